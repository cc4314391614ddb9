"""A user's own sets in COCO format, named by the config alone: ``DATASETS.COCO_SETS``."""

import json
import os
from collections.abc import Iterable, Mapping

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json

from .errors import DataError
from .names import forget

__all__ = ["register_coco_sets"]

_ORIGIN = "wsbcn_d2.coco"
_FIELDS = ("NAME", "JSON", "IMAGES")


def register_coco_sets(sets: Iterable[Mapping[str, str]]) -> None:
    """Give sets their names in Detectron2's catalogs; nothing is read before one is loaded.

    Every process that reads the config does this, so that spawned ones, evaluation and prediction
    know the sets too. Saying it twice changes nothing; another place for a name replaces the first.

    Args:
        sets: one mapping each with ``NAME``, ``JSON`` (the annotation file) and ``IMAGES`` (the
            folder that its file names start from). Paths that do not exist from the current
            folder are looked for in ``$DETECTRON2_DATASETS``.

    Raises:
        DataError: a set without one of the three, or with the name of another data set.
    """
    for entry in sets:
        if not isinstance(entry, Mapping) or sorted(entry) != sorted(_FIELDS):
            raise DataError(
                f"DATASETS.COCO_SETS: {entry!r} is no data set: say {{NAME: a name, JSON: the "
                "annotation file, IMAGES: the folder with the pictures}"
            )
        if not all(isinstance(entry[field], str) and entry[field] for field in _FIELDS):
            raise DataError(f"DATASETS.COCO_SETS: NAME, JSON and IMAGES must be text in {entry!r}")
        _register(entry["NAME"], _place(entry["JSON"]), _place(entry["IMAGES"]))


def _place(path: str) -> str:
    path = os.path.expanduser(path)
    elsewhere = os.path.join(os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "")), path)
    return elsewhere if not os.path.exists(path) and os.path.exists(elsewhere) else path


def _register(name: str, json_file: str, image_root: str) -> None:
    if name in DatasetCatalog.list():
        metadata = MetadataCatalog.get(name)
        if metadata.get("origin") != _ORIGIN:
            raise DataError(
                f"DATASETS.COCO_SETS: the name {name!r} belongs to another data set: choose another"
            )
        if (metadata.json_file, metadata.image_root) == (json_file, image_root):
            return
        forget(name)

    def load() -> list[dict]:
        records = load_coco_json(json_file, image_root, name)
        _note_keypoints(name, json_file)
        return records

    DatasetCatalog.register(name, load)
    MetadataCatalog.get(name).set(
        origin=_ORIGIN,
        evaluator_type="coco",
        json_file=json_file,
        image_root=image_root,
        how_to_get="check DATASETS.COCO_SETS,",
    )


def _note_keypoints(name: str, json_file: str) -> None:
    """What Detectron2 wants to know of keypoints and the JSON says in its categories."""
    with open(json_file, encoding="utf-8") as file:
        categories = json.load(file)["categories"]
    names = next((c["keypoints"] for c in categories if c.get("keypoints")), None)
    if names:
        mirrored = tuple((n, n.replace("left", "right")) for n in names if "left" in n)
        MetadataCatalog.get(name).set(keypoint_names=tuple(names), keypoint_flip_map=mirrored)
