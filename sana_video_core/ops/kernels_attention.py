"""Triton kernels of the linear attention: the keys, the sums over tokens, and their application.

Import only where Triton is there; called by ``fused.py``. A rotation turns adjacent channels, so a head is read as pairs: the
first channels of all pairs in one register tile, the second ones in another. The products run over the two tiles one after the
other, which is the same sum in another order, and nothing has to be put back together. bfloat16 pairs are 32-bit words, read
whole (``WORDS``): ``qkv`` then comes a second time as int32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .kernels import cut
from .kernels_silu import reciprocal, word


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
def _rotated(a, b, cos, sin, turns, n, j, inside, HALF: tl.constexpr, WORDS: tl.constexpr):
    """Pairs ``(a, b) [ROWS, HALF_BLOCK]`` turned by the angles of tokens ``n``; WORDS: of cosines and sines in one word."""
    at = n[:, None] * HALF + j[None, :]
    if WORDS:
        word = tl.load(turns + at, mask=inside, other=0)
        c = word.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        s = (word >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        c, s = tl.load(cos + at, mask=inside, other=0.0), tl.load(sin + at, mask=inside, other=0.0)
    return a * c - b * s, a * s + b * c


@triton.jit
def _put_keys(keys, key_words, goal, a, b, turn_c, turn_s, inside, WORDS: tl.constexpr, NATIVE: tl.constexpr):
    """Store the pairs ``(a, b) [heads, pairs]`` turned."""
    a, b = a * turn_c[None, :] - b * turn_s[None, :], a * turn_s[None, :] + b * turn_c[None, :]
    if WORDS:
        tl.store(key_words + goal, word(a, b, tl.bfloat16, NATIVE), mask=inside)
    else:
        tl.store(keys + 2 * goal, a.to(keys.dtype.element_ty), mask=inside)
        tl.store(keys + 2 * goal + 1, b.to(keys.dtype.element_ty), mask=inside)


@triton.jit
def _put_sums(total, place, a, b, inside):
    tl.store(total + 2 * place, a, mask=inside)
    tl.store(total + 2 * place + 1, b, mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def attention_keys_kernel(
    qkv, words, weight, gain_words, cos, sin, turns, keys, key_words, ksum, tokens, eps, WORDS: tl.constexpr,
    NATIVE: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, HALF_BLOCK: tl.constexpr, MAIN: tl.constexpr,
    REST: tl.constexpr, TOKENS: tl.constexpr,
):
    """The rotated keys ``[tokens, pairs of all heads]``, and the sum of the unrotated ones over TOKENS tokens.

    A program holds all heads of a token (``[MAIN, HALF_BLOCK]`` pairs and REST heads more, see ``kernels.py``): the key norm
    needs them, and the rotary table of HALF pairs is read once instead of once a head. WORDS: the table is also written in half
    the precision, which is enough where float16 is what it turns, and half the bytes (``turns``).
    """
    j = tl.arange(0, HALF_BLOCK)
    real = j < HALF
    h = tl.arange(0, MAIN)
    p, real_p = h[:, None] * HALF + j[None, :], (h < HEADS)[:, None] & real[None, :]
    g = MAIN + tl.arange(0, REST if REST else 1)
    r, real_r = g[:, None] * HALF + j[None, :], (g < HEADS)[:, None] & real[None, :]
    batch = tl.program_id(1).to(tl.int64)
    sum_a, sum_b = tl.zeros((MAIN, HALF_BLOCK), tl.float32), tl.zeros((MAIN, HALF_BLOCK), tl.float32)
    if REST:
        more_a, more_b = tl.zeros((REST, HALF_BLOCK), tl.float32), tl.zeros((REST, HALF_BLOCK), tl.float32)
    for i in range(TOKENS):
        n = tl.program_id(0) * TOKENS + i
        here = n < tokens
        token = batch * tokens + n
        key = (token * 3 + 1) * (HEADS * HALF)
        a, b = _pairs(qkv, words, key + p, real_p & here, WORDS)
        squares = tl.sum(a * a + b * b)
        if REST:
            e, f = _pairs(qkv, words, key + r, real_r & here, WORDS)
            squares += tl.sum(e * e + f * f)
        inverse = tl.rsqrt(squares / (2 * HEADS * HALF) + eps)  # positive: it may come after the ReLU
        c = tl.load(cos + n * HALF + j, mask=real & here, other=0.0)
        s = tl.load(sin + n * HALF + j, mask=real & here, other=0.0)
        if WORDS:
            tl.store(turns + n * HALF + j, word(c, s, tl.float16, NATIVE), mask=real & here & (batch == 0))
        c, s = c * inverse, s * inverse
        gain_a, gain_b = _pairs(weight, gain_words, p, real_p, WORDS)
        a, b = tl.maximum(a * gain_a, 0.0), tl.maximum(b * gain_b, 0.0)
        sum_a += a * inverse
        sum_b += b * inverse
        _put_keys(keys, key_words, token * (HEADS * HALF) + p, a, b, c, s, real_p & here, WORDS, NATIVE)
        if REST:
            gain_a, gain_b = _pairs(weight, gain_words, r, real_r, WORDS)
            e, f = tl.maximum(e * gain_a, 0.0), tl.maximum(f * gain_b, 0.0)
            more_a += e * inverse
            more_b += f * inverse
            _put_keys(keys, key_words, token * (HEADS * HALF) + r, e, f, c, s, real_r & here, WORDS, NATIVE)
    total = ksum + (batch * tl.num_programs(0) + tl.program_id(0)) * (2 * HEADS * HALF)
    _put_sums(total, p, sum_a, sum_b, real_p)
    if REST:
        _put_sums(total, r, more_a, more_b, real_r)


@triton.jit(do_not_specialize=["tokens"])
def key_factor_kernel(
    qkv, cos, sin, turns, factor, tokens, eps, C: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, HALF: tl.constexpr,
    HALF_BLOCK: tl.constexpr, NATIVE: tl.constexpr,
):
    """``1 / sqrt(mean(k^2) + eps)`` of a token, float32; and its line of the rotary table, cosine and sine in one word."""
    n, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    a = tl.arange(0, MAIN)
    key = qkv + ((batch * tokens + n) * 3 + 1) * C
    value = tl.load(key + a, mask=a < C, other=0.0).to(tl.float32)
    squares = tl.sum(value * value, 0)
    if REST:
        b = MAIN + tl.arange(0, REST)
        value = tl.load(key + b, mask=b < C, other=0.0).to(tl.float32)
        squares += tl.sum(value * value, 0)
    tl.store(factor + batch * tokens + n, tl.rsqrt(squares / C + eps))
    if batch == 0:
        j = tl.arange(0, HALF_BLOCK)
        c, s = tl.load(cos + n * HALF + j, mask=j < HALF, other=0.0), tl.load(sin + n * HALF + j, mask=j < HALF, other=0.0)
        tl.store(turns + n * HALF + j, word(c, s, tl.float16, NATIVE), mask=j < HALF)


@triton.jit(do_not_specialize=["tokens", "heads", "steps"])
def attention_state_kernel(
    qkv, keys, vk, tokens, heads, steps, OPERAND: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):
    """Partial sum v k'^T ``[D, D]`` over one split (ROWS * steps tokens) of one head; k' are rotated keys.

    Heads come first in the grid, so that what runs at one time reads whole tokens.
    """
    row, split, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    batch, head = (row // heads).to(tl.int64), row % heads
    width = heads * D
    d = tl.arange(0, BLOCK_D)
    real = d < D
    state = tl.zeros((BLOCK_D, BLOCK_D), tl.float32)
    for step in range(steps):
        n = (split * steps + step) * ROWS + tl.arange(0, ROWS)
        token = (batch * tokens + n)[:, None]
        inside = (n < tokens)[:, None] & real[None, :]
        k = tl.load(keys + token * width + head * D + d[None, :], mask=inside, other=0.0)
        v = tl.load(qkv + (token * 3 + 2) * width + head * D + d[None, :], mask=inside, other=0.0)
        state = tl.dot(tl.trans(v.to(OPERAND)), k.to(OPERAND), state, input_precision="ieee")
    place = row.to(tl.int64) * splits + split
    tl.store(vk + place * D * D + d[:, None] * D + d[None, :], state, mask=real[:, None] & real[None, :])


@triton.jit
def _total(values, own, total, past, row, program, count, WIDTH: tl.constexpr, COUNT: tl.constexpr, COLUMNS: tl.constexpr,
           HAS_PAST: tl.constexpr):
    """COLUMNS sums over ``count`` rows of ``values [rows, count, WIDTH]``, alone and with the past's."""
    c = program * COLUMNS + tl.arange(0, COLUMNS)
    real, at = c < WIDTH, row * WIDTH + c
    value = tl.zeros((COLUMNS,), tl.float32)
    for first in range(0, count, COUNT):
        n = first + tl.arange(0, COUNT)
        place = (row * count + n)[:, None] * WIDTH + c[None, :]
        value += tl.sum(tl.load(values + place, mask=(n < count)[:, None] & real[None, :], other=0.0), 0)
    tl.store(own + at, value, mask=real)
    if HAS_PAST:
        tl.store(total + at, value + tl.load(past + at, mask=real, other=0.0), mask=real)


@triton.jit(do_not_specialize=["splits", "parts"])
def attention_totals_kernel(
    vk, ksum, own_vk, own_ksum, total_vk, total_ksum, past_vk, past_ksum, splits, parts, HAS_PAST: tl.constexpr,
    D: tl.constexpr, HEADS: tl.constexpr, SPLITS: tl.constexpr, SQUARE: tl.constexpr, PARTS: tl.constexpr, COLUMNS: tl.constexpr,
):
    """The sums of all splits (``vk [B, heads, splits, D, D]``) and of all parts (``ksum [B, parts, heads, D]``), and those with
    the past's added. Programs: SQUARE values of a head's state, then COLUMNS values of ksum; batch."""
    batch, program = tl.program_id(1).to(tl.int64), tl.program_id(0)
    squares: tl.constexpr = (D * D + SQUARE - 1) // SQUARE
    if program < HEADS * squares:
        _total(vk, own_vk, total_vk, past_vk, batch * HEADS + program // squares, program % squares, splits, D * D, SPLITS,
               SQUARE, HAS_PAST)
    else:
        _total(ksum, own_ksum, total_ksum, past_ksum, batch, program - HEADS * squares, parts, HEADS * D, PARTS, COLUMNS,
               HAS_PAST)


@triton.jit(do_not_specialize=["tokens", "heads", "tiles"])
def attention_apply_kernel(
    qkv, words, weight, cos, sin, turns, vk, ksum, given, out, tokens, heads, tiles, eps, OPERAND: tl.constexpr,
    WORDS: tl.constexpr, FP8: tl.constexpr, NATIVE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):
    """``(state q') / (ksum . q + eps)`` for ``tiles`` tiles of ROWS tokens of one head; q' is q rotated. ``vk`` comes as int64.

    A positive factor of a token is one of both parts: the q norm's 1 / rms is left out (performance spec 4, identity a), and
    every token and the state are brought to a largest value of 1, so that float16 can hold them. As bfloat16, which has three
    bits less, they gave up to twice the error of plain torch where few tokens meet. FP8: the output is over ``given []``.
    """
    HALF: tl.constexpr = D // 2
    HALF_BLOCK: tl.constexpr = BLOCK_D // 2
    row = tl.program_id(0)
    batch, head = (row // heads).to(tl.int64), row % heads
    width = heads * D
    d, j = tl.arange(0, BLOCK_D), tl.arange(0, HALF_BLOCK)
    real, whole = d < D, j < HALF
    first = tl.program_id(1) * tiles * ROWS
    start = batch * tokens + first  # from the program's first token on 32 bits are enough for places
    out += start * width + head * D
    if WORDS:
        words += (start * 3 * width + head * D) // 2
    else:
        qkv += start * 3 * width + head * D
    gain_a, gain_b = _both(weight + head * D, j, whole)
    total_a, total_b = _both(ksum + row * D, j, whole)
    # Transposed: pairs of the keys down, values across; a pair of float32 is one word.
    square = row.to(tl.int64) * D * HALF + d[None, :] * HALF + j[:, None]
    pair = tl.load(vk + square, mask=whole[:, None] & real[None, :], other=0)
    state_a, state_b = pair.to(tl.int32).to(tl.float32, bitcast=True), (pair >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    largest = tl.maximum(tl.max(tl.maximum(tl.abs(state_a), tl.abs(state_b))), 1e-30)
    state_a, state_b = (state_a / largest).to(OPERAND), (state_b / largest).to(OPERAND)
    if FP8:
        largest /= tl.load(given)
    for tile in range(tiles):
        own = tile * ROWS + tl.arange(0, ROWS)
        n = first + own
        valid = n < tokens
        inside = valid[:, None] & whole[None, :]
        a, b = _pairs(qkv, words, own[:, None] * (3 * heads * HALF) + j[None, :], inside, WORDS)
        a, b = tl.maximum(a * gain_a[None, :], 0.0), tl.maximum(b * gain_b[None, :], 0.0)
        factor = reciprocal(tl.maximum(tl.max(tl.maximum(a, b), 1), 1e-30), NATIVE)
        below = (tl.sum(a * total_a[None, :] + b * total_b[None, :], 1) + eps) * factor
        a, b = a * factor[:, None], b * factor[:, None]
        a, b = _rotated(a, b, cos, sin, turns, n, j, inside, HALF, WORDS)
        above = tl.dot(a.to(OPERAND), state_a, input_precision="ieee")
        above = tl.dot(b.to(OPERAND), state_b, above, input_precision="ieee")
        result = cut(above * (largest * reciprocal(below, NATIVE))[:, None], FP8, NATIVE).to(out.dtype.element_ty)
        tl.store(out + own[:, None] * width + d[None, :], result, mask=valid[:, None] & real[None, :])
