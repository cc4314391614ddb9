"""``wsbcn://`` names: found, downloaded, verified, cached; converted when they are loaded.

The cache is where Detectron2 keeps its own downloads (``$FVCORE_CACHE`` or ``~/.torch/
iopath_cache``), in ``wsbcn_d2/``, a folder of this user's alone. It holds the files as they were
published, each under its SHA-256, which is compared whenever the file is used.

Without a network, set ``WSBCN_CHECKPOINTS`` to a folder of already downloaded files under their
published names; it is looked at first.
"""

import logging
import os
import re
import stat
from dataclasses import replace
from pathlib import Path

from detectron2.utils.file_io import PathManager
from iopath.common.file_io import PathHandler

from ...files import PART_FILE, locked, replacing
from ..conversion import Options, convert
from ..errors import CheckpointError, naming
from ..files.containers import read_checkpoint
from ..files.opening import file_sha256
from ..metadata import METADATA_KEY
from .entries import CATALOG, PREFIX, Entry, file_digest, url_digest, url_file_name
from .transfer import download

OFFLINE_VARIABLE = "WSBCN_CHECKPOINTS"
_PATIENCE = 3600.0  # seconds for another process's download
_INCOMING = "incoming"  # a file that is whole, before it is named by its digest


def fetch(name: str, cache_dir: str | None = None) -> str:
    """Makes a catalog entry's published file available.

    Args:
        name: entry name, without ``wsbcn://``.
        cache_dir: instead of Detectron2's.

    Returns:
        path of the file, in its publisher's names and format; `read_entry` converts it.

    Raises:
        CheckpointError: unknown name; nothing usable anywhere (the message lists what was tried);
            a cached file that is no longer the one downloaded; or a cache that is not private.
    """
    entry = _entry(name)
    if (local := _offline_file(entry)) is not None:
        digest, expected = file_sha256(local), file_digest(local)
        if expected and not digest.startswith(expected):
            raise CheckpointError(f"{local}: SHA-256 {digest[:8]}..., its name says {expected}")
        return local
    folder = os.path.join(_private_folder(cache_dir), *name.split("/"))
    try:
        os.makedirs(folder, exist_ok=True)
        with locked(os.path.join(folder, "entry.lock"), _PATIENCE):  # one download for all
            for leftover in (PART_FILE, _INCOMING):  # of a process that was killed
                Path(folder, leftover).unlink(missing_ok=True)
            return _cached(folder) or _download(entry, folder)
    except OSError as err:  # a lock's time-out too
        raise CheckpointError(f"{PREFIX}{name}: {err}") from err


def read_entry(name: str, path: str, origin: str | None = None) -> dict:
    """Reads and converts a catalog entry's file, which has to be what the catalog says it is.

    Args:
        name: entry name, without ``wsbcn://``.
        path: what `fetch` returned.
        origin: for the record and messages, None for the file's name.

    Returns:
        dict as Detectron2's checkpoints: ``model`` and ``wsbcn_d2``; bare names with
        ``matching_heuristics`` for a backbone, full names for a detector.
    """
    entry = _entry(name)
    origin = origin or re.sub(r"^[0-9a-f]{64}-", "", os.path.basename(path))
    options = Options("fpn" if entry.detector else "resnet", None, entry.norm, entry.formula)
    source = read_checkpoint(path)
    with naming(origin):
        state, report = convert(source, options)
        if report.nonfinite:
            raise CheckpointError(f"NaN or Inf in {', '.join(report.nonfinite[:4])}")
        if bool(report.detector) != entry.detector:
            raise CheckpointError(f"not {'a detector' if entry.detector else 'a backbone'}")
    metadata = replace(report.metadata, **vars(entry.pixels), presumed=(), source=origin)
    data = {"model": state, METADATA_KEY: metadata.as_dict()}
    return data if entry.detector else data | {"matching_heuristics": True}


def _entry(name: str) -> Entry:
    if name in CATALOG:
        return CATALOG[name]
    close = [n for n in CATALOG if n.split("/")[-1].lower() == name.split("/")[-1].lower()]
    hint = f"did you mean {PREFIX}{close[0]}?" if close else "see tools/list_checkpoints.py"
    raise CheckpointError(f"{PREFIX}{name} is not in the catalog: {hint}")


def _private_folder(cache_dir: str | None) -> str:
    """The cache: made, or found to be this user's alone. There is no other if it cannot be."""
    default = os.getenv("FVCORE_CACHE") or "~/.torch/iopath_cache"
    folder = os.path.join(os.path.expanduser(cache_dir or default), "wsbcn_d2")
    mend = f"set FVCORE_CACHE to a folder of your own, or {OFFLINE_VARIABLE} to one with the file"
    try:
        os.makedirs(folder, mode=0o700, exist_ok=True)
        found = os.lstat(folder)
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
            raise CheckpointError(f"the cache {folder} is another user's, or a link: {mend}")
        if found.st_mode & 0o077:
            os.chmod(folder, 0o700)
    except OSError as err:
        raise CheckpointError(f"the cache {folder}: {err.strerror or err}; {mend}") from err
    return folder


def _offline_file(entry: Entry) -> str | None:
    """The entry's file in the folder of ``WSBCN_CHECKPOINTS``, None if it is not there."""
    folder = os.environ.get(OFFLINE_VARIABLE)
    if not folder:
        return None
    if not os.path.isdir(folder):
        raise CheckpointError(f"{OFFLINE_VARIABLE} names {folder}, which is not a folder")
    candidates = (os.path.join(folder, url_file_name(url)) for url in entry.urls)
    return next((path for path in candidates if os.path.isfile(path)), None)


def _cached(folder: str) -> str | None:
    for name in sorted(os.listdir(folder)):
        if match := re.match(r"([0-9a-f]{64})-", name):
            path = os.path.join(folder, name)
            if file_sha256(path) != match[1]:
                raise CheckpointError(
                    f"{path} is not the file that was recorded (SHA-256 differs): delete the "
                    f"folder {folder} to download it again"
                )
            return path
    return None


def _download(entry: Entry, folder: str) -> str:
    offline = os.environ.get(OFFLINE_VARIABLE)
    tried = [f"{offline}: not there"] if offline else []
    # What can be verified comes first, what anybody on the way could change comes last.
    for url in sorted(entry.urls, key=lambda u: (not url_digest(u), u.startswith("http://"))):
        incoming = os.path.join(folder, _INCOMING)
        try:
            with replacing(incoming) as part:
                digest = download(url, part)
                read_entry(entry.name, part, url)  # a file that cannot be read is no file
            path = os.path.join(folder, f"{digest}-{url_file_name(url)}")
            os.replace(incoming, path)
            return path
        except CheckpointError as err:
            tried.append(str(err))
            logging.getLogger(__name__).warning("%s", err)
    names = sorted({url_file_name(url) for url in entry.urls})
    raise CheckpointError(
        f"{PREFIX}{entry.name} could not be had; tried {len(tried)}: {'; '.join(tried)}. "
        f"Put one of {', '.join(names)} into a folder and set {OFFLINE_VARIABLE} to it"
    )


class CatalogHandler(PathHandler):
    """Resolves ``wsbcn://`` names for iopath, to the published files."""

    def _get_supported_prefixes(self):
        return [PREFIX]

    def _get_local_path(self, path, force=False, **kwargs):
        return fetch(path[len(PREFIX) :].partition("?")[0])

    def _isfile(self, path, **kwargs):
        return path[len(PREFIX) :].partition("?")[0] in CATALOG

    _exists = _isfile

    def _open(self, path, mode="r", buffering=-1, **kwargs):
        if mode not in ("r", "rb"):
            raise CheckpointError(f"{path} is read-only")
        return open(self._get_local_path(path), mode)


def register() -> None:
    """Makes Detectron2's PathManager know ``wsbcn://``; harmless when repeated."""
    PathManager.register_handler(CatalogHandler(), allow_override=True)
