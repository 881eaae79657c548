"""Triton kernel of the gated depthwise convolution: SiLU, 3x3, gate, in one pass over the FFN's hidden values.

Import only where Triton is there; called by ``fused.py``. A tensor here is a row of channels of one pixel, and the pixels
are named one by one: a thread then holds all neighbours of its channels in registers, and a shift costs nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

COLUMNS = 4  # output columns a program makes; the functions below name as many, and two more for what is read


def silu_form(wanted: str) -> str:
    """``wanted`` where its instructions exist (NVIDIA), else 'plain'."""
    return "plain" if triton.knobs.runtime.interpret or torch.version.cuda is None else wanted


@triton.jit
def _silu(a, b, FORM: tl.constexpr):
    """SiLU of two values; float32. The special function unit is the narrow place, so the forms differ in its use.

    'plain': two exponentials, two divisions. 'pair': the reciprocals of both come from one of their product (below 2^-60
    a sigmoid stops falling).
    """
    if FORM == "pair":
        below_a = 1.0 + _exp2(tl.minimum(a * -1.4426950408889634, 60.0))
        below_b = 1.0 + _exp2(tl.minimum(b * -1.4426950408889634, 60.0))
        inverse = _reciprocal(below_a * below_b)
        return a * (below_b * inverse), b * (below_a * inverse)
    return a / (1.0 + tl.exp(-a)), b / (1.0 + tl.exp(-b))


@triton.jit
def _exp2(x):
    return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _reciprocal(x):
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _six(at, m0, m1, m2, m3, m4, m5, STEP: tl.constexpr):
    """Six neighbouring pixels of a row, zero where masked."""
    return (tl.load(at, mask=m0, other=0.0), tl.load(at + STEP, mask=m1, other=0.0),
            tl.load(at + 2 * STEP, mask=m2, other=0.0), tl.load(at + 3 * STEP, mask=m3, other=0.0),
            tl.load(at + 4 * STEP, mask=m4, other=0.0), tl.load(at + 5 * STEP, mask=m5, other=0.0))


@triton.jit
def _three(at, real, STEP: tl.constexpr):
    """One row of the 3x3 weights; float32."""
    return (tl.load(at, mask=real, other=0.0).to(tl.float32), tl.load(at + STEP, mask=real, other=0.0).to(tl.float32),
            tl.load(at + 2 * STEP, mask=real, other=0.0).to(tl.float32))


@triton.jit
def _add(s0, s1, s2, s3, i0, i1, i2, i3, i4, i5, w0, w1, w2):
    """Four sums with one row of six inputs times three weights added."""
    return (s0 + i0 * w0 + i1 * w1 + i2 * w2, s1 + i1 * w0 + i2 * w1 + i3 * w2,
            s2 + i2 * w0 + i3 * w1 + i4 * w2, s3 + i3 * w0 + i4 * w1 + i5 * w2)


@triton.jit
def _store(goal, a0, a1, a2, a3, g0, g1, g2, g3, m0, m1, m2, m3, STEP: tl.constexpr, FORM: tl.constexpr):
    """Four pixels of value * SiLU(gate)."""
    g0, g1 = _silu(g0, g1, FORM)
    g2, g3 = _silu(g2, g3, FORM)
    kind = goal.dtype.element_ty
    tl.store(goal, (a0 * g0).to(kind), mask=m0)
    tl.store(goal + STEP, (a1 * g1).to(kind), mask=m1)
    tl.store(goal + 2 * STEP, (a2 * g2).to(kind), mask=m2)
    tl.store(goal + 3 * STEP, (a3 * g3).to(kind), mask=m3)


@triton.jit(do_not_specialize=["height", "width", "strips"])
def gated_depthwise_kernel(
    x, taps, bias, out, height, width, strips,
    HIDDEN: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_C: tl.constexpr, FORM: tl.constexpr,
):
    """x ``[frames, height, width, 2 * HIDDEN]`` before its SiLU, taps ``[9, 2 * HIDDEN]`` -> ``[frames, height, width, HIDDEN]``.

    A program walks down a strip of four columns for BLOCK_C value channels and their gate channels. Every row read is
    activated once and added to the sums of three output rows: the one above is then complete, the other two go on (sums
    named ``v`` for values and ``g`` for gates, of the ``last`` complete row, the ``same`` and the ``next``). The row below
    is on its way from memory meanwhile.
    """
    blocks: tl.constexpr = (HIDDEN + BLOCK_C - 1) // BLOCK_C
    WIDE: tl.constexpr = 2 * HIDDEN
    c = (tl.program_id(0) % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    place = tl.program_id(0) // blocks
    column, frame = (place % strips) * 4, (place // strips).to(tl.int64)
    corner = frame * height * width + column
    at, goal = x + (corner - 1) * WIDE + c, out + corner * HIDDEN + c
    m1 = c < HIDDEN
    m0, m2, m3 = m1 & (column > 0), m1 & (column + 1 < width), m1 & (column + 2 < width)
    m4, m5 = m1 & (column + 3 < width), m1 & (column + 4 < width)
    v0, v1, v2 = _three(taps + c, m1, WIDE)
    v3, v4, v5 = _three(taps + c + 3 * WIDE, m1, WIDE)
    v6, v7, v8 = _three(taps + c + 6 * WIDE, m1, WIDE)
    g0, g1, g2 = _three(taps + c + HIDDEN, m1, WIDE)
    g3, g4, g5 = _three(taps + c + HIDDEN + 3 * WIDE, m1, WIDE)
    g6, g7, g8 = _three(taps + c + HIDDEN + 6 * WIDE, m1, WIDE)
    v_bias, g_bias = tl.zeros((BLOCK_C,), tl.float32), tl.zeros((BLOCK_C,), tl.float32)
    if HAS_BIAS:
        v_bias = tl.load(bias + c, mask=m1, other=0.0).to(tl.float32)
        g_bias = tl.load(bias + c + HIDDEN, mask=m1, other=0.0).to(tl.float32)
    x0, x1, x2, x3, x4, x5 = _six(at, m0, m1, m2, m3, m4, m5, WIDE)
    y0, y1, y2, y3, y4, y5 = _six(at + HIDDEN, m0, m1, m2, m3, m4, m5, WIDE)
    last_v0, last_v1, last_v2, last_v3 = v_bias, v_bias, v_bias, v_bias
    last_g0, last_g1, last_g2, last_g3 = g_bias, g_bias, g_bias, g_bias
    same_v0, same_v1, same_v2, same_v3 = v_bias, v_bias, v_bias, v_bias
    same_g0, same_g1, same_g2, same_g3 = g_bias, g_bias, g_bias, g_bias
    for row in range(height):
        a0, b0 = _silu(x0.to(tl.float32), y0.to(tl.float32), FORM)
        a1, b1 = _silu(x1.to(tl.float32), y1.to(tl.float32), FORM)
        a2, b2 = _silu(x2.to(tl.float32), y2.to(tl.float32), FORM)
        a3, b3 = _silu(x3.to(tl.float32), y3.to(tl.float32), FORM)
        a4, b4 = _silu(x4.to(tl.float32), y4.to(tl.float32), FORM)
        a5, b5 = _silu(x5.to(tl.float32), y5.to(tl.float32), FORM)
        at += width * WIDE
        more = row + 1 < height
        x0, x1, x2, x3, x4, x5 = _six(at, m0 & more, m1 & more, m2 & more, m3 & more, m4 & more, m5 & more, WIDE)
        y0, y1, y2, y3, y4, y5 = _six(at + HIDDEN, m0 & more, m1 & more, m2 & more, m3 & more, m4 & more, m5 & more, WIDE)
        if row > 0:
            last_v0, last_v1, last_v2, last_v3 = _add(
                last_v0, last_v1, last_v2, last_v3, a0, a1, a2, a3, a4, a5, v6, v7, v8)
            last_g0, last_g1, last_g2, last_g3 = _add(
                last_g0, last_g1, last_g2, last_g3, b0, b1, b2, b3, b4, b5, g6, g7, g8)
            _store(goal, last_v0, last_v1, last_v2, last_v3, last_g0, last_g1, last_g2, last_g3, m1, m2, m3, m4, HIDDEN, FORM)
            goal += width * HIDDEN
        last_v0, last_v1, last_v2, last_v3 = _add(same_v0, same_v1, same_v2, same_v3, a0, a1, a2, a3, a4, a5, v3, v4, v5)
        last_g0, last_g1, last_g2, last_g3 = _add(same_g0, same_g1, same_g2, same_g3, b0, b1, b2, b3, b4, b5, g3, g4, g5)
        same_v0, same_v1, same_v2, same_v3 = _add(v_bias, v_bias, v_bias, v_bias, a0, a1, a2, a3, a4, a5, v0, v1, v2)
        same_g0, same_g1, same_g2, same_g3 = _add(g_bias, g_bias, g_bias, g_bias, b0, b1, b2, b3, b4, b5, g0, g1, g2)
    _store(goal, last_v0, last_v1, last_v2, last_v3, last_g0, last_g1, last_g2, last_g3, m1, m2, m3, m4, HIDDEN, FORM)
