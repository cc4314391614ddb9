"""BCN on a GPU, forward: the three kernels that ``triton_bcn.py`` launches, and what a tile is.

:func:`moments` (mean and squared deviations of tiles), :func:`settle` (one program per group:
moments of rows, step of the running estimates, coefficients), :func:`apply`. Arithmetic is in the
type of the parameters, whatever that of x. There are no atomics: results do not depend on the order
of programs.

A row is one channel of one sample. A tile is ROWS rows by COLS pixels (a chunk of each row), in
channels_last memory if LAST; if FLAT, ROWS whole rows that lie together in memory, as COLS lanes
one after another, so that rows of 49 pixels are read in wide and aligned accesses too. Elements
that lie together come in units of UNIT, which is how the compiler knows of the alignment.

Notation as in ``autograd.py``. ``scratch``, between kernels: two sums per chunk and row; then
coefficients per row; then a probe per tile, finite if its moments are. ``stats``, kept for
backward: mean and inverse deviation of the estimates per channel; m and v per row; mu and r per
sample and group.
"""

import triton
import triton.language as tl

__all__ = [
    "SIZES",
    "SMALL",
    "apply",
    "by_row",
    "load_or",
    "member",
    "moments",
    "settle",
    "tile",
    "tile_rows",
]

#: Arguments that kernels are not specialized on: sizes, and tensors that need not be aligned.
SIZES = ["units", "rows", "samples", "channels", "size", "chunks", "programs", "cols"]
SMALL = ["weight", "bias", "bn_weight", "bn_bias", "bn_mean", "bn_var", "bn_count"]


@triton.jit
def tile(
    channels, size, chunks, units,
    UNIT: tl.constexpr, LAST: tl.constexpr, FLAT: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """This program's offsets into x and their mask, and the row of each, to be broadcast."""
    together = units * UNIT
    if FLAT:
        i = tl.arange(0, COLS)
        at, mask = tl.program_id(0).to(tl.int64) * together + i, i < together
        row, valid = tl.program_id(0) * ROWS + i // size, mask
    else:
        chunk, block = tl.program_id(0) % chunks, tl.program_id(0) // chunks
        blocks = tl.cdiv(channels, ROWS)
        c, n = (block % blocks * ROWS + tl.arange(0, ROWS))[:, None], block // blocks
        i = (chunk * COLS + tl.arange(0, COLS))[None, :]
        row = n * channels + c
        if LAST:
            at = n.to(tl.int64) * size * together + (i * together + c)
            valid = c < together
            mask = valid & (i < size)
        else:
            at = n.to(tl.int64) * channels * together + (c * together + i)
            valid = c < channels
            mask = valid & (i < together)
    return at, mask, row, valid


@triton.jit
def tile_rows(channels, chunks, FLAT: tl.constexpr, ROWS: tl.constexpr):
    """The rows of this program's tile, which of them there are, and the chunk."""
    k = tl.arange(0, ROWS)
    if FLAT:
        row, valid = tl.program_id(0) * ROWS + k, k < ROWS
    else:
        block, blocks = tl.program_id(0) // chunks, tl.cdiv(channels, ROWS)
        c = block % blocks * ROWS + k
        row, valid = block // blocks * channels + c, c < channels
    return row, valid, tl.program_id(0) % chunks


@triton.jit
def by_row(value, mask, size, FLAT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Elements of a tile and their mask with a row to each first index."""
    if FLAT:
        own = (tl.arange(0, COLS) // size)[None, :] == tl.arange(0, ROWS)[:, None]
        value, mask = tl.where(own, value[None, :], 0), own & mask[None, :]
    return value, mask


@triton.jit(do_not_specialize=SIZES)
def moments(
    x, scratch, rows, channels, size, chunks, units,
    UNIT: tl.constexpr, LAST: tl.constexpr, FLAT: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    at, mask, _, _ = tile(channels, size, chunks, units, UNIT, LAST, FLAT, ROWS, COLS)
    row, valid, chunk = tile_rows(channels, chunks, FLAT, ROWS)
    value = tl.load(x + at, mask, 0).to(scratch.dtype.element_ty)
    value, mask = by_row(value, mask, size, FLAT, ROWS, COLS)
    mean = tl.sum(value, 1) / tl.minimum(size - chunk * COLS, COLS)
    off = tl.where(mask, value - mean[:, None], 0)
    square = tl.sum(off * off, 1)
    tl.store(scratch + chunk * rows + row, mean, valid)
    tl.store(scratch + (chunks + chunk) * rows + row, square, valid)
    probe = scratch + (2 * chunks + 2) * rows
    tl.store(probe + tl.program_id(0), tl.sum(tl.where(valid, mean + square, 0)))


@triton.jit
def member(n, samples, channels, PER: tl.constexpr, CG: tl.constexpr):
    """Rows, and their mask, of this program's group in the samples n."""
    k = tl.arange(0, CG)
    c = tl.program_id(0) * PER + k
    return n[:, None] * channels + c[None, :], (n < samples)[:, None] & (k < PER)[None, :]


@triton.jit
def row_moments(scratch, row, mask, rows, chunks, size, cols, CHUNKS: tl.constexpr):
    """Mean and variance of rows from those of their chunks; 0 outside the mask."""
    m = tl.load(scratch + row, mask, 0)
    square = tl.load(scratch + chunks * rows + row, mask, 0)
    if CHUNKS > 1:  # the first chunk, joined by blocks of others
        seen = tl.minimum(size, cols)
        for s0 in range(1, chunks, CHUNKS):
            s = s0 + tl.arange(0, CHUNKS)[None, None, :]
            at, there = scratch + s * rows + row[:, :, None], mask[:, :, None] & (s < chunks)
            count = tl.where(there, tl.minimum(size - s * cols, cols), 0)
            mean, more = tl.load(at, there, 0), tl.load(at + chunks * rows, there, 0)
            total = tl.minimum(size - s0 * cols, CHUNKS * cols)
            joined = tl.sum(mean * count, 2) / total
            off = tl.where(there, mean - joined[:, :, None], 0)
            delta, both = joined - m, (seen + total).to(m.dtype)
            square += tl.sum(more + off * off * count, 2) + delta * delta * (seen * (total / both))
            m += delta * (total / both)
            seen += total
    return m, square / size


@triton.jit
def load_or(pointer, offset, mask, other: tl.constexpr):
    return other if pointer is None else tl.load(pointer + offset, mask, other)


@triton.jit(do_not_specialize=SIZES + SMALL)
def settle(
    scratch, stats, weight, bias, bn_weight, bn_bias, bn_mean, bn_var, bn_count,
    rate: "fp64",  # noqa: F821
    samples, channels, size, chunks, programs, cols,
    BN_EPS: tl.constexpr, EPS: tl.constexpr, CHUNKS: tl.constexpr,
    PER: tl.constexpr, CG: tl.constexpr, NB: tl.constexpr, PROBES: tl.constexpr,
):  # fmt: skip
    rows, g, groups = samples * channels, tl.program_id(0), tl.num_programs(0)
    coefficients, probe = scratch + 2 * chunks * rows, scratch + (2 * chunks + 2) * rows
    c, valid = g * PER + tl.arange(0, CG), tl.arange(0, CG) < PER
    mean, var = tl.load(bn_mean + c, valid, 0), tl.load(bn_var + c, valid, 1)
    if bn_count is not None:
        total = tl.zeros([PROBES], mean.dtype)
        for i in range(0, programs, PROBES):
            k = i + tl.arange(0, PROBES)
            total += tl.load(probe + k, k < programs, 0)
        finite = tl.sum(total - total) == 0  # of the whole batch, all channels
        # Blocks of samples are joined to those before them by their means and squares.
        batch_mean, square = tl.zeros_like(mean), tl.zeros_like(mean)
        for n0 in range(0, samples, NB):
            row, mask = member(n0 + tl.arange(0, NB), samples, channels, PER, CG)
            m, v = row_moments(scratch, row, mask, rows, chunks, size, cols, CHUNKS)
            more = tl.minimum(samples - n0, NB)
            joined = tl.sum(m, 0) / more
            off = tl.where(mask, m - joined[None, :], 0)
            delta, share = joined - batch_mean, more / (n0 + more).to(mean.dtype)
            square += tl.sum(v + off * off, 0) + delta * delta * (n0 * share)
            batch_mean += delta * share
        batch_var = square / samples
        outright = (tl.load(bn_count) == 0) | (rate >= 1)
        delta = batch_mean - mean
        new_mean = tl.where(outright, batch_mean, mean + rate * delta)
        new_var = tl.where(outright, batch_var, var + rate * (batch_var - var + delta * delta))
        mean = tl.where(finite, new_mean.to(mean.dtype), mean)
        var = tl.where(finite, new_var.to(var.dtype), var)
        tl.store(bn_mean + c, mean, valid)
        tl.store(bn_var + c, var, valid)
        if g == 0:  # counted by ``apply``, since other programs may still have to read the count
            tl.store(probe + programs, finite.to(mean.dtype))
    inverse = tl.rsqrt(var + BN_EPS)
    tl.store(stats + c, mean, valid)
    tl.store(stats + channels + c, inverse, valid)
    of_rows, of_groups = stats + 2 * channels, stats + 2 * channels + 2 * rows
    a = (inverse * load_or(bn_weight, c, valid, 1))[None, :]
    b = load_or(bn_bias, c, valid, 0)
    for n0 in range(0, samples, NB):
        n = n0 + tl.arange(0, NB)
        row, mask = member(n, samples, channels, PER, CG)
        m, v = row_moments(scratch, row, mask, rows, chunks, size, cols, CHUNKS)
        e = tl.where(mask, (m - mean[None, :]) * a + b, 0)
        mu = tl.sum(e, 1) / PER
        e = tl.where(mask, e - mu[:, None], 0)
        r = tl.rsqrt(tl.sum(a * a * v + e * e, 1) / PER + EPS)
        wr = (tl.load(weight + g) * r)[:, None]
        tl.store(of_rows + row, m, mask)
        tl.store(of_rows + rows + row, v, mask)
        tl.store(of_groups + n * groups + g, mu, n < samples)
        tl.store(of_groups + (samples + n) * groups + g, r, n < samples)
        tl.store(coefficients + row, wr * a, mask)
        tl.store(coefficients + rows + row, wr * e + tl.load(bias + g), mask)


@triton.jit(do_not_specialize=SIZES + SMALL)
def apply(
    x, y, scratch, stats, bn_count, rows, channels, size, chunks, units, programs,
    UNIT: tl.constexpr, LAST: tl.constexpr, FLAT: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    at, mask, row, valid = tile(channels, size, chunks, units, UNIT, LAST, FLAT, ROWS, COLS)
    coefficients = scratch + 2 * chunks * rows
    m = tl.load(stats + 2 * channels + row, valid, 0)
    scale = tl.load(coefficients + row, valid, 0)
    shift = tl.load(coefficients + rows + row, valid, 0)
    value = tl.load(x + at, mask, 0).to(m.dtype)
    tl.store(y + at, ((value - m) * scale + shift).to(y.dtype.element_ty), mask)
    if bn_count is not None and tl.program_id(0) == 0:
        finite = tl.load(coefficients + 2 * rows + programs)
        tl.store(bn_count, tl.load(bn_count) + finite.to(tl.int64))
