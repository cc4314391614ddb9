"""Registers the "shapes" set with Detectron2's catalogs; nothing is written until it is loaded."""

import os
from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.coco import load_coco_json

from ..names import forget
from .outline import CLASSES
from .write import DEFAULT_IMAGE_SIZE, ShapesSpec, annotation_file, default_root, ensure_shapes

_GENERATOR = "wsbcn_d2.shapes"


def register_shapes(root: str | os.PathLike | None = None) -> None:
    """Registers ``shapes_train`` and ``shapes_val``; called once when `wsbcn_d2.data` is imported.

    The set is rendered below `root` the first time either is loaded. Build a data loader before a
    `COCOEvaluator`, as Detectron2's trainers do, or call `ensure_shapes`: the evaluator reads the
    annotation file as soon as it is made. Some masks are RLE: configs need
    ``INPUT.MASK_FORMAT: "bitmask"``.

    Args:
        root: folder that holds data sets; ``$DETECTRON2_DATASETS`` as it is now, or
            ``./datasets``, by default. Another root than last time replaces the registration.

    Raises:
        ValueError: if the names belong to another data set.
    """
    spec = ShapesSpec()
    for split, _ in spec.splits:
        _register(f"shapes_{split}", root, split, spec)


def register_shapes_split(
    name: str,
    root: str | os.PathLike | None = None,
    split: str = "train",
    num_images: int = 16,
    seed: int = 0,
    image_size: tuple[int, int] = DEFAULT_IMAGE_SIZE,
) -> None:
    """Registers a set of one's own size or seed under `name`; rendered when first loaded.

    Args:
        name: data set name in Detectron2's catalogs.
        root: folder that holds data sets; as for `register_shapes`.
        split, num_images, seed, image_size: as for `write_shapes`.

    Raises:
        ValueError: if `name` belongs to another data set, or for arguments `ShapesSpec` refuses.
    """
    _register(name, root, split, ShapesSpec(((split, num_images),), seed, tuple(image_size)))


def _register(name: str, root: str | os.PathLike | None, split: str, spec: ShapesSpec) -> None:
    root = default_root() if root is None else Path(root)
    folder = root / spec.folder_name
    json_file = str(annotation_file(folder, split))
    if name in DatasetCatalog.list():
        metadata = MetadataCatalog.get(name)
        if metadata.get("generator") != _GENERATOR:
            raise ValueError(
                f"cannot register the data set '{name}': the name belongs to another data set"
            )
        if metadata.json_file == json_file:
            return
        forget(name)

    def load() -> list[dict]:
        ensure_shapes(root, spec)
        return load_coco_json(json_file, str(folder / split), name)

    DatasetCatalog.register(name, load)
    MetadataCatalog.get(name).set(
        generator=_GENERATOR,
        evaluator_type="coco",
        thing_classes=list(CLASSES),
        thing_dataset_id_to_contiguous_id={i + 1: i for i in range(len(CLASSES))},
        json_file=json_file,
        image_root=str(folder / split),
    )
