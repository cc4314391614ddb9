"""Small data sets in COCO format, to be spoiled by tests."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

SIZES = [(64, 72), (72, 64), (80, 64)]  # width, height


def a_set():
    """The content of an annotation file: three pictures, two classes, a polygon an object."""
    images, annotations = [], []
    for i, (width, height) in enumerate(SIZES):
        images.append({"id": i + 1, "file_name": f"{i}.png", "width": width, "height": height})
        for j, (x, y) in enumerate(((5, 5), (30, 25))):
            annotations.append(
                {
                    "id": 2 * i + j + 1,
                    "image_id": i + 1,
                    "category_id": j + 1,
                    "bbox": [x, y, 24, 20],
                    "area": 480,
                    "iscrowd": 0,
                    "segmentation": [[x, y, x + 24, y, x + 24, y + 20, x, y + 20]],
                }
            )
    categories = [{"id": 1, "name": "round"}, {"id": 2, "name": "long"}]
    return {"images": images, "annotations": annotations, "categories": categories}


def runs(x, y, image):
    """The mask of ``a_set``'s box at x, y as uncompressed run lengths."""
    mask = np.zeros((image["height"], image["width"]), np.uint8)
    mask[y : y + 20, x : x + 24] = 1
    flat = mask.T.ravel()
    edges = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff([0, *edges, flat.size]).tolist()
    return {"size": [image["height"], image["width"]], "counts": counts}


def write(folder: Path, content, name="set"):
    """Write an annotation file and pictures of random pixels; gives the entry of COCO_SETS."""
    pictures = folder / name
    pictures.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i, (width, height) in enumerate(SIZES):
        pixels = rng.integers(256, size=(height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(pictures / f"{i}.png")
    path = folder / f"{name}.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return {"NAME": f"test_{name}", "JSON": str(path), "IMAGES": str(pictures)}
