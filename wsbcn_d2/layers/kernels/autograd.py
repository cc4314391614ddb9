"""The two fused layers as differentiable functions, whatever backend runs them.

While the statistics of the batch half are constants to autograd (running estimates, a frozen
batch norm, evaluation), BCN is y = A x + T with A, T per sample and channel, which follow from the
mean and variance of every channel of every sample; so does the step of the running estimates.
For backward only x and numbers per sample and channel are kept, as by ``nn.GroupNorm``.

Notation: m, v are the moments of one channel of one sample; a = bn.weight / sqrt(var + eps);
z = a (x - mean) + bn.bias is the output of the batch half, and e = E[z] - mu its mean relative to
the mean mu of its group, whose variance is E[a^2 v + e^2] and whose inverse deviation is r. With
w, b the affine of the group, y = w r (a (x - m) + e) + b.

Every formula of WS is (w - m) u with u a function of the filter's variance alone, so they share
one derivative: dw = u (dy - mean(dy) - k (w - m)), k = -2 u'(v) / (u n) * sum(dy (w - m)).

``create_graph=True`` gets the gradients of the readable form, which each call brings along.
"""

from collections.abc import Callable
from types import ModuleType

import torch
from torch.nn import functional as F

from .cuda_nodes import answers

__all__ = ["fused_bcn", "fused_standardize", "gradients", "gradients_of_bcn"]


def fused_bcn(
    backend: ModuleType,
    readable: Callable[..., torch.Tensor],
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    bn_weight: torch.Tensor | None,
    bn_bias: torch.Tensor | None,
    bn_mean: torch.Tensor,
    bn_var: torch.Tensor,
    bn_count: torch.Tensor | None,
    bn_eps: float,
    rate: float | None,
    eps: float,
) -> torch.Tensor:
    """BCN on constant batch statistics; moves the running estimates before it uses them.

    Args:
        backend: see :func:`.dispatch.bcn_backend`.
        readable: function of (x, weight, bias, bn_weight, bn_bias, mean, inverse, eps), where
            inverse is 1 / sqrt(var + bn_eps), that computes the same.
        x: shape (N, C, H, W), not empty; contiguous and channels_last layouts are kept.
        weight, bias: shape (G,): the affine of the groups.
        bn_weight, bn_bias: shape (C,), or None for no affine.
        bn_mean, bn_var: shape (C,): the estimates, moved in place where ``rate`` is set.
        bn_count: shape (), batches seen; read and moved where ``rate`` is set.
        bn_eps, eps: stabilizers of the two halves.
        rate: update rate, or None to leave the estimates alone.

    Returns:
        Tensor of the shape of ``x``; of its type, or float32 where autocast has group norms
        return that (CUDA). Arithmetic is float32 at least.
    """
    nodes = backend.nodes()
    if nodes is not None:
        y = nodes.bcn(
            x, weight, bias, bn_weight, bn_bias, bn_mean, bn_var, bn_count, bn_eps, rate, eps,
            readable,
        )  # fmt: skip
        if y is not None:
            return y
    # What is not differentiated goes in one piece: apply() looks at each of its arguments.
    options = (backend, readable, bn_mean, bn_var, bn_count, bn_eps, rate, eps)
    return _apply(_FusedBCN, x, weight, bias, bn_weight, bn_bias, options)


def _apply(function: type[torch.autograd.Function], x: torch.Tensor, *args):
    # function.apply() without its preparations for function transforms, which never get here (see
    # dispatch.plain) and would be a twentieth of a layer's host time; a tensor that one left behind
    # may.
    x = torch._C._functorch.unwrap_if_dead(x)
    return super(torch.autograd.Function, function).apply(x, *args)


class _FusedBCN(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, bn_weight, bn_bias, options):
        backend, readable, bn_mean, bn_var, bn_count, bn_eps, rate, eps = options
        dtype = None
        if x.is_cuda and x.dtype != weight.dtype and torch.is_autocast_enabled("cuda"):
            dtype = weight.dtype  # as autocast's F.group_norm
        frozen = rate is not None and bn_mean.is_inference()
        if frozen and not torch.is_inference_mode_enabled():
            raise RuntimeError(
                "running estimates made in inference mode cannot move outside of it: build the "
                "model outside torch.inference_mode(), or clone its buffers"
            )
        y, saved = backend.bcn_forward(
            x, weight, bias, bn_weight, bn_bias, bn_mean, bn_var, bn_count, bn_eps, rate, eps, dtype
        )
        if rate is not None and not frozen:
            # Autograd has not seen the estimates move.
            for moved in (bn_mean, bn_var, bn_count):
                torch.autograd.graph.increment_version(moved)
        ctx.save_for_backward(x, weight, bias, bn_weight, bn_bias, *saved)
        ctx.backend, ctx.readable, ctx.eps = backend, readable, eps
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, bias, bn_weight, bn_bias, *saved = ctx.saved_tensors
        needed = ctx.needs_input_grad[:5]
        if torch.is_grad_enabled():
            constants = ctx.backend.bcn_constants(saved)
            inputs = x, weight, bias, bn_weight, bn_bias
            grads = gradients_of_bcn(ctx.readable, dy, inputs, constants, ctx.eps, needed)
        else:
            needs = needed[0], needed[3] or needed[4]
            grads = ctx.backend.bcn_backward(dy, x, weight, bn_weight, bn_bias, tuple(saved), needs)
            grads = [g if need else None for g, need in zip(grads, needed, strict=True)]
        return *grads, None


def gradients_of_bcn(readable, dy, inputs, constants, eps, needed):
    """Gradients of BCN that can be differentiated again; None where none is needed."""
    y = readable(*inputs, *constants, eps)
    return gradients(y, inputs, needed, dy, create_graph=True)


def fused_standardize(
    backend: ModuleType,
    readable: Callable[..., torch.Tensor],
    weight: torch.Tensor,
    formula: str,
    eps: float,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Standardize every filter ``weight[i]``.

    Args:
        backend: see :func:`.dispatch.ws_backend`.
        readable: function of (weight, formula, eps) that computes the same.
        weight: shape (C_out, C_in/groups, kh, kw); contiguous and channels_last layouts are kept.
        formula, eps: see :func:`wsbcn_d2.layers.standardize_weight`.
        dtype: type of the result, None for that of ``weight``.
    """
    nodes = backend.nodes()
    if nodes is not None:
        out = nodes.ws(weight, formula, eps, dtype, readable)
        if out is not None:
            return out
    return _apply(_FusedWS, weight, (backend, readable, formula, eps, dtype))


class _FusedWS(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, options):
        backend, readable, formula, eps, dtype = options
        out, saved = backend.ws_forward(weight, formula, eps, dtype)
        ctx.save_for_backward(weight, *saved)
        ctx.backend, ctx.readable, ctx.options = backend, readable, (formula, eps)
        return out

    @staticmethod
    def backward(ctx, dy):
        weight, *saved = ctx.saved_tensors
        if torch.is_grad_enabled():
            (dw,) = ws_graph(ctx.readable, dy, weight, *ctx.options)
        else:
            dw = ctx.backend.ws_backward(dy, weight, tuple(saved), *ctx.options)
        return dw, None


@answers
def ws_graph(readable, dy, weight, formula, eps):
    """The same of a standardized weight."""
    out = readable(weight, formula, eps)
    return tuple(gradients(out, (weight,), (True,), dy, create_graph=True))


@answers
def ws_conv_graph(
    readable, dy, x, weight, formula, eps, stride, padding, dilation, groups, needed
):  # fmt: skip
    """The same of a convolution on a standardized weight, and of its bias."""
    standardized = readable(weight, formula, eps).to(x.dtype)
    y = F.conv2d(x, standardized, None, stride, padding, dilation, groups)
    grads = gradients(y, (x, weight), needed[:2], dy, create_graph=True)
    return *grads, dy.sum((0, 2, 3)) if needed[2] else None


def gradients(y, inputs, needed, dy, **options):
    """Gradients of y with respect to the inputs that need one, None for the others."""
    wanted = [tensor for tensor, need in zip(inputs, needed, strict=True) if need]
    if not wanted:
        return [None] * len(needed)
    found = iter(torch.autograd.grad(y, wanted, dy.to(y.dtype), allow_unused=True, **options))
    return [next(found) if need else None for need in needed]
