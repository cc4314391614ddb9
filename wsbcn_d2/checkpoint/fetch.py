"""``wsbcn://`` names: found, downloaded, converted, cached, verified.

The cache is where Detectron2 keeps its own downloads (``$FVCORE_CACHE`` or iopath's default), in
``wsbcn_d2/``. For each entry it holds the original, the converted checkpoint and a JSON file with
the digests of both, written last: without it, or if a digest differs, nothing there is used.

Without a network, set ``WSBCN_CHECKPOINTS`` to a folder of already downloaded files under their
published names; it is looked at first.
"""

import json
import logging
import os
from dataclasses import replace

from detectron2.utils.file_io import PathManager
from iopath.common.file_io import PathHandler, file_lock, get_cache_dir

from .catalog import CATALOG, PREFIX, Entry, url_digest, url_file_name
from .convert import Options, convert
from .download import download
from .errors import CheckpointError
from .reader import file_sha256, read_checkpoint
from .writer import replacing, write_checkpoint

OFFLINE_VARIABLE = "WSBCN_CHECKPOINTS"
# Part of the record: a cache that an older converter filled is converted again.
_CONVERTER = 1


def fetch(name: str, cache_dir: str | None = None) -> str:
    """Makes a catalog entry available as a Detectron2 checkpoint.

    Args:
        name: entry name, without ``wsbcn://``.
        cache_dir: instead of Detectron2's.

    Returns:
        path of the converted checkpoint (bare names with ``matching_heuristics`` for a backbone,
        full names for a detector).

    Raises:
        CheckpointError: unknown name; nothing usable anywhere (the message lists what was tried);
            or a cached file that is no longer the one recorded.
    """
    entry = CATALOG.get(name)
    if entry is None:
        close = [n for n in CATALOG if n.split("/")[-1].lower() == name.split("/")[-1].lower()]
        hint = f"did you mean {PREFIX}{close[0]}?" if close else "see tools/list_checkpoints.py"
        raise CheckpointError(f"{PREFIX}{name} is not in the catalog: {hint}")
    folder = os.path.join(get_cache_dir(cache_dir), "wsbcn_d2", *name.split("/"))
    os.makedirs(folder, exist_ok=True)
    with file_lock(os.path.join(folder, "entry")):  # one download for all processes
        return _Cached(entry, folder).path()


class _Cached:
    """One entry's folder in the cache."""

    def __init__(self, entry: Entry, folder: str):
        self.entry, self.folder = entry, folder
        self.converted = os.path.join(folder, entry.name.split("/")[-1] + ".pth")
        self.record_file = os.path.join(folder, "record.json")
        self.record = self._read_record()

    def path(self) -> str:
        local = self._offline_file()
        if local is not None:
            digest = _checked_digest(local)
            if self.record.get("sha256") != digest or not self._converted_is_current():
                self._convert(local, f"file {os.path.basename(local)}", digest)
            return self.converted
        if self._converted_is_current():
            return self.converted
        if (original := self._original()) is not None:
            self._convert(original, self.record["url"], self.record["sha256"])
            return self.converted
        return self._download()

    def _read_record(self):
        try:
            with open(self.record_file, encoding="utf-8") as stream:
                record = json.load(stream)
        except (OSError, ValueError):
            return {}
        return record if isinstance(record, dict) else {}

    def _offline_file(self):
        """The entry's file in the folder of ``WSBCN_CHECKPOINTS``, None if it is not there."""
        folder = os.environ.get(OFFLINE_VARIABLE)
        if not folder:
            return None
        if not os.path.isdir(folder):
            raise CheckpointError(f"{OFFLINE_VARIABLE} names {folder}, which is not a folder")
        candidates = (os.path.join(folder, url_file_name(url)) for url in self.entry.urls)
        return next((path for path in candidates if os.path.isfile(path)), None)

    def _converted_is_current(self):
        if not os.path.isfile(self.converted) or self.record.get("converter") != _CONVERTER:
            return False
        self._verify(self.converted, self.record.get("converted_sha256"))
        return True

    def _original(self):
        path = os.path.join(self.folder, self.record.get("file") or "original")
        if not self.record.get("sha256") or not os.path.isfile(path):
            return None
        self._verify(path, self.record["sha256"])
        return path

    def _verify(self, path, digest):
        if file_sha256(path) != digest:
            raise CheckpointError(
                f"{path} is not the file that was recorded (SHA-256 differs): delete the folder "
                f"{self.folder} to download it again"
            )

    def _download(self):
        tried = []
        if os.environ.get(OFFLINE_VARIABLE):
            tried.append(f"{os.environ[OFFLINE_VARIABLE]}: not there")
        for url in self.entry.urls:
            path = os.path.join(self.folder, url_file_name(url))
            try:
                with replacing(path) as temporary:
                    digest = download(url, temporary)
                    known = self.record.get("digests", {}).get(url)
                    if known and known != digest:
                        raise CheckpointError(f"{url}: not the file it was (SHA-256 differs)")
                    # Converted before it gets its name: a file that cannot be read is no file.
                    self._convert(temporary, url, digest, os.path.basename(path))
                return self.converted
            except CheckpointError as err:
                tried.append(str(err))
                logging.getLogger(__name__).warning("%s", err)
        names = sorted({url_file_name(url) for url in self.entry.urls})
        raise CheckpointError(
            f"{PREFIX}{self.entry.name} could not be had; tried {len(tried)}: {'; '.join(tried)}. "
            f"Put one of {', '.join(names)} into a folder and set {OFFLINE_VARIABLE} to it"
        )

    def _convert(self, path, origin, digest, file=None):
        entry = self.entry
        options = Options(
            target="fpn" if entry.detector else "resnet",
            norm=entry.norm,
            formula=entry.formula,
            source_name=origin,
        )
        loaded = read_checkpoint(path)
        try:
            state, report = convert(loaded, options)
        except CheckpointError as err:
            raise CheckpointError(f"{origin}: {err}") from err
        if report.nonfinite:
            raise CheckpointError(f"{origin}: NaN or Inf in {', '.join(report.nonfinite[:4])}")
        if bool(report.detector) != entry.detector:
            raise CheckpointError(
                f"{origin}: not {'a detector' if entry.detector else 'a backbone'}"
            )
        metadata = replace(
            report.metadata,
            input_format=entry.pixels.input_format,
            pixel_mean=entry.pixels.pixel_mean,
            pixel_std=entry.pixels.pixel_std,
            presumed=(),
            source=origin,
        )
        write_checkpoint(self.converted, state, metadata, heuristics=not entry.detector)
        digests = dict(self.record.get("digests", {}))
        if file:
            digests[origin] = digest
        self.record = {
            "url": origin,
            "file": file or self.record.get("file"),
            "sha256": digest,
            "digests": digests,
            "converted_sha256": file_sha256(self.converted),
            "converter": _CONVERTER,
        }
        with (
            replacing(self.record_file) as temporary,
            open(temporary, "w", encoding="utf-8") as out,
        ):
            json.dump(self.record, out, indent=1)


def _checked_digest(path):
    digest, expected = file_sha256(path), url_digest(path)
    if expected and not digest.startswith(expected):
        raise CheckpointError(f"{path}: SHA-256 {digest[:8]}..., its name says {expected}")
    return digest


class CatalogHandler(PathHandler):
    """Resolves ``wsbcn://`` names for iopath."""

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
