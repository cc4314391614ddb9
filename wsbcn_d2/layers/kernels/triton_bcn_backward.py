"""BCN on a GPU, backward: the three kernels that ``triton_bcn.py`` launches.

:func:`sums` (of dy and dy (x - m) over tiles), :func:`settle_backward` (one program per group:
gradients of the parameters, coefficients), :func:`combine`. Notation and memory as in
``triton_bcn_forward.py``.
"""

import triton
import triton.language as tl

from .triton_bcn_forward import SIZES, SMALL, by_row, load_or, member, tile, tile_rows

__all__ = ["combine", "settle_backward", "sums"]

_GRADS = ["d_weight", "d_bias", "d_bn_weight", "d_bn_bias"]


@triton.jit(do_not_specialize=SIZES)
def sums(
    dy, x, scratch, stats, rows, channels, size, chunks, units,
    UNIT: tl.constexpr, LAST: tl.constexpr, FLAT: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    at, mask, row, valid = tile(channels, size, chunks, units, UNIT, LAST, FLAT, ROWS, COLS)
    m = tl.load(stats + 2 * channels + row, valid, 0)
    d, value = tl.load(dy + at, mask, 0).to(m.dtype), tl.load(x + at, mask, 0).to(m.dtype)
    product, _ = by_row(d * (value - m), mask, size, FLAT, ROWS, COLS)
    d, _ = by_row(d, mask, size, FLAT, ROWS, COLS)
    row, valid, chunk = tile_rows(channels, chunks, FLAT, ROWS)
    tl.store(scratch + chunk * rows + row, tl.sum(d, 1), valid)
    tl.store(scratch + (chunks + chunk) * rows + row, tl.sum(product, 1), valid)


@triton.jit
def row_sums(scratch, row, mask, rows, chunks, CHUNKS: tl.constexpr):
    """The two sums of rows from those of their chunks; 0 outside the mask."""
    first = tl.load(scratch + row, mask, 0)
    second = tl.load(scratch + chunks * rows + row, mask, 0)
    if CHUNKS > 1:
        for s0 in range(1, chunks, CHUNKS):
            s = s0 + tl.arange(0, CHUNKS)[None, None, :]
            at, there = scratch + s * rows + row[:, :, None], mask[:, :, None] & (s < chunks)
            first += tl.sum(tl.load(at, there, 0), 2)
            second += tl.sum(tl.load(at + chunks * rows, there, 0), 2)
    return first, second


@triton.jit(do_not_specialize=SIZES + SMALL + _GRADS)
def settle_backward(
    scratch, stats, weight, bn_weight, bn_bias, d_weight, d_bias, d_bn_weight, d_bn_bias,
    samples, channels, size, chunks,
    CHUNKS: tl.constexpr, PER: tl.constexpr, CG: tl.constexpr, NB: tl.constexpr,
):  # fmt: skip
    rows, g, groups = samples * channels, tl.program_id(0), tl.num_programs(0)
    of_rows, of_groups = stats + 2 * channels, stats + 2 * channels + 2 * rows
    coefficients = scratch + 2 * chunks * rows
    c, valid = g * PER + tl.arange(0, CG), tl.arange(0, CG) < PER
    mean, inverse = tl.load(stats + c, valid, 0), tl.load(stats + channels + c, valid, 0)
    a = (inverse * load_or(bn_weight, c, valid, 1))[None, :]
    b = load_or(bn_bias, c, valid, 0)
    grad_a, grad_s = tl.zeros_like(mean), tl.zeros_like(mean)
    grad_w, grad_b = tl.sum(grad_a), tl.sum(grad_a)
    for n0 in range(0, samples, NB):
        n = n0 + tl.arange(0, NB)
        row, mask = member(n, samples, channels, PER, CG)
        sum_d, sum_dx = row_sums(scratch, row, mask, rows, chunks, CHUNKS)
        mu = tl.load(of_groups + n * groups + g, n < samples, 0)
        r = tl.load(of_groups + (samples + n) * groups + g, n < samples, 0)
        m, v = tl.load(of_rows + row, mask, 0), tl.load(of_rows + rows + row, mask, 0)
        offset = m - mean[None, :]
        e = tl.where(mask, offset * a + (b - mu[:, None]), 0)
        sum_dy, sum_dy_z = tl.sum(sum_d, 1), r * tl.sum(sum_dx * a + sum_d * e, 1)
        q = (sum_dy_z * r / (size * PER))[:, None]
        wr = (tl.load(weight + g) * r)[:, None]
        lost, slope = (sum_dy / (size * PER))[:, None] + q * e, q * a
        dz = tl.where(mask, wr * (sum_d - size * lost), 0)
        grad_a += tl.sum(tl.where(mask, dz * offset + wr * (sum_dx - size * slope * v), 0), 0)
        grad_s += tl.sum(dz, 0)
        grad_w += tl.sum(sum_dy_z)
        grad_b += tl.sum(sum_dy)
        tl.store(coefficients + row, wr * a, mask)
        tl.store(coefficients + rows + row, lost, mask)
        tl.store(coefficients + 2 * rows + row, slope, mask)
    tl.store(d_weight + g, grad_w)
    tl.store(d_bias + g, grad_b)
    if d_bn_weight is not None:
        tl.store(d_bn_weight + c, grad_a * inverse, valid)
        tl.store(d_bn_bias + c, grad_s, valid)


@triton.jit(do_not_specialize=SIZES)
def combine(
    dy, x, dx, scratch, stats, rows, channels, size, chunks, units,
    UNIT: tl.constexpr, LAST: tl.constexpr, FLAT: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    at, mask, row, valid = tile(channels, size, chunks, units, UNIT, LAST, FLAT, ROWS, COLS)
    coefficients = scratch + 2 * chunks * rows
    m = tl.load(stats + 2 * channels + row, valid, 0)
    p = tl.load(coefficients + row, valid, 0)
    lost = tl.load(coefficients + rows + row, valid, 0)
    slope = tl.load(coefficients + 2 * rows + row, valid, 0)
    d, value = tl.load(dy + at, mask, 0).to(m.dtype), tl.load(x + at, mask, 0).to(m.dtype)
    tl.store(dx + at, (p * (d - lost - slope * (value - m))).to(dx.dtype.element_ty), mask)
