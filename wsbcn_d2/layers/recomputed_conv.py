"""A convolution by a function of its weight, which is computed again for backward, not kept.

Autograd would keep the standardized copy of every weight from forward to backward: 126 MB in an
R-50-FPN Mask R-CNN, 6 % of the memory of a step on one image. Standardizing once more takes less
than 1 % of the convolution's own backward.
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from .backend import requested_backend, supports

__all__ = ["recomputed_conv2d", "recomputes"]


def recomputes(conv: nn.Conv2d, x: torch.Tensor) -> bool:
    """Whether :func:`recomputed_conv2d` serves this input; only training gains by it.

    Under autocast nothing is to be gained: kept is the weight's copy in half precision.
    """
    return (
        torch.is_grad_enabled()
        and conv.weight.requires_grad
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and x.numel() > 0
        and x.dtype == conv.weight.dtype
        and isinstance(conv.padding, tuple)
        and supports(x, conv.weight.dtype)
        and not torch.is_autocast_enabled(x.device.type)
        and requested_backend() != "off"
    )


def recomputed_conv2d(
    conv: nn.Conv2d, x: torch.Tensor, weight_of: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """``F.conv2d(x, weight_of(conv.weight), ...)`` with the other arguments of ``conv``.

    Args:
        conv: whose ``padding`` is in numbers.
        x: shape (N, C_in, H, W), of the type of the weight.
        weight_of: a differentiable function of the weight alone.

    Returns:
        Tensor of shape (N, C_out, H', W'), bit by bit that of the plain call, as its gradients.
    """
    how = (conv.stride, conv.padding, conv.dilation, conv.groups)
    return _RecomputedConv.apply(x, conv.weight, conv.bias, weight_of, how)


class _RecomputedConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, weight_of, how):
        ctx.save_for_backward(x, weight, bias)
        ctx.weight_of, ctx.how = weight_of, how
        return F.conv2d(x, weight_of(weight), bias, *how)

    @staticmethod
    def backward(ctx, dy):
        x, weight, bias = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():  # create_graph=True
            y = F.conv2d(x, ctx.weight_of(weight), bias, *ctx.how)
            inputs = [t for t, need in zip((x, weight, bias), needs, strict=True) if need]
            grads = iter(torch.autograd.grad(y, inputs, dy, create_graph=True))
            return *(next(grads) if need else None for need in needs), None, None
        stride, padding, dilation, groups = ctx.how
        with torch.enable_grad():
            leaf = weight.detach().requires_grad_(needs[1])
            used = ctx.weight_of(leaf)
        dx, dw, db = torch.ops.aten.convolution_backward(
            dy, x, used.detach(), None if bias is None else bias.shape,
            stride, padding, dilation, False, (0, 0), groups, needs,
        )  # fmt: skip
        if needs[1]:
            (dw,) = torch.autograd.grad(used, leaf, dw)
        return dx, dw, db, None, None
