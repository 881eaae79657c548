"""Triton kernel of the gated depthwise convolution: SiLU, 3x3, gate, in one pass over the FFN's hidden values.

Import only where Triton is there; called by ``fused.py``. A tensor here is a row of channels of one pixel, and the pixels
are named one by one: a thread then holds all neighbours of its channels in registers, and a shift costs nothing. Channels come
in pairs ``[BLOCK_C / 2, 2]``: two of bfloat16 are one 32-bit word (``WORDS``), which is read, kept and halved whole. On an H200
the second-level cache is its narrow place (81 %), then the instructions (70 %); memory would allow a quarter more. An output in
E4M3 needs no float32 sums: there two channels are one word all the way (``PACKED``), and one instruction where there were two.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .kernels import cut
from .kernels_silu import fetch, silu_of_half, word

HALVES, MINUS_ZEROS = tl.constexpr(0x3F003F00), tl.constexpr(0x80008000 - (1 << 32))  # 0.5 and -0.0 twice, in bfloat16
COLUMNS = 4  # output columns a program makes; the functions below name as many, and two more for what is read


@triton.jit
def _six(at, m0, m1, m2, m3, m4, m5, STEP: tl.constexpr):
    """Six neighbouring pixels of a row as they are stored, zero where masked."""
    return (tl.load(at, mask=m0, other=0), tl.load(at + STEP, mask=m1, other=0),
            tl.load(at + 2 * STEP, mask=m2, other=0), tl.load(at + 3 * STEP, mask=m3, other=0),
            tl.load(at + 4 * STEP, mask=m4, other=0), tl.load(at + 5 * STEP, mask=m5, other=0))


@triton.jit
def _apart(stored):
    """The two bfloat16 of every word as float32 pairs."""
    return tl.join((stored << 16).to(tl.float32, bitcast=True), (stored & -65536).to(tl.float32, bitcast=True))


@triton.jit
def _packed(pairs, PACKED: tl.constexpr):
    """Float32 pairs as words of two bfloat16, where PACKED."""
    if PACKED:
        a, b = tl.split(pairs)
        pairs = word(a, b, tl.bfloat16, True)
    return pairs


@triton.jit
def _activated(stored, WORDS: tl.constexpr, FORM: tl.constexpr, PACKED: tl.constexpr):
    """SiLU of stored values; float32 pairs of channels, or words of them."""
    if WORDS:
        if FORM == "half":  # both halves of a word at once
            stored = tl.inline_asm_elementwise("fma.rn.bf16x2 $0, $1, $2, $3;", "=r,r,r,r", [stored, HALVES, MINUS_ZEROS],
                                               dtype=tl.int32, is_pure=True, pack=1)
        h = _apart(stored)
        if FORM != "half":
            h *= 0.5
    else:
        h = stored.to(tl.float32) * 0.5
    return _packed(silu_of_half(h, FORM), PACKED)


@triton.jit
def _row(x0, x1, x2, x3, x4, x5, WORDS: tl.constexpr, FORM: tl.constexpr, PACKED: tl.constexpr):
    """SiLU of six pixels."""
    return (_activated(x0, WORDS, FORM, PACKED), _activated(x1, WORDS, FORM, PACKED), _activated(x2, WORDS, FORM, PACKED),
            _activated(x3, WORDS, FORM, PACKED), _activated(x4, WORDS, FORM, PACKED), _activated(x5, WORDS, FORM, PACKED))


@triton.jit
def _weight(at, real, scale, PACKED: tl.constexpr):
    return _packed(tl.load(at, mask=real, other=0.0).to(tl.float32) * scale, PACKED)


@triton.jit
def _three(at, real, scale, PACKED: tl.constexpr):
    """One row of the 3x3 weights times scale; float32, or words of them."""
    return _weight(at, real, scale, PACKED), _weight(at + 1, real, scale, PACKED), _weight(at + 2, real, scale, PACKED)


@triton.jit
def _nine(at, real, scale, PACKED: tl.constexpr):
    """The 3x3 weights times scale."""
    w0, w1, w2 = _three(at, real, scale, PACKED)
    w3, w4, w5 = _three(at + 3, real, scale, PACKED)
    w6, w7, w8 = _three(at + 6, real, scale, PACKED)
    return w0, w1, w2, w3, w4, w5, w6, w7, w8


@triton.jit
def _bias(at, real, scale, HAS_BIAS: tl.constexpr, PACKED: tl.constexpr):
    value = tl.zeros_like(real).to(tl.float32)
    if HAS_BIAS:
        value = tl.load(at, mask=real, other=0.0).to(tl.float32) * scale
    return _packed(value, PACKED)


@triton.jit
def _inverse(given, FP8: tl.constexpr):
    """What the values' weights are multiplied with, so that the output comes out over ``given []``."""
    inverse = 1.0
    if FP8:
        inverse = 1.0 / tl.load(given)
    return inverse


@triton.jit
def _own_lines(words, corner, left, first, HIDDEN: tl.constexpr, GATE: tl.constexpr):
    """Where the four pixels of a strip (the last of ``left``) begin; those beside it are its neighbours'."""
    line = tl.arange(0, 8)
    return words + (corner + tl.minimum(line % 4, left)) * HIDDEN + (line // 4) * GATE + first


@triton.jit
def _plus(s, i, w, PACKED: tl.constexpr):
    """``s + i * w``."""
    if PACKED:
        return tl.inline_asm_elementwise("fma.rn.bf16x2 $0, $1, $2, $3;", "=r,r,r,r", [i, w, s], dtype=tl.int32, is_pure=True,
                                         pack=1)
    return s + i * w


@triton.jit
def _sum(s, i0, i1, i2, w0, w1, w2, PACKED: tl.constexpr):
    return _plus(_plus(_plus(s, i0, w0, PACKED), i1, w1, PACKED), i2, w2, PACKED)


@triton.jit
def _add(s0, s1, s2, s3, i0, i1, i2, i3, i4, i5, w0, w1, w2, PACKED: tl.constexpr):
    """Four sums with one row of six inputs times three weights added."""
    return (_sum(s0, i0, i1, i2, w0, w1, w2, PACKED), _sum(s1, i1, i2, i3, w0, w1, w2, PACKED),
            _sum(s2, i2, i3, i4, w0, w1, w2, PACKED), _sum(s3, i3, i4, i5, w0, w1, w2, PACKED))


@triton.jit
def _gated(a, g, kind: tl.constexpr, FORM: tl.constexpr, FP8: tl.constexpr, NATIVE: tl.constexpr, PACKED: tl.constexpr):
    """A value times the SiLU of twice the sum ``g``."""
    if PACKED:
        a, g = _apart(a), _apart(g)
    return cut(a * silu_of_half(g, FORM), FP8, NATIVE).to(kind)


@triton.jit
def _store(goal, a0, a1, a2, a3, g0, g1, g2, g3, m0, m1, m2, m3, STEP: tl.constexpr, FORM: tl.constexpr, FP8: tl.constexpr,
           NATIVE: tl.constexpr, PACKED: tl.constexpr):
    """Four pixels."""
    kind: tl.constexpr = goal.dtype.element_ty
    tl.store(goal, _gated(a0, g0, kind, FORM, FP8, NATIVE, PACKED), mask=m0)
    tl.store(goal + STEP, _gated(a1, g1, kind, FORM, FP8, NATIVE, PACKED), mask=m1)
    tl.store(goal + 2 * STEP, _gated(a2, g2, kind, FORM, FP8, NATIVE, PACKED), mask=m2)
    tl.store(goal + 3 * STEP, _gated(a3, g3, kind, FORM, FP8, NATIVE, PACKED), mask=m3)


@triton.jit(do_not_specialize=["height", "width", "strips"])
def gated_depthwise_kernel(
    x, words, taps, bias, given, out, height, width, strips,
    HIDDEN: tl.constexpr, HAS_BIAS: tl.constexpr, WORDS: tl.constexpr, BLOCK_C: tl.constexpr, FORM: tl.constexpr,
    AHEAD: tl.constexpr, FP8: tl.constexpr, NATIVE: tl.constexpr, PACKED: tl.constexpr,
):
    """x ``[frames, height, width, 2 * HIDDEN]`` before its SiLU, taps ``[2 * HIDDEN, 9]`` -> ``[frames, height, width, HIDDEN]``.

    A program walks down a strip of four columns for BLOCK_C value channels and their gate channels. Every row read is
    activated once and added to the sums of three output rows: the one above is then complete, the other two go on (sums
    ``v`` of values, ``g`` of gates; of the ``last`` row, complete, and the ``same``). The row below is on its way meanwhile, and
    with AHEAD the one so many below is fetched into the cache: else the memory's answers come too late. FP8: over ``given []``.
    """
    blocks: tl.constexpr = (HIDDEN + BLOCK_C - 1) // BLOCK_C
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
        at, m1, STEP, GATE = x + (corner - 1) * (2 * HIDDEN) + c, real, 2 * HIDDEN, HIDDEN
    m0, m2, m3 = m1 & (column > 0), m1 & (column + 1 < width), m1 & (column + 2 < width)
    m4, m5 = m1 & (column + 3 < width), m1 & (column + 4 < width)
    over = _inverse(given, FP8)
    v0, v1, v2, v3, v4, v5, v6, v7, v8 = _nine(taps + 9 * c, real, over, PACKED)
    g0, g1, g2, g3, g4, g5, g6, g7, g8 = _nine(taps + 9 * (c + HIDDEN), real, 0.5, PACKED)
    v_bias, g_bias = _bias(bias + c, real, over, HAS_BIAS, PACKED), _bias(bias + c + HIDDEN, real, 0.5, HAS_BIAS, PACKED)
    x0, x1, x2, x3, x4, x5 = _six(at, m0, m1, m2, m3, m4, m5, STEP)
    y0, y1, y2, y3, y4, y5 = _six(at + GATE, m0, m1, m2, m3, m4, m5, STEP)
    if AHEAD:
        soon = _own_lines(words, corner, width - 1 - column, (tl.program_id(0) % blocks) * (BLOCK_C // 2), HIDDEN, GATE)
    last_v0, last_v1, last_v2, last_v3 = v_bias, v_bias, v_bias, v_bias
    last_g0, last_g1, last_g2, last_g3 = g_bias, g_bias, g_bias, g_bias
    same_v0, same_v1, same_v2, same_v3 = v_bias, v_bias, v_bias, v_bias
    same_g0, same_g1, same_g2, same_g3 = g_bias, g_bias, g_bias, g_bias
    for row in range(height):
        a0, a1, a2, a3, a4, a5 = _row(x0, x1, x2, x3, x4, x5, WORDS, FORM, PACKED)
        b0, b1, b2, b3, b4, b5 = _row(y0, y1, y2, y3, y4, y5, WORDS, FORM, PACKED)
        at += tl.where(row + 1 < height, width * STEP, 0)  # the last row is read again, in vain
        if AHEAD:
            fetch(soon + tl.minimum(row + AHEAD, height - 1) * (width * STEP))
        x0, x1, x2, x3, x4, x5 = _six(at, m0, m1, m2, m3, m4, m5, STEP)
        y0, y1, y2, y3, y4, y5 = _six(at + GATE, m0, m1, m2, m3, m4, m5, STEP)
        if row > 0:
            last_v0, last_v1, last_v2, last_v3 = _add(
                last_v0, last_v1, last_v2, last_v3, a0, a1, a2, a3, a4, a5, v6, v7, v8, PACKED)
            last_g0, last_g1, last_g2, last_g3 = _add(
                last_g0, last_g1, last_g2, last_g3, b0, b1, b2, b3, b4, b5, g6, g7, g8, PACKED)
            _store(goal, last_v0, last_v1, last_v2, last_v3, last_g0, last_g1, last_g2, last_g3, real, s2, s3, s4, HIDDEN, FORM,
                   FP8, NATIVE, PACKED)
            goal += width * HIDDEN
        last_v0, last_v1, last_v2, last_v3 = _add(same_v0, same_v1, same_v2, same_v3, a0, a1, a2, a3, a4, a5, v3, v4, v5, PACKED)
        last_g0, last_g1, last_g2, last_g3 = _add(same_g0, same_g1, same_g2, same_g3, b0, b1, b2, b3, b4, b5, g3, g4, g5, PACKED)
        same_v0, same_v1, same_v2, same_v3 = _add(v_bias, v_bias, v_bias, v_bias, a0, a1, a2, a3, a4, a5, v0, v1, v2, PACKED)
        same_g0, same_g1, same_g2, same_g3 = _add(g_bias, g_bias, g_bias, g_bias, b0, b1, b2, b3, b4, b5, g0, g1, g2, PACKED)
    _store(goal, last_v0, last_v1, last_v2, last_v3, last_g0, last_g1, last_g2, last_g3, real, s2, s3, s4, HIDDEN, FORM, FP8,
           NATIVE, PACKED)
