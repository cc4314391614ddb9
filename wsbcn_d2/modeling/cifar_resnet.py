"""The ResNets of CIFAR (He et al., "Deep Residual Learning", section 4.2) from Detectron2's blocks.

A 3x3 stem without pooling and three stages of 2n basic convolutions each: depth 6n + 2. Widths are
those of the config and not 16, 32, 64: Detectron2's GN and this project's BCN have 32 groups.
"""

from collections.abc import Callable

import torch
from detectron2.config import CfgNode
from detectron2.layers import CNNBlockBase, Conv2d, ShapeSpec, get_norm
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone.resnet import BasicBlock, ResNet
from fvcore.nn import weight_init
from torch import nn
from torch.nn import functional as F

from .build import standardize_by_config

__all__ = ["CifarStem", "build_cifar_resnet_backbone", "build_ws_cifar_resnet_backbone"]


class CifarStem(CNNBlockBase):
    """A 3x3 convolution at full resolution, norm and ReLU."""

    def __init__(self, in_channels: int, out_channels: int, norm: str | Callable[[int], nn.Module]):
        super().__init__(in_channels, out_channels, stride=1)
        self.conv1 = Conv2d(
            in_channels,
            out_channels,
            kernel_size=3,
            padding=1,
            bias=False,
            norm=get_norm(norm, out_channels),
        )
        weight_init.c2_msra_fill(self.conv1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, in_channels, H, W) to (N, out_channels, H, W)."""
        return F.relu(self.conv1(x))


@BACKBONE_REGISTRY.register()
def build_cifar_resnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ResNet:
    """A CIFAR ResNet of ``MODEL.RESNETS.DEPTH`` 20, 32, 44, 56, 110, ...

    Read are also ``STEM_OUT_CHANNELS``, ``RES2_OUT_CHANNELS`` (doubled in res3 and res4), ``NORM``
    and ``MODEL.BACKBONE.FREEZE_AT``. The output is res4.

    Raises:
        ValueError: for a depth that is not 6n + 2.
    """
    options = cfg.MODEL.RESNETS
    blocks, rest = divmod(options.DEPTH - 2, 6)
    if rest or blocks < 1:
        raise ValueError(
            f"no CIFAR ResNet of depth {options.DEPTH}: MODEL.RESNETS.DEPTH must be 6n + 2, such "
            "as 20, 56 or 110"
        )
    channels = [options.STEM_OUT_CHANNELS, *(options.RES2_OUT_CHANNELS << i for i in range(3))]
    stages = [
        ResNet.make_stage(
            BasicBlock,
            blocks,
            stride_per_block=[1 if i == 0 else 2] + [1] * (blocks - 1),
            in_channels=channels[i],
            out_channels=channels[i + 1],
            norm=options.NORM,
        )
        for i in range(3)
    ]
    stem = CifarStem(input_shape.channels, channels[0], options.NORM)
    freeze_at = cfg.MODEL.BACKBONE.FREEZE_AT
    return ResNet(stem, stages, out_features=["res4"], freeze_at=freeze_at)


@BACKBONE_REGISTRY.register()
def build_ws_cifar_resnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ResNet:
    """:func:`build_cifar_resnet_backbone` with WS in every convolution."""
    return standardize_by_config(build_cifar_resnet_backbone(cfg, input_shape), cfg)
