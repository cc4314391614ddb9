"""Opening a checkpoint file: its kind is told by its first bytes, every refusal is one line."""

import hashlib
import json
import os
import zipfile

from safetensors.torch import load_file

from ..errors import CheckpointError, naming
from . import archives

MAX_BYTES = 16 << 30  # larger than any checkpoint that this project reads
INDEX = ".index.json"  # of sharded files
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


def file_sha256(path: str) -> str:
    """The hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def check_head(path: str) -> bytes:
    """A file's first bytes; no file and the things that downloads end up as are refused."""
    if not os.path.isfile(path):
        raise CheckpointError("no such file")
    with open(path, "rb") as stream:
        head = stream.read(512)
    if not head:
        raise CheckpointError("the file is empty; download it again")
    if os.path.getsize(path) > MAX_BYTES:
        raise CheckpointError(f"larger than {MAX_BYTES >> 30} GiB, which no checkpoint is")
    start = head.lstrip().lower()
    for prefix, what in _NOT_CHECKPOINTS:
        if start.startswith(prefix) and not path.endswith(INDEX):
            raise CheckpointError(f"this is {what}, not a checkpoint; download it again")
    if head[257:262] == b"ustar":
        raise CheckpointError("this is a tar archive; unpack it and pass the file inside")
    return head


def read_file(path: str, data: bool = True) -> tuple[dict, list[str]]:
    """Reads a checkpoint file by its content, whatever its extension; runs nothing in it.

    Args:
        path: local file: of torch.save, a pickle of arrays, safetensors, or the index of shards.
        data: False to read a zip file's structure alone (tensors on "meta").

    Returns:
        (the container as saved, kinds of object that were left out of it).

    Raises:
        CheckpointError: not a checkpoint, damaged, or with functions that are not admitted.
    """
    with naming(path):
        head = check_head(path)
        try:
            result, foreign = _read(path, head, data)
        except CheckpointError:
            raise
        except Exception as err:  # a damaged file can fail anywhere in its reader
            text = " ".join(f"{type(err).__name__}: {err}".split())[:160]
            raise CheckpointError(f"damaged or cut short ({text})") from err
        if not isinstance(result, dict):
            what = getattr(result, "path", type(result).__name__)
            mend = ": save its state_dict() instead" if foreign else ""
            raise CheckpointError(f"holds a {what}, not a dict of tensors{mend}")
        return result, sorted(foreign)


def _read(path, head, data):
    size = os.path.getsize(path)
    if head.startswith(b"PK\x03\x04") or zipfile.is_zipfile(path):
        return archives.read_archive(path, size, data)
    if path.endswith(INDEX):
        return _read_shards(path), set()
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < size:
        return load_file(path), set()
    if head[:1] not in (b"\x80", b"(", b"}", b"c"):
        raise CheckpointError("neither a torch file nor a pickle nor safetensors: not a checkpoint")
    with open(path, "rb") as stream:
        result, foreign = archives.unpickled(stream, size)
        if result == archives.MAGIC and type(result) is int:
            return archives.read_legacy(stream, size)
        return result, foreign


def _read_shards(path):
    with open(path, encoding="utf-8") as stream:
        weight_map = json.load(stream)["weight_map"]
    state = {}
    for name in sorted(set(weight_map.values())):
        if os.path.basename(name) != name:
            raise CheckpointError(f"shard {name[:80]!r} is not a file beside the index")
        state |= read_file(os.path.join(os.path.dirname(path), name))[0]
    if missing := weight_map.keys() - state.keys():
        raise CheckpointError(f"its shards lack {len(missing)} tensors, {min(missing)[:80]} first")
    return state
