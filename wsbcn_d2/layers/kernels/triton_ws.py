"""WS in Triton on a GPU: what :mod:`.dispatch` asks of a backend; one launch per weight and pass.

A filter that fits into registers, of up to 8192 elements, is read once; small filters share a
program, larger ones are read three times, from the caches. Nothing is kept for backward but the
weight, whose moments are found again: backward reads w and dy and writes dw.

With n elements per filter, m and v their mean and biased variance, the value is (w - m) u(v) and
dw = u (dy - mean(dy) - k sum(dy (w - m)) (w - m)).

All weights of a model in one launch would need a table of addresses, sent to the GPU whenever an
optimizer or autocast moves one, and all results would live from the first layer to the last. What
it saves is a launch a weight, while the convolution itself keeps the GPU busy.
"""

import functools
import math

import torch
import triton
import triton.language as tl

from . import triton_launch as launch
from .cuda_nodes import answers, nodes
from .triton_launch import Launch, dense, plan

__all__ = ["nodes", "takes_ws", "ws_backward", "ws_forward"]

_TYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
# Elements of filters in a program's registers: 32 a thread.
_BLOCK = 8192


@triton.jit
def scale_of(v, mean, n, EPS: tl.constexpr, FORMULA: tl.constexpr, ROUNDING: tl.constexpr):
    """u, and k of the derivative."""
    if FORMULA == "biased":
        u = tl.rsqrt(v + EPS)
        k = u * u / n
    elif FORMULA == "unbiased":
        u = tl.rsqrt(v * n / (n - 1) + EPS)
        k = u * u / (n - 1)
    else:
        deviation = tl.sqrt(v * n / (n - 1))
        u = 1 / (deviation + EPS)
        # The deviation of a constant filter, which rounding makes almost 0, has no derivative: 0.
        constant = deviation <= ROUNDING * tl.abs(mean) + 1e-9
        k = tl.where(constant, 0, u / ((n - 1) * tl.where(constant, 1, deviation)))
    return u, k


@triton.jit
def load(pointer, at, mask, TYPE: tl.constexpr):
    return tl.load(pointer + at, mask, 0).to(TYPE)


@triton.jit(do_not_specialize=["filters", "units"])
def standardize(
    w, out, dy, filters, units,
    EPS: tl.constexpr, FORMULA: tl.constexpr, ROUNDING: tl.constexpr, TYPE: tl.constexpr,
    UNIT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """``out`` from ``w``; with ``dy``, the gradient of ``w`` into ``out``."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    n = units * UNIT  # which tells the compiler how filters are aligned
    at, i = row.to(tl.int64) * n, tl.arange(0, COLS)[None, :]
    there = row < filters
    if WHOLE:
        mask = there & (i < n)
        value = load(w, at + i, mask, TYPE)
        mean = tl.sum(value, 1)[:, None] / n
        off = tl.where(mask, value - mean, 0)
        square = tl.sum(off * off, 1)[:, None]
        u, k = scale_of(square / n, mean, n, EPS, FORMULA, ROUNDING)
        if dy is None:
            result = off * u
        else:
            d = load(dy, at + i, mask, TYPE)
            slope = k * tl.sum(off * d, 1)[:, None]
            result = u * (d - tl.sum(d, 1)[:, None] / n - slope * off)
        tl.store(out + at + i, result.to(out.dtype.element_ty), mask)
    else:
        total, total_dy = tl.zeros([ROWS, COLS], TYPE), tl.zeros([ROWS, COLS], TYPE)
        for s in range(0, n, COLS):
            mask = there & (s + i < n)
            total += load(w, at + s + i, mask, TYPE)
            if dy is not None:
                total_dy += load(dy, at + s + i, mask, TYPE)
        mean, mean_dy = tl.sum(total, 1)[:, None] / n, tl.sum(total_dy, 1)[:, None] / n
        squares, products = tl.zeros([ROWS, COLS], TYPE), tl.zeros([ROWS, COLS], TYPE)
        for s in range(0, n, COLS):
            mask = there & (s + i < n)
            off = tl.where(mask, load(w, at + s + i, mask, TYPE) - mean, 0)
            squares += off * off
            if dy is not None:
                products += off * load(dy, at + s + i, mask, TYPE)
        square = tl.sum(squares, 1)[:, None]
        u, k = scale_of(square / n, mean, n, EPS, FORMULA, ROUNDING)
        slope = k * tl.sum(products, 1)[:, None]
        for s in range(0, n, COLS):
            mask = there & (s + i < n)
            off = load(w, at + s + i, mask, TYPE) - mean
            if dy is None:
                result = off * u
            else:
                result = u * (load(dy, at + s + i, mask, TYPE) - mean_dy - slope * off)
            tl.store(out + at + s + i, result.to(out.dtype.element_ty), mask)


@functools.lru_cache(maxsize=4096)
def _plan(shape, kinds, formula, eps):
    """(whether filters lie in channels_last memory, launch) for a weight of a shape.

    Args:
        kinds: device, types of weight, result and dy (None forward).
    """
    filters, size = shape[0], math.prod(shape[1:])
    unit, whole = math.gcd(size, 8), size <= _BLOCK
    cols = triton.next_power_of_2(size) if whole else _BLOCK // 2
    # Few elements a program where that makes enough programs for all of a GPU.
    rows = max(1, min(2048 // cols, triton.next_power_of_2(filters) // 128))
    wide = torch.float64 if kinds[1] == torch.float64 else torch.float32
    return Launch(
        standardize, triton.cdiv(filters, rows), kinds, (filters, size // unit),
        8 if cols > 2048 else 4, EPS=eps, FORMULA=formula, ROUNDING=4 * torch.finfo(wide).eps,
        TYPE=tl.float64 if wide is torch.float64 else tl.float32,
        UNIT=unit, ROWS=rows, COLS=cols, WHOLE=whole,
    )  # fmt: skip


def takes_ws(weight) -> bool:
    """See :mod:`.dispatch`."""
    return (
        (launch.on_gpu(weight) or launch.INTERPRETED)
        and weight.dtype in _TYPES
        and weight.dim() == 4
        and weight.numel() < 2**30
    )


def _is_last(weight: torch.Tensor) -> bool:
    # A filter's elements count alike, so a channels_last weight is standardized as it lies.
    return not weight.is_contiguous() and weight.is_contiguous(memory_format=torch.channels_last)


def _forward_of(weight, formula, eps, dtype) -> Launch:
    return _plan(weight.shape, (weight.device, weight.dtype, dtype, None), formula, eps)


def _backward_of(weight, formula, eps, dy) -> Launch:
    return _plan(weight.shape, (weight.device, weight.dtype, None, dy.dtype), formula, eps)


@answers
def ws_forward_plan(weight, formula, eps, dtype):
    return plan(0, 0, _forward_of(weight, formula, eps, dtype))


@answers
def ws_backward_plan(weight, formula, eps, dy):
    return plan(0, 0, _backward_of(weight, formula, eps, dy))


@launch.on_its_device
def ws_forward(weight, formula, eps, dtype):
    """See :mod:`.dispatch`."""
    weight = dense(weight, _is_last(weight))
    out = torch.empty_like(weight, dtype=dtype)
    run = _forward_of(weight, formula, eps, dtype)
    run(launch.stream_of(weight), weight, out, None)
    return out, ()


@answers
def ws_slowly(_, dy, weight, formula, eps):
    return (ws_backward(dy, weight, (), formula, eps),)


@launch.on_its_device
def ws_backward(dy, weight, saved, formula, eps):
    """See :mod:`.dispatch`."""
    last = _is_last(weight)
    weight, dy = dense(weight, last), dense(dy, last)
    dw = torch.empty_like(weight)
    run = _backward_of(weight, formula, eps, dy)
    run(launch.stream_of(weight, dy), weight, dw, dy)
    return dw
