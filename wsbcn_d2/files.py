"""Files that are whole or not there, locks, and progress: for everything that writes or waits."""

import contextlib
import fcntl
import os
import sys
import time
from collections.abc import Iterable, Iterator
from typing import IO

from tqdm import tqdm

__all__ = ["PART_FILE", "locked", "progress", "replacing", "take_lock"]

PART_FILE = ".saving.part"
"""Name of a file being written, in its target's folder; a killed writer's is taken over."""


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[str]:
    """Give a temporary name in the target's folder, renamed to ``path`` on success.

    Until then ``path`` is what it was; after an error the temporary file is gone. What is written
    is on the disk before it has its name. Writers in one folder wait for each other.

    Args:
        path: the target; its folder is made if need be.

    Yields:
        str: the temporary name, to be opened for writing.
    """
    folder = os.path.dirname(os.path.abspath(path))
    os.makedirs(folder, exist_ok=True)
    part = os.path.join(folder, PART_FILE)
    with _owned(part) as lock:
        try:
            yield part
            os.fsync(lock.fileno())  # before the rename: a power cut is a kill too
            os.replace(part, path)
        except BaseException:
            with contextlib.suppress(OSError):  # gives a full disk its space back
                os.unlink(part)
            raise


def _owned(part: str) -> IO:
    """The file, locked; the one that has the name, not one that another writer has renamed."""
    while True:
        lock = open(part, "ab")  # noqa: SIM115 (closed by the caller)
        fcntl.flock(lock, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock.fileno()), os.stat(part)):
                return lock
        lock.close()


def take_lock(path: str | os.PathLike, patience: float | None = None) -> IO | None:
    """Open and lock a file, until it is closed or the processes that inherited it have ended.

    Args:
        path: of the lock file, which stays.
        patience: seconds to wait for another process; None for as long as it takes.

    Returns:
        The file, or None if another process has kept its lock for so long.
    """
    file = open(path, "a")  # noqa: SIM115 (the caller's to close)
    deadline = None if patience is None else time.monotonic() + patience
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            if deadline is not None and time.monotonic() > deadline:
                file.close()
                return None
            time.sleep(0.1)


@contextlib.contextmanager
def locked(path: str | os.PathLike, patience: float | None = None) -> Iterator[None]:
    """Hold the lock of :func:`take_lock`.

    Raises:
        TimeoutError: another process has it for longer than ``patience``; names the file.
    """
    file = take_lock(path, patience)
    if file is None:
        raise TimeoutError(
            f"another process has held {path} for {patience:g} s: wait for it to end, or end it"
        )
    with file:
        yield


def progress(iterable: Iterable | None = None, *, period: float = 30.0, **options) -> tqdm:
    """A progress bar; where there is no terminal, a line now and then.

    Args:
        iterable: what to go through; None for a bar that is updated by hand.
        period: seconds between lines.
        **options: of :class:`tqdm.tqdm`.
    """
    if not sys.stderr.isatty():
        options = {
            "mininterval": period,
            "maxinterval": period,
            "bar_format": "{desc}: {percentage:3.0f}% {n_fmt}/{total_fmt} "
            "[{elapsed}<{remaining}, {rate_fmt}{postfix}]\n",
            **options,
        }
    return tqdm(iterable, **options)
