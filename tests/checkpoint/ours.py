"""Detectron2 models of this project that the converted checkpoints are loaded into."""

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone
from detectron2.modeling.proposal_generator import build_proposal_generator
from detectron2.modeling.roi_heads import build_roi_heads
from torch import nn

import wsbcn_d2  # noqa: F401  (registers)
from wsbcn_d2.config import get_cfg

FORMULA = {"std": "unbiased_std", "var": "unbiased"}
# A formula that is wrong for the source, to show that the comparison can tell.
WRONG = {"std": "unbiased", "var": "unbiased_std"}


def config(depth=50, groups=1, width=64, norm="GN", formula="unbiased", mask=True, fpn_norm=None):
    """A 4conv1fc FPN detector with the part under test set explicitly."""
    cfg = get_cfg()
    ws = formula != "none"
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.WEIGHTS = ""
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.MASK_ON = mask
    cfg.MODEL.META_ARCHITECTURE = "GeneralizedRCNN"
    cfg.MODEL.BACKBONE.NAME = "build_ws_resnet_fpn_backbone" if ws else "build_resnet_fpn_backbone"
    cfg.MODEL.RESNETS.DEPTH = depth
    cfg.MODEL.RESNETS.NUM_GROUPS = groups
    cfg.MODEL.RESNETS.WIDTH_PER_GROUP = width
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = False
    cfg.MODEL.RESNETS.NORM = norm
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    if ws:
        cfg.MODEL.WS.FORMULA = formula
    cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.FPN.NORM = norm if fpn_norm is None else fpn_norm
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[32], [64], [128], [256], [512]]
    cfg.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS = [[0.5, 1.0, 2.0]]
    cfg.MODEL.PROPOSAL_GENERATOR.NAME = "RPN"
    cfg.MODEL.RPN.IN_FEATURES = ["p2", "p3", "p4", "p5", "p6"]
    cfg.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
    cfg.MODEL.ROI_HEADS.IN_FEATURES = ["p2", "p3", "p4", "p5"]
    cfg.MODEL.ROI_BOX_HEAD.NAME = "WSFastRCNNConvFCHead" if ws else "FastRCNNConvFCHead"
    cfg.MODEL.ROI_BOX_HEAD.NUM_CONV = 4
    cfg.MODEL.ROI_BOX_HEAD.NUM_FC = 1
    cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION = 7
    cfg.MODEL.ROI_BOX_HEAD.NORM = norm
    cfg.MODEL.ROI_MASK_HEAD.NAME = (
        "WSMaskRCNNConvUpsampleHead" if ws else "MaskRCNNConvUpsampleHead"
    )
    cfg.MODEL.ROI_MASK_HEAD.NUM_CONV = 4
    cfg.MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION = 14
    cfg.MODEL.ROI_MASK_HEAD.NORM = norm
    return cfg


class _SkipInit(torch.overrides.TorchFunctionMode):
    """Leaves parameters as they are: they are about to be loaded, and filling them is slow."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__module__", "") == "torch.nn.init":
            return (kwargs or {}).get("tensor", args[0] if args else None)
        return func(*args, **(kwargs or {}))


class Parts(nn.Module):
    """The learned parts of a GeneralizedRCNN under its names, without data handling."""

    def __init__(self, cfg, heads=True):
        super().__init__()
        with _SkipInit():
            self.backbone = build_backbone(cfg, ShapeSpec(channels=3))
            if heads:
                shapes = self.backbone.output_shape()
                self.proposal_generator = build_proposal_generator(cfg, shapes)
                self.roi_heads = build_roi_heads(cfg, shapes)
        self.eval()

    @torch.no_grad()
    def detect(self, features, boxes, masks):
        """The same outputs as ``source_models.detector_forward`` from the same inputs."""
        backbone = self.backbone
        out = {}
        levels = self.fpn(features)
        out.update(levels)
        hidden = self.proposal_generator.rpn_head
        scores, deltas = hidden([levels["p4"]])
        out["objectness"], out["deltas"] = scores[0], deltas[0]
        x = self.roi_heads.box_head(boxes)
        out["scores"], out["boxes"] = self.roi_heads.box_predictor(x)
        if masks is not None:
            out["masks"] = self.roi_heads.mask_head.layers(masks)
        assert backbone.size_divisibility == 32
        return out

    def fpn(self, features):
        """p2..p5 of given res2..res5: the ResNet is replaced for the call."""
        bottom_up = self.backbone.bottom_up
        names = ("res2", "res3", "res4", "res5")

        def given(_):
            return dict(zip(names, features, strict=True))

        original, bottom_up.forward = bottom_up.forward, given
        try:
            levels = self.backbone(features[0])
        finally:
            bottom_up.forward = original
        return {name: levels[name] for name in ("p2", "p3", "p4", "p5")}


def bottom_up(cfg):
    """A ResNet alone, with FPN detector names via its parent."""
    return Parts(cfg, heads=False).backbone.bottom_up


def set_formula(module, formula):
    """Changes the formula of every standardized conv in a model."""
    changed = 0
    for part in module.modules():
        if hasattr(part, "ws_formula"):
            part.ws_formula = formula
            changed += 1
    return changed
