"""Variants against each other, seed by seed: the only numbers that a statement may rest on."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from .stats import Difference, paired_difference
from .summary import group, interval_columns, task_label, tasks_of, text_csv

__all__ = ["Pair", "compare_pairs", "pairs_csv", "pairs_table"]


@dataclass(frozen=True)
class Pair:
    """Two variants at one number of images per step.

    Attributes:
        ap: task to what ``variant`` is ahead of ``other`` by, at the end of training.
    """

    variant: str
    other: str
    images_per_step: int
    ap: dict[str, Difference]

    @property
    def seeds(self) -> tuple[int, ...]:
        """Those that both were run on."""
        return next(iter(self.ap.values())).seeds

    @property
    def statement(self) -> str:
        """What the intervals show, or that they show nothing."""
        ahead: dict[str, list[str]] = {}
        for task, difference in self.ap.items():
            if difference.excludes_zero:
                leader = self.variant if difference.mean > 0 else self.other
                ahead.setdefault(leader, []).append(task_label(task))
        said = [f"{leader} is ahead in {' and '.join(tasks)}" for leader, tasks in ahead.items()]
        return "; ".join(said) or "nothing shown"


def compare_pairs(records: Sequence[dict]) -> list[Pair]:
    """Every two variants that share two seeds at least, at each number of images per step.

    Runs of different lengths are not compared.
    """
    pairs = []
    for (one, first), (two, second) in itertools.combinations(group(records).items(), 2):
        if one[1] != two[1] or first[0]["max_iter"] != second[0]["max_iter"]:
            continue
        tasks = [t for t in first[0]["final_ap"] if all(t in r["final_ap"] for r in first + second)]
        found = {
            task: paired_difference(
                *({r["seed"]: r["final_ap"][task] for r in side} for side in (second, first))
            )
            for task in tasks
        }
        found = {task: d for task, d in found.items() if d is not None and d.half is not None}
        if found:
            pairs.append(Pair(two[0], one[0], one[1], found))
    return pairs


def pairs_table(pairs: Sequence[Pair]) -> tuple[list[str], list[list[str]]]:
    """Head and cells, as text."""
    tasks = tasks_of(pair.ap for pair in pairs)
    head = ["difference", "images/step", *map(task_label, tasks), "seeds", "shown"]
    cells = [
        [
            f"{pair.variant} - {pair.other}",
            str(pair.images_per_step),
            *(str(pair.ap.get(task, "-")) for task in tasks),
            str(len(pair.seeds)),
            pair.statement,
        ]
        for pair in pairs
    ]
    return head, cells


def pairs_csv(pairs: Sequence[Pair]) -> str:
    """The differences with mean and half width of the interval in columns of their own."""
    head, figures = interval_columns(
        [{task: (found.mean, found.half) for task, found in pair.ap.items()} for pair in pairs]
    )
    lines = [["variant", "minus", "images_per_step", *head, "seeds", "shown"]]
    for pair, intervals in zip(pairs, figures, strict=True):
        who = [pair.variant, pair.other, pair.images_per_step]
        lines.append([*who, *intervals, " ".join(map(str, pair.seeds)), pair.statement])
    return text_csv(lines)
