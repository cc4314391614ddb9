"""Convolutions by a function of their parameters, which is computed again for backward, not kept.

Autograd would keep the standardized copy of every weight from forward to backward: 126 MB in an
R-50-FPN Mask R-CNN, 6 % of the memory of a step on one image. Standardizing once more takes less
than 1 % of the convolution's own backward.
"""

import contextlib
from collections.abc import Callable, Iterator

import torch
from detectron2.layers import Conv2d
from torch import nn
from torch.nn import functional as F

from .backend import requested_backend, supports

__all__ = ["ReparametrizedConv2d", "recomputed_conv2d", "standardize_once"]


class ReparametrizedConv2d(Conv2d):
    """Detectron2's ``Conv2d`` (with ``norm`` and ``activation``) on a function of its parameters.

    Subclasses say which: :meth:`used_weight` and, for those that are not scripted, :meth:`_recipe`.
    """

    def used_weight(self) -> torch.Tensor:
        """The weight of the convolution, shape (C_out, C_in/groups, kh, kw)."""
        raise NotImplementedError

    @torch.jit.unused
    def _recipe(self):
        """A function and the parameters, ``weight`` first, of which it makes the used weight."""
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """
        Args:
            x: shape (N, C_in, H, W); N, H or W may be 0.

        Returns:
            Tensor of shape (N, C_out, H', W').
        """
        if torch.jit.is_scripting():
            x = F.conv2d(
                x,
                self.used_weight(),
                self.bias,
                self.stride,
                self.padding,
                self.dilation,
                self.groups,
            )
        else:
            x = self._convolve(x)
        if self.norm is not None:
            x = self.norm(x)
        if self.activation is not None:
            x = self.activation(x)
        return x

    @torch.jit.unused
    def _convolve(self, x: torch.Tensor) -> torch.Tensor:
        # Same contract as the parent, which stops here with an assertion.
        assert not (self.training and x.numel() == 0 and isinstance(self.norm, nn.SyncBatchNorm)), (
            "SyncBatchNorm does not support empty inputs!"
        )
        shared = self.__dict__.get("_shared")  # set by standardize_once
        if shared is None and _recomputes(self, x):
            weight_of, parameters = self._recipe()
            return recomputed_conv2d(self, x, weight_of, *parameters)
        if shared:
            weight = shared[0]
        else:
            weight = self.used_weight()
            if shared is not None:
                shared.append(weight)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


@contextlib.contextmanager
def standardize_once(module: nn.Module) -> Iterator[None]:
    """Within, each :class:`ReparametrizedConv2d` computes its weight at the first use alone.

    For one forward of a head whose convolutions run on every feature level. Parameters must not
    change within; the next forward computes anew.
    """
    convs = [child for child in module.modules() if isinstance(child, ReparametrizedConv2d)]
    for conv in convs:
        conv.__dict__["_shared"] = []
    try:
        yield
    finally:
        for conv in convs:
            del conv.__dict__["_shared"]


def _recomputes(conv: nn.Conv2d, x: torch.Tensor) -> bool:
    # Only training gains. Under autocast what is kept is the weight's copy in half precision.
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
            return None, None, *_grads(y, inputs, ctx.needs_input_grad[2:], dy, create_graph=True)
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
        return None, None, dx, db, *_grads(weight, leaves, needs, dw)


def _grads(y, inputs, needs, dy, **options):
    """Gradients of y with respect to the inputs that need one, None for the others."""
    wanted = [tensor for tensor, need in zip(inputs, needs, strict=True) if need]
    found = iter(torch.autograd.grad(y, wanted, dy, **options) if wanted else ())
    return [next(found) if need else None for need in needs]
