"""Weight standardization in one reduction and one elementwise map, forward and backward.

Every formula is (w - m) u with u a function of the filter's variance alone, so they share one
derivative: dw = u (dy - mean(dy) - k (w - m)), k = -2 u'(v) / (u n) * sum(dy (w - m)).
"""

import torch

from .backend import requested_backend, supports
from .rows import combine, normalize, row_sums

__all__ = ["fused_standardize", "takes"]


def takes(weight: torch.Tensor) -> bool:
    """Whether the fused form serves this weight: on a CPU, where it halves the cost.

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
    """Standardize every row of ``filters``, shape (C_out, n), float32 or float64."""
    c_out, n = filters.shape
    return _FusedWS.apply(filters.reshape(1, c_out, n, 1), formula, eps).view(c_out, n)


class _FusedWS(torch.autograd.Function):
    @staticmethod
    def forward(ctx, filters, formula, eps):
        # Filters are the rows: shape (1, C_out, n, 1).
        n = filters.shape[2]
        filters = filters.contiguous()
        out, mean, var, factor = normalize(filters, True)
        if formula == "biased":
            u = (var + eps).rsqrt_()
        elif formula == "unbiased":
            u = (var * (n / (n - 1)) + eps).rsqrt_()
        else:
            u = (var * (n / (n - 1))).sqrt_().add_(eps).reciprocal_()
        out.mul_((u / factor)[:, :, None, None])
        ctx.save_for_backward(filters, mean, var, u)
        ctx.formula, ctx.eps = formula, eps
        return out

    @staticmethod
    def backward(ctx, dy):
        filters, mean, var, u = ctx.saved_tensors
        n = filters.shape[2]
        if torch.is_grad_enabled():
            from .ws_conv import standardize_filters

            # create_graph=True: the gradient as a graph is that of the readable form.
            y = standardize_filters(filters[0, :, :, 0], ctx.formula, ctx.eps).view_as(filters)
            return torch.autograd.grad(y, filters, dy, create_graph=True)[0], None, None
        dy = dy.contiguous()
        total, product = row_sums(dy, filters, mean, True)
        if ctx.formula == "biased":
            slope = u.square() * product / n
        elif ctx.formula == "unbiased":
            slope = u.square() * product / (n - 1)
        else:
            # The deviation of a constant filter, which rounding makes almost 0, has no
            # derivative; 0 is the subgradient taken.
            deviation = (var * (n / (n - 1))).sqrt_()
            rounding = 4 * torch.finfo(mean.dtype).eps * mean.abs() + 1e-9
            slope = u * product / ((n - 1) * deviation)
            slope = torch.where(deviation > rounding, slope, 0.0)
        shift = torch.addcmul(total / -n, slope, mean).mul_(u)
        return combine(dy, filters, slope, u, shift, True), None, None
