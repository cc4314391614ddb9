"""Batch-channel norm in one reduction and one elementwise map, forward and backward.

While the statistics of the batch half are constants to autograd (running estimates, a frozen
batch norm, evaluation), BCN is y = A x + T with A, T per sample and channel, which follow from the
mean and variance of every channel of every sample; so does the step of the running estimates.
For backward only x and numbers per sample and channel are kept, as by ``nn.GroupNorm``.

Notation: m, v are the moments of one channel of one sample; a = bn.weight / sqrt(var + eps);
z = a (x - mean) + bn.bias is the output of the batch half, and e = E[z] - mu its mean relative to
the mean mu of its group, whose variance is E[a^2 v + e^2] and whose inverse deviation is r. With
w, b the affine of the group, y = w r (a (x - m) + e) + b.

:data:`.backend.BACKENDS` lists the ways to run it.
"""

import functools
import logging

import torch
from torch import nn
from torch.nn import functional as F

from . import kernels
from .estimated_batch_norm import update_estimates
from .rows import affine_, combine, normalize, row_sums

__all__ = ["ConstantBatchNorm", "fused_bcn"]

_logger = logging.getLogger(__name__)


class ConstantBatchNorm:
    """What the fused form needs to know of the batch half.

    Attributes:
        weight, bias: shape (C,), or None for no affine.
        mean, var: shape (C,), the running estimates, updated in place where ``rate`` is set.
        count: shape (), batches seen.
        eps: added to the variance.
        rate: update rate, or None to leave the estimates alone.
    """

    __slots__ = ("bias", "count", "eps", "mean", "rate", "var", "weight")

    def __init__(self, bn: nn.Module, rate: float | None):
        self.weight, self.bias = bn.weight, bn.bias
        self.mean, self.var, self.eps = bn.running_mean, bn.running_var, bn.eps
        self.count = bn.num_batches_tracked if rate is not None else None
        self.rate = rate


def fused_bcn(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    bn: ConstantBatchNorm,
    eps: float,
    backend: str,
) -> torch.Tensor:
    """BCN on constant batch statistics; updates the running estimates before it uses them.

    Args:
        x: shape (N, C, H, W), not empty; contiguous and channels_last layouts are kept.
        weight, bias: shape (G,): the affine of the groups.
        bn: the batch half.
        eps: stabilizer of the channel half.
        backend: "cpp" (for contiguous tensors; others go natively), "native" or "compile".

    Returns:
        Tensor of the shape of ``x``; of its type, or float32 where autocast has group norms
        return that (CUDA). Arithmetic is float32 at least.
    """
    return _FusedBCN.apply(x, weight, bias, bn.weight, bn.bias, bn, eps, backend)


def _forward(
    x, weight, bias, bn_weight, bn_bias, bn_mean, bn_var, bn_count, bn_eps, rate, eps, native
):
    # Few operations rather than plain ones: on small maps their number is what BCN costs.
    n, groups = x.shape[0], weight.shape[0]
    y, m, v, factor = normalize(x, native)
    mean = bn_mean
    if rate is not None:
        if n == 1:
            batch_mean, batch_var = m[0], v[0]
        else:
            between, batch_mean = torch.var_mean(m, dim=0, correction=0)
            batch_var = v.mean(dim=0) + between
        update_estimates(bn_mean, bn_var, bn_count, batch_mean, batch_var, rate)
        # A copy: a layer used twice in a step (shared heads) moves them again before backward.
        mean = bn_mean.clone()
    inverse = (bn_var + bn_eps).rsqrt()
    a = inverse if bn_weight is None else inverse * bn_weight
    e = (m - mean) * a if bn_bias is None else torch.addcmul(bn_bias, m - mean, a)
    e = e.view(n, groups, -1)
    between, mu = torch.var_mean(e, dim=2, keepdim=True, correction=0)
    if factor is None:
        a = a.view(1, groups, -1)
        within = a.square() * v.view(e.shape)
    else:
        # y has variance 1, so its scale is the deviation of z.
        a = (a / factor).view(e.shape)
        within = a.square()
    r = (between + within.mean(dim=2, keepdim=True)).add_(eps).rsqrt_()
    wr = r * weight.view(1, groups, 1)
    shift = torch.addcmul(bias.view(1, groups, 1), e - mu, wr)
    y = affine_(y, (wr * a).view(m.shape), shift.view(m.shape), native)
    return y, m, v, mean, inverse, mu, r


def _backward(dy, x, weight, bn_weight, bn_bias, m, v, mean, inverse, mu, r, needs, native):
    n, c, h, w = x.shape
    groups = weight.shape[0]
    split, size = (n, groups, c // groups), h * w
    per_group = size * split[2]
    s, t = row_sums(dy, x, m, native)
    s, t = s.view(split), t.view(split)
    a = (inverse if bn_weight is None else inverse * bn_weight).view(1, groups, -1)
    offset = (m - mean).view(split)
    e = torch.addcmul(-mu if bn_bias is None else bn_bias.view(a.shape) - mu, offset, a)
    # Sums over each group: of dy, and of dy times the normalized value.
    sum_dy = s.sum(dim=2, keepdim=True)
    sum_dy_z = torch.addcmul(t * a, s, e).sum(dim=2, keepdim=True).mul_(r)
    # dz = wr (dy - lost - slope (x - m)) and dx = a dz.
    q = (sum_dy_z * r).div_(per_group)
    wr = r * weight.view(1, groups, 1)
    slope = q * a
    lost = torch.addcmul(sum_dy / per_group, q, e)
    dx = d_bn_weight = d_bn_bias = None
    needs_x, needs_bn = needs
    if needs_bn:
        dz = torch.sub(s, lost, alpha=size).mul_(wr)
        dz_x = torch.sub(t, slope * v.view(split), alpha=size).mul_(wr)
        d_bn_weight = dz_x.addcmul_(dz, offset).sum(dim=0).view(c).mul_(inverse)
        d_bn_bias = dz.sum(dim=0).view(c)
    if needs_x:
        wr = wr * a
        shift = torch.addcmul(lost, slope, m.view(split), value=-1).mul_(wr).neg_()
        dx = combine(dy, x, slope.view(m.shape), wr.view(m.shape), shift.view(m.shape), native)
    return dx, sum_dy_z.sum(dim=0).view(-1), sum_dy.sum(dim=0).view(-1), d_bn_weight, d_bn_bias


class _Compiled:
    """The two passes through ``torch.compile``, once per process, for every shape."""

    broken = False
    options = {"dynamic": True}

    @classmethod
    @functools.lru_cache(maxsize=1)
    def passes(cls):
        return torch.compile(_forward, **cls.options), torch.compile(_backward, **cls.options)


def _run(index: int, backend: str, *args):
    """One of the two passes by the backend asked for, or natively where that fails."""
    if backend == "cpp":
        return (kernels.bcn_forward, kernels.bcn_backward)[index](*args)
    if backend == "compile" and not _Compiled.broken:
        try:
            return _Compiled.passes()[index](*args, False)
        except (ImportError, RuntimeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            # No compiler, no Triton, a driver it does not know: the estimates have not moved
            # yet, since nothing ran.
            _Compiled.broken = True
            _logger.warning("torch.compile failed, BCN goes on without: %s", error)
    native = args[0].device.type == "cpu" and args[0].is_contiguous()
    return (_forward, _backward)[index](*args, native)


def readable(x, weight, bias, scale, shift, eps):
    """The defining composition: batch half as an affine map, then group norm."""
    z = (x * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)).to(x.dtype)
    per_group = z.shape[1] // weight.shape[0]
    w, b = weight.repeat_interleave(per_group), bias.repeat_interleave(per_group)
    return F.group_norm(z, weight.shape[0], w, b, eps)


class _FusedBCN(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, bn_weight, bn_bias, bn, eps, backend):
        dtype = x.dtype
        if dtype != weight.dtype and x.is_cuda and torch.is_autocast_enabled("cuda"):
            dtype = weight.dtype  # as autocast's F.group_norm
        if not (x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)):
            x = x.contiguous()
        wide = x.to(weight.dtype)
        if backend == "cpp" and not kernels.takes(
            wide, (bn_weight, bn_bias, bn.mean, bn.var), (weight, bias), weight.shape[0]
        ):
            backend = "native"
        y, *rows = _run(
            0, backend, wide, weight, bias, bn_weight, bn_bias,
            bn.mean, bn.var, bn.count, bn.eps, bn.rate, eps,
        )  # fmt: skip
        ctx.save_for_backward(x, weight, bias, bn_weight, bn_bias, *rows)
        ctx.eps, ctx.backend = eps, backend
        return y.to(dtype)

    @staticmethod
    def backward(ctx, dy):
        x, weight, bias, bn_weight, bn_bias, m, v, mean, inverse, mu, r = ctx.saved_tensors
        needed = ctx.needs_input_grad
        if torch.is_grad_enabled():
            grads = _differentiable(ctx, dy, x, weight, bias, bn_weight, bn_bias, mean, inverse)
        else:
            wide = x.to(weight.dtype)
            layout = torch.contiguous_format if x.is_contiguous() else torch.channels_last
            dy = dy.to(weight.dtype).contiguous(memory_format=layout)
            grads = _run(
                1, ctx.backend, dy, wide, weight, bn_weight, bn_bias, m, v, mean, inverse, mu, r,
                (needed[0], needed[3] or needed[4]),
            )  # fmt: skip
            if needed[0]:
                grads = (grads[0].to(x.dtype), *grads[1:])
        return *(g if need else None for g, need in zip(grads, needed, strict=False)), *[None] * 3


def _differentiable(ctx, dy, x, weight, bias, bn_weight, bn_bias, mean, inverse):
    """The gradients as a graph, for ``create_graph=True``: those of the readable form."""
    scale = inverse if bn_weight is None else inverse * bn_weight
    shift = -mean * scale if bn_bias is None else bn_bias - mean * scale
    y = readable(x.to(weight.dtype), weight, bias, scale, shift, ctx.eps)
    inputs = (x, weight, bias, bn_weight, bn_bias)
    wanted = [i for i, need in enumerate(ctx.needs_input_grad[:5]) if need]
    found = torch.autograd.grad(
        y, [inputs[i] for i in wanted], dy.to(y.dtype), create_graph=True, allow_unused=True
    )
    grads = [None] * 5
    for i, grad in zip(wanted, found, strict=True):
        grads[i] = grad
    return grads
