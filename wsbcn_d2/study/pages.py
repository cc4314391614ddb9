"""Tables within Markdown pages, made from records: no number of a result is typed by hand.

A page has its tables between two comments, of which the first says what they show:

    <!-- ap: NAME -->
    <!-- end -->

``ap`` is the AP of each variant of the study NAME, ``lowest`` that of its worst seed, ``pairs``
their differences, paired by seed, ``channels`` what the channel monitor saw: the share of channels
that are inactive at the end, and how far the backbone's estimates of the mean were off on average,
in standard deviations.
"""

import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from .pairs import compare_pairs, pairs_table
from .summary import group, markdown, summarize, table, task_label, tasks_of

__all__ = ["fill_page", "prose"]

_BLOCK = re.compile(r"<!-- (\w+): ([\w/]+) -->\n.*?<!-- end -->", re.DOTALL)
# Column to the monitor's series and what is taken of it.
_CHANNELS = {
    "inactive: backbone": ("channels/backbone/inactive_mean", lambda values: values[-1], ".1%"),
    "inactive: FPN": ("channels/fpn/inactive_mean", lambda values: values[-1], ".1%"),
    "error / std": ("channels/backbone/estimate_error_mean", np.mean, ".2f"),
}


def fill_page(
    page: str,
    records_of: Callable[[str], Sequence[dict]],
    more: Mapping[str, Callable[..., str]] | None = None,
) -> str:
    """The text of a page with all its tables made anew; all outside of the comments stays.

    Args:
        page: the text.
        records_of: name of a study to its records, in the order of its variants.
        more: further kinds of tables, each with what makes one of what ``records_of`` gives.

    Raises:
        ValueError: for a comment that asks for no known table.
    """

    tables = {**_TABLES, **(more or {})}

    def fill(found: re.Match) -> str:
        kind, name = found.groups()
        if kind not in tables:
            raise ValueError(f"unknown table {kind!r}: known are {', '.join(tables)}")
        return f"<!-- {kind}: {name} -->\n{tables[kind](records_of(name))}<!-- end -->"

    return _BLOCK.sub(fill, page)


def prose(page: str) -> str:
    """What a page says outside of its tables."""
    return _BLOCK.sub("", page)


def _columns(head: list[str], cells: list[list[str]], left_out: Sequence[str] = ()) -> str:
    """A table without some columns, and without the images per step where they are 1 throughout."""
    if {line[head.index("images/step")] for line in cells} == {"1"}:
        left_out = [*left_out, "images/step"]
    places = [i for i, name in enumerate(head) if name not in left_out]
    return markdown([head[i] for i in places], [[line[i] for i in places] for line in cells])


def _ap(records: Sequence[dict]) -> str:
    cost = ("iterations", "s/step", "training s", "memory MB")
    return _columns(*table(summarize(records)), left_out=cost)


def _lowest(records: Sequence[dict]) -> str:
    tasks = tasks_of(record["final_ap"] for record in records)
    lines = []
    for (variant, images), members in group(records).items():
        lowest = [min(member["final_ap"][task] for member in members) for task in tasks]
        lines.append([variant, str(images), *(f"{ap:.1f}" for ap in lowest), str(len(members))])
    labels = [f"lowest {task_label(task)}" for task in tasks]
    return _columns(["variant", "images/step", *labels, "of seeds"], lines)


def _pairs(records: Sequence[dict]) -> str:
    return _columns(*pairs_table(compare_pairs(records)))


def _channels(records: Sequence[dict]) -> str:
    lines = []
    for (variant, images), members in group(records).items():
        cells = []
        for series, take, form in _CHANNELS.values():
            curves = [member["channels"].get(series) for member in members]
            values = [take([value for _, value in curve]) for curve in curves if curve]
            cells.append(format(np.mean(values), form) if values else "-")
        lines.append([variant, str(images), *cells, str(len(members))])
    return _columns(["variant", "images/step", *_CHANNELS, "seeds"], lines)


_TABLES = {"ap": _ap, "lowest": _lowest, "pairs": _pairs, "channels": _channels}
