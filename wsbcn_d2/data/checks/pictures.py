"""A look at the pictures of a set: are they there, readable, of the size and depth that is said?"""

import collections
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image, UnidentifiedImageError

from ...files import progress
from ..picture_range import is_deep
from .findings import Findings

__all__ = ["check_pictures"]

_MANY = 5000  # below, the look takes a second or two
_ORIENTATION = 0x0112  # the EXIF tag
_TURNED = "EXIF turns the picture, which Detectron2 obeys"
_MEND_TURNED = (
    "save the picture as it is shown (`mogrify -auto-orient`), then look whether the boxes are "
    "where they should be (tools/check_dataset.py draws some)"
)


def check_pictures(
    entries: Sequence[dict], folder: str, found: Findings, *, decode: bool = False
) -> None:
    """Open every picture of a set; faults, notes and facts are added to ``found``.

    With ``decode`` their pixels are read too, which shows pictures that break off and takes longer.
    """
    facts = found.facts
    facts |= {"deep": 0, "sizes": []}
    if not os.path.isdir(folder):
        found.fault("no folder of pictures", folder, "give the folder that file_name starts from")
        return

    def look(entry):
        return entry, _look(os.path.join(folder, entry["file_name"]), entry, decode)

    counts = collections.Counter()
    with ThreadPoolExecutor(8) as pool:
        seen: Iterable = pool.map(look, entries)
        if len(entries) > _MANY:
            seen = progress(seen, total=len(entries), desc="Looking at pictures")
        for entry, (fault, notes, deep) in seen:
            if fault:
                found.fault(*fault)
            counts.update(notes)
            if deep:
                facts["deep"] += 1
                facts.setdefault("first_deep", [entry["file_name"], deep])
    found.notes += [f"{n} pictures: {note}" for note, n in counts.items()]
    if facts["deep"]:
        facts["deep_range"] = _range_of(os.path.join(folder, facts["first_deep"][0]))
    sizes = [(entry["width"], entry["height"]) for entry in entries]
    facts["sizes"] = [list(min(sizes)), list(max(sizes))] if sizes else []


def _look(path: str, entry: dict, decode: bool) -> tuple[tuple | None, list[str], str]:
    """(fault: what, where, mend), notes, mode of a picture of more than 8 bits."""
    name = entry["file_name"]
    try:
        with Image.open(path) as picture:
            # Of a PNG whose header has no EXIF, Pillow would read all pixels to look behind them.
            exif = picture.format != "PNG" or "exif" in picture.info
            turn = picture.getexif().get(_ORIENTATION, 1) if exif else 1
            mode = picture.mode if is_deep(picture) else ""
            notes = _notes(picture)
            size, tiff = picture.size, picture.format == "TIFF"
            if decode:
                picture.load()
    except FileNotFoundError:
        return ("picture that is missing", name, _mend_missing(path, name)), [], ""
    except UnidentifiedImageError:
        return ("file that is no picture", name, "save it as PNG or JPEG"), [], ""
    except Image.DecompressionBombError:
        return ("picture of too many pixels", name, "cut it into tiles"), [], ""
    except Exception as error:  # Pillow's plugins raise all kinds on broken files
        what = "picture that cannot be read"
        reason = " ".join(str(error).split()) or type(error).__name__
        return (what, f"{name}: {reason}", "get it again, or leave it out"), [], ""
    said = (entry["width"], entry["height"])
    # Pillow turns a TIFF by itself, and Detectron2 once more.
    if turn in (2, 3, 4) or (turn in (5, 6, 7, 8) and (tiff or size != said[::-1])):
        return (_TURNED, f"{name}, orientation {turn}", _MEND_TURNED), notes, mode
    if turn in (5, 6, 7, 8):
        notes.append("turned by EXIF, and listed with the size that is seen then")
    elif size != said:
        where = f"{name} has {size[0]} x {size[1]}, the JSON says {said[0]} x {said[1]}"
        mend = "correct width and height, and see whether the boxes are for this picture"
        return ("picture of another size than is said", where, mend), notes, mode
    return None, notes, mode


def _notes(picture: Image.Image) -> list[str]:
    notes = []
    if getattr(picture, "n_frames", 1) > 1:
        notes.append("of several frames, of which the first is used")
    layouts = [str(tile[3]) for tile in picture.tile or [] if len(tile) > 3]
    if any(";16" in layout for layout in layouts) and not is_deep(picture):
        notes.append("colour of 16 bits, of which the upper 8 are used")
    return notes


def _mend_missing(path: str, name: str) -> str:
    if "\\" in name:
        return "write / in place of \\ in file_name"
    if "://" in name:
        return "download it: file_name is a path in the picture folder"
    folder, base = os.path.split(path)
    present = os.listdir(folder) if os.path.isdir(folder) else []
    if alike := [other for other in present if other.lower() == base.lower()]:
        return f"there is {alike[0]}: case counts"
    return f"put it into {folder}, or give the folder that file_name starts from"


def _range_of(path: str) -> list[float]:
    """Smallest and largest value of a picture, as a hint for its range."""
    with Image.open(path) as picture:
        values = np.asarray(picture, dtype=np.float64)
    return [float(values.min()), float(values.max())]
