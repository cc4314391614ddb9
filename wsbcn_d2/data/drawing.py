"""Pictures of a data set with their objects drawn in."""

import os
from collections.abc import Sequence

import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.data.datasets import load_coco_json
from detectron2.utils.visualizer import Visualizer
from PIL import Image

from ..files import replacing
from .picture_range import read_picture

__all__ = ["draw_some"]


def draw_some(
    json_file: str, images: str, folder: str, count: int = 6, limits: Sequence[float] = ()
) -> list[str]:
    """Draw ``count`` evenly spaced pictures of a set in COCO format with its boxes and masks.

    Args:
        json_file, images: the set.
        folder: where the PNG files go; made if absent.
        limits: ``INPUT.PICTURE_RANGE``.

    Returns:
        list[str]: the paths written.
    """
    name = f"__drawing__ {os.path.abspath(json_file)}"
    try:
        records = load_coco_json(json_file, images, name)
        metadata = MetadataCatalog.get(name)
        picks = np.linspace(0, len(records) - 1, min(count, len(records))).astype(int)
        paths = []
        for i in picks:
            record = records[i]
            picture = read_picture(record["file_name"], "RGB", limits)
            drawn = Visualizer(picture, metadata).draw_dataset_dict(record).get_image()
            stem = os.path.splitext(os.path.basename(record["file_name"]))[0]
            paths.append(os.path.join(folder, f"{record['image_id']}_{stem}.png"))
            with replacing(paths[-1]) as part:
                Image.fromarray(drawn).save(part, "PNG")
        return paths
    finally:
        if name in MetadataCatalog.list():
            MetadataCatalog.remove(name)
