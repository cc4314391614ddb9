"""What was found good is remembered, in a folder of the user's cache, until a file changes."""

import contextlib
import hashlib
import json
import os

from ...files import replacing
from .findings import Findings

__all__ = ["keep", "key_of", "recall"]

_VERSION = 1  # counts up when the look changes


def _folder() -> str:
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return os.path.join(cache, "wsbcn_d2", "datasets")


def key_of(json_file: str, images: str, decode: bool) -> str | None:
    """Of the state of a set's files: names, sizes and times; None where there are none."""
    digest = hashlib.sha256(f"{_VERSION} {decode} {os.path.abspath(images)}".encode())
    try:
        state = os.stat(json_file)
    except OSError:
        return None
    digest.update(f"{os.path.abspath(json_file)} {state.st_size} {state.st_mtime_ns}".encode())
    for folder, folders, files in os.walk(images):
        folders.sort()
        for name in sorted(files):
            path = os.path.join(folder, name)
            with contextlib.suppress(OSError):
                state = os.stat(path)
                text = f"{path}\0{state.st_size}\0{state.st_mtime_ns}\0"
                digest.update(text.encode(errors="surrogateescape"))
    return digest.hexdigest()


def recall(key: str | None) -> Findings | None:
    """What :func:`keep` kept; None if there is nothing, or nothing that can be read."""
    try:
        with open(os.path.join(_folder(), f"{key}.json"), encoding="utf-8") as file:
            kept = json.load(file)
        return Findings(notes=kept["notes"], facts=kept["facts"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def keep(found: Findings) -> None:
    """Keep notes and facts of a set without faults, by its key.

    Where that cannot be, the set is looked at again next time.
    """
    if found.key is None or found.faults:
        return
    with contextlib.suppress(OSError):
        os.makedirs(_folder(), mode=0o700, exist_ok=True)
        target = os.path.join(_folder(), f"{found.key}.json")
        with replacing(target) as path, open(path, "w", encoding="utf-8") as file:
            json.dump({"notes": found.notes, "facts": found.facts}, file)
