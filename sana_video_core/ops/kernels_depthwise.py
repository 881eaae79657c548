"""Triton kernel of the gated depthwise convolution: SiLU, 3x3, gate, in one pass over the FFN's hidden values.

Import only where Triton is there; called by ``fused.py``. A tensor here is a row of channels of one pixel, and the pixels
are named one by one: a thread then holds all neighbours of its channels in registers, and a shift costs nothing. Channels come
in pairs ``[BLOCK_C / 2, 2]``: two of bfloat16 are one 32-bit word (``WORDS``), which is read, kept and halved whole. On an H200
the second-level cache is its narrow place (81 %), then the instructions (70 %); memory would allow a quarter more.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .kernels_silu import fetch, silu_of_half

HALVES, MINUS_ZEROS = tl.constexpr(0x3F003F00), tl.constexpr(0x80008000 - (1 << 32))  # 0.5 and -0.0 twice, in bfloat16
COLUMNS = 4  # output columns a program makes; the functions below name as many, and two more for what is read


@triton.jit
def _six(at, m0, m1, m2, m3, m4, m5, STEP: tl.constexpr):
    """Six neighbouring pixels of a row as they are stored, zero where masked."""
    return (tl.load(at, mask=m0, other=0), tl.load(at + STEP, mask=m1, other=0),
            tl.load(at + 2 * STEP, mask=m2, other=0), tl.load(at + 3 * STEP, mask=m3, other=0),
            tl.load(at + 4 * STEP, mask=m4, other=0), tl.load(at + 5 * STEP, mask=m5, other=0))


@triton.jit
def _activated(stored, WORDS: tl.constexpr, FORM: tl.constexpr):
    """SiLU of stored values; float32 pairs of channels."""
    if WORDS:
        if FORM == "half":  # both halves of a word at once
            stored = tl.inline_asm_elementwise("fma.rn.bf16x2 $0, $1, $2, $3;", "=r,r,r,r", [stored, HALVES, MINUS_ZEROS],
                                               dtype=tl.int32, is_pure=True, pack=1)
        h = tl.join((stored << 16).to(tl.float32, bitcast=True), (stored & -65536).to(tl.float32, bitcast=True))
        if FORM != "half":
            h *= 0.5
    else:
        h = stored.to(tl.float32) * 0.5
    return silu_of_half(h, FORM)


@triton.jit
def _row(x0, x1, x2, x3, x4, x5, WORDS: tl.constexpr, FORM: tl.constexpr):
    """SiLU of six pixels."""
    return (_activated(x0, WORDS, FORM), _activated(x1, WORDS, FORM), _activated(x2, WORDS, FORM),
            _activated(x3, WORDS, FORM), _activated(x4, WORDS, FORM), _activated(x5, WORDS, FORM))


@triton.jit
def _three(at, real, SCALE: tl.constexpr):
    """One row of the 3x3 weights times SCALE; float32."""
    a = tl.load(at, mask=real, other=0.0).to(tl.float32)
    b = tl.load(at + 1, mask=real, other=0.0).to(tl.float32)
    return a * SCALE, b * SCALE, tl.load(at + 2, mask=real, other=0.0).to(tl.float32) * SCALE


@triton.jit
def _nine(at, real, SCALE: tl.constexpr):
    """The 3x3 weights times SCALE; float32."""
    w0, w1, w2 = _three(at, real, SCALE)
    w3, w4, w5 = _three(at + 3, real, SCALE)
    w6, w7, w8 = _three(at + 6, real, SCALE)
    return w0, w1, w2, w3, w4, w5, w6, w7, w8


@triton.jit
def _bias(at, real, HAS_BIAS: tl.constexpr, SCALE: tl.constexpr):
    value = tl.zeros_like(real).to(tl.float32)
    if HAS_BIAS:
        value = tl.load(at, mask=real, other=0.0).to(tl.float32) * SCALE
    return value


@triton.jit
def _add(s0, s1, s2, s3, i0, i1, i2, i3, i4, i5, w0, w1, w2):
    """Four sums with one row of six inputs times three weights added."""
    return (s0 + i0 * w0 + i1 * w1 + i2 * w2, s1 + i1 * w0 + i2 * w1 + i3 * w2,
            s2 + i2 * w0 + i3 * w1 + i4 * w2, s3 + i3 * w0 + i4 * w1 + i5 * w2)


@triton.jit
def _store(goal, a0, a1, a2, a3, g0, g1, g2, g3, m0, m1, m2, m3, STEP: tl.constexpr, FORM: tl.constexpr):
    """Four pixels of value * SiLU(twice the sum ``g``)."""
    kind = goal.dtype.element_ty
    tl.store(goal, (a0 * silu_of_half(g0, FORM)).to(kind), mask=m0)
    tl.store(goal + STEP, (a1 * silu_of_half(g1, FORM)).to(kind), mask=m1)
    tl.store(goal + 2 * STEP, (a2 * silu_of_half(g2, FORM)).to(kind), mask=m2)
    tl.store(goal + 3 * STEP, (a3 * silu_of_half(g3, FORM)).to(kind), mask=m3)


@triton.jit(do_not_specialize=["height", "width", "strips"])
def gated_depthwise_kernel(
    x, words, taps, bias, out, height, width, strips,
    HIDDEN: tl.constexpr, HAS_BIAS: tl.constexpr, WORDS: tl.constexpr, BLOCK_C: tl.constexpr, FORM: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """x ``[frames, height, width, 2 * HIDDEN]`` before its SiLU, taps ``[2 * HIDDEN, 9]`` -> ``[frames, height, width, HIDDEN]``.

    A program walks down a strip of four columns for BLOCK_C value channels and their gate channels. Every row read is
    activated once and added to the sums of three output rows: the one above is then complete, the other two go on (sums
    ``v`` of values, ``g`` of gates; of the ``last`` row, complete, and the ``same``). The row below is on its way meanwhile, and
    with AHEAD the one so many below is fetched into the cache: without that the memory's answers come too late.
    """
    blocks: tl.constexpr = (HIDDEN + BLOCK_C - 1) // BLOCK_C
    WIDE: tl.constexpr = 2 * HIDDEN
    half = (tl.program_id(0) % blocks) * (BLOCK_C // 2) + tl.arange(0, BLOCK_C // 2)
    c = 2 * half[:, None] + tl.arange(0, 2)[None, :]
    place = tl.program_id(0) // blocks
    column, frame = (place % strips) * 4, (place // strips).to(tl.int64)
    corner = frame * height * width + column
    goal, real = out + corner * HIDDEN + c, c < HIDDEN
    s2, s3, s4 = real & (column + 1 < width), real & (column + 2 < width), real & (column + 3 < width)
    if WORDS:
        at, m1, STEP, GATE = words + (corner - 1) * HIDDEN + half, 2 * half < HIDDEN, HIDDEN, HIDDEN // 2
    else:
        at, m1, STEP, GATE = x + (corner - 1) * WIDE + c, real, WIDE, HIDDEN
    m0, m2, m3 = m1 & (column > 0), m1 & (column + 1 < width), m1 & (column + 2 < width)
    m4, m5 = m1 & (column + 3 < width), m1 & (column + 4 < width)
    v0, v1, v2, v3, v4, v5, v6, v7, v8 = _nine(taps + 9 * c, real, 1.0)
    g0, g1, g2, g3, g4, g5, g6, g7, g8 = _nine(taps + 9 * (c + HIDDEN), real, 0.5)
    v_bias, g_bias = _bias(bias + c, real, HAS_BIAS, 1.0), _bias(bias + c + HIDDEN, real, HAS_BIAS, 0.5)
    x0, x1, x2, x3, x4, x5 = _six(at, m0, m1, m2, m3, m4, m5, STEP)
    y0, y1, y2, y3, y4, y5 = _six(at + GATE, m0, m1, m2, m3, m4, m5, STEP)
    if AHEAD:  # the strip's own pixels; those beside it are its neighbours'
        line = tl.arange(0, 8)
        pixel = tl.minimum(line % 4, width - 1 - column)
        soon = words + (corner + pixel) * HIDDEN + (line // 4) * GATE + (tl.program_id(0) % blocks) * (BLOCK_C // 2)
    last_v0, last_v1, last_v2, last_v3 = v_bias, v_bias, v_bias, v_bias
    last_g0, last_g1, last_g2, last_g3 = g_bias, g_bias, g_bias, g_bias
    same_v0, same_v1, same_v2, same_v3 = v_bias, v_bias, v_bias, v_bias
    same_g0, same_g1, same_g2, same_g3 = g_bias, g_bias, g_bias, g_bias
    for row in range(height):
        a0, a1, a2, a3, a4, a5 = _row(x0, x1, x2, x3, x4, x5, WORDS, FORM)
        b0, b1, b2, b3, b4, b5 = _row(y0, y1, y2, y3, y4, y5, WORDS, FORM)
        at += tl.where(row + 1 < height, width * STEP, 0)  # the last row is read again, in vain
        if AHEAD:
            fetch(soon + tl.minimum(row + AHEAD, height - 1) * (width * STEP))
        x0, x1, x2, x3, x4, x5 = _six(at, m0, m1, m2, m3, m4, m5, STEP)
        y0, y1, y2, y3, y4, y5 = _six(at + GATE, m0, m1, m2, m3, m4, m5, STEP)
        if row > 0:
            last_v0, last_v1, last_v2, last_v3 = _add(
                last_v0, last_v1, last_v2, last_v3, a0, a1, a2, a3, a4, a5, v6, v7, v8)
            last_g0, last_g1, last_g2, last_g3 = _add(
                last_g0, last_g1, last_g2, last_g3, b0, b1, b2, b3, b4, b5, g6, g7, g8)
            _store(goal, last_v0, last_v1, last_v2, last_v3, last_g0, last_g1, last_g2, last_g3, real, s2, s3, s4, HIDDEN, FORM)
            goal += width * HIDDEN
        last_v0, last_v1, last_v2, last_v3 = _add(same_v0, same_v1, same_v2, same_v3, a0, a1, a2, a3, a4, a5, v3, v4, v5)
        last_g0, last_g1, last_g2, last_g3 = _add(same_g0, same_g1, same_g2, same_g3, b0, b1, b2, b3, b4, b5, g3, g4, g5)
        same_v0, same_v1, same_v2, same_v3 = _add(v_bias, v_bias, v_bias, v_bias, a0, a1, a2, a3, a4, a5, v0, v1, v2)
        same_g0, same_g1, same_g2, same_g3 = _add(g_bias, g_bias, g_bias, g_bias, b0, b1, b2, b3, b4, b5, g0, g1, g2)
    _store(goal, last_v0, last_v1, last_v2, last_v3, last_g0, last_g1, last_g2, last_g3, real, s2, s3, s4, HIDDEN, FORM)
