"""What a ResNet or a FPN detector of a given kind must hold: names and shapes.

They are those of Detectron2's own model, built on the meta device from what a few tensors tell of
its size, so that a missing, extra or transposed tensor is found before anything is loaded. Names
are Detectron2's, without the ``backbone.bottom_up.`` prefix for backbones.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling import build_backbone, build_proposal_generator, build_roi_heads
from detectron2.modeling.backbone import build_resnet_backbone
from torch import nn

from ..layers import BatchChannelNorm2d
from .errors import CheckpointError, shortened

BOTTOM_UP = "backbone.bottom_up."

_DEPTHS = {  # (bottleneck?, blocks per stage) -> depth
    (False, (2, 2, 2, 2)): 18,
    (False, (3, 4, 6, 3)): 34,
    (True, (3, 4, 6, 3)): 50,
    (True, (3, 4, 23, 3)): 101,
    (True, (3, 8, 36, 3)): 152,
}
_GROUPINGS = {(1, 64), (1, 128), (32, 4), (32, 8), (64, 4)}  # groups, width per group
# A counter that Detectron2's frozen norms do not keep; never a reason to refuse a file.
OPTIONAL_SUFFIX = "num_batches_tracked"


def norm_kind(names) -> str | None:
    """Tells the kind of norm from Detectron2 names, None where there is no norm.

    "BN" is with its frozen, synchronized and estimated relatives, "GN" is any pair of per-channel
    weight and bias.
    """
    suffixes = {name.partition(".norm.")[2] for name in names if ".norm." in name}
    if "bn.running_mean" in suffixes:
        return "BCN"
    if "running_mean" in suffixes:
        return "BN"
    return "GN" if "weight" in suffixes else None


@dataclass(frozen=True)
class BackboneLayout:
    """Description of one ResNet.

    Attributes:
        depth: 18, 34, 50, 101 or 152.
        groups, width_per_group: as in ``MODEL.RESNETS``.
        norm: "GN", "BCN" or "BN".
        norm_groups: groups of the norm, from the group affine's length (BCN only; else 32).
        deeplab: whether the stem is DeepLab's, of three convolutions.
    """

    depth: int
    groups: int
    width_per_group: int
    norm: str
    norm_groups: int = 32
    deeplab: bool = False

    @property
    def name(self) -> str:
        """Short name such as ``R-50`` or ``X-101-32x4d``."""
        kind = " (DeepLab)" if self.deeplab else ""
        if self.groups == 1:
            return f"R-{self.depth}{kind}"
        return f"X-{self.depth}-{self.groups}x{self.width_per_group}d{kind}"

    def config(self) -> CfgNode:
        """Detectron2's config of the ResNet with stock norms."""
        cfg = get_cfg()
        resnets = cfg.MODEL.RESNETS
        resnets.DEPTH, resnets.NUM_GROUPS = self.depth, self.groups
        resnets.WIDTH_PER_GROUP = self.width_per_group
        resnets.NORM = "GN" if self.norm == "GN" else "BN"
        resnets.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
        if self.depth < 50:
            resnets.RES2_OUT_CHANNELS = 64
        if self.deeplab:
            resnets.STEM_OUT_CHANNELS = 128
        cfg.MODEL.BACKBONE.FREEZE_AT = 0
        return cfg

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """All names and shapes, ``num_batches_tracked`` included."""
        cfg = self.config()
        with torch.device("meta"):
            model = build_resnet_backbone(cfg, ShapeSpec(channels=3))
            if self.deeplab:
                norm = cfg.MODEL.RESNETS.NORM
                for number, (inputs, out) in enumerate(((3, 64), (64, 64), (64, 128)), 1):
                    conv = Conv2d(inputs, out, 3, bias=False, norm=get_norm(norm, out))
                    setattr(model.stem, f"conv{number}", conv)
            if self.norm == "BCN":
                for conv in [m for m in model.modules() if isinstance(m, Conv2d)]:
                    conv.norm = BatchChannelNorm2d(conv.out_channels, self.norm_groups)
        return _shapes(model)


def _shapes(model: nn.Module, prefix: str = "") -> dict[str, tuple[int, ...]]:
    return {prefix + name: tuple(value.shape) for name, value in model.state_dict().items()}


def infer_backbone(state: Mapping[str, torch.Tensor]) -> BackboneLayout:
    """Works out which ResNet a state dict of bare Detectron2 names belongs to.

    Only names and two shapes are looked at; see `check_shapes`.
    """
    blocks = {match[0] for name in state if (match := re.match(r"res[2-5]\.\d+\.", name))}
    stages = [block.partition(".")[0] for block in blocks]
    counts = tuple(stages.count(f"res{stage}") for stage in (2, 3, 4, 5))
    bottleneck = "res2.0.conv3.weight" in state
    depth = _DEPTHS.get((bottleneck, counts))
    if depth is None:
        kind = "bottleneck" if bottleneck else "basic"
        raise CheckpointError(f"no known ResNet has {counts} {kind} blocks in res2..res5")
    kind = norm_kind(state)
    if kind is None:
        raise CheckpointError("the backbone has no norm parameters: not a GN, BN or BCN ResNet")
    grouping = (1, 64)
    if bottleneck:
        conv2 = state.get("res2.0.conv2.weight")
        shape = () if conv2 is None else tuple(conv2.shape)
        if len(shape) == 4 and shape[1]:
            grouping = shape[0] // shape[1], shape[1] if shape[0] > shape[1] else shape[0]
        if len(shape) != 4 or grouping not in _GROUPINGS:
            raise CheckpointError(
                f"res2.0.conv2.weight has shape {shape}, which no known ResNet or ResNeXt has"
            )
    affine = state.get("stem.conv1.norm.weight")
    groups = affine.numel() if kind == "BCN" and affine is not None else 32
    if kind == "BCN" and (not groups or 64 % groups):
        raise CheckpointError(f"BCN with {groups} groups, which do not divide 64 channels")
    return BackboneLayout(depth, *grouping, kind, groups, "stem.conv3.weight" in state)


def check_shapes(state: Mapping[str, torch.Tensor], expected: Mapping[str, tuple]) -> None:
    """Refuses a state dict with missing or extra names, or shapes that differ from a table's."""
    missing = [n for n in expected if n not in state and not n.endswith(OPTIONAL_SUFFIX)]
    extra = [n for n in state if n not in expected]
    wrong = [
        f"{n} is {tuple(state[n].shape)} instead of {tuple(shape)}"
        for n, shape in expected.items()
        if n in state and tuple(state[n].shape) != tuple(shape)
    ]
    faults = [
        f"{len(found)} {what}: {shortened(found)}"
        for what, found in (
            ("parameters are missing", missing),
            ("are not part of this architecture", extra),
            ("have the wrong shape", wrong),
        )
        if found
    ]
    if faults:
        raise CheckpointError("; ".join(faults))


def split_backbone(names) -> tuple[str, dict[str, str]]:
    """Finds the ResNet among Detectron2 names: its kind, and bare name -> name as given.

    The kind is "fpn", "c4", "bare" or, without a ResNet, "". A C4 detector's ``roi_heads.res5``
    counts as part of its ResNet.
    """
    names = list(names)
    for kind, prefix in (
        ("fpn", r"backbone\.bottom_up\."),
        ("c4", r"(?:backbone\.|roi_heads\.(?=res5))"),
        ("bare", ""),
    ):
        pattern = re.compile(rf"{prefix}((?:stem|res[2-5])\..+)")
        found = {match[1]: match[0] for name in names if (match := pattern.fullmatch(name))}
        if found:
            return kind, found
    return "", {}


def detector_shapes(rest: Mapping[str, torch.Tensor], layout: BackboneLayout) -> dict[str, tuple]:
    """Names and shapes of FPN, RPN, box head and mask head of a two-stage detector.

    Widths that a configuration may choose (FPN channels, fc size, classes, anchors) are taken
    from one tensor each, which must be there; everything else is Detectron2's.
    """

    def size(name, dim=0):
        if name not in rest:
            raise CheckpointError(f"the detector has no {name}")
        if rest[name].dim() <= dim or not rest[name].numel():
            raise CheckpointError(f"{name} has shape {tuple(rest[name].shape)}: not a detector's")
        return rest[name].shape[dim]

    def count(stem):
        pattern = re.compile(re.escape(f"roi_heads.{stem}") + r"\d+\.weight")
        return sum(pattern.fullmatch(name) is not None for name in rest)

    cfg = layout.config()
    model = cfg.MODEL
    model.BACKBONE.NAME, model.PROPOSAL_GENERATOR.NAME = "build_resnet_fpn_backbone", "RPN"
    model.FPN.IN_FEATURES = model.RESNETS.OUT_FEATURES
    model.FPN.OUT_CHANNELS = size("backbone.fpn_lateral2.weight")
    model.RPN.IN_FEATURES = ["p2", "p3", "p4", "p5", "p6"]
    anchors = size("proposal_generator.rpn_head.objectness_logits.weight")
    model.ANCHOR_GENERATOR.SIZES = [[32], [64], [128], [256], [512]]
    model.ANCHOR_GENERATOR.ASPECT_RATIOS = [[1.0] * anchors]
    model.ROI_HEADS.NAME, model.ROI_HEADS.IN_FEATURES = "StandardROIHeads", ["p2", "p3", "p4", "p5"]
    classes = size("roi_heads.box_predictor.cls_score.weight") - 1
    model.ROI_HEADS.NUM_CLASSES = classes

    def norm(part):
        return norm_kind(name for name in rest if part in name) or ""

    model.FPN.NORM = norm("fpn_")
    box, mask = model.ROI_BOX_HEAD, model.ROI_MASK_HEAD
    box.NAME, box.POOLER_RESOLUTION, box.NORM = "FastRCNNConvFCHead", 7, norm("box_head")
    box.NUM_CONV, box.NUM_FC = count("box_head.conv"), count("box_head.fc")
    if not box.NUM_CONV + box.NUM_FC or classes < 1:
        raise CheckpointError("the detector has no box head or no classes")
    for number, key in ((box.NUM_CONV, "conv"), (box.NUM_FC, "fc")):
        if number:
            box[f"{key.upper()}_DIM"] = size(f"roi_heads.box_head.{key}1.weight")
    box.CLS_AGNOSTIC_BBOX_REG = size("roi_heads.box_predictor.bbox_pred.weight") == 4
    model.MASK_ON = any(name.startswith("roi_heads.mask_head.") for name in rest)
    if model.MASK_ON:
        mask.NAME, mask.POOLER_RESOLUTION = "MaskRCNNConvUpsampleHead", 14
        mask.NORM = norm("mask_head")
        mask.NUM_CONV = count("mask_head.mask_fcn")
        mask.CONV_DIM = size("roi_heads.mask_head.deconv.weight", 1)
        mask.CLS_AGNOSTIC_MASK = size("roi_heads.mask_head.predictor.weight") == 1
    try:
        with torch.device("meta"):
            backbone = build_backbone(cfg)
            levels = backbone.output_shape()
            shapes = _shapes(backbone, "backbone.")
            shapes |= _shapes(build_proposal_generator(cfg, levels), "proposal_generator.")
            shapes |= _shapes(build_roi_heads(cfg, levels), "roi_heads.")
    except ValueError as error:  # channels that the groups of a norm do not divide
        raise CheckpointError(f"no detector has such widths: {error}") from error
    return {n: shape for n, shape in shapes.items() if not n.startswith(BOTTOM_UP)}
