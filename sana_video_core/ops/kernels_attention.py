"""Triton kernels of the linear attention: the sums over tokens, and their application.

Import only where Triton is there; called by ``fused.py``. A rotation turns adjacent channels, so a head is read as pairs: the
first channels of all pairs in one register tile, the second ones in another. The products run over the two tiles one after the
other, which is the same sum in another order, and nothing has to be put back together. bfloat16 pairs are 32-bit words, read
whole (``WORDS``): ``qkv`` then comes a second time as int32.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _pairs(values, words, place, inside, WORDS: tl.constexpr):
    """The two channels of the pairs at ``place`` (counted in pairs) as float32."""
    if WORDS:
        word = tl.load(words + place, mask=inside, other=0)
        return (word << 16).to(tl.float32, bitcast=True), (word & -65536).to(tl.float32, bitcast=True)
    first = tl.load(values + 2 * place, mask=inside, other=0.0).to(tl.float32)
    return first, tl.load(values + 2 * place + 1, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _both(values, at, inside):
    """Float32 values at ``2 * at`` and at ``2 * at + 1``."""
    first = tl.load(values + 2 * at, mask=inside, other=0.0).to(tl.float32)
    return first, tl.load(values + 2 * at + 1, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _rotated(a, b, cos, sin, n, j, inside, HALF: tl.constexpr):
    """Pairs ``(a, b) [ROWS, HALF_BLOCK]`` turned by the angles of tokens ``n``."""
    at = n[:, None] * HALF + j[None, :]
    c, s = tl.load(cos + at, mask=inside, other=0.0), tl.load(sin + at, mask=inside, other=0.0)
    return a * c - b * s, a * s + b * c


@triton.jit(do_not_specialize=["tokens", "heads"])
def attention_state_kernel(
    qkv, words, inverse, weight, cos, sin, vk, ksum, tokens, heads, OPERAND: tl.constexpr, WORDS: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr,
):
    """Partial sums over one split (ROWS * STEPS tokens) of one head: v k'^T ``[D, D]`` (rotated keys) and the keys ``[D]``.

    Heads come first in the grid, so that what runs at one time reads whole tokens and shares the rotary table.
    """
    HALF: tl.constexpr = D // 2
    HALF_BLOCK: tl.constexpr = BLOCK_D // 2
    row, split, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    batch, head = (row // heads).to(tl.int64), row % heads
    width = heads * D
    d, j = tl.arange(0, BLOCK_D), tl.arange(0, HALF_BLOCK)
    real, whole = d < D, j < HALF
    gain_a, gain_b = _both(weight + head * D, j, whole)
    state_a, state_b = tl.zeros((BLOCK_D, HALF_BLOCK), tl.float32), tl.zeros((BLOCK_D, HALF_BLOCK), tl.float32)
    keys_a, keys_b = tl.zeros((HALF_BLOCK,), tl.float32), tl.zeros((HALF_BLOCK,), tl.float32)
    for step in range(STEPS):
        n = (split * STEPS + step) * ROWS + tl.arange(0, ROWS)
        valid = n < tokens
        token = (batch * tokens + n)[:, None] * 3
        inside = valid[:, None] & whole[None, :]
        a, b = _pairs(qkv, words, ((token + 1) * width + head * D) // 2 + j[None, :], inside, WORDS)
        r = tl.load(inverse + batch * tokens + n, mask=valid, other=0.0)[:, None]
        a, b = tl.maximum(a * r * gain_a[None, :], 0.0), tl.maximum(b * r * gain_b[None, :], 0.0)
        keys_a += tl.sum(a, 0)
        keys_b += tl.sum(b, 0)
        a, b = _rotated(a, b, cos, sin, n, j, inside, HALF)
        v = tl.load(qkv + (token + 2) * width + head * D + d[None, :], mask=valid[:, None] & real[None, :], other=0.0)
        v = tl.trans(v.to(OPERAND))
        state_a = tl.dot(v, a.to(OPERAND), state_a, input_precision="ieee")
        state_b = tl.dot(v, b.to(OPERAND), state_b, input_precision="ieee")
    place = row.to(tl.int64) * splits + split
    square = vk + place * D * D + d[:, None] * D + 2 * j[None, :]
    kept = real[:, None] & whole[None, :]
    tl.store(square, state_a, mask=kept)
    tl.store(square + 1, state_b, mask=kept)
    tl.store(ksum + place * D + 2 * j, keys_a, mask=whole)
    tl.store(ksum + place * D + 2 * j + 1, keys_b, mask=whole)


@triton.jit(do_not_specialize=["tokens", "heads"])
def attention_apply_kernel(
    qkv, words, weight, cos, sin, vk, ksum, out, tokens, heads, eps, OPERAND: tl.constexpr, WORDS: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr,
):
    """``(state q') / (ksum . q + eps)`` for TILES tiles of ROWS tokens of one head; q' is q rotated. ``vk`` comes as int64.

    A positive factor of a token is one of both parts: the q norm's 1 / rms is left out (performance spec 4, identity a), and
    every token and the state are brought to a largest value of 1, so that float16 can hold them. As bfloat16, which has three
    bits less, they gave up to twice the error of plain torch where few tokens meet.
    """
    HALF: tl.constexpr = D // 2
    HALF_BLOCK: tl.constexpr = BLOCK_D // 2
    row = tl.program_id(0)
    batch, head = (row // heads).to(tl.int64), row % heads
    width = heads * D
    d, j = tl.arange(0, BLOCK_D), tl.arange(0, HALF_BLOCK)
    real, whole = d < D, j < HALF
    gain_a, gain_b = _both(weight + head * D, j, whole)
    total_a, total_b = _both(ksum + row * D, j, whole)
    # Transposed: pairs of the keys down, values across; a pair of float32 is one word.
    square = row.to(tl.int64) * D * HALF + d[None, :] * HALF + j[:, None]
    pair = tl.load(vk + square, mask=whole[:, None] & real[None, :], other=0)
    state_a, state_b = pair.to(tl.int32).to(tl.float32, bitcast=True), (pair >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    largest = tl.maximum(tl.max(tl.maximum(tl.abs(state_a), tl.abs(state_b))), 1e-30)
    state_a, state_b = (state_a / largest).to(OPERAND), (state_b / largest).to(OPERAND)
    for tile in range(TILES):
        n = (tl.program_id(1) * TILES + tile) * ROWS + tl.arange(0, ROWS)
        valid = n < tokens
        token = (batch * tokens + n)[:, None]
        inside = valid[:, None] & whole[None, :]
        a, b = _pairs(qkv, words, (token * 3 * width + head * D) // 2 + j[None, :], inside, WORDS)
        a, b = tl.maximum(a * gain_a[None, :], 0.0), tl.maximum(b * gain_b[None, :], 0.0)
        factor = 1.0 / tl.maximum(tl.max(tl.maximum(a, b), 1), 1e-30)
        below = (tl.sum(a * total_a[None, :] + b * total_b[None, :], 1) + eps) * factor
        a, b = a * factor[:, None], b * factor[:, None]
        a, b = _rotated(a, b, cos, sin, n, j, inside, HALF)
        above = tl.dot(a.to(OPERAND), state_a, input_precision="ieee")
        above = tl.dot(b.to(OPERAND), state_b, above, input_precision="ieee")
        result = (above * (largest / below)[:, None]).to(out.dtype.element_ty)
        tl.store(out + token * width + head * D + d[None, :], result, mask=valid[:, None] & real[None, :])
