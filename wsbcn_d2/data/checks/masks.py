"""A look at one mask: polygons, or run lengths written as numbers or packed into text."""

import math
import re

import numpy as np

from .findings import Findings, shown

__all__ = ["check_mask"]

_PACKED = re.compile(r"[0-o]*[0-O]")  # of the last number, the last letter says that it ends


def check_mask(mask: object, image: dict, where: str, found: Findings) -> str:
    """Look at an annotation's ``segmentation``; faults are added to ``found``.

    Returns:
        str: ``"polygons"``, ``"rle"`` or, of none or an empty one, ``"unmasked"``.
    """
    if mask is None or mask == [] or mask == {}:
        return "unmasked"
    if isinstance(mask, dict):
        _check_runs(mask, image, where, found)
        return "rle"
    if not isinstance(mask, list):
        mend = "write a list of polygons, or run lengths with size and counts"
        found.fault("mask that is no mask", f"{where} has {shown(mask)}", mend)
        return "unmasked"
    if not all(isinstance(polygon, list) for polygon in mask):
        mend = "write a list of polygons, each a list x, y, x, y, ..., even where there is but one"
        found.fault("mask that is no list of polygons", f"{where} has {shown(mask)}", mend)
        return "polygons"
    for polygon in mask:
        if len(polygon) < 6 or len(polygon) % 2:
            found.fault(
                "polygon of fewer than three points, or half a point",
                f"{where} has {len(polygon)} numbers",
                "draw it again or delete it: training leaves it out and evaluation stops at it",
            )
        elif not set(map(type, polygon)) <= {int, float} or not math.isfinite(sum(polygon)):
            mend = "write finite numbers"
            found.fault("polygon of something else than numbers", where, mend)
    return "polygons"


def _check_runs(mask: dict, image: dict, where: str, found: Findings) -> None:
    size, counts = mask.get("size"), mask.get("counts")
    wanted = [image["height"], image["width"]]
    if size != wanted:
        found.fault(
            "mask of another size than its picture",
            f"{where} has {shown(size)}, the picture {wanted}",
            "write height and width of the picture as size, and the runs of that size",
        )
    elif _sum_of_runs(counts) != wanted[0] * wanted[1]:
        found.fault(
            "run lengths that do not add up to their picture",
            f"{where} has {shown(counts)}",
            "encode the mask again (pycocotools.mask.encode)",
        )


def _sum_of_runs(counts: object) -> int:
    """Pixels that run lengths cover; -1 for what is none."""
    if isinstance(counts, list):
        whole = all(type(run) is int and run >= 0 for run in counts)
        return sum(counts) if whole else -1
    if not isinstance(counts, str) or not _PACKED.fullmatch(counts):
        return -1
    runs = _unpack(counts)
    return int(runs.sum()) if (runs >= 0).all() else -1


def _unpack(counts: str) -> np.ndarray:
    """pycocotools' ``rleFrString``: numbers of 5 bits a letter, from the third differences."""
    letters = np.frombuffer(counts.encode("ascii"), np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero((letters & 0x20) == 0)
    starts = np.concatenate([[0], ends[:-1] + 1])
    place = np.arange(len(letters)) - np.repeat(starts, ends - starts + 1)
    if place.max() > 10:
        return np.array([-1])
    values = np.add.reduceat((letters & 0x1F) << (5 * place), starts)
    negative = (letters[ends] & 0x10) != 0
    values -= np.where(negative, np.int64(1) << (5 * (place[ends] + 1)), 0)
    runs = values.copy()
    runs[1::2] = np.cumsum(values[1::2])
    runs[2::2] = np.cumsum(values[2::2])
    return runs
