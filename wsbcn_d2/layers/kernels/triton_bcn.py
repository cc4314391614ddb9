"""BCN in Triton on a GPU: what :mod:`.dispatch` asks of a backend, on ``triton_bcn_forward.py``
and ``triton_bcn_backward.py``.

Three launches forward, which read x twice and write y, and three backward, which read x and dy
twice and write dx: as few bytes as ``nn.GroupNorm`` moves. Half precision is read and written as it
is, channels_last as it lies. Nothing waits for the GPU.

How a shape is cut into programs is found once and kept (:func:`_forward`, :func:`_backward`), with
the launches for it: what happens on the host at each call is as little as Python allows.
"""

import functools
import math

import torch
from triton import cdiv, next_power_of_2

from . import triton_launch as launch
from .autograd import gradients_of_bcn
from .cuda_nodes import answers, nodes
from .triton_bcn_backward import combine, settle_backward, sums
from .triton_bcn_forward import apply, moments, settle
from .triton_launch import Launch, dense, plan

__all__ = ["bcn_backward", "bcn_constants", "bcn_forward", "nodes", "takes_bcn"]

_HALF = (torch.float16, torch.bfloat16)
_TYPES = (torch.float32, torch.float64)
# Numbers that one program handles at a time when it settles a group: 8 a thread.
_BLOCK = 4096
# Offsets within a sample are 32-bit integers, as are rows in all.
_LARGEST = 2**31 - 1


def _fit(dtype: torch.dtype, numel: int, device: int, *tensors: torch.Tensor | None) -> bool:
    """Whether an address is all that a kernel needs to know of parameters and buffers."""
    for tensor in tensors:
        if tensor is not None and (
            tensor.dtype is not dtype
            or tensor.numel() != numel
            or tensor.get_device() != device
            or type(tensor) not in (torch.Tensor, torch.nn.Parameter)
            or not tensor.is_contiguous()
            or tensor.is_neg()
            or tensor._is_zerotensor()
        ):
            return False
    return True


def takes_bcn(x, weight, bias, bn_weight, bn_bias, bn_mean, bn_var, bn_count) -> bool:
    """See :mod:`.dispatch`."""
    if launch.on_gpu(x):
        compiled = nodes()
        if compiled is not None and compiled.takes_bcn(
            x, weight, bias, bn_weight, bn_bias, bn_mean, bn_var, bn_count
        ):
            return True
    dtype, device, (n, channels, height, width) = weight.dtype, x.get_device(), x.shape
    groups = weight.numel()
    return (
        (launch.on_gpu(x) or launch.INTERPRETED)
        and dtype in _TYPES
        and (x.dtype is dtype or x.dtype in _HALF)
        and channels % groups == 0
        and channels // groups <= _BLOCK // 2
        and channels * height * width <= _LARGEST
        and 8 * n * channels <= _LARGEST
        and _fit(dtype, groups, device, weight, bias)
        and _fit(dtype, channels, device, bn_weight, bn_bias, bn_mean, bn_var)
        and _fit(torch.int64, 1, device, bn_count)
    )


class Tiling:
    """How an activation is cut into programs."""

    def __init__(self, shape: torch.Size, last: bool, groups: int):
        """
        Args:
            shape: (N, C, H, W).
            last: whether its memory is channels_last, else contiguous.
            groups: G.
        """
        (n, c, h, w), power = shape, next_power_of_2
        size = h * w
        self.shape, self.size, self.rows, self.groups = shape, size, n * c, groups
        rows, unit = 1, math.gcd(c if last else size, 8)
        while not last and 2 * rows * power(2 * rows * size) <= 4096:
            rows *= 2
        # Rows that do not begin at aligned addresses do so several at a time.
        flat = not last and unit < 4 <= rows and c % rows == 0
        if flat:
            cols, unit, area = power(rows * size), math.gcd(rows * size, 8), 1024
            self.chunks, self.programs = 1, n * c // rows
        # Otherwise every element has an address of its own, in registers: smaller tiles. In
        # channels_last memory they are wide in channels, which lie together there.
        area = 8192 if last else 4096 if unit > 1 else 1024
        while not flat:
            cols = min(power(size), max(area // power(c), 64) if last else area)
            rows = min(power(c), max(1, area // cols))
            self.chunks = cdiv(size, cols)
            self.programs = n * cdiv(c, rows) * self.chunks
            if self.programs >= 512 or area <= (4096 if last else 1024):
                break
            area //= 2  # enough programs for all of a GPU
        self.tile = {"UNIT": unit, "LAST": last, "FLAT": flat, "ROWS": rows, "COLS": cols}
        together = rows * size if flat else c if last else size
        self.sizes = self.rows, c, size, self.chunks, together // unit
        self.warps = 8 if area > 4096 else 4
        # Few different ones, for each is compiled: blocks of 1, 16 or 256 chunks, and of 1, 2 or
        # as many samples as there is room for.
        per, room = c // groups, _BLOCK // power(c // groups)
        chunks = 1 if self.chunks == 1 else min(room, 16 if self.chunks < 128 else 256)
        samples = max(1, min(n, room // chunks) if n <= 2 else room // chunks)
        self.block = {"CHUNKS": chunks, "PER": per, "CG": power(per), "NB": samples}
        self.block_warps = 16 if chunks * power(per) * samples > 2048 else 4
        # Rows of C: mean and inverse of the estimates, m, v, and where mu and r have room.
        self.kept = 2 + 2 * n + cdiv(2 * n * groups, c), c


_tiling = functools.lru_cache(maxsize=4096)(Tiling)


class _Forward:
    """The launches of a forward pass."""

    __slots__ = ("apply", "kept", "moments", "scratch", "settle")

    def __init__(self, shape, last, groups, kinds, bn_eps, eps):
        t = _tiling(shape, last, groups)
        self.kept = t.kept
        self.scratch = (2 * t.chunks + 2) * t.rows + t.programs + 1
        self.moments = Launch(moments, t.programs, kinds, t.sizes, t.warps, **t.tile)
        sizes = (shape[0], *t.sizes[1:4], t.programs, t.tile["COLS"])
        self.settle = Launch(
            settle, groups, kinds, sizes, t.block_warps, BN_EPS=bn_eps, EPS=eps, **t.block,
            PROBES=1024 if t.programs <= 1024 else 4096,
        )  # fmt: skip
        sizes = (*t.sizes, t.programs)
        self.apply = Launch(apply, t.programs, kinds, sizes, t.warps, **t.tile)


class _Backward:
    """The launches of a backward pass."""

    __slots__ = ("combine", "scratch", "settle", "sums")

    def __init__(self, shape, last, groups, kinds):
        t = _tiling(shape, last, groups)
        self.scratch = (2 * t.chunks + 3) * t.rows
        self.sums = Launch(sums, t.programs, kinds, t.sizes, t.warps, **t.tile)
        sizes = (shape[0], *t.sizes[1:4])
        self.settle = Launch(settle_backward, groups, kinds, sizes, t.block_warps, **t.block)
        self.combine = Launch(combine, t.programs, kinds, t.sizes, t.warps, **t.tile)


_forward = functools.lru_cache(maxsize=4096)(_Forward)
_backward = functools.lru_cache(maxsize=4096)(_Backward)


def _is_last(x: torch.Tensor) -> bool:
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def _forward_of(x, weight, bn_weight, bn_bias, bn_count, dtype, bn_eps, eps) -> _Forward:
    absent = bn_weight is None, bn_bias is None, bn_count is None
    kinds = (x.device, x.dtype, dtype, weight.dtype, absent)
    return _forward(x.shape, _is_last(x), weight.numel(), kinds, bn_eps, eps)


def _backward_of(x, weight, bn_weight, bn_bias, dy, needs_bn) -> _Backward:
    kinds = (
        x.device, x.dtype, dy.dtype, weight.dtype, bn_weight is None, bn_bias is None, needs_bn,
    )  # fmt: skip
    return _backward(x.shape, _is_last(x), weight.numel(), kinds)


@answers
def bcn_forward_plan(*args):
    run = _forward_of(*args)
    return plan(run.kept[0], run.scratch, run.moments, run.settle, run.apply)


@answers
def bcn_backward_plan(*args):
    run = _backward_of(*args)
    return plan(0, run.scratch, run.sums, run.settle, run.combine)


@launch.on_its_device
def bcn_forward(
    x, weight, bias, bn_weight, bn_bias, bn_mean, bn_var, bn_count, bn_eps, rate, eps, dtype
):  # fmt: skip
    """See :mod:`.dispatch`."""
    x = dense(x, _is_last(x))
    if rate is None:
        rate, bn_count = 0.0, None
    run = _forward_of(x, weight, bn_weight, bn_bias, bn_count, dtype, bn_eps, eps)
    y, stats = torch.empty_like(x, dtype=dtype), weight.new_empty(run.kept)
    scratch, stream = weight.new_empty(run.scratch), launch.stream_of(x)
    run.moments(stream, x, scratch)
    run.settle(
        stream, scratch, stats, weight, bias, bn_weight, bn_bias, bn_mean, bn_var, bn_count,
        float(rate),
    )  # fmt: skip
    run.apply(stream, x, y, scratch, stats, bn_count)
    return y, (stats,)


def bcn_constants(saved):
    """See :mod:`.dispatch`."""
    return saved[0][0], saved[0][1]


@answers
def bcn_slowly(_, dy, x, weight, bias, bn_weight, bn_bias, stats, eps, needed):
    needs = needed[0], needed[3] or needed[4]
    return bcn_backward(dy, x, weight, bn_weight, bn_bias, (stats,), needs)


@answers
def bcn_graph(readable, dy, x, weight, bias, bn_weight, bn_bias, stats, eps, needed):
    inputs = x, weight, bias, bn_weight, bn_bias
    return tuple(gradients_of_bcn(readable, dy, inputs, bcn_constants((stats,)), eps, needed))


@launch.on_its_device
def bcn_backward(dy, x, weight, bn_weight, bn_bias, saved, needs):
    """See :mod:`.dispatch`."""
    (stats,), (needs_x, needs_bn) = saved, needs
    last = _is_last(x)
    x, dy = dense(x, last), dense(dy, last)
    run = _backward_of(x, weight, bn_weight, bn_bias, dy, needs_bn)
    d_weight, d_bias, d_bn_weight, d_bn_bias = (
        torch.empty_like(weight),
        torch.empty_like(weight),
        None,
        None,
    )
    if needs_bn:
        d_bn_weight, d_bn_bias = torch.empty_like(stats[0]), torch.empty_like(stats[0])
    scratch, stream = weight.new_empty(run.scratch), launch.stream_of(x, dy)
    run.sums(stream, dy, x, scratch, stats)
    run.settle(
        stream, scratch, stats, weight, bn_weight, bn_bias, d_weight, d_bias, d_bn_weight, d_bn_bias
    )
    dx = None
    if needs_x:
        dx = torch.empty_like(x)
        run.combine(stream, dy, x, dx, scratch, stats)
    return dx, d_weight, d_bias, d_bn_weight, d_bn_bias
