"""Writing a checkpoint so that a half-written one can never be taken for a whole one."""

import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping

import torch

from .metadata import METADATA_KEY, Metadata


@contextlib.contextmanager
def replacing(path: str) -> Iterator[str]:
    """Gives a temporary name in the target's folder, renamed to ``path`` on success.

    Args:
        path: the target; its folder is made if need be.

    Yields:
        the temporary name, of a new empty file.
    """
    folder = os.path.dirname(os.path.abspath(path))
    os.makedirs(folder, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=".part-", suffix=".tmp")
    os.close(handle)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp's files are private
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def write_checkpoint(
    path: str, state: Mapping[str, torch.Tensor], metadata: Metadata, heuristics: bool = False
) -> None:
    """Writes a Detectron2 checkpoint with this project's metadata.

    Args:
        path: target, ``.pth``.
        state: names -> tensors.
        metadata: stored under ``wsbcn_d2``.
        heuristics: the names lack the model's prefix; Detectron2 is told to match suffixes.
    """
    data = {"model": dict(state), METADATA_KEY: metadata.as_dict()}
    if heuristics:
        data["matching_heuristics"] = True
    with replacing(path) as temporary:
        torch.save(data, temporary)
