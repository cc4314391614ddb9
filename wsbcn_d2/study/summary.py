"""Tables of a study: one row per variant and number of images, aggregated over seeds."""

import csv
import io
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .plan import default_of
from .stats import mean_interval

__all__ = [
    "TASKS",
    "Row",
    "differences",
    "group",
    "interval_columns",
    "markdown",
    "runs_csv",
    "summarize",
    "summary_csv",
    "task_label",
    "tasks_of",
    "text_csv",
]

TASKS = {
    "bbox": "box AP",
    "segm": "mask AP",
    "keypoints": "keypoint AP",
    "classification": "top-1 accuracy",
}


@dataclass(frozen=True)
class Row:
    """A variant at a number of images per step.

    Attributes:
        seeds: of its records.
        ap: task to (mean, half width of the 95 % interval or None).
        step_seconds, train_seconds, memory_mb: medians over seeds; None if unknown.
    """

    variant: str
    images_per_step: int
    max_iter: int
    learning_rate: float
    seeds: tuple[int, ...]
    ap: dict[str, tuple[float, float | None]]
    step_seconds: float | None
    train_seconds: float | None
    memory_mb: float | None


def task_label(task: str) -> str:
    """What a task's result is called."""
    return TASKS.get(task, f"{task} AP")


def tasks_of(results: Iterable[dict]) -> list[str]:
    """Tasks that are in any of some dicts by task."""
    return sorted({task for result in results for task in result})


def group(records: Sequence[dict]) -> dict[tuple[str, int], list[dict]]:
    """Records by (variant, images per step), in order of appearance, images first."""
    groups: dict[tuple[str, int], list[dict]] = {}
    for record in records:
        groups.setdefault((record["variant"], record["images_per_step"]), []).append(record)
    order = list(dict.fromkeys(variant for variant, _ in groups))
    return dict(sorted(groups.items(), key=lambda item: (item[0][1], order.index(item[0][0]))))


def summarize(records: Sequence[dict]) -> list[Row]:
    """One row per variant and images per step, in order of appearance."""
    rows = []
    for (variant, images), members in group(records).items():
        tasks = [task for task in members[0]["final_ap"] if all(task in m["ap"] for m in members)]
        costs = {}
        for name in ("step_seconds", "train_seconds", "memory_mb"):
            known = [m[name] for m in members if m[name] is not None]
            costs[name] = statistics.median(known) if known else None
        rows.append(
            Row(
                variant,
                images,
                members[0]["max_iter"],
                members[0]["learning_rate"],
                tuple(sorted(m["seed"] for m in members)),
                {task: mean_interval([m["final_ap"][task] for m in members]) for task in tasks},
                **costs,
            )
        )
    return rows


def _interval(value: tuple[float, float | None] | None) -> str:
    if value is None:
        return "-"
    mean, half = value
    return f"{mean:.1f}" if half is None else f"{mean:.1f} ± {half:.1f}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Head and cells of the summary, as :func:`markdown` takes them."""
    tasks = tasks_of(row.ap for row in rows)
    head = ["variant", "images/step", *map(task_label, tasks)]
    head += ["seeds", "iterations", "learning rate", "s/step", "training s", "memory MB"]
    cells = [
        [
            row.variant,
            str(row.images_per_step),
            *(_interval(row.ap.get(task)) for task in tasks),
            str(len(row.seeds)),
            str(row.max_iter),
            f"{row.learning_rate:g}",
            _number(row.step_seconds, ".3f"),
            _number(row.train_seconds, ".0f"),
            _number(row.memory_mb, ".0f"),
        ]
        for row in rows
    ]
    return head, cells


def markdown(head: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """A Markdown table; whatever a cell has in it, it stays one."""
    lines = [[text.replace("|", "\\|") for text in line] for line in (head, *cells)]
    lines.insert(1, ["---"] * len(head))
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def text_csv(lines: Sequence[Sequence]) -> str:
    """Lines of cells as a CSV file's text."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue()


def interval_columns(results: Sequence[dict]) -> tuple[list[str], list[list[str]]]:
    """Head and cells of a CSV file's columns with mean and half width of each task's interval."""
    tasks = tasks_of(results)
    head = [f"{task}_ap_{what}" for task in tasks for what in ("mean", "ci95")]
    lines = [[x for task in tasks for x in result.get(task, (None, None))] for result in results]
    return head, [["" if x is None else f"{x:.3f}" for x in line] for line in lines]


def summary_csv(rows: Sequence[Row]) -> str:
    """The summary with mean and half width of the interval in columns of their own."""
    rest = ("max_iter", "learning_rate", "step_seconds", "train_seconds", "memory_mb")
    head, figures = interval_columns([row.ap for row in rows])
    lines = [["variant", "images_per_step", *head, "seeds", *rest]]
    for row, intervals in zip(rows, figures, strict=True):
        seeds = " ".join(map(str, row.seeds))
        values = [getattr(row, name) for name in rest]
        lines.append([row.variant, row.images_per_step, *intervals, seeds, *values])
    return text_csv(lines)


def runs_csv(records: Sequence[dict]) -> str:
    """The raw numbers: one line per run and evaluation."""
    lines = [["variant", "images_per_step", "seed", "task", "iteration", "train_seconds", "ap"]]
    for record in records:
        key = [record["variant"], record["images_per_step"], record["seed"]]
        for task, curve in record["ap"].items():
            lines += [[*key, task, *point[:2], f"{point[2]:.3f}"] for point in curve]
    return text_csv(lines)


def differences(records: Sequence[dict]) -> tuple[list[str], list[list[str]]]:
    """Where the variants' configs differ: head (key, variants) and one line per key.

    Compared are the runs at each variant's fewest images per step; seeds do not count.
    """
    settings: dict[str, dict] = {}
    for (variant, _), members in group(records).items():
        settings.setdefault(variant, members[0]["settings"])
    keys = sorted({key for values in settings.values() for key in values} - {"SEED"})
    lines = []
    for key in keys:
        values = [settings[variant].get(key, default_of(key)) for variant in settings]
        if any(value != values[0] for value in values):
            lines.append([key, *map(str, values)])
    return ["key", *settings], lines
