"""Writes the "shapes" set in COCO format.

The set is rendered the first time it is used, into a temporary folder that is then renamed: a
folder with the final name is complete, whatever was killed on the way. A file lock lets one of
several processes render while the others wait.
"""

import hashlib
import json
import logging
import os
import shutil
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as mask_util

from ...files import locked, progress
from ..errors import DataError
from .outline import CLASSES
from .render import Instance, render_scene

GENERATOR_VERSION = 3
"""Counts up whenever the renderer's output changes; part of the folder's name."""

DEFAULT_SPLITS: dict[str, int] = {"train": 1600, "val": 200}
DEFAULT_IMAGE_SIZE = (112, 144)
POLYGON_IOU = 0.95

_STAMP = "spec.json"
_logger = logging.getLogger("wsbcn_d2.data")


class ShapesDataError(DataError):
    """The shapes set cannot be written or read; the message names the folder and the mend."""


@dataclass(frozen=True)
class ShapesSpec:
    """Everything that decides the contents of one shapes folder.

    Attributes:
        splits: (name, number of images) pairs.
        seed: seed of all randomness. An image depends on the seed, its split and its index only.
        image_size: smallest and largest side in pixels, each side of each image drawn between.

    Raises:
        ValueError: for an empty split list, a split without images, a negative seed or sides
            below 32 pixels.
    """

    splits: tuple[tuple[str, int], ...] = tuple(DEFAULT_SPLITS.items())
    seed: int = 0
    image_size: tuple[int, int] = DEFAULT_IMAGE_SIZE

    def __post_init__(self) -> None:
        names = [name for name, _ in self.splits]
        if not names or len(set(names)) < len(names) or "annotations" in names:
            raise ValueError(f"splits need distinct names other than 'annotations', got {names}")
        if any(not name.isidentifier() or count < 1 for name, count in self.splits):
            raise ValueError(f"a split is a plain name and at least one image: {self.splits}")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, got {self.seed}")
        if not 32 <= self.image_size[0] <= self.image_size[1]:
            size = self.image_size
            raise ValueError(f"image_size must be 32 <= smallest <= largest side, got {size}")

    def stamp(self) -> dict:
        """The contents of the folder's stamp that must match, as JSON reads them back."""
        stamp = {"generator_version": GENERATOR_VERSION, "classes": CLASSES, **asdict(self)}
        return json.loads(json.dumps(stamp))

    @property
    def folder_name(self) -> str:
        """``shapes_v<version>`` for the default spec; others carry a digest of theirs."""
        name = f"shapes_v{GENERATOR_VERSION}"
        if self == ShapesSpec():
            return name
        text = json.dumps(self.stamp(), sort_keys=True)
        return f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"


def annotation_file(folder: Path, split: str) -> Path:
    """The COCO json of one split in a set's folder."""
    return folder / "annotations" / f"shapes_{split}.json"


def _segmentation(instance: Instance) -> tuple[list | dict, dict]:
    """One instance's segmentation as COCO stores it, and the RLE (counts: bytes) it decodes to."""
    exact = mask_util.encode(np.asfortranarray(instance.mask, dtype=np.uint8))
    if instance.outline is not None and instance.visible_fraction == 1.0:
        polygon = [round(float(value), 2) for value in instance.outline.ravel()]
        rle = mask_util.merge(mask_util.frPyObjects([polygon], *instance.mask.shape))
        if mask_util.iou([rle], [exact], [0])[0, 0] >= POLYGON_IOU:
            return [polygon], rle
    return {"size": exact["size"], "counts": exact["counts"].decode("ascii")}, exact


def _write_split(folder: Path, split: str, count: int, spec: ShapesSpec) -> dict:
    """Renders one split below `folder`; returns its numbers for the stamp."""
    images, annotations, size_on_disk = [], [], 0
    (folder / split).mkdir()
    for index in progress(range(count), desc=f"Rendering shapes {split}"):
        # A generator per image: neither the counts nor other splits change an image.
        rng = np.random.default_rng([spec.seed, zlib.crc32(split.encode()), index])
        height, width = rng.integers(spec.image_size[0], spec.image_size[1] + 1, size=2).tolist()
        pixels, instances = render_scene(rng, (height, width))
        name = f"{index:06d}.png"
        Image.fromarray(pixels).save(folder / split / name, compress_level=3)
        size_on_disk += (folder / split / name).stat().st_size
        images.append({"id": index + 1, "file_name": name, "height": height, "width": width})
        for instance in instances:
            segmentation, rle = _segmentation(instance)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": index + 1,
                    "category_id": instance.category + 1,
                    "bbox": mask_util.toBbox(rle).tolist(),
                    "area": float(mask_util.area(rle)),
                    "iscrowd": 0,
                    "segmentation": segmentation,
                }
            )
    content = {
        "info": {"description": f"shapes {split}", "version": str(GENERATOR_VERSION)},
        "licenses": [],
        "images": images,
        "annotations": annotations,
        "categories": [
            {"id": i, "name": name, "supercategory": "shape"} for i, name in enumerate(CLASSES, 1)
        ],
    }
    text = json.dumps(content)
    annotation_file(folder, split).write_text(text, encoding="ascii")
    digest = hashlib.sha256(text.encode()).hexdigest()
    return {"images": count, "image_bytes": size_on_disk, "annotations_sha256": digest}


def _check(folder: Path, spec: ShapesSpec) -> None:
    """Raises ShapesDataError unless `folder` holds what was once written there."""
    try:
        stamp = json.loads((folder / _STAMP).read_text())
        contents = stamp.pop("contents")
        if stamp != spec.stamp():
            raise ValueError(f"{_STAMP} describes another set")
        for split, expected in contents.items():
            text = annotation_file(folder, split).read_bytes()
            if hashlib.sha256(text).hexdigest() != expected["annotations_sha256"]:
                raise ValueError(f"annotations of '{split}' are incomplete or changed")
            sizes = [entry.stat().st_size for entry in os.scandir(folder / split)]
            if (len(sizes), sum(sizes)) != (expected["images"], expected["image_bytes"]):
                raise ValueError(f"images of '{split}' are missing, truncated or changed")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ShapesDataError(
            f"the shapes data set in {folder} is damaged ({error}): delete it and it will be "
            "rendered again"
        ) from error


def ensure_shapes(root: str | os.PathLike | None = None, spec: ShapesSpec | None = None) -> Path:
    """Renders the set below `root` unless it is there.

    Args:
        root: folder that holds data sets; ``$DETECTRON2_DATASETS``, or ``./datasets``, by default.
        spec: what to render; the default set if None.

    Returns:
        The set's folder: ``<split>/*.png``, ``annotations/shapes_<split>.json`` and ``spec.json``.
        The same spec gives the same files on one machine. Elsewhere, other versions of NumPy or
        zlib can round a pixel by one step or compress it differently.

    Raises:
        ShapesDataError: if the folder is damaged or cannot be written.
    """
    spec = spec or ShapesSpec()
    root = default_root() if root is None else Path(root)
    folder = root / spec.folder_name
    if not folder.exists():
        try:
            root.mkdir(parents=True, exist_ok=True)
            with locked(f"{folder}.lock"):
                if not folder.exists():
                    _render(folder, spec)
        except OSError as error:
            raise ShapesDataError(
                f"cannot write the shapes data set to {folder} ({error}): make room there or set "
                "DETECTRON2_DATASETS to a folder that can be written"
            ) from error
    _check(folder, spec)
    return folder


def _render(folder: Path, spec: ShapesSpec) -> None:
    """Renders into a sibling folder, then renames it to `folder`. The caller holds the lock."""
    counts = ", ".join(f"{count} {split}" for split, count in spec.splits)
    _logger.info("Rendering the shapes data set (%s images) into %s, once", counts, folder)
    partial = folder.with_name(folder.name + ".partial")
    if partial.exists():  # Left by a killed process: the lock says that no live one uses it.
        shutil.rmtree(partial)
    try:
        (partial / "annotations").mkdir(parents=True)
        contents = {
            split: _write_split(partial, split, count, spec) for split, count in spec.splits
        }
        (partial / _STAMP).write_text(json.dumps({**spec.stamp(), "contents": contents}, indent=1))
        os.rename(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def default_root() -> Path:
    """Where Detectron2 looks for data sets: ``$DETECTRON2_DATASETS``, else ``./datasets``."""
    return Path(os.environ.get("DETECTRON2_DATASETS", "datasets")).expanduser()


def write_shapes(
    root: str | os.PathLike,
    split: str,
    num_images: int,
    seed: int = 0,
    image_size: tuple[int, int] = DEFAULT_IMAGE_SIZE,
) -> Path:
    """Renders a set of a single split below `root` unless it is there; see `ensure_shapes`.

    Args:
        root: folder that holds data sets.
        split: name of the split; the name takes part in the seed.
        num_images: number of images.
        seed: seed of all randomness.
        image_size: smallest and largest side in pixels.

    Returns:
        The set's folder, named after the version and a digest of these arguments.

    Raises:
        ShapesDataError: if the folder is damaged or cannot be written.
        ValueError: for arguments `ShapesSpec` refuses.
    """
    return ensure_shapes(root, ShapesSpec(((split, num_images),), seed, tuple(image_size)))
