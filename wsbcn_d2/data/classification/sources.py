"""Classification data sets as Detectron2 knows them: image folders and CIFAR.

The files of CIFAR's python version are pickles, which can run code when they are read: torchvision
holds every one against the MD5 of the original before it opens any.
"""

import os
from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset
from torchvision.datasets.utils import check_integrity

from ..errors import ClassificationDataError
from .cifar_binary import BINARY

__all__ = ["load_cifar", "load_image_folder", "register_cifar", "register_image_folder"]

_CIFAR = {"cifar10": CIFAR10, "cifar100": CIFAR100}


def load_image_folder(folder: str | os.PathLike, name: str = "image folder") -> list[dict]:
    """Lists the images of a folder; none is opened.

    Args:
        folder: holds ``<class>/<image>``; classes are numbered in the order of their names.
        name: of the data set, for messages.

    Returns:
        One dict per image, ordered by name: ``file_name``, ``image_id`` (int), ``label`` (int).

    Raises:
        ClassificationDataError: if the folder, or an image in one of its classes, is missing.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ClassificationDataError(
            f"{name} is absent: looked for {folder.absolute()}/<class>/<image>; put it there or "
            "set DETECTRON2_DATASETS to the folder that holds the data sets"
        )
    try:
        _, classes = find_classes(folder)
        samples = make_dataset(folder, classes, extensions=IMG_EXTENSIONS)
    except FileNotFoundError as error:
        raise ClassificationDataError(
            f"{name} in {folder.absolute()}: {error}; sort its images into <class>/<image>"
        ) from error
    return [
        {"file_name": path, "image_id": i, "label": label}
        for i, (path, label) in enumerate(samples)
    ]


def register_image_folder(name: str, folder: str | os.PathLike) -> None:
    """Registers an image folder; nothing is read before it is loaded.

    Args:
        name: data set name in Detectron2's catalogs; must be free.
        folder: see :func:`load_image_folder`.
    """
    DatasetCatalog.register(name, lambda: load_image_folder(folder, name))
    MetadataCatalog.get(name).set(evaluator_type="classification", image_root=str(folder))


def _find_cifar(root: Path, dataset: str) -> Path:
    """The extracted folder, else the archive, else the folder that there should be."""
    kinds = _CIFAR[dataset], BINARY[dataset]
    for kind in kinds:
        folder, archive = root / kind.base_folder, root / kind.filename
        if folder.is_dir():
            return folder
        if archive.is_file():
            return archive
    return root / kinds[0].base_folder


def load_cifar(root: str | os.PathLike, dataset: str, split: str) -> list[dict]:
    """Reads one split into memory (at most 50000 images, 150 MB).

    Args:
        root: folder that holds ``cifar-10-batches-py`` (``cifar-100-python``), or the archive
            ``cifar-10-python.tar.gz`` (``cifar-100-python.tar.gz``) as downloaded, which is
            extracted there; or the binary version, ``cifar-10-batches-bin`` (``cifar-100-binary``)
            or ``cifar-10-binary.tar.gz`` (``cifar-100-binary.tar.gz``), which is read as it is.
        dataset: ``"cifar10"`` or ``"cifar100"``.
        split: ``"train"`` or ``"test"``.

    Returns:
        One dict per image: ``pixels``, uint8 array (32, 32, 3) RGB, ``image_id``, ``label``,
        ``height``, ``width``.

    Raises:
        ClassificationDataError: if the data set is absent or damaged; the python version is, if it
            is not byte for byte the original.
    """
    kind, binary, root = _CIFAR[dataset], BINARY[dataset], Path(root)
    place = _find_cifar(root, dataset)
    mend = (
        "get the python or the binary version from https://www.cs.toronto.edu/~kriz/cifar.html, or "
        "set DETECTRON2_DATASETS to the folder that holds it"
    )
    if not place.exists():
        raise ClassificationDataError(
            f"{dataset} is absent: looked for {place.absolute()}, and {kind.filename}, "
            f"{binary.base_folder} and {binary.filename} beside it; {mend}"
        )
    try:
        if place.name in (binary.base_folder, binary.filename):
            images, labels = binary.read(place, split)
        else:
            images, labels = _read_pickles(kind, place, split)
    except (RuntimeError, OSError, ValueError) as error:  # other bytes; a full disk
        raise ClassificationDataError(
            f"{dataset} in {place.absolute()} is damaged ({error}); {mend}"
        ) from error
    return [
        {"pixels": pixels, "image_id": i, "label": label, "height": 32, "width": 32}
        for i, (pixels, label) in enumerate(zip(images, labels, strict=True))
    ]


def _read_pickles(kind: type[CIFAR10], place: Path, split: str):
    if not place.is_dir() and not check_integrity(place, kind.tgz_md5):
        raise RuntimeError("another file than the original")
    # With the whole archive there, "download" means to extract it.
    images = kind(place.parent, train=split == "train", download=not place.is_dir())
    return images.data, images.targets


def register_cifar(name: str, root: str | os.PathLike, dataset: str, split: str) -> None:
    """Registers one split; nothing is read before it is loaded.

    Args:
        name: data set name in Detectron2's catalogs; must be free.
        root, dataset, split: see :func:`load_cifar`.
    """
    DatasetCatalog.register(name, lambda: load_cifar(root, dataset, split))
    MetadataCatalog.get(name).set(
        evaluator_type="classification", image_root=str(_find_cifar(Path(root), dataset))
    )
