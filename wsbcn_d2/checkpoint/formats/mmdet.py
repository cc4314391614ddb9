"""mmdetection's GN+WS Faster and Mask R-CNN, versions 2 and later and version 1.

Version 1 keeps the background in row 0 of every predictor, later ones last and only in the class
scores. Which one a file is shows in its names, as ``roi_head.`` came with the new order, and its
shapes have to agree. (The upgrade script that mmdetection ships cuts the
*biases* of the box and mask predictors at the wrong end; here weights and biases are cut alike. A
file that has been through that script cannot be told from a sound one.)
"""

from collections.abc import Mapping

import torch

from ..errors import CheckpointError
from ..layout import BOTTOM_UP
from .imagenet import resnet_rules, revive_counters
from .rules import Mapped, Rule, apply_rules


def _conv_modules(pattern, name, first):
    """Rule for mmcv's ConvModules, numbered from 0; ours are called ``name`` from ``first`` on."""
    return Rule(
        rf"{pattern}\.(?:conv\.(weight|bias)|(?:gn|bn|norm)\.(.+))",
        lambda m: f"{name}{int(m[1]) + first}." + (m[2] or f"norm.{m[3]}"),
    )


def _background_last(tensor):
    """Class scores (K+1, ...) with the background in row 0 -> in the last row."""
    return torch.cat([tensor[1:], tensor[:1]])


def _without_background(agnostic):
    """Rows of boxes, 4(K+1), or masks, K+1, without those of class 0; agnostic ones stay."""
    return lambda tensor: tensor if len(tensor) == agnostic else tensor[agnostic:].clone()


def _rules(background_first):
    move = (None, None, None)
    if background_first:
        move = (_background_last, _without_background(4), _without_background(1))
    box, mask = r"(?:roi_head\.)?bbox_head\.", r"(?:roi_head\.)?mask_head\."
    param = r"\.(weight|bias)"
    return [
        Rule(r"data_preprocessor\..+", None, "pixel statistics come from the config"),
        *resnet_rules("backbone.", BOTTOM_UP),
        _conv_modules(r"neck\.lateral_convs\.([0-3])", "backbone.fpn_lateral", 2),
        _conv_modules(r"neck\.fpn_convs\.([0-3])", "backbone.fpn_output", 2),
        Rule(rf"rpn_head\.rpn_conv{param}", r"proposal_generator.rpn_head.conv.\1"),
        Rule(rf"rpn_head\.rpn_cls{param}", r"proposal_generator.rpn_head.objectness_logits.\1"),
        Rule(rf"rpn_head\.rpn_reg{param}", r"proposal_generator.rpn_head.anchor_deltas.\1"),
        _conv_modules(rf"{box}shared_convs\.(\d)", "roi_heads.box_head.conv", 1),
        Rule(
            rf"{box}shared_fcs\.(\d){param}",
            lambda m: f"roi_heads.box_head.fc{int(m[1]) + 1}.{m[2]}",
        ),
        Rule(rf"{box}fc_cls{param}", r"roi_heads.box_predictor.cls_score.\1", value=move[0]),
        Rule(rf"{box}fc_reg{param}", r"roi_heads.box_predictor.bbox_pred.\1", value=move[1]),
        _conv_modules(rf"{mask}convs\.(\d)", "roi_heads.mask_head.mask_fcn", 1),
        Rule(rf"{mask}upsample{param}", r"roi_heads.mask_head.deconv.\1"),
        Rule(rf"{mask}conv_logits{param}", r"roi_heads.mask_head.predictor.\1", value=move[2]),
    ]


def _rows(state, name, kind):
    for prefix in ("roi_head.", ""):
        if (tensor := state.get(f"{prefix}{name}.{kind}")) is not None:
            return len(tensor) if tensor.dim() else 0
    return None


def background_first(state: Mapping[str, torch.Tensor]) -> bool:
    """Tells a version 1 detector (background in row 0) from a later one, by names and rows."""
    first = not any(name.startswith("roi_head.") for name in state)
    for kind in ("weight", "bias"):
        classes = _rows(state, "bbox_head.fc_cls", kind)
        boxes = _rows(state, "bbox_head.fc_reg", kind)
        masks = _rows(state, "mask_head.conv_logits", kind)
        if not classes or boxes is None:
            raise CheckpointError(f"fc_cls or fc_reg has no {kind}: not a whole detector")
        rows = classes if first else classes - 1
        if boxes not in (4, 4 * rows) or masks not in (None, 1, rows):
            raise CheckpointError(
                f"{classes} class, {boxes} box and {masks} mask rows fit no mmdetection version "
                f"with such names; expected {4 * rows} and {rows} of version {1 if first else 2}"
            )
    return first


def convert_mmdet(state: Mapping[str, torch.Tensor]) -> Mapped:
    """Renames a mmdetection Faster or Mask R-CNN; version 1 predictors get the background last.

    Names are ``backbone.conv1.weight``, ``neck...``, ``roi_head...`` (version 1 without that
    prefix); they become Detectron2's for a FPN detector.
    """
    first = background_first(state)
    mapped = apply_rules(state, _rules(first), "mmdetection")
    revive_counters(mapped, state)
    if first:
        mapped.notes.append("version 1: background moved from first to last")
    return mapped
