"""Variants against each other, seed by seed: the only numbers that a statement may rest on."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from .stats import Difference, paired_difference
from .summary import TASKS, group, markdown, text_csv

__all__ = ["Pair", "compare_pairs", "pairs_csv", "pairs_markdown", "pairs_table"]


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
    def statement(self) -> str:
        """What the intervals show, or that they show nothing."""
        ahead: dict[str, list[str]] = {}
        for task, difference in self.ap.items():
            if difference.excludes_zero:
                leader = self.variant if difference.mean > 0 else self.other
                ahead.setdefault(leader, []).append(TASKS.get(task, f"{task} AP"))
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


def _tasks(pairs: Sequence[Pair]) -> list[str]:
    return sorted({task for pair in pairs for task in pair.ap})


def _seeds(pair: Pair) -> tuple[int, ...]:
    return next(iter(pair.ap.values())).seeds


def pairs_table(pairs: Sequence[Pair]) -> tuple[list[str], list[list[str]]]:
    """Head and cells, as text."""
    tasks = _tasks(pairs)
    head = ["difference", "images/step", *(TASKS.get(task, f"{task} AP") for task in tasks)]
    cells = [
        [
            f"{pair.variant} - {pair.other}",
            str(pair.images_per_step),
            *(str(pair.ap.get(task, "-")) for task in tasks),
            str(len(_seeds(pair))),
            pair.statement,
        ]
        for pair in pairs
    ]
    return [*head, "seeds", "shown"], cells


def pairs_markdown(pairs: Sequence[Pair]) -> str:
    """The differences as a Markdown table."""
    return markdown(*pairs_table(pairs))


def pairs_csv(pairs: Sequence[Pair]) -> str:
    """The differences with mean and half width of the interval in columns of their own."""
    tasks = _tasks(pairs)
    head = ["variant", "minus", "images_per_step"]
    head += [f"{task}_ap_{what}" for task in tasks for what in ("mean", "ci95")]
    lines = [[*head, "seeds", "shown"]]
    for pair in pairs:
        figures = []
        for task in tasks:
            found = pair.ap.get(task)
            figures += [f"{found.mean:.3f}", f"{found.half:.3f}"] if found else ["", ""]
        seeds = " ".join(map(str, _seeds(pair)))
        lines.append(
            [pair.variant, pair.other, pair.images_per_step, *figures, seeds, pair.statement]
        )
    return text_csv(lines)
