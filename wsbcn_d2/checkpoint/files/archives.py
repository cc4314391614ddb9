"""Files that torch.save wrote: the zip archive, and the row of pickles of before version 1.6."""

import io
import struct
import zipfile
from collections.abc import Callable
from typing import BinaryIO

import numpy as np
import torch

from ..errors import CheckpointError
from .pickles import RestrictedUnpickler, check_opcodes

MAGIC = 0x1950A86A20F9469CFC6C
_TORCHSCRIPT = ("constants.pkl", "code/")
_COPY = 1 << 24


def unpickled(stream: BinaryIO, size: int, storage: Callable | None = None):
    """Reads the pickle at a stream's place, checked first; leaves the stream behind it.

    Returns what was pickled and the names of the kinds of object left out.
    """
    start = stream.tell()
    check_opcodes(stream, size)
    stream.seek(start)
    unpickler = RestrictedUnpickler(stream, storage)
    return unpickler.load(), unpickler.foreign


def _buffer(count: int, dtype: torch.dtype) -> tuple[np.ndarray, torch.Tensor]:
    """Bytes to be filled, and the flat tensor that they are."""
    data = np.empty(count * dtype.itemsize, np.uint8)
    return data, torch.from_numpy(data).view(dtype) if count else torch.empty(0, dtype=dtype)


def _entries(archive: zipfile.ZipFile, size: int) -> tuple[str, dict[str, zipfile.ZipInfo]]:
    """The archive's folder and its entries, which are what they claim to be."""
    entries = {entry.filename: entry for entry in archive.infolist()}
    if len({name.lower() for name in entries}) != len(archive.infolist()):
        raise CheckpointError("two of its entries have one name, if case is ignored")
    if any(name.partition("/")[2].startswith(_TORCHSCRIPT) for name in entries):
        raise CheckpointError("it is a TorchScript program: save the model's state_dict() instead")
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries.values()):
        raise CheckpointError("it is compressed, which torch.save never does")
    if sum(entry.file_size for entry in entries.values()) > size:
        raise CheckpointError("its header claims more data than the file holds")
    roots = [name for name in entries if name.rpartition("/")[2] == "data.pkl"]
    if len(roots) != 1:
        raise CheckpointError("it is a zip file without torch's data.pkl")
    root = roots[0].removesuffix("data.pkl")
    if root + "byteorder" in entries and archive.read(root + "byteorder") != b"little":
        raise CheckpointError("it was saved on a big-endian machine")
    return root, entries


def read_archive(path: str, size: int, data: bool = True):
    """As `unpickled`, of a zip file of torch's; without ``data`` with tensors on "meta"."""
    with zipfile.ZipFile(path) as archive:
        root, entries = _entries(archive, size)
        storages: dict[str, torch.Tensor] = {}

        def storage(pid):
            _, dtype, key, _, count, *_ = pid
            if not data:
                return torch.empty(count, dtype=dtype, device="meta")
            key = f"{root}data/{key}"
            if key not in storages:
                held = entries[key].file_size if key in entries else 0
                if held != count * dtype.itemsize:
                    raise CheckpointError(
                        f"storage {key.rpartition('/')[2][:20]} should have "
                        f"{count * dtype.itemsize} bytes but has {held}"
                    )
                raw, storages[key] = _buffer(count, dtype)
                with archive.open(key) as stream:
                    _fill(raw, stream)
                    stream.read(1)  # at the end the checksum is compared
            return storages[key].view(dtype)

        return unpickled(io.BytesIO(archive.read(root + "data.pkl")), size, storage)


def _fill(raw: np.ndarray, stream: BinaryIO) -> None:
    for start in range(0, len(raw), _COPY):
        part = memoryview(raw)[start : start + _COPY]
        if stream.readinto(part) != len(part):
            raise CheckpointError("cut short")


def read_legacy(stream: BinaryIO, size: int):
    """As `unpickled`, of the pickles after the magic number and the storages after them."""
    storages: dict[str, tuple[np.ndarray, torch.Tensor]] = {}

    def storage(pid):
        _, dtype, key, _, count, *view = pid
        key = str(key)
        if key not in storages:
            held = sum(len(raw) for raw, _ in storages.values())
            if held + count * dtype.itemsize > size:
                raise CheckpointError("its header claims more data than the file holds: cut short?")
            storages[key] = _buffer(count, dtype)
        flat = storages[key][1].view(dtype)
        if view and view[0]:  # part of another storage
            _, offset, length = view[0]
            flat = torch.as_strided(flat, (length,), (1,), offset)
        return flat

    unpickled(stream, size)  # the version of the format
    system = unpickled(stream, size)[0]
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise CheckpointError("it was saved on a big-endian machine")
    result, foreign = unpickled(stream, size, storage)
    keys = unpickled(stream, size)[0]
    if not isinstance(keys, list) or set(map(str, keys)) != set(storages):
        raise CheckpointError("its storages are not those of its tensors")
    for key in keys:
        raw, flat = storages[str(key)]
        if struct.unpack("<q", stream.read(8))[0] != len(flat):
            raise CheckpointError(f"damaged: storage {str(key)[:20]} has another size")
        _fill(raw, stream)
    return result, foreign
