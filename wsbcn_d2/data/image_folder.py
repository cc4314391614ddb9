"""Image folders, one sub-folder per class, as Detectron2 data sets: ImageNet's usual layout."""

from __future__ import annotations

import os
from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog

from .errors import ClassificationDataError

__all__ = ["load_image_folder", "register_image_folder"]

SUFFIXES = (".jpeg", ".jpg", ".png", ".bmp", ".webp", ".ppm")


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
    classes = _classes(folder, name)
    records = []
    for label, class_name in enumerate(classes):
        files = sorted(
            entry.path
            for entry in os.scandir(folder / class_name)
            if entry.name.lower().endswith(SUFFIXES)
        )
        if not files:
            raise ClassificationDataError(
                f"{name}: no image in {folder / class_name}; get the data set again"
            )
        records += [
            {"file_name": path, "image_id": len(records) + i, "label": label}
            for i, path in enumerate(files)
        ]
    return records


def _classes(folder: Path, name: str) -> list[str]:
    if not folder.is_dir():
        raise ClassificationDataError(
            f"{name} is absent: looked for {folder.absolute()}/<class>/<image>; put it there or "
            "set DETECTRON2_DATASETS to the folder that holds the data sets"
        )
    classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    if not classes:
        raise ClassificationDataError(
            f"{name}: {folder.absolute()} has no folder per class; sort its images into "
            "<class>/<image>"
        )
    return classes


def register_image_folder(name: str, folder: str | os.PathLike) -> None:
    """Registers an image folder; nothing is read before it is loaded.

    Args:
        name: data set name in Detectron2's catalogs; must be free.
        folder: see :func:`load_image_folder`.
    """
    DatasetCatalog.register(name, lambda: load_image_folder(folder, name))
    MetadataCatalog.get(name).set(evaluator_type="classification", image_root=str(folder))
