"""mmdetection's GN+WS Faster and Mask R-CNN, versions 2 and later and version 1.

Version 1 keeps the background in row 0 of every predictor, later ones last and only in the class
scores. Which one a file is shows in its shapes. (The upgrade script that mmdetection ships cuts
the *biases* of the box and mask predictors at the wrong end; here weights and biases are cut alike.
A file that has been through that script cannot be told from a sound one.)
"""

from collections.abc import Mapping

import torch

from .errors import CheckpointError
from .imagenet import resnet_rules
from .layout import BOTTOM_UP
from .mrb import (
    background_last,
    boxes_without_background,
    check_class_rows,
    masks_without_background,
)
from .rules import Mapped, Rule, apply_rules

_CONV_NORM = r"(?:(conv)\.weight|(?:gn|bn|norm)\.(weight|bias))"


def _conv_or_norm(name):
    """New name of a mmcv ConvModule's weight or norm entry; ``name`` makes the module's name."""
    return lambda m: f"{name(int(m[1]))}." + ("weight" if m[2] else f"norm.{m[3]}")


def _rules(background_first):
    move = (
        (background_last, boxes_without_background, masks_without_background)
        if background_first
        else (None, None, None)
    )
    box, mask = r"(?:roi_head\.)?bbox_head\.", r"(?:roi_head\.)?mask_head\."
    param = r"\.(weight|bias)"
    return [
        *resnet_rules("backbone.", "", BOTTOM_UP),
        Rule(
            rf"neck\.lateral_convs\.([0-3])\.{_CONV_NORM}",
            _conv_or_norm(lambda i: f"backbone.fpn_lateral{i + 2}"),
        ),
        Rule(
            rf"neck\.fpn_convs\.([0-3])\.{_CONV_NORM}",
            _conv_or_norm(lambda i: f"backbone.fpn_output{i + 2}"),
        ),
        Rule(rf"rpn_head\.rpn_conv{param}", r"proposal_generator.rpn_head.conv.\1"),
        Rule(rf"rpn_head\.rpn_cls{param}", r"proposal_generator.rpn_head.objectness_logits.\1"),
        Rule(rf"rpn_head\.rpn_reg{param}", r"proposal_generator.rpn_head.anchor_deltas.\1"),
        Rule(
            rf"{box}shared_convs\.(\d)\.{_CONV_NORM}",
            _conv_or_norm(lambda i: f"roi_heads.box_head.conv{i + 1}"),
        ),
        Rule(
            rf"{box}shared_fcs\.(\d){param}",
            lambda m: f"roi_heads.box_head.fc{int(m[1]) + 1}.{m[2]}",
        ),
        Rule(rf"{box}fc_cls{param}", r"roi_heads.box_predictor.cls_score.\1", value=move[0]),
        Rule(rf"{box}fc_reg{param}", r"roi_heads.box_predictor.bbox_pred.\1", value=move[1]),
        Rule(
            rf"{mask}convs\.(\d)\.{_CONV_NORM}",
            _conv_or_norm(lambda i: f"roi_heads.mask_head.mask_fcn{i + 1}"),
        ),
        Rule(rf"{mask}upsample{param}", r"roi_heads.mask_head.deconv.\1"),
        Rule(rf"{mask}conv_logits{param}", r"roi_heads.mask_head.predictor.\1", value=move[2]),
    ]


def _rows(state, name, kind):
    for prefix in ("roi_head.", ""):
        if f"{prefix}{name}.{kind}" in state:
            return state[f"{prefix}{name}.{kind}"].shape[0]
    return None


def background_first(state: Mapping[str, torch.Tensor]) -> bool:
    """Tells a version 1 detector (background in row 0) from a later one, by shape.

    Args:
        state: mmdetection names -> tensors.

    Returns:
        True for version 1.

    Raises:
        CheckpointError: rows that fit neither, or weights and biases that disagree.
    """
    verdicts = set()
    for kind in ("weight", "bias"):
        classes = _rows(state, "bbox_head.fc_cls", kind)
        boxes = _rows(state, "bbox_head.fc_reg", kind)
        masks = _rows(state, "mask_head.conv_logits", kind)
        if classes is None or boxes is None:
            raise CheckpointError(f"fc_cls or fc_reg has no {kind}: not a whole detector")
        if boxes == 4 * classes:
            check_class_rows(classes, boxes, masks)
            verdicts.add(True)
        elif boxes in (4, 4 * (classes - 1)) and masks in (None, classes - 1):
            verdicts.add(False)
        else:
            raise CheckpointError(
                f"{classes} class, {boxes} box and {masks} mask rows fit no mmdetection version"
            )
    if len(verdicts) > 1:
        raise CheckpointError("the predictors' weights and biases are of different versions")
    return verdicts.pop()


def convert_mmdet(state: Mapping[str, torch.Tensor]) -> Mapped:
    """Renames a mmdetection Faster or Mask R-CNN; version 1 predictors get the background last.

    Args:
        state: ``backbone.conv1.weight``, ``neck...``, ``roi_head...`` (version 1 without that
            prefix).

    Returns:
        Mapped, with Detectron2's names for a FPN detector.

    Raises:
        CheckpointError: unknown keys or predictor rows of no known version.
    """
    first = background_first(state)
    mapped = apply_rules(state, _rules(first), "mmdetection")
    if first:
        mapped.notes.append("version 1 by its shapes: background moved from first to last")
    return mapped
