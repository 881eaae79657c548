"""Triton kernels of the text attention: the norm of the queries, softmax over the prompt's tokens.

Import only where Triton is there; called by ``fused.py``. The queries are read as the matrix product left them: their norm needs
all heads of a token, so one pass leaves a factor a token, and the attention's program of one head multiplies with it. Scores,
their largest value and all sums are float32.
"""

from __future__ import annotations

import triton
import triton.language as tl


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


@triton.jit
def _words(k, v, word, count, k_row, v_row, place, real, OPERAND: tl.constexpr):
    """Keys and values ``[KEYS, BLOCK_D]`` of text tokens, and which of them count."""
    there = (word < count)[:, None] & real[None, :]
    key = tl.load(k + word[:, None] * k_row + place[None, :], mask=there, other=0.0)
    value = tl.load(v + word[:, None] * v_row + place[None, :], mask=there, other=0.0)
    return key.to(OPERAND), value.to(OPERAND), word < count


@triton.jit
def _scores(query, key, valid):
    score = tl.dot(query, tl.trans(key), input_precision="ieee")
    return tl.where(valid[None, :], score, float("-inf"))


@triton.jit(do_not_specialize=["tokens", "count"])
def text_attention_kernel(
    q, factor, weight, k, v, out, tokens, count, k_row, v_row, scale, OPERAND: tl.constexpr, HAS_NORM: tl.constexpr,
    WHOLE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr, KEYS: tl.constexpr,
):
    """Softmax attention of TILES tiles of ROWS tokens of one head over ``count`` text tokens (1 or more), of one batch row.

    WHOLE: all text tokens fit into KEYS, are read once and stay for all tiles. Heads come first in the grid, so that what runs
    at one time reads whole tokens. ``scale`` counts in powers of two.
    """
    head, heads = tl.program_id(0), tl.num_programs(0)
    d = tl.arange(0, BLOCK_D)
    real = d < D
    place = head * D + d
    w = tl.arange(0, KEYS)
    kind = v.dtype.element_ty
    if HAS_NORM:
        gain = tl.load(weight + place, mask=real, other=0.0).to(tl.float32)
    if WHOLE:
        key, value, valid = _words(k, v, w, count, k_row, v_row, place, real, OPERAND)
    for tile in range(TILES):
        n = (tl.program_id(1) * TILES + tile) * ROWS + tl.arange(0, ROWS)
        token = n.to(tl.int64)
        at = token[:, None] * (heads * D) + place[None, :]
        inside = (n < tokens)[:, None] & real[None, :]
        query = tl.load(q + at, mask=inside, other=0.0)
        if HAS_NORM:
            query = query.to(tl.float32) * tl.load(factor + token, mask=n < tokens, other=0.0)[:, None] * gain[None, :]
            query = query.to(q.dtype.element_ty)
        query = query.to(OPERAND)
        if WHOLE:
            score = _scores(query, key, valid)
            most = tl.max(score, 1) * scale
            share = tl.exp2(score * scale - most[:, None])
            below = tl.sum(share, 1)
            above = tl.dot(share.to(kind).to(OPERAND), value, input_precision="ieee")
        else:
            most = tl.full((ROWS,), float("-inf"), tl.float32)
            below = tl.zeros((ROWS,), tl.float32)
            above = tl.zeros((ROWS, BLOCK_D), tl.float32)
            for first in range(0, count, KEYS):
                key, value, valid = _words(k, v, first + w, count, k_row, v_row, place, real, OPERAND)
                score = _scores(query, key, valid)
                larger = tl.maximum(most, tl.max(score, 1) * scale)
                share, kept = tl.exp2(score * scale - larger[:, None]), tl.exp2(most - larger)
                below = below * kept + tl.sum(share, 1)
                above = tl.dot(share.to(kind).to(OPERAND), value, above * kept[:, None], input_precision="ieee")
                most = larger
        tl.store(out + at, (above / below[:, None]).to(out.dtype.element_ty), mask=inside)
