"""The state dict in what a file holds: unwrapped, under the model's own names."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from ..errors import CheckpointError, naming
from .opening import file_sha256, read_file

_WRAPPERS = ("state_dict", "model", "model_state", "blobs")


@dataclass
class Source:
    """A checkpoint file as read.

    Attributes:
        state: parameter names -> tensors, ``module.``, ``_orig_mod.`` and ``model.`` removed.
        container: one word on what the state was wrapped in.
        extra: the container's other entries, not converted.
        sha256: hexadecimal digest of the file.
        notes: what was unusual.
    """

    state: dict[str, torch.Tensor]
    container: str = "bare state dict"
    extra: dict = field(default_factory=dict)
    sha256: str | None = None
    notes: list[str] = field(default_factory=list)


def as_tensor(name: str, value) -> torch.Tensor:
    """A state dict's entry as a tensor of its own, which has as much data as its shape says."""
    if isinstance(value, (np.ndarray, np.generic)) and value.dtype.kind in "biuf":
        return torch.from_numpy(np.array(value))
    if not isinstance(value, torch.Tensor):
        kind = getattr(value, "path", "") or type(value).__name__
        raise CheckpointError(f"entry {name} is a {kind}, not a tensor")
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise CheckpointError(f"entry {name} has shape {tuple(value.shape)} but too little data")
    return value


def bare_names(names) -> dict[str, str]:
    """Name as given -> without what DataParallel, torch.compile and Lightning put before it."""
    if not all(isinstance(name, str) for name in names):
        raise CheckpointError("its keys are not names: not a state dict")
    bare = {name: name.replace("_orig_mod.", "").removeprefix("module.") for name in names}
    if all(name.startswith("model.") for name in bare.values()):
        bare = {name: new.removeprefix("model.") for name, new in bare.items()}
    if len(set(bare.values())) != len(bare):
        raise CheckpointError("names with and without 'module.' mean the same parameter")
    return bare


def unwrap(data: dict, foreign: Sequence[str] = ()) -> Source:
    """Finds the state dict in a container and removes what wrappers put before names.

    Args:
        data: as read: a bare state dict, or one under a key of ``_WRAPPERS``.
        foreign: kinds of object that were left out of it.
    """
    wrapper = next((key for key in _WRAPPERS if isinstance(data.get(key), dict)), None)
    state = data[wrapper] if wrapper else data
    extra = {key: value for key, value in data.items() if key != wrapper} if wrapper else {}
    if not state:
        raise CheckpointError("it holds no parameters")
    bare = bare_names(list(state))
    tensors = {bare[name]: as_tensor(name, value) for name, value in state.items()}
    source = Source(tensors, f"under {wrapper!r}" if wrapper else "bare state dict", extra)
    for prefix in ("module.", "_orig_mod.", "model."):
        if any(prefix in name and prefix not in new for name, new in bare.items()):
            source.notes.append(f"{prefix!r} removed from the names")
    if foreign:
        source.notes.append(f"objects left out: {', '.join(foreign[:8])}")
    return source


def read_checkpoint(path: str) -> Source:
    """Reads any supported file and unwraps its state dict.

    Args:
        path: local file.

    Returns:
        Source with its digest.

    Raises:
        CheckpointError: see `read_file` and `unwrap`; the message starts with the path.
    """
    data, foreign = read_file(path)
    with naming(path):
        source = unwrap(data, foreign)
    source.sha256 = file_sha256(path)
    return source
