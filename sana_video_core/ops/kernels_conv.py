"""Triton kernel of the video decoder's convolutions: a matrix product over shifted rows, and the norm that may follow it.

Import only where Triton is there; called by ``frames_fused.py``. Frames lie channels last, so a pixel is a row of channels and
a neighbour in space is a row at a fixed distance. Where the input is a window, its zero border makes that true at the edges
too: the loop over taps and channels has no test in it, and its loads are copies to shared memory ahead of the product. The
two frames before come from a tensor of their own. Sums are float32 in an order that depends on the layer alone: a pixel has
the same bits however many frames a call holds.

A program makes MAIN + REST output channels (powers of two; REST may be 0) of ROWS pixels of one frame.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .kernels_silu import silu

CAUSAL, TIME, UP = 0, 1, 2  # the forms; the kernel names the numbers


def operand(dtype):
    """The type to which a product's operands are rounded. Triton's interpreter (CPU tests) cannot multiply bfloat16."""
    return tl.float32 if triton.knobs.runtime.interpret else getattr(tl, str(dtype).removeprefix("torch."))


@triton.jit
def _activated(value, inverse, n, gamma, real, SILU: tl.constexpr):
    """``SiLU(value * inverse * gamma)``, zero where not ``real``."""
    y = value * inverse[:, None] * tl.load(gamma + n).to(tl.float32)[None, :]
    return tl.where(real[:, None], silu(y, SILU), 0.0)


@triton.jit
def _tap(
    x, history, at, y, c, i, batch, t, frames, plane, wide, height, width, parity,
    FORM: tl.constexpr, CIN: tl.constexpr, STEPS: tl.constexpr, BLOCK_K: tl.constexpr, OPERAND: tl.constexpr,
):
    """The values that tap and channel block ``i`` multiply: ``[ROWS, BLOCK_K]``."""
    ROOM: tl.constexpr = 2 if FORM == 0 else 0
    SIDE: tl.constexpr = 3 if FORM == 0 else (1 if FORM == 1 else 2)
    tap = i // STEPS
    dy, dx = tap % (SIDE * SIDE) // SIDE, tap % SIDE
    if FORM == 2:
        up, left = dy + parity // 2 - 1, dx + parity % 2 - 1
        near = x + ((batch * frames + t) * plane + up * wide + left) * CIN + i % STEPS * BLOCK_K
        inside = (y + up >= 0) & (y + up < height) & (c + left >= 0) & (c + left < width)
        value = tl.load(near + at, mask=inside[:, None], other=0.0)
    else:
        f = t + tap // (SIDE * SIDE)
        near = x + (batch * (frames + ROOM) + f - 2 + ROOM) * plane * CIN
        near = tl.where(f < 2, history + (batch * 2 + f) * plane * CIN, near)
        value = tl.load(near + (dy * wide + dx) * CIN + i % STEPS * BLOCK_K + at)
    return value.to(OPERAND)


@triton.jit
def _keep(
    out, acc_a, acc_b, a, b, y, c, first, frame, height, width, parity, real,
    FORM: tl.constexpr, COUT: tl.constexpr, REST: tl.constexpr,
):
    """Write the frames that come out."""
    STRIDE: tl.constexpr = COUT // 2 if FORM == 1 else COUT
    row = y * width + c
    goal = out + frame * height * width * COUT
    if FORM == 1:  # the second half of the channels is the frame after
        goal += first // STRIDE * (height * width - 1) * STRIDE
    if FORM == 2:
        goal += frame * height * width * COUT * 3 + (parity // 2 * 2 * width + parity % 2) * COUT
        row = (y * 2 * width + c) * 2
    at = row[:, None] * STRIDE
    kind = out.dtype.element_ty
    tl.store(goal + (at + a[None, :]), acc_a.to(kind), mask=real[:, None])
    if REST:
        tl.store(goal + (at + b[None, :]), acc_b.to(kind), mask=real[:, None])


@triton.jit
def _norm(
    goal, acc_a, acc_b, a, b, q, rows, gamma, real, kind: tl.constexpr,
    ROOT: tl.constexpr, COUT: tl.constexpr, REST: tl.constexpr, SILU: tl.constexpr,
):
    """Write ``SiLU(norm)`` of what comes out, into the next window."""
    squares = tl.sum(acc_a * acc_a, 1)
    if REST:
        squares += tl.sum(acc_b * acc_b, 1)
    inverse = tl.rsqrt(tl.maximum(squares, 1e-24)) * ROOT
    at = q[:, None] * COUT
    here = (q < rows)[:, None]
    tl.store(goal + (at + a[None, :]), _activated(acc_a, inverse, a, gamma, real, SILU).to(kind), mask=here)
    if REST:
        tl.store(goal + (at + b[None, :]), _activated(acc_b, inverse, b, gamma, real, SILU).to(kind), mask=here)


@triton.jit(do_not_specialize=["frames", "height", "width", "begins"])
def frame_conv_kernel(
    x, history, weight, bias, gamma, out, frames, height, width, begins,
    FORM: tl.constexpr, CIN: tl.constexpr, COUT: tl.constexpr, OPERAND: tl.constexpr, NORM: tl.constexpr, ROOT: tl.constexpr,
    ROWS: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, BLOCK_K: tl.constexpr, SILU: tl.constexpr,
):
    """CAUSAL: window -> frames. TIME: three frames -> two frames in turn. UP: 2x2 taps for each of the four pixels that a
    nearest upsampling makes of one (weight ``[4, COUT, 2, 2, CIN]``).

    NORM (CAUSAL where a program has all channels of a pixel): ``out`` is the next window instead, and gets ``SiLU(norm)`` at the
    place of every row and of the border pixels between rows. ``frames`` are those of x without room; with ``begins`` there is no
    history, and its taps, all zeros, are left out. ROOT is sqrt(COUT).
    """
    PAD: tl.constexpr = 1 if FORM == 0 else 0
    SQUARE: tl.constexpr = 9 if FORM == 0 else (1 if FORM == 1 else 4)
    TAPS: tl.constexpr = SQUARE * (1 if FORM == 2 else 3)
    STEPS: tl.constexpr = CIN // BLOCK_K
    SPLITS: tl.constexpr = COUT // (MAIN + REST)
    batch = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0)
    parity = 0
    if FORM == 2:
        parity, place = place % 4, place // 4
        weight += parity * (COUT * TAPS * CIN)
    first = (place % SPLITS) * (MAIN + REST)
    t = (place // SPLITS) % frames
    wide = width + 2 * PAD
    plane = (height + 2 * PAD).to(tl.int64) * wide
    rows = height * wide  # pixels of a frame that come out, with the border pixels between rows
    q = (place // SPLITS) // frames * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, BLOCK_K)
    a = first + tl.arange(0, MAIN)
    b = a  # not used without REST
    weight_a = weight + a[:, None] * (TAPS * CIN) + k[None, :]
    acc_a = tl.zeros((ROWS, MAIN), tl.float32)
    acc_b = acc_a
    if REST:
        b = first + MAIN + tl.arange(0, REST)
        weight_b = weight + b[:, None] * (TAPS * CIN) + k[None, :]
        acc_b = tl.zeros((ROWS, REST), tl.float32)
    y, c = q // wide, q % wide
    at = tl.minimum(q, rows - 1 - 2 * PAD)[:, None] * CIN + k[None, :]  # the last rows read what no pixel needs
    low = 0 if FORM == 2 else tl.where(begins != 0, tl.maximum(2 - t, 0), 0) * (SQUARE * STEPS)
    for i in range(low, TAPS * STEPS):
        value = _tap(x, history, at, y, c, i, batch, t, frames, plane, wide, height, width, parity, FORM, CIN, STEPS, BLOCK_K,
                     OPERAND)
        acc_a = tl.dot(value, tl.trans(tl.load(weight_a + i * BLOCK_K).to(OPERAND)), acc_a, input_precision="ieee")
        if REST:
            acc_b = tl.dot(value, tl.trans(tl.load(weight_b + i * BLOCK_K).to(OPERAND)), acc_b, input_precision="ieee")
    real = (q < rows) & (c < width)
    acc_a += tl.load(bias + a).to(tl.float32)[None, :]
    if REST:
        acc_b += tl.load(bias + b).to(tl.float32)[None, :]
    if NORM:
        goal = out + ((batch * (frames + 2) + 2 + t) * plane + wide + 1) * COUT
        _norm(goal, acc_a, acc_b, a, b, q, rows, gamma, real, out.dtype.element_ty, ROOT, COUT, REST, SILU)
    else:
        _keep(out, acc_a, acc_b, a, b, y, c, first, batch * frames + t, height, width, parity, real, FORM, COUT, REST)
