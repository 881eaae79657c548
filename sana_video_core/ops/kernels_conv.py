"""Triton kernels of the video decoder's convolutions: matrix products over shifted rows.

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

CAUSAL, TIME, UP = 0, 1, 2  # the forms; the kernel names the numbers


def operand(dtype):
    """The type to which a product's operands are rounded. Triton's interpreter (CPU tests) cannot multiply bfloat16."""
    return tl.float32 if triton.knobs.runtime.interpret else getattr(tl, str(dtype).removeprefix("torch."))


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


@triton.jit(do_not_specialize=["frames", "height", "width", "begins"])
def frame_conv_kernel(
    x, history, weight, bias, out, frames, height, width, begins,
    FORM: tl.constexpr, CIN: tl.constexpr, COUT: tl.constexpr, OPERAND: tl.constexpr,
    ROWS: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """CAUSAL: window -> frames. TIME: three frames -> two frames in turn. UP: 2x2 taps for each of the four pixels that a
    nearest upsampling makes of one (weight ``[4, COUT, 2, 2, CIN]``).

    ``frames`` are those of x without room; with ``begins`` there is no history, and its taps, all zeros, are left out.
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
    _keep(out, acc_a, acc_b, a, b, y, c, first, batch * frames + t, height, width, parity, real, FORM, COUT, REST)


@triton.jit
def _two_products(
    x, weight_a, weight_b, at, M: tl.constexpr, N: tl.constexpr, sum_a, sum_b, more_a, more_b, wide, area, SIZE: tl.constexpr,
    CIN: tl.constexpr, REST: tl.constexpr, BLOCK_K: tl.constexpr, OPERAND: tl.constexpr,
):
    """Sums number M added to one accumulator, sums number N to another."""
    STEPS: tl.constexpr = CIN // BLOCK_K
    for i in range(9 * STEPS):
        near = x + (i // STEPS // 3 * wide + i // STEPS % 3) * CIN + i % STEPS * BLOCK_K + at
        value, other = tl.load(near + M * area).to(OPERAND), tl.load(near + N * area).to(OPERAND)
        one, two = tl.load(weight_a + M * SIZE + i * BLOCK_K), tl.load(weight_a + N * SIZE + i * BLOCK_K)
        sum_a = tl.dot(value, tl.trans(one.to(OPERAND)), sum_a, input_precision="ieee")
        more_a = tl.dot(other, tl.trans(two.to(OPERAND)), more_a, input_precision="ieee")
        if REST:
            one, two = tl.load(weight_b + M * SIZE + i * BLOCK_K), tl.load(weight_b + N * SIZE + i * BLOCK_K)
            sum_b = tl.dot(value, tl.trans(one.to(OPERAND)), sum_b, input_precision="ieee")
            more_b = tl.dot(other, tl.trans(two.to(OPERAND)), more_b, input_precision="ieee")
    return sum_a, sum_b, more_a, more_b


@triton.jit
def _put_two(out, first, second, bias, n, pixel, step, real, COUT: tl.constexpr):
    """Channels ``n`` of two frames, ``step`` apart."""
    value = tl.load(bias + n).to(tl.float32)[None, :]
    goal = out + (pixel[:, None] * COUT + n[None, :])
    tl.store(goal, (first + value).to(out.dtype.element_ty), mask=real[:, None])
    tl.store(goal + step, (second + value).to(out.dtype.element_ty), mask=real[:, None])


@triton.jit(do_not_specialize=["pairs", "height", "width"])
def pair_conv_kernel(
    x, weight, bias, out, pairs, height, width, CIN: tl.constexpr, COUT: tl.constexpr, OPERAND: tl.constexpr, ROWS: tl.constexpr,
    MAIN: tl.constexpr, REST: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """``frames.pair_conv``: x ``[B, pairs, 4, height + 2, width + 2, CIN]``, weight ``[4, COUT, 3, 3, CIN]``.

    A program makes MAIN + REST channels of ROWS pixels of two frames. The middle products belong to both: they are made first,
    one in each accumulator; their sum and difference are where the frames' own products go on.
    """
    SPLITS: tl.constexpr = COUT // (MAIN + REST)
    SIZE: tl.constexpr = COUT * 9 * CIN
    batch, place = tl.program_id(1).to(tl.int64), tl.program_id(0)
    split = (place % SPLITS) * (MAIN + REST)
    which = batch * pairs + place // SPLITS % pairs
    wide, rows = width + 2, height * (width + 2)
    area = (height + 2).to(tl.int64) * wide * CIN
    q = place // SPLITS // pairs * ROWS + tl.arange(0, ROWS)
    k, a = tl.arange(0, BLOCK_K), split + tl.arange(0, MAIN)
    weight_a = weight + a[:, None] * (9 * CIN) + k[None, :]
    first_a, second_a = tl.zeros((ROWS, MAIN), tl.float32), tl.zeros((ROWS, MAIN), tl.float32)
    b, weight_b, first_b, second_b = a, weight_a, first_a, second_a  # not used without REST
    if REST:
        b = split + MAIN + tl.arange(0, REST)
        weight_b = weight + b[:, None] * (9 * CIN) + k[None, :]
        first_b, second_b = tl.zeros((ROWS, REST), tl.float32), tl.zeros((ROWS, REST), tl.float32)
    at = tl.minimum(q, rows - 3)[:, None] * CIN + k[None, :]  # the last rows read what no pixel needs
    x += which * 4 * area
    first_a, first_b, second_a, second_b = _two_products(
        x, weight_a, weight_b, at, 1, 2, first_a, first_b, second_a, second_b, wide, area, SIZE, CIN, REST, BLOCK_K, OPERAND)
    first_a, second_a = first_a + second_a, first_a - second_a
    if REST:
        first_b, second_b = first_b + second_b, first_b - second_b
    first_a, first_b, second_a, second_b = _two_products(
        x, weight_a, weight_b, at, 0, 3, first_a, first_b, second_a, second_b, wide, area, SIZE, CIN, REST, BLOCK_K, OPERAND)
    y, c = q // wide, q % wide
    real, pixel = (q < rows) & (c < width), (which * 2 * height + y) * width + c
    step = height.to(tl.int64) * width * COUT
    _put_two(out, first_a, second_a, bias, a, pixel, step, real, COUT)
    if REST:
        _put_two(out, first_b, second_b, bias, b, pixel, step, real, COUT)
