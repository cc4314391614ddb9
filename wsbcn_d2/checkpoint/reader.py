"""Opening checkpoint files that somebody else made.

Nothing in a file is trusted: its kind is told by its first bytes, the sizes in its headers are
checked against the bytes that are there, and what it holds is limited to tensors, arrays and
plain containers. Every refusal is one line.
"""

import hashlib
import os
import pickle
import warnings
import zipfile
from dataclasses import dataclass, field

import numpy as np
import torch

from .errors import CheckpointError
from .pickles import MAX_BYTES, NUMPY_SCALARS, load_arrays, survey_storages

_WRAPPERS = ("state_dict", "model", "model_state", "blobs")
_LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_NOT_CHECKPOINTS = (  # first bytes (lower case, after white space) -> what the file is
    (b"<!doctype", "a web page"),
    (b"<html", "a web page"),
    (b"<?xml", "a server's error message"),
    (b"{", "JSON text"),
    (b"version https://git-lfs", "a Git LFS pointer"),
    (b"\x1f\x8b", "gzip-compressed"),
    (b"bzh", "bzip2-compressed"),
    (b"\xfd7zxz", "xz-compressed"),
)


@dataclass
class Source:
    """A checkpoint file as read.

    Attributes:
        state: parameter names -> tensors, ``module.`` removed.
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


def file_sha256(path: str) -> str:
    """Returns the hexadecimal SHA-256 of a file."""
    with open(path, "rb") as stream:
        digest = hashlib.sha256()
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def check_head(path: str) -> bytes:
    """Returns a file's first bytes.

    Raises:
        CheckpointError: no file, an empty one, or one of the things that downloads end up as.
    """
    if not os.path.isfile(path):
        raise CheckpointError(f"{path}: no such file")
    with open(path, "rb") as stream:
        head = stream.read(512)
    if not head:
        raise CheckpointError(f"{path}: the file is empty; download it again")
    if os.path.getsize(path) > MAX_BYTES:
        raise CheckpointError(f"{path}: larger than {MAX_BYTES >> 30} GiB, which no checkpoint is")
    start = head.lstrip().lower()
    for prefix, what in _NOT_CHECKPOINTS:
        if start.startswith(prefix):
            raise CheckpointError(f"{path}: this is {what}, not a checkpoint; download it again")
    if head[257:262] == b"ustar":
        raise CheckpointError(f"{path}: this is a tar archive; unpack it and pass the file inside")
    return head


def _check_zip(path):
    """Sizes in a torch zip file against the bytes that are there."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = {entry.filename: entry for entry in archive.infolist()}
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries.values()):
                raise CheckpointError("it is compressed, which torch.save never does")
            if sum(entry.file_size for entry in entries.values()) > os.path.getsize(path):
                raise CheckpointError("its header claims more data than the file holds")
            roots = [name for name in entries if name.endswith("data.pkl")]
            if len(roots) != 1:
                raise CheckpointError("it is a zip file without torch's data.pkl")
            with archive.open(roots[0]) as stream:
                storages = survey_storages(stream)
            folder = roots[0].removesuffix("data.pkl") + "data/"
            for key, size in storages.items():
                held = entries.get(folder + key)
                if held is None or held.file_size != size:
                    raise CheckpointError(
                        f"storage {key} should have {size} bytes but has "
                        f"{held.file_size if held else 0}"
                    )
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as err:
        raise CheckpointError(f"the file is damaged or cut short ({err})") from err


def _check_legacy(path):
    with open(path, "rb") as stream:
        sizes = survey_storages(stream, pickles=4)
    if sum(sizes.values()) > os.path.getsize(path):
        raise CheckpointError("its header claims more data than the file holds: cut short?")


def _numpy_scalar_globals():
    """What torch has to admit for numpy scalars, under both names numpy's module has had."""
    scalar = np.float64(0).__reduce__()[0]
    dtypes = {type(np.dtype(code)) for code in ("f8", "f4", "i8", "i4", "b1", "u1")}
    pairs = [(scalar, name) for name in NUMPY_SCALARS if name.endswith("scalar")]
    return [*pairs, np.dtype, *dtypes]


def read_torch(path: str):
    """``torch.load(weights_only=True)`` on the CPU, after a look at the file's own claims.

    Args:
        path: a file that torch.save wrote, new (zip) or old format.

    Returns:
        what was saved.

    Raises:
        CheckpointError: damaged, too large for its bytes, or other objects than tensors.
    """
    head = check_head(path)
    admitted = getattr(torch.serialization, "safe_globals", None)  # torch >= 2.5
    try:
        (_check_zip if head.startswith(b"PK") else _check_legacy)(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old storages' deprecation notes
            if admitted is None:
                data = torch.load(path, map_location="cpu", weights_only=True)
            else:
                with admitted(_numpy_scalar_globals()):
                    data = torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError as err:
        raise CheckpointError(f"{path}: {err}") from err
    except pickle.UnpicklingError as err:
        text = str(err).splitlines()[0][:200]
        raise CheckpointError(f"{path}: torch.load(weights_only=True) refuses it: {text}") from err
    except (RuntimeError, MemoryError, OSError, EOFError, ValueError, TypeError) as err:
        text = f"{type(err).__name__}: {err}".splitlines()[0][:200]
        raise CheckpointError(f"{path}: damaged or cut short ({text})") from err
    return data


def read_pickle(path: str):
    """A pickle of numpy arrays (Caffe2, Detectron2's ``.pkl``); runs no code.

    Raises:
        CheckpointError: other objects, or a damaged file.
    """
    check_head(path)
    try:
        with open(path, "rb") as stream:
            return load_arrays(stream)
    except CheckpointError as err:
        raise CheckpointError(f"{path}: {err}") from err


def read_file(path: str):
    """Reads a checkpoint file by its content, whatever its extension.

    Args:
        path: local file.

    Returns:
        the container as saved: a dict.

    Raises:
        CheckpointError: not a checkpoint; see the module's docstring.
    """
    head = check_head(path)
    if head.startswith((b"PK\x03\x04", _LEGACY_MAGIC)):
        data = read_torch(path)
    elif head[:1] in (b"\x80", b"(", b"}", b"c"):
        data = read_pickle(path)
    else:
        raise CheckpointError(f"{path}: neither a torch file nor a pickle: not a checkpoint")
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: holds a {type(data).__name__}, not a dict of tensors")
    return data


def _tensor(name, value):
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        return torch.from_numpy(value)
    if isinstance(value, np.generic) and value.dtype.kind in "biuf":
        return torch.from_numpy(np.asarray(value))
    if not isinstance(value, torch.Tensor):
        raise CheckpointError(f"entry {name} is a {type(value).__name__}, not a tensor")
    if value.layout is not torch.strided or value.is_quantized or value.is_meta:
        raise CheckpointError(f"entry {name} is a sparse, quantized or data-less tensor")
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise CheckpointError(f"entry {name} has shape {tuple(value.shape)} but too little data")
    return value.detach()


def unwrap(data: dict) -> Source:
    """Finds the state dict in a container and removes ``module.``.

    Args:
        data: as read: a bare state dict, or one under ``state_dict``, ``model``,
            ``model_state`` or ``blobs``.

    Returns:
        Source.

    Raises:
        CheckpointError: no state dict, an empty one, or entries that are not tensors.
    """
    wrapper = next((key for key in _WRAPPERS if isinstance(data.get(key), dict)), None)
    state = data[wrapper] if wrapper else data
    extra = {key: value for key, value in data.items() if key != wrapper} if wrapper else {}
    if not state:
        raise CheckpointError("it holds no parameters")
    if not all(isinstance(key, str) for key in state):
        raise CheckpointError("its keys are not names: not a state dict")
    tensors = {key: _tensor(key, value) for key, value in state.items()}
    stripped = {key.removeprefix("module."): value for key, value in tensors.items()}
    if len(stripped) != len(tensors):
        raise CheckpointError("names with and without 'module.' mean the same parameter")
    source = Source(stripped, f"under {wrapper!r}" if wrapper else "bare state dict", extra)
    if any(key.startswith("module.") for key in tensors):
        source.notes.append("'module.' removed from the names")
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
    data = read_file(path)
    try:
        source = unwrap(data)
    except CheckpointError as err:
        raise CheckpointError(f"{path}: {err}") from err
    source.sha256 = file_sha256(path)
    return source
