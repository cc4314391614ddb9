"""Which convolutions of a model are reparametrized: those that carry a norm."""

from detectron2.layers import Conv2d, DeformConv, ModulatedDeformConv
from torch import nn

__all__ = ["normalized_convs"]


def normalized_convs(module: nn.Module) -> list[Conv2d]:
    """The convolutions of a module whose type is exactly Detectron2's and that carry a norm.

    Args:
        module: any module; may itself be a convolution.

    Returns:
        In the order of ``named_modules``.

    Raises:
        ValueError: for a deformable convolution that carries a norm.
    """
    convs = []
    for name, child in module.named_modules():
        if getattr(child, "norm", None) is None:
            continue
        if isinstance(child, (DeformConv, ModulatedDeformConv)):
            raise ValueError(
                f"cannot standardize the deformable convolution {name!r}: set "
                "MODEL.RESNETS.DEFORM_ON_PER_STAGE to False for every stage, or use the "
                "stock backbone"
            )
        if type(child) is Conv2d:
            convs.append(child)
    return convs
