"""Triton kernels of the video decoder that pass over frames: norm, SiLU and border in one; the sum of the last convolution.

Import only where Triton is there; called by ``frames_fused.py``. Frames lie channels last. A row of C channels is read as MAIN
channels and REST more, as in ``kernels.py``. A program names its image row, so that no pixel's place costs a division.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .kernels_silu import silu


@triton.jit
def _total(x, bias, residual, at, n, inside, real, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr):
    """``x (+ bias) (+ residual)``; float32."""
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        value += tl.load(bias + n, mask=real, other=0.0).to(tl.float32)[None, :]
    if HAS_RESIDUAL:
        value += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    return value


@triton.jit
def _activated(value, inverse, gamma, n, real, FORM: tl.constexpr):
    """``SiLU(value * inverse * gamma)``."""
    return silu(value * inverse[:, None] * tl.load(gamma + n, mask=real, other=0.0).to(tl.float32)[None, :], FORM)


@triton.jit(do_not_specialize=["frames", "height", "width"])
def window_kernel(
    x, bias, residual, gamma, out, window, frames, height, width,
    C: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, PIXELS: tl.constexpr, ROOT: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, KEEP: tl.constexpr, OPEN: tl.constexpr, NORM: tl.constexpr,
    FORM: tl.constexpr,
):
    """``total = x + bias + residual`` into ``out`` (KEEP), and total, or SiLU(norm(total)), into the window (OPEN).

    Programs: PIXELS pixels of a row, the rows of a frame with its border, the frames. Each one also writes the border
    beside its pixels. x ``[B, frames, height, width, C]``; ROOT is sqrt(C).
    """
    column = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    line, which = tl.program_id(1) - 1, tl.program_id(2).to(tl.int64)
    wide = width + 2
    a = tl.arange(0, MAIN)
    real_a = a < C
    b = MAIN + tl.arange(0, REST if REST else 1)
    real_b = b < C
    there = (line >= 0) & (line < height)
    here = (column < width) & there
    inside_a = here[:, None] & real_a[None, :]
    inside_b = here[:, None] & real_b[None, :]
    row = ((which * height + line) * width + column)[:, None] * C
    value_a = _total(x, bias, residual, row + a[None, :], a, inside_a, real_a, HAS_BIAS, HAS_RESIDUAL)
    if REST:
        value_b = _total(x, bias, residual, row + b[None, :], b, inside_b, real_b, HAS_BIAS, HAS_RESIDUAL)
    if KEEP:
        tl.store(out + row + a[None, :], value_a.to(out.dtype.element_ty), mask=inside_a)
        if REST:
            tl.store(out + row + b[None, :], value_b.to(out.dtype.element_ty), mask=inside_b)
    if OPEN:
        kind = window.dtype.element_ty
        if NORM:
            squares = tl.sum(value_a * value_a, 1)
            if REST:
                squares += tl.sum(value_b * value_b, 1)
            inverse = tl.rsqrt(tl.maximum(squares, 1e-24)) * ROOT
            value_a = _activated(value_a, inverse, gamma, a, real_a, FORM)
            if REST:
                value_b = _activated(value_b, inverse, gamma, b, real_b, FORM)
        frame = which // frames * (frames + 2) + which % frames + 2
        start = (frame * (height + 2) + line + 1) * wide
        goal = window + (start + 1 + column)[:, None] * C
        shown = (column < width)[:, None]
        tl.store(goal + a[None, :], tl.where(inside_a, value_a, 0.0).to(kind), mask=shown & real_a[None, :])
        if REST:
            tl.store(goal + b[None, :], tl.where(inside_b, value_b, 0.0).to(kind), mask=shown & real_b[None, :])
        side = tl.arange(0, 2)
        first, last = tl.program_id(0) == 0, tl.program_id(0) == tl.num_programs(0) - 1
        mine = ((side == 0) & first) | ((side == 1) & last)
        edge = window + (start + side * (width + 1))[:, None] * C
        tl.store(edge + a[None, :], tl.zeros((2, MAIN), kind), mask=mine[:, None] & real_a[None, :])
        if REST:
            tl.store(edge + b[None, :], tl.zeros((2, REST), kind), mask=mine[:, None] & real_b[None, :])


@triton.jit
def _normed(
    x, residual, gamma, at, n, inside, real, KEEP: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ROOT: tl.constexpr,
    FORM: tl.constexpr,
):
    """SiLU(norm(x + residual)) of pixels, rounded to x's type; KEEP: the sum goes where x was."""
    value = _total(x, x, residual, at, n, inside, real, False, HAS_RESIDUAL)
    if KEEP:
        tl.store(x + at, value.to(x.dtype.element_ty), mask=inside)
    inverse = tl.rsqrt(tl.maximum(tl.sum(value * value, 1), 1e-24)) * ROOT
    return _activated(value, inverse, gamma, n, real, FORM).to(x.dtype.element_ty).to(tl.float32)


@triton.jit(do_not_specialize=["frames", "height", "width"])
def pairs_kernel(
    x, residual, gamma, history, sums, last, frames, height, width, C: tl.constexpr, BLOCK_C: tl.constexpr, PIXELS: tl.constexpr,
    ROOT: tl.constexpr, HAS_RESIDUAL: tl.constexpr, KEEP: tl.constexpr, HAS_HISTORY: tl.constexpr, FORM: tl.constexpr,
):
    """``frames.open_pairs``. Programs: PIXELS pixels of a row with its border, the rows with theirs, the batch; each walks along
    time and reads every frame once."""
    column = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS) - 1
    line, batch, pairs = tl.program_id(1) - 1, tl.program_id(2).to(tl.int64), frames // 2
    wide, n = width + 2, tl.arange(0, BLOCK_C)
    area, frame, real = (height + 2).to(tl.int64) * wide * C, height.to(tl.int64) * width * C, n < C
    shown = (column <= width)[:, None] & real[None, :]
    inside = shown & (column >= 0)[:, None] & (column < width)[:, None] & (line >= 0) & (line < height)
    at = (line * width + column)[:, None] * C + n[None, :]
    place = ((line + 1) * wide + column + 1)[:, None] * C + n[None, :]
    before, same = tl.zeros((PIXELS, BLOCK_C), tl.float32), tl.zeros((PIXELS, BLOCK_C), tl.float32)
    if HAS_HISTORY:
        past = history + batch * 2 * area + place
        before = tl.load(past, mask=inside, other=0.0).to(tl.float32)
        same = tl.load(past + area, mask=inside, other=0.0).to(tl.float32)
    goal = sums + batch * pairs * 4 * area + place
    kind = sums.dtype.element_ty
    for p in range(pairs):
        here = (batch * frames + 2 * p) * frame
        after = _normed(x + here, residual + here, gamma, at, n, inside, real, KEEP, HAS_RESIDUAL, ROOT, FORM)
        tl.store(goal, (before - after).to(kind), mask=shown)
        tl.store(goal + area, (same + after).to(kind), mask=shown)
        tl.store(goal + 2 * area, (after - same).to(kind), mask=shown)
        here += frame
        latest = _normed(x + here, residual + here, gamma, at, n, inside, real, KEEP, HAS_RESIDUAL, ROOT, FORM)
        tl.store(goal + 3 * area, (same - latest).to(kind), mask=shown)
        before, same = after, latest
        goal += 4 * area
    tl.store(last + batch * 2 * area + place, before.to(last.dtype.element_ty), mask=shown)
    tl.store(last + batch * 2 * area + area + place, same.to(last.dtype.element_ty), mask=shown)


@triton.jit(do_not_specialize=["frames", "height", "width", "plane"])
def gather_taps_kernel(
    products, bias, out, frames, height, width, plane, ROWS: tl.constexpr, OUT: tl.constexpr, PIXELS: tl.constexpr,
):
    """Pixels of a 3x3x3 convolution from the products of every window pixel with every tap.

    products ``[B * (frames + 2), ROWS, plane]``, the first 27 * OUT rows tap by tap, the first (height + 2) * (width + 2)
    columns pixel by pixel; out ``[B, OUT, frames, height, width]``. Programs: pixels of a row, rows, frames of the batch.
    """
    column = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    line, which = tl.program_id(1), tl.program_id(2)
    batch, t = (which // frames).to(tl.int64), which % frames
    here, wide = column < width, width + 2
    for channel in tl.static_range(OUT):
        value = tl.zeros((PIXELS,), tl.float32) + tl.load(bias + channel).to(tl.float32)
        for tap in tl.static_range(27):
            frame = batch * (frames + 2) + t + tap // 9
            near = (frame * ROWS + tap * OUT + channel) * plane + (line + tap // 3 % 3) * wide + tap % 3
            value += tl.load(products + near + column, mask=here, other=0.0).to(tl.float32)
        goal = out + ((batch * OUT + channel) * frames + t) * height * width + line * width + column
        tl.store(goal, value.to(out.dtype.element_ty), mask=here)
