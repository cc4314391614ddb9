"""The authors' COCO detectors: names of their maskrcnn-benchmark fork."""

from collections.abc import Mapping

import torch

from .errors import CheckpointError
from .imagenet import resnet_rules
from .layout import BOTTOM_UP
from .rules import Mapped, Rule, apply_rules

CELL_ANCHORS = "anchors are computed, not stored; MODEL.ANCHOR_GENERATOR makes them"


def background_last(tensor: torch.Tensor) -> torch.Tensor:
    """Class scores (K+1, ...) with the background in row 0 -> in the last row."""
    return torch.cat([tensor[1:], tensor[:1]])


def boxes_without_background(tensor: torch.Tensor) -> torch.Tensor:
    """Class-specific box deltas (4(K+1), ...) with the background first -> (4K, ...)."""
    return tensor[4:].clone()


def masks_without_background(tensor: torch.Tensor) -> torch.Tensor:
    """Mask logits (K+1, ...) with the background first -> (K, ...)."""
    return tensor[1:].clone()


def check_class_rows(classes: int, boxes: int, masks: int | None) -> None:
    """Checks that a background-first detector's predictors have K+1, 4(K+1) and K+1 rows.

    Raises:
        CheckpointError: other rows, for which the slicing above would shift the classes.
    """
    if boxes != 4 * classes or masks not in (None, classes):
        raise CheckpointError(
            f"{classes} class rows with {boxes} box rows and {masks} mask rows: expected "
            f"{4 * classes} and {classes} for a detector whose first class is the background"
        )


def _fpn(kind):
    return lambda m: f"backbone.fpn_{kind}{int(m[1]) + 1}."


def _box_conv(kind):
    # The feature extractor is a Sequential of (conv, norm, ReLU) triples.
    offset = {"weight": 0, "norm": 1}[kind]

    def rename(match):
        index = int(match[1]) - offset
        if index % 3:
            raise CheckpointError(f"{match[0]} is no {kind} of the four box-head convs")
        tail = "weight" if kind == "weight" else f"norm.{match[2]}"
        return f"roi_heads.box_head.conv{index // 3 + 1}.{tail}"

    return rename


_BOX = r"roi_heads\.box\.feature_extractor\."
_MASK = r"roi_heads\.mask\.feature_extractor\."
_RULES = [
    Rule(r"(?:rpn\.)?anchor_generator\.cell_anchors\.\d+", None, CELL_ANCHORS),
    *resnet_rules("backbone.body.", "stem.", BOTTOM_UP),
    Rule(r"backbone\.fpn\.fpn_inner([1-4])\.0\.weight", lambda m: _fpn("lateral")(m) + "weight"),
    Rule(
        r"backbone\.fpn\.fpn_inner([1-4])\.1\.(weight|bias)",
        lambda m: _fpn("lateral")(m) + "norm." + m[2],
    ),
    Rule(r"backbone\.fpn\.fpn_layer([1-4])\.0\.weight", lambda m: _fpn("output")(m) + "weight"),
    Rule(
        r"backbone\.fpn\.fpn_layer([1-4])\.1\.(weight|bias)",
        lambda m: _fpn("output")(m) + "norm." + m[2],
    ),
    Rule(r"rpn\.head\.conv\.(weight|bias)", r"proposal_generator.rpn_head.conv.\1"),
    Rule(
        r"rpn\.head\.cls_logits\.(weight|bias)",
        r"proposal_generator.rpn_head.objectness_logits.\1",
    ),
    Rule(r"rpn\.head\.bbox_pred\.(weight|bias)", r"proposal_generator.rpn_head.anchor_deltas.\1"),
    Rule(_BOX + r"xconvs\.(0|3|6|9)\.weight", _box_conv("weight")),
    Rule(_BOX + r"xconvs\.(1|4|7|10)\.(weight|bias)", _box_conv("norm")),
    Rule(_BOX + r"fc6\.(weight|bias)", r"roi_heads.box_head.fc1.\1"),
    Rule(
        r"roi_heads\.box\.predictor\.cls_score\.(weight|bias)",
        r"roi_heads.box_predictor.cls_score.\1",
        value=background_last,
    ),
    Rule(
        r"roi_heads\.box\.predictor\.bbox_pred\.(weight|bias)",
        r"roi_heads.box_predictor.bbox_pred.\1",
        value=boxes_without_background,
    ),
    Rule(_MASK + r"mask_fcn([1-4])\.0\.weight", r"roi_heads.mask_head.mask_fcn\1.weight"),
    Rule(_MASK + r"mask_fcn([1-4])\.1\.(weight|bias)", r"roi_heads.mask_head.mask_fcn\1.norm.\2"),
    Rule(
        r"roi_heads\.mask\.predictor\.conv5_mask\.(weight|bias)", r"roi_heads.mask_head.deconv.\1"
    ),
    Rule(
        r"roi_heads\.mask\.predictor\.mask_fcn_logits\.(weight|bias)",
        r"roi_heads.mask_head.predictor.\1",
        value=masks_without_background,
    ),
]


def convert_mrb(state: Mapping[str, torch.Tensor]) -> Mapped:
    """Renames an authors' Faster or Mask R-CNN and puts the background class last.

    Args:
        state: ``backbone.body.stem.conv1.weight``, ... without ``module.``.

    Returns:
        Mapped, with Detectron2's names for a FPN detector.

    Raises:
        CheckpointError: unknown keys, or predictor rows that do not fit together.
    """

    def rows(name):
        tensor = state.get(name)
        return None if tensor is None else tensor.shape[0]

    for kind in ("weight", "bias"):
        classes = rows(f"roi_heads.box.predictor.cls_score.{kind}")
        boxes = rows(f"roi_heads.box.predictor.bbox_pred.{kind}")
        if classes is None or boxes is None:
            raise CheckpointError(f"the box predictor's {kind} is missing: not a whole detector")
        check_class_rows(classes, boxes, rows(f"roi_heads.mask.predictor.mask_fcn_logits.{kind}"))
    return apply_rules(state, _RULES, "maskrcnn-benchmark")
