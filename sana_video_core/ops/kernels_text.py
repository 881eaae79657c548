"""Triton kernels of the text attention: the norm of the queries, softmax over the prompt's tokens.

Import only where Triton is there; called by ``fused.py``. The queries are multiplied as the matrix product left them: the weight
of their norm goes into the few keys, and what it divides a token by, which needs all heads and so a pass of its own, into the
token's scores. Scores, their largest value and all sums are float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .kernels import cut
from .kernels_silu import reciprocal


@triton.jit(do_not_specialize=["tokens"])
def query_factor_kernel(
    q, factor, tokens, eps, C: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, TOKENS: tl.constexpr,
):
    """``1 / sqrt(mean(q^2) + eps)`` of every token; float32."""
    a = tl.arange(0, MAIN)
    b = MAIN + tl.arange(0, REST if REST else 1)
    for i in range(TOKENS):
        token = (tl.program_id(0) * TOKENS + i).to(tl.int64)
        here = token < tokens
        value = tl.load(q + token * C + a, mask=(a < C) & here, other=0.0).to(tl.float32)
        squares = tl.sum(value * value, 0)
        if REST:
            value = tl.load(q + token * C + b, mask=(b < C) & here, other=0.0).to(tl.float32)
            squares += tl.sum(value * value, 0)
        tl.store(factor + token, tl.rsqrt(squares / C + eps), mask=here)


@triton.jit(do_not_specialize=["tokens", "count"])
def text_attention_kernel(
    q, factor, weight, k, v, given, out, tokens, count, k_row, v_row, scale, OPERAND: tl.constexpr, HAS_NORM: tl.constexpr,
    FP8: tl.constexpr, NATIVE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Softmax attention of TILES tiles of ROWS tokens of one head over ``count`` text tokens (1 to KEYS), of one batch row.

    The text tokens are read once and stay for all tiles. Heads come first in the grid, so that what runs at one time reads whole
    tokens. ``scale`` counts in powers of two. FP8: the output is over ``given []``.
    """
    head, heads = tl.program_id(0), tl.num_programs(0)
    d = tl.arange(0, BLOCK_D)
    real = d < D
    place = head * D + d
    w = tl.arange(0, KEYS)
    kind = v.dtype.element_ty
    there = (w < count)[:, None] & real[None, :]
    key = tl.load(k + w[:, None] * k_row + place[None, :], mask=there, other=0.0)
    if HAS_NORM:
        gain = tl.load(weight + place, mask=real, other=0.0).to(tl.float32)
        key = (key.to(tl.float32) * gain[None, :]).to(kind)
    key = key.to(OPERAND)
    value = tl.load(v + w[:, None] * v_row + place[None, :], mask=there, other=0.0).to(OPERAND)
    for tile in range(TILES):
        n = (tl.program_id(1) * TILES + tile) * ROWS + tl.arange(0, ROWS)
        token = n.to(tl.int64)
        at = token[:, None] * (heads * D) + place[None, :]
        inside = (n < tokens)[:, None] & real[None, :]
        query = tl.load(q + at, mask=inside, other=0.0)
        each = tl.full((ROWS,), 1.0, tl.float32) * scale
        if HAS_NORM:
            each *= tl.load(factor + token, mask=n < tokens, other=1.0)
        score = tl.dot(query.to(OPERAND), tl.trans(key), input_precision="ieee")
        score = tl.where((w < count)[None, :], score, float("-inf"))
        most = tl.max(score, 1) * each
        share = tl.exp2(score * each[:, None] - most[:, None])
        below = tl.sum(share, 1)
        if FP8:
            below *= tl.load(given)
        above = tl.dot(share.to(kind).to(OPERAND), value, input_precision="ieee")
        above *= reciprocal(below, NATIVE)[:, None]
        tl.store(out + at, cut(above, FP8, NATIVE).to(out.dtype.element_ty), mask=inside)
