"""The look at a set: the annotation file, then the pictures, once for each state of the files."""

import json
import os

from . import memory
from .annotations import check_content
from .findings import Findings
from .pictures import check_pictures

__all__ = ["look_at"]


def look_at(json_file: str, images: str, *, decode: bool = False) -> Findings:
    """Look at a set: its annotation file, then its pictures, unless they are known to be good.

    Args:
        json_file: the annotation file.
        images: the folder that its file names start from.
        decode: read the pictures' pixels too.

    Returns:
        Findings: what an earlier look at the same files has kept, or what this one finds.
    """
    key = memory.key_of(json_file, images, decode)
    found = memory.recall(key)
    if found is None:
        found = _look_at(json_file, images, decode)
        found.key = key
    return found


def _look_at(json_file: str, images: str, decode: bool) -> Findings:
    found = Findings()
    try:
        with open(json_file, encoding="utf-8") as file:
            content = json.load(file)
    except OSError as error:
        found.fault("no annotation file", f"{json_file}: {error.strerror}", "check the path")
    except (ValueError, RecursionError) as error:
        where = f"{os.path.basename(json_file)}: {' '.join(str(error).split())}"
        mend = "write it again: it breaks off, or is of another format"
        found.fault("annotation file that is no JSON", where, mend)
    else:
        check_pictures(check_content(content, found), images, found, decode=decode)
    return found
