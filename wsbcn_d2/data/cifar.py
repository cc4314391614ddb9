"""CIFAR-10 and CIFAR-100 from their standard archives, binary version.

Format: https://www.cs.toronto.edu/~kriz/cifar.html. Each record is one label byte (CIFAR-100: a
coarse and a fine one, of which the fine one is used) and 3072 bytes, the red, green and blue
planes of a 32x32 image. The "python version" of the archives consists of pickles, which can run
code when they are read: it is refused.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog

from .errors import ClassificationDataError

__all__ = ["load_cifar", "register_cifar"]

SIDE = 32
PIXELS = 3 * SIDE * SIDE


@dataclass(frozen=True)
class _Archive:
    """One of the two data sets: its archive, the folder in it, label bytes and files."""

    archive: str
    folder: str
    pickled: str
    labels: int
    classes: int
    files: dict[str, tuple[str, ...]]


_ARCHIVES = {
    "cifar10": _Archive(
        "cifar-10-binary.tar.gz",
        "cifar-10-batches-bin",
        "cifar-10-batches-py",
        1,
        10,
        {
            "train": tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
            "test": ("test_batch.bin",),
        },
    ),
    "cifar100": _Archive(
        "cifar-100-binary.tar.gz",
        "cifar-100-binary",
        "cifar-100-python",
        2,
        100,
        {"train": ("train.bin",), "test": ("test.bin",)},
    ),
}


def _find(root: Path, spec: _Archive) -> Path:
    """The extracted folder, else the archive, else the folder that there should be."""
    folder, archive = root / spec.folder, root / spec.archive
    return folder if folder.is_dir() or not archive.is_file() else archive


def _contents(place: Path, spec: _Archive, split: str) -> Iterator[bytes]:
    if place.is_dir():
        yield from ((place / name).read_bytes() for name in spec.files[split])
        return
    with tarfile.open(place) as archive:  # members are read, never written to disk
        for name in spec.files[split]:
            yield archive.extractfile(f"{spec.folder}/{name}").read()


def load_cifar(root: str | os.PathLike, dataset: str, split: str) -> list[dict]:
    """Reads one split into memory (at most 50000 images, 150 MB).

    Args:
        root: folder that holds ``cifar-10-batches-bin`` (``cifar-100-binary``), or the archive
            ``cifar-10-binary.tar.gz`` (``cifar-100-binary.tar.gz``) as downloaded.
        dataset: ``"cifar10"`` or ``"cifar100"``.
        split: ``"train"`` or ``"test"``.

    Returns:
        One dict per image: ``pixels``, uint8 array (32, 32, 3) RGB, ``image_id``, ``label``,
        ``height``, ``width``.

    Raises:
        ClassificationDataError: if the data set is absent, pickled or damaged.
    """
    spec, root = _ARCHIVES[dataset], Path(root)
    place = _find(root, spec)
    if not place.exists():
        pickled = (root / spec.pickled).exists()
        raise ClassificationDataError(
            f"{dataset} is absent: looked for {place.absolute()} and {spec.archive} beside it; "
            + (
                f"{spec.pickled} is the python version, whose pickles are not read: "
                if pickled
                else ""
            )
            + "get the binary version from https://www.cs.toronto.edu/~kriz/cifar.html, or set "
            "DETECTRON2_DATASETS to the folder that holds it"
        )
    records: list[dict] = []
    size = spec.labels + PIXELS
    try:
        for content in _contents(place, spec, split):
            if not content or len(content) % size:
                raise ValueError(f"{len(content)} bytes are no whole records of {size}")
            rows = np.frombuffer(content, np.uint8).reshape(-1, size)
            labels = rows[:, spec.labels - 1].tolist()
            if max(labels) >= spec.classes:
                raise ValueError(f"label {max(labels)} among {spec.classes} classes")
            images = rows[:, spec.labels :].reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1)
            records += [
                {
                    "pixels": np.ascontiguousarray(image),
                    "image_id": len(records) + i,
                    "label": label,
                    "height": SIDE,
                    "width": SIDE,
                }
                for i, (image, label) in enumerate(zip(images, labels, strict=True))
            ]
    except (OSError, ValueError, KeyError, EOFError, tarfile.TarError) as error:
        reason = " ".join(str(error).split())
        raise ClassificationDataError(
            f"{dataset} in {place.absolute()} is damaged ({reason}): get the binary version again"
        ) from error
    return records


def register_cifar(name: str, root: str | os.PathLike, dataset: str, split: str) -> None:
    """Registers one split; nothing is read before it is loaded.

    Args:
        name: data set name in Detectron2's catalogs; must be free.
        root, dataset, split: see :func:`load_cifar`.
    """
    DatasetCatalog.register(name, lambda: load_cifar(root, dataset, split))
    MetadataCatalog.get(name).set(
        evaluator_type="classification", image_root=str(_find(Path(root), _ARCHIVES[dataset]))
    )
