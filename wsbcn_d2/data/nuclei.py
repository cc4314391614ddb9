"""Registers "nuclei", microscopy images prepared by ``tools/prepare_nuclei.py``.

The set is stage1_train of the 2018 Data Science Bowl (BBBC038v1, Broad Institute, CC0 1.0).
"""

import os
from pathlib import Path

from detectron2.data.datasets import register_coco_instances

from .names import is_free
from .shapes import default_root

__all__ = ["register_nuclei"]

_HOW_TO_GET = (
    "get stage1_train.zip (CC0) from https://bbbc.broadinstitute.org/BBBC038, "
    "run tools/prepare_nuclei.py stage1_train.zip"
)


def register_nuclei(root: str | os.PathLike | None = None) -> None:
    """Registers ``nuclei_train`` and ``nuclei_val``; called once when `wsbcn_d2.data` is imported.

    Files are looked for when a set is loaded: ``nuclei/annotations/{train,val}.json`` and pictures
    in ``nuclei/{train,val}``. Masks are RLE: configs need ``INPUT.MASK_FORMAT: "bitmask"``.

    Args:
        root: folder that holds data sets, and replaces what is registered under these names. By
            default ``$DETECTRON2_DATASETS`` or ``./datasets``, and names that are taken are left
            alone.
    """
    folder = (default_root() if root is None else Path(root)) / "nuclei"
    for split in ("train", "val"):
        if is_free(f"nuclei_{split}", replace=root is not None):
            register_coco_instances(
                f"nuclei_{split}",
                {"how_to_get": _HOW_TO_GET},
                str(folder / "annotations" / f"{split}.json"),
                str(folder / split),
            )
