"""Holds what was found in the data sets of a run against what its config says of them."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from detectron2.data import MetadataCatalog
from detectron2.data.datasets import builtin

from ..errors import DataError
from ..picture_range import check_range
from . import memory
from .findings import Findings
from .look import look_at

__all__ = ["Wanted", "check_sets"]


@dataclass(frozen=True)
class Wanted:
    """What a config says of its data, with the names of its keys for messages.

    Attributes:
        classes: the model's; None if it does not say.
        masks: whether it learns masks.
        mask_format: ``"polygon"`` or ``"bitmask"``.
        keypoints: how many it learns; 0 for none.
        sigmas: how many numbers evaluation has for keypoints; 0 for its own 17.
        flip: whether pictures are mirrored.
        picture_range: see ``INPUT.PICTURE_RANGE``.
        classes_key, masks_key, format_key: what the config calls them.
    """

    classes: int | None = None
    masks: bool = False
    mask_format: str = "bitmask"
    keypoints: int = 0
    sigmas: int = 0
    flip: bool = False
    picture_range: Sequence[float] = ()
    classes_key: str = "MODEL.ROI_HEADS.NUM_CLASSES"
    masks_key: str = "MODEL.MASK_ON"
    format_key: str = "INPUT.MASK_FORMAT"


def check_sets(train: Iterable[str], test: Iterable[str], wanted: Wanted) -> None:
    """Refuse data sets that training or evaluation would stumble over, or misread.

    Looked at are sets in COCO format with an annotation file, but for those that Detectron2 itself
    registers and those that are rendered.

    Args:
        train, test: names of registered data sets.
        wanted: what the config says.

    Raises:
        DataError: one line: the set, the fault, the mend.
    """
    check_range(wanted.picture_range)
    official = {name for names in builtin._PREDEFINED_SPLITS_COCO.values() for name in names}
    roles: dict[str, set[str]] = {}
    for names, role in ((train, "train"), (test, "test")):
        for name in names:
            metadata = MetadataCatalog.get(name)
            plain = metadata.get("evaluator_type") == "coco" and metadata.get("json_file")
            if plain and not metadata.get("generator") and name not in official:
                roles.setdefault(name, set()).add(role)
    found = {}
    for name in roles:
        metadata = MetadataCatalog.get(name)
        found[name] = look_at(metadata.json_file, metadata.image_root)
        found[name].refuse(f"data set {name!r}", test="test" in roles[name])
    for name, findings in found.items():
        _check_one(name, findings.facts, wanted, train="train" in roles[name])
    _check_together(found)
    for name, findings in found.items():
        memory.keep(findings)
        notes, classes = list(findings.notes), len(findings.facts["categories"])
        if wanted.classes is not None and wanted.classes > classes:
            notes.append(
                f"the model has {wanted.classes} classes and the data {classes}: the others are "
                f"never seen ({wanted.classes_key})"
            )
        for note in notes:
            logging.getLogger(__name__).warning(f"data set {name!r}: {note}")


def _check_one(name: str, facts: dict, wanted: Wanted, *, train: bool) -> None:
    def refuse(text):
        raise DataError(f"data set {name!r}: {text}")

    classes = len(facts["categories"])
    if wanted.classes is not None and wanted.classes < classes:
        refuse(
            f"{classes} classes, the model has {wanted.classes}: the last ones would be taken for "
            f"background; set {wanted.classes_key} to {classes}"
        )
    if wanted.masks and facts["unmasked"]:
        share = "no" if not facts["polygons"] + facts["rle"] else f"{facts['unmasked']} without a"
        refuse(
            f"{share} mask (annotation {facts['first_unmasked']}) with {wanted.masks_key} on: turn "
            "it off to train on boxes alone, or add 'segmentation'"
        )
    if wanted.masks and train and facts["rle"] and wanted.mask_format == "polygon":
        refuse(
            f"{facts['rle']} masks are run lengths (annotation {facts['first_rle']}): set "
            f"{wanted.format_key} to bitmask"
        )
    if facts["deep"] and not wanted.picture_range:
        (file, mode), (low, high) = facts["first_deep"], facts["deep_range"]
        refuse(
            f"{facts['deep']} pictures of more than 8 bits ({file}, {mode}, values {low:g} to "
            f"{high:g}) would be cut at 255: set INPUT.PICTURE_RANGE to the values that become "
            "black and white, such as [0, 4095]"
        )
    if wanted.keypoints:
        _check_keypoints(facts, wanted, refuse)


def _check_keypoints(facts: dict, wanted: Wanted, refuse) -> None:
    names = facts["keypoint_names"]
    if not facts["keypoints"]:
        refuse("no keypoints with MODEL.KEYPOINT_ON: turn it off, or add 'keypoints'")
    if facts["keypoints"] < facts["objects"]:
        refuse(
            f"{facts['objects'] - facts['keypoints']} objects without keypoints: write them with "
            "visibility 0"
        )
    counts = sorted(set(facts["points"]) | ({len(names)} if names else set()))
    if counts != [wanted.keypoints]:
        refuse(
            f"{' and '.join(map(str, counts))} keypoints, the model has {wanted.keypoints}: set "
            "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS"
        )
    if (wanted.sigmas or 17) != wanted.keypoints:
        refuse(
            f"evaluation has {wanted.sigmas or 17} numbers for {wanted.keypoints} keypoints: set "
            "TEST.KEYPOINT_OKS_SIGMAS to one each"
        )
    if wanted.flip and not names:
        refuse(
            "the category does not name its keypoints, so a mirrored picture's cannot be told: "
            "list them as 'keypoints' (left_eye, right_eye, ...), or set INPUT.RANDOM_FLIP none"
        )


def _check_together(found: dict[str, Findings]) -> None:
    """Classes go by their place in the list, which must be the same in all sets of a run."""
    classes = {name: [text for _, text in f.facts["categories"]] for name, f in found.items()}
    first = next(iter(classes), None)
    for name in classes:
        if classes[name] != classes[first]:
            only = sorted(set(classes[name]) ^ set(classes[first]))
            differ = f"{only[0]!r} is in one alone" if only else "they come in another order"
            raise DataError(
                f"data sets {first!r} and {name!r} have other categories: {differ}; list the "
                "same categories with the same ids in both"
            )
