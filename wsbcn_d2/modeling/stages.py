"""ResNet stages from explicit arguments, for LazyConfig.

Detectron2's ``ResNet.make_default_stages`` fixes the width of the bottlenecks, so it has no
ResNeXt; its config-driven builder has, and this follows that one.
"""

from collections.abc import Callable

from detectron2.modeling.backbone.resnet import BasicBlock, BottleneckBlock, ResNet
from torch import nn

__all__ = ["make_resnet_stages"]

_BLOCKS = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}


def make_resnet_stages(
    depth: int,
    *,
    norm: str | Callable[[int], nn.Module],
    num_groups: int = 1,
    width_per_group: int = 64,
    stride_in_1x1: bool = False,
    stem_out_channels: int = 64,
) -> list:
    """The four stages of a ResNet or ResNeXt, for ``detectron2.modeling.backbone.ResNet``.

    Args:
        depth: 18, 34, 50, 101 or 152.
        norm (str or callable): of every convolution.
        num_groups, width_per_group: 32 and 4 for a ResNeXt 32x4d; depth 50 and up.
        stride_in_1x1: stride in the first, not the 3x3, convolution; depth 50 and up.
        stem_out_channels: channels that enter the first stage.

    Returns:
        list[list[CNNBlockBase]]

    Raises:
        ValueError: for another depth.
    """
    if depth not in _BLOCKS:
        raise ValueError(f"no ResNet of depth {depth}: use one of {', '.join(map(str, _BLOCKS))}")
    bottleneck = depth >= 50
    in_channels, out_channels = stem_out_channels, 256 if bottleneck else 64
    width = num_groups * width_per_group
    stages = []
    for index, num_blocks in enumerate(_BLOCKS[depth]):
        options = {}
        if bottleneck:
            options = {
                "bottleneck_channels": width << index,
                "num_groups": num_groups,
                "stride_in_1x1": stride_in_1x1,
            }
        stages.append(
            ResNet.make_stage(
                BottleneckBlock if bottleneck else BasicBlock,
                num_blocks,
                stride_per_block=[1 if index == 0 else 2] + [1] * (num_blocks - 1),
                in_channels=in_channels,
                out_channels=out_channels,
                norm=norm,
                **options,
            )
        )
        in_channels, out_channels = out_channels, out_channels * 2
    return stages
