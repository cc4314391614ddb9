"""Checkpoints that are whole or not there, whatever happens while one is written.

fvcore writes a checkpoint straight into the file of its final name, and then the name into
``last_checkpoint``, which it empties first. A kill or a full disk in between leaves half a file
under a good name, or an empty ``last_checkpoint``, and the next ``--resume`` fails.
"""

import contextlib
import os
from collections.abc import Iterable, Iterator
from typing import IO

import torch

from ..files import replacing
from .errors import CheckpointError, NotAdmittedError
from .files.opening import read_file

__all__ = ["AtomicSaving", "check_admitted", "save", "usable_checkpoints"]


class _AtomicWrites:
    """A path manager whose written local files appear under their names when they are whole."""

    def __init__(self, manager):
        self._manager = manager

    def __getattr__(self, name):
        return getattr(self._manager, name)

    @contextlib.contextmanager
    def open(self, path: str, mode: str = "r", **kwargs) -> Iterator[IO]:
        if "w" not in mode or "://" in path:
            with self._manager.open(path, mode, **kwargs) as stream:
                yield stream
            return
        with replacing(path) as part:
            with open(part, mode) as stream:
                yield stream
            if path.endswith(".pth"):
                check_admitted(part, path)


def check_admitted(file: str, path: str) -> None:
    """Refuses a file that was written whole and would not be read whole, naming what is in it."""
    try:
        found = ", ".join(read_file(file, data=False)[1][:4])
    except NotAdmittedError as error:
        found = str(error).partition("it holds ")[2].partition(", and only")[0] or "a function"
    if found:
        raise NotAdmittedError(
            f"cannot save {path}: it would hold {found}, which is not read again; let every "
            "state_dict() hold tensors, arrays and plain data alone"
        )


def save(data: dict, path: str) -> None:
    """``torch.save`` of a file that is whole or not there.

    Raises:
        CheckpointError: it cannot be written (no space, no permission, ...).
    """
    try:
        with replacing(path) as part, open(part, "wb") as stream:
            torch.save(data, stream)
    except (OSError, RuntimeError) as error:
        if (reason := _refusal(error)) is None:
            raise
        raise CheckpointError(f"cannot write {path}: {reason}") from error


def usable_checkpoints(folder: str, needed: Iterable[str] = ()) -> Iterator[str]:
    """The whole checkpoints of a run, newest first, that hold what is ``needed`` and the model."""
    with contextlib.suppress(FileNotFoundError):
        files = [entry for entry in os.scandir(folder) if entry.name.endswith(".pth")]
        for entry in sorted(files, key=lambda entry: entry.stat().st_mtime_ns, reverse=True):
            if _is_whole(entry.path, needed):
                yield entry.path


def _is_whole(path: str, needed: Iterable[str] = ()) -> bool:
    try:
        data, foreign = read_file(path)
        return {"model", *needed} <= set(data) and not foreign
    except (CheckpointError, TypeError):
        return False


class AtomicSaving:
    """Mixin before fvcore's ``Checkpointer``: atomic saving, and errors that name what is left."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._resuming = False
        self.path_manager = _AtomicWrites(self.path_manager)

    def save(self, name: str, **kwargs) -> None:
        """As fvcore's; a failure leaves all earlier checkpoints, and ``last_checkpoint``, whole.

        Raises:
            CheckpointError: the file cannot be written (no space, no permission, ...).
        """
        try:
            super().save(name, **kwargs)
        except (OSError, RuntimeError) as error:
            if (reason := _refusal(error)) is None:
                raise
            usable = self._newest_usable()
            left = f"go on with --resume from {usable}" if usable else "start again"
            path = os.path.join(self.save_dir, name)
            raise CheckpointError(
                f"cannot save {path}.pth: {reason}; mend that, then {left}"
            ) from error

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict:
        """As fvcore's.

        Raises:
            CheckpointError: when resuming, if ``last_checkpoint`` names no usable file; the
                message names the newest that is.
        """
        try:
            self._resuming = resume and self.has_checkpoint()
            return super().resume_or_load(path, resume=resume)
        except (CheckpointError, AssertionError, OSError) as error:
            if not (resume and self.has_checkpoint()):
                raise
            last = self.get_checkpoint_file()
            if _is_whole(last, self.checkpointables):  # so something else is wrong
                raise
            tag = os.path.join(self.save_dir, "last_checkpoint")
            reason = str(error) if isinstance(error, CheckpointError) else f"{last} not found"
            if os.path.isdir(last):
                reason = f"{tag} is empty"
            mend = "no other checkpoint is whole: start again without --resume"
            if isinstance(error, NotAdmittedError):
                mend = "the file is whole: start again from its weights, without --resume"
            if usable := self._newest_usable():
                name = os.path.basename(usable)
                mend = f"{usable} is whole: to resume from it, echo {name} > {tag}"
            raise CheckpointError(f"cannot resume: {reason}; {mend}") from error
        finally:
            self._resuming = False

    def _newest_usable(self) -> str | None:
        return next(usable_checkpoints(self.save_dir, self.checkpointables), None)


def _refusal(error: BaseException | None) -> str | None:
    """The operating system's words behind an error; torch reports its own failure over it."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error and (error.strerror or str(error))
