"""Backbones whose normalized convolutions are weight-standardized.

Each is Detectron2's own builder followed by :meth:`WSConv2d.convert`. The norm is that of
``MODEL.RESNETS.NORM`` and ``MODEL.FPN.NORM``, the rest of the architecture (depth, groups, width,
FREEZE_AT, ...) that of Detectron2's keys.
"""

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from detectron2.modeling.backbone import build_resnet_backbone
from detectron2.modeling.backbone.fpn import (
    build_resnet_fpn_backbone,
    build_retinanet_resnet_fpn_backbone,
)

from .build import standardize_by_config

__all__ = [
    "build_ws_resnet_backbone",
    "build_ws_resnet_fpn_backbone",
    "build_ws_retinanet_resnet_fpn_backbone",
]


@BACKBONE_REGISTRY.register()
def build_ws_resnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """A ResNet with WS: :func:`detectron2.modeling.backbone.build_resnet_backbone`, converted.

    Raises:
        ValueError: if a stage is deformable, a norm does not fit its channels, or the config asks
            for a stem that Detectron2's builder does not have (DeepLab's).
    """
    stem = cfg.MODEL.RESNETS.get("STEM_TYPE", "basic")
    if stem != "basic":
        raise ValueError(
            f"build_ws_resnet_backbone has no stem of MODEL.RESNETS.STEM_TYPE {stem!r}: set "
            "MODEL.BACKBONE.NAME to build_resnet_deeplab_backbone and MODEL.WS.PARTS to "
            "['backbone']"
        )
    return standardize_by_config(build_resnet_backbone(cfg, input_shape), cfg)


@BACKBONE_REGISTRY.register()
def build_ws_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """A ResNet-FPN with WS in the ResNet and, where ``MODEL.FPN.NORM`` is set, in the FPN.

    Raises:
        ValueError: as :func:`build_ws_resnet_backbone`.
    """
    return standardize_by_config(build_resnet_fpn_backbone(cfg, input_shape), cfg)


@BACKBONE_REGISTRY.register()
def build_ws_retinanet_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """The ResNet-FPN (P3-P7) of RetinaNet with WS; P6 and P7, which have no norm, stay plain.

    Raises:
        ValueError: as :func:`build_ws_resnet_backbone`.
    """
    return standardize_by_config(build_retinanet_resnet_fpn_backbone(cfg, input_shape), cfg)
