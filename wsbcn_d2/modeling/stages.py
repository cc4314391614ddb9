"""ResNet stages from explicit arguments, for LazyConfig.

Detectron2's ``ResNet.make_default_stages`` fixes the width of the bottlenecks, so it has no
ResNeXt; its config-driven builder has, and this follows that one.
"""

from collections.abc import Callable

from detectron2.modeling.backbone.resnet import BasicBlock, BottleneckBlock, ResNet
from torch import nn

__all__ = ["make_resnet_stages"]


def make_resnet_stages(
    depth: int,
    *,
    norm: str | Callable[[int], nn.Module],
    num_groups: int = 1,
    width_per_group: int = 64,
    stride_in_1x1: bool = False,
) -> list:
    """The four stages of a ResNet or ResNeXt, for ``detectron2.modeling.backbone.ResNet``.

    Args:
        depth: 18, 34, 50, 101 or 152.
        norm (str or callable): of every convolution.
        num_groups, width_per_group: 32 and 4 for a ResNeXt 32x4d; depth 50 and up.
        stride_in_1x1: stride in the first, not the 3x3, convolution; depth 50 and up.

    Returns:
        list[list[CNNBlockBase]]

    Raises:
        ValueError: for another depth.
    """

    def bottleneck(*, bottleneck_channels, **options):
        return BottleneckBlock(
            bottleneck_channels=bottleneck_channels // 64 * num_groups * width_per_group,
            num_groups=num_groups,
            stride_in_1x1=stride_in_1x1,
            **options,
        )

    if depth not in (18, 34, 50, 101, 152):
        raise ValueError(f"no ResNet of depth {depth}: use one of 18, 34, 50, 101, 152")
    return ResNet.make_default_stages(depth, BasicBlock if depth < 50 else bottleneck, norm=norm)
