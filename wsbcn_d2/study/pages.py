"""Tables within Markdown pages, made from records: no number of a result is typed by hand.

A page has its tables between two comments, of which the first says what they show:

    <!-- ap: NAME -->
    <!-- end -->

``ap`` is the AP of each variant of the study NAME, ``pairs`` their differences, paired by seed,
``errors`` how far the running estimates of its variants were off.
"""

import re
from collections.abc import Callable, Sequence

from .pairs import compare_pairs, pairs_table
from .stats import mean_interval
from .summary import group, markdown, summarize, table

__all__ = ["fill_page", "prose"]

_BLOCK = re.compile(r"<!-- (\w+): ([\w/]+) -->\n.*?<!-- end -->", re.DOTALL)
_ERROR = "channels/backbone/estimate_error_mean"


def fill_page(page: str, records_of: Callable[[str], Sequence[dict]]) -> str:
    """A page with all its tables made anew.

    Args:
        page: its text.
        records_of: name of a study to its records, in the order of its variants.

    Returns:
        str: the text; all outside of the comments is as it was.

    Raises:
        ValueError: for a comment that asks for no known table.
    """

    def fill(found: re.Match) -> str:
        kind, name = found.groups()
        if kind not in _TABLES:
            raise ValueError(f"unknown table {kind!r}: known are {', '.join(_TABLES)}")
        return f"<!-- {kind}: {name} -->\n{_TABLES[kind](records_of(name))}<!-- end -->"

    return _BLOCK.sub(fill, page)


def prose(page: str) -> str:
    """What a page says outside of its tables."""
    return _BLOCK.sub("", page)


def _columns(head: list[str], cells: list[list[str]], kept: Callable[[str], bool]) -> str:
    several = {line[head.index("images/step")] for line in cells}
    places = [
        i
        for i, name in enumerate(head)
        if kept(name) and (name != "images/step" or several > {"1"})
    ]
    return markdown([head[i] for i in places], [[line[i] for i in places] for line in cells])


def _ap(records: Sequence[dict]) -> str:
    left_out = ("iterations", "s/step", "training s", "memory MB")
    return _columns(*table(summarize(records)), lambda name: name not in left_out)


def _pairs(records: Sequence[dict]) -> str:
    return _columns(*pairs_table(compare_pairs(records)), lambda name: True)


def _errors(records: Sequence[dict]) -> str:
    """Of the means in the backbone, in standard deviations, averaged over the run and its seeds."""
    lines = []
    for (variant, images), members in group(records).items():
        curves = [member["channels"].get(_ERROR) for member in members]
        means = [mean_interval([v for _, v in curve])[0] for curve in curves if curve]
        if means:
            error = f"{mean_interval(means)[0]:.2f}"
            lines.append([variant, str(images), error, str(len(means))])
    head = ["variant", "images/step", "error / std", "seeds"]
    return _columns(head, lines, lambda name: True)


_TABLES = {"ap": _ap, "pairs": _pairs, "errors": _errors}
