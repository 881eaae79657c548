"""Triton kernels of the temporal convolution for two frames at a time (``pairs.py``): sums of frames, of taps, and the end.

Import only where Triton is there; called by ``pairs_fused.py``.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _put_four(goal, part, at, a, b, c, d, inside):
    kind = goal.dtype.element_ty
    tl.store(goal + at, a.to(kind), mask=inside)
    tl.store(goal + part + at, b.to(kind), mask=inside)
    tl.store(goal + 2 * part + at, c.to(kind), mask=inside)
    tl.store(goal + 3 * part + at, d.to(kind), mask=inside)


@triton.jit(do_not_specialize=["frames", "size"])
def time_pairs_kernel(
    u, tail, out, frames, size, scale, C: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr, HAS_TAIL: tl.constexpr,
):
    """u ``[B, frames, size, C]`` -> ``[B, 4, pairs, size, C]``. Programs: channels, tokens of a frame, batch; each walks along
    time and reads every value once."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    token = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    batch, pairs = tl.program_id(2).to(tl.int64), (frames + 1) // 2
    inside = (token < size)[:, None] & (c < C)[None, :]
    at = token[:, None] * C + c[None, :]
    frame = size.to(tl.int64) * C
    x, goal, part = u + batch * frames * frame, out + batch * 4 * pairs * frame, pairs * frame
    before = tl.zeros((ROWS, BLOCK_C), tl.float32)
    if HAS_TAIL:
        before = tl.load(tail + batch * frame + at, mask=inside, other=0.0).to(tl.float32)
    same = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    for p in range(pairs):
        x += 2 * frame
        after = tl.load(x - frame + at, mask=inside & (2 * p + 1 < frames), other=0.0).to(tl.float32)
        last = tl.load(x + at, mask=inside & (2 * p + 2 < frames), other=0.0).to(tl.float32)
        _put_four(goal, part, at, (before - after) * scale, (same + after) * scale, (after - same) * scale, (same - last) * scale,
                  inside)
        before, same = after, last
        goal += frame


@triton.jit
def pair_weights_kernel(weight, out, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """weight ``[C, 3C]`` -> ``[4, C, C]``. Programs: columns, rows."""
    c, row = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C), tl.program_id(1)
    real, at = c < C, row * (3 * C) + c
    a = tl.load(weight + at, mask=real, other=0.0).to(tl.float32)
    b = tl.load(weight + at + C, mask=real, other=0.0).to(tl.float32)
    d = tl.load(weight + at + 2 * C, mask=real, other=0.0).to(tl.float32)
    _put_four(out, C * C, row * C + c, a, (a + b + d) * 0.5, (a - b + d) * 0.5, d, real)


@triton.jit
def _sum_of(x, y, gate, temporal, at, inside):
    """``x + gate * (y + temporal)``; float32."""
    value = tl.load(y + at, mask=inside, other=0.0).to(tl.float32) + temporal
    return tl.load(x + at, mask=inside, other=0.0).to(tl.float32) + gate[None, :] * value


@triton.jit(do_not_specialize=["frames", "size", "rows", "stride"])
def pair_residual_kernel(
    x, y, gate, offset, products, out, frames, size, rows, stride, factor, C: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr, HAS_OFFSET: tl.constexpr,
):
    """``x + gate * (y + temporal)`` ``[B, frames, size, C]``; ``rows`` gates of a batch (1 or frames), ``stride`` apart.
    HAS_OFFSET: and ``offset [B, C]``.

    Programs: channels, tokens of a frame, pairs of the batch.
    """
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    token = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    pairs, real = (frames + 1) // 2, c < C
    which = tl.program_id(2).to(tl.int64)
    batch, t = which // pairs, which % pairs * 2
    inside = (token < size)[:, None] & real[None, :]
    at = token[:, None] * C + c[None, :]
    frame = size.to(tl.int64) * C
    part, m = pairs * frame, products + (batch * 4 * pairs + which % pairs) * frame + at
    m0, m1 = tl.load(m, mask=inside, other=0.0).to(tl.float32), tl.load(m + part, mask=inside, other=0.0).to(tl.float32)
    m2 = tl.load(m + 2 * part, mask=inside, other=0.0).to(tl.float32)
    m3 = tl.load(m + 3 * part, mask=inside, other=0.0).to(tl.float32)
    row = gate + (batch * rows + tl.where(rows > 1, t, 0)) * stride + c
    here = tl.load(row, mask=real, other=0.0).to(tl.float32)
    start = (batch * frames + t) * frame
    kind = out.dtype.element_ty
    first = _sum_of(x + start, y + start, here, (m0 + m1 + m2) * factor, at, inside)
    if HAS_OFFSET:
        more = tl.load(offset + batch * C + c, mask=real, other=0.0).to(tl.float32)[None, :]
        first += more
    tl.store(out + start + at, first.to(kind), mask=inside)
    there = tl.load(row + tl.where(rows > 1, stride, 0), mask=real & (t + 1 < frames), other=0.0).to(tl.float32)
    both = inside & (t + 1 < frames)
    start += frame
    second = _sum_of(x + start, y + start, there, (m1 - m2 - m3) * factor, at, both)
    if HAS_OFFSET:
        second += more
    tl.store(out + start + at, second.to(kind), mask=both)
