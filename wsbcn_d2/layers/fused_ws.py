"""Weight standardization in one reduction and one elementwise map, forward and backward.

Every formula is (w - m) u with u a function of the filter's variance alone, so they share one
derivative: dw = u (dy - mean(dy) - k (w - m)), k = -2 u'(v) / (u n) * sum(dy (w - m)).
"""

import torch

from . import kernels
from .backend import backend_for, requested_backend, supports
from .rows import combine, normalize, row_sums

__all__ = ["fused_standardize", "takes"]


def takes(weight: torch.Tensor) -> bool:
    """Whether the fused form serves this weight: on a CPU.

    Elsewhere one group norm (one kernel) does the same.
    """
    return (
        weight.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and weight.numel() > 0
        and requested_backend() != "off"
        and supports(weight, weight.dtype)
    )


def fused_standardize(filters: torch.Tensor, formula: str, eps: float) -> torch.Tensor:
    """Standardize every filter, each ``filters[i]`` of any shape; float32 or float64."""
    return _FusedWS.apply(filters, formula, eps)


def _forward(filters, formula, eps):
    """The pass in PyTorch's own norms; also mean, biased variance and scale u, shape (3, C_out)."""
    rows = filters.view(1, len(filters), -1, 1)
    n = rows.shape[2]
    out, mean, var, factor = normalize(rows, True)
    if formula == "biased":
        u = (var + eps).rsqrt_()
    elif formula == "unbiased":
        u = (var * (n / (n - 1)) + eps).rsqrt_()
    else:
        u = (var * (n / (n - 1))).sqrt_().add_(eps).reciprocal_()
    out.mul_((u / factor)[:, :, None, None])
    return out.view_as(filters), torch.cat([mean, var, u])


def _backward(dy, filters, stats, formula):
    rows = filters.view(1, len(filters), -1, 1)
    n, dy = rows.shape[2], dy.view_as(rows)
    mean, var, u = stats.split(1)
    total, product = row_sums(dy, rows, mean, True)
    if formula == "biased":
        slope = u.square() * product / n
    elif formula == "unbiased":
        slope = u.square() * product / (n - 1)
    else:
        # The deviation of a constant filter, which rounding makes almost 0, has no
        # derivative; 0 is the subgradient taken.
        deviation = (var * (n / (n - 1))).sqrt_()
        rounding = 4 * torch.finfo(mean.dtype).eps * mean.abs() + 1e-9
        slope = u * product / ((n - 1) * deviation)
        slope = torch.where(deviation > rounding, slope, 0.0)
    shift = torch.addcmul(total / -n, slope, mean).mul_(u)
    return combine(dy, rows, slope, u, shift, True).view_as(filters)


class _FusedWS(torch.autograd.Function):
    @staticmethod
    def forward(ctx, filters, formula, eps):
        filters = filters.contiguous()
        ctx.cpp = backend_for(filters.device, filters.dtype) == "cpp"
        run = kernels.ws_forward if ctx.cpp else _forward
        out, stats = run(filters, formula, eps)
        ctx.save_for_backward(filters, stats)
        ctx.formula, ctx.eps = formula, eps
        return out

    @staticmethod
    def backward(ctx, dy):
        filters, stats = ctx.saved_tensors
        if torch.is_grad_enabled():
            from .ws_conv import standardize_filters

            # create_graph=True: the gradient as a graph is that of the readable form.
            y = standardize_filters(filters.flatten(1), ctx.formula, ctx.eps).view_as(filters)
            return torch.autograd.grad(y, filters, dy, create_graph=True)[0], None, None
        run = kernels.ws_backward if ctx.cpp else _backward
        return run(dy.contiguous(), filters, stats, ctx.formula), None, None
