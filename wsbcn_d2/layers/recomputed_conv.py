"""Convolutions that keep their parameters for backward, and not the weight that is made of them.

On a CPU autograd would keep the standardized copy of every weight from forward to backward: 126 MB
in an R-50-FPN Mask R-CNN, 6 % of the memory of a step on one image. Standardizing once more takes
less than 1 % of the convolution's own backward. On a GPU launches cost more than that memory.
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from .kernels.autograd import gradients
from .kernels.dispatch import plain, requested_backend

__all__ = ["recomputed_conv2d", "recomputes"]


def recomputes(conv: nn.Conv2d, x: torch.Tensor) -> bool:
    """Whether a convolution on this input is to make its weight again in backward."""
    # Only training gains. Under autocast what is kept is the weight's copy in half precision.
    return (
        x.is_cpu
        and torch.is_grad_enabled()
        and conv.weight.requires_grad
        and plain(x)
        and x.numel() > 0
        and x.dtype == conv.weight.dtype
        and x.dtype in (torch.float32, torch.float64)
        and isinstance(conv.padding, tuple)
        and not torch.is_autocast_enabled("cpu")
        and requested_backend() != "off"
    )


def recomputed_conv2d(
    conv: nn.Conv2d,
    x: torch.Tensor,
    weight_of: Callable[..., torch.Tensor],
    *parameters: torch.Tensor,
) -> torch.Tensor:
    """``F.conv2d(x, weight_of(*parameters), ...)`` with the other arguments of ``conv``.

    Args:
        conv: whose ``padding`` is in numbers.
        x: shape (N, C_in, H, W), of the type of the weight.
        weight_of: a differentiable function of its arguments alone.
        *parameters: its arguments.

    Returns:
        Tensor of shape (N, C_out, H', W'), bit by bit that of the plain call, as its gradients.
    """
    how = (conv.stride, conv.padding, conv.dilation, conv.groups)
    return _RecomputedConv.apply(weight_of, how, x, conv.bias, *parameters)


class _RecomputedConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight_of, how, x, bias, *parameters):
        ctx.save_for_backward(x, bias, *parameters)
        ctx.weight_of, ctx.how = weight_of, how
        return F.conv2d(x, weight_of(*parameters), bias, *how)

    @staticmethod
    def backward(ctx, dy):
        x, bias, *parameters = ctx.saved_tensors
        needs_x, needs_bias, *needs = ctx.needs_input_grad[2:]
        if torch.is_grad_enabled():  # create_graph=True
            y = F.conv2d(x, ctx.weight_of(*parameters), bias, *ctx.how)
            inputs = (x, bias, *parameters)
            needs = ctx.needs_input_grad[2:]
            return None, None, *gradients(y, inputs, needs, dy, create_graph=True)
        stride, padding, dilation, groups = ctx.how
        with torch.enable_grad():
            leaves = [
                parameter.detach().requires_grad_(need)
                for parameter, need in zip(parameters, needs, strict=True)
            ]
            weight = ctx.weight_of(*leaves)
        dx, dw, db = torch.ops.aten.convolution_backward(
            dy, x, weight.detach(), None if bias is None else bias.shape,
            stride, padding, dilation, False, (0, 0), groups, (needs_x, any(needs), needs_bias),
        )  # fmt: skip
        return None, None, dx, db, *gradients(weight, leaves, needs, dw)
