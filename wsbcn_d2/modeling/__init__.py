"""Registered backbones and heads; importing this package registers them."""

from .backbone import (
    build_ws_resnet_backbone,
    build_ws_resnet_fpn_backbone,
    build_ws_retinanet_resnet_fpn_backbone,
)
from .build import standardize
from .cifar_resnet import build_cifar_resnet_backbone, build_ws_cifar_resnet_backbone
from .classifier import ImageClassifier
from .parts import register_preparation, set_estimates, standardize_parts
from .retinanet import WSRetinaNet, WSRetinaNetHead
from .roi_heads import WSFastRCNNConvFCHead, WSMaskRCNNConvUpsampleHead, WSRes5ROIHeads

__all__ = [
    "ImageClassifier",
    "WSFastRCNNConvFCHead",
    "WSMaskRCNNConvUpsampleHead",
    "WSRes5ROIHeads",
    "WSRetinaNet",
    "WSRetinaNetHead",
    "build_cifar_resnet_backbone",
    "build_ws_cifar_resnet_backbone",
    "build_ws_resnet_backbone",
    "build_ws_resnet_fpn_backbone",
    "build_ws_retinanet_resnet_fpn_backbone",
    "set_estimates",
    "standardize",
    "standardize_parts",
]

register_preparation()
