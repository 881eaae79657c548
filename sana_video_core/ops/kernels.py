"""Triton kernels that pass over the tokens: residuals and norms, temporal neighbours, linear attention.

Import only where Triton is there; called by ``fused.py``. All sums, norms, rotations and denominators are float32; only
the operands of matrix products and the results are rounded to the model dtype (performance spec 4: accuracy). Sums over
tokens are split in a way that depends on shapes alone and reduced in a fixed order, so a result repeats bit for bit.

A row of C channels is read as MAIN channels and REST more (both powers of two, REST may be 0): one power of two that holds
2240 would leave almost half of the threads without work. Counts of tokens are not specialised: one build serves all sizes.
"""

from __future__ import annotations

import triton
import triton.language as tl


def operand(dtype):
    """The type to which a product's operands are rounded. Triton's interpreter (CPU tests) cannot multiply bfloat16."""
    return tl.float32 if triton.knobs.runtime.interpret else getattr(tl, str(dtype).removeprefix("torch."))


@triton.jit
def _float(at, inside):
    return tl.load(at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _residual(x, y, extra, gate, at, inside, HAS_Y: tl.constexpr, HAS_EXTRA: tl.constexpr, HAS_GATE: tl.constexpr):
    """``x + gate * (y + extra)`` at ``at``, with what is there; float32."""
    value = _float(x + at, inside)
    if HAS_Y:
        more = _float(y + at, inside)
        if HAS_EXTRA:
            more += _float(extra + at, inside)
        value += more * gate if HAS_GATE else more
    return value


@triton.jit(do_not_specialize=["tokens"])
def residual_norm_kernel(
    x, y, extra, gate, shift, scale, out, normed, tokens, row_stride, eps,
    C: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, TOKENS: tl.constexpr, HAS_Y: tl.constexpr,
    HAS_EXTRA: tl.constexpr, HAS_GATE: tl.constexpr, HAS_NORM: tl.constexpr,
):
    """``out = x + gate * (y + extra)`` and ``normed = LayerNorm(out) * (1 + scale) + shift``, or one of the two.

    TOKENS tokens of one modulation row (``tokens`` of them each) a program. The norm is that of the float32 sum.
    """
    row = tl.program_id(1).to(tl.int64)
    a = tl.arange(0, MAIN)
    real_a = a < C
    b = MAIN + tl.arange(0, REST if REST else 1)
    real_b = b < C
    place = row * row_stride
    gate_a, gate_b = 1.0, 1.0
    if HAS_GATE:
        gate_a = _float(gate + place + a, real_a)
        gate_b = _float(gate + place + b, real_b)
    if HAS_NORM:
        gain_a, gain_b = 1.0 + _float(scale + place + a, real_a), 1.0 + _float(scale + place + b, real_b)
        offset_a, offset_b = _float(shift + place + a, real_a), _float(shift + place + b, real_b)
    for i in range(TOKENS):
        token = tl.program_id(0) * TOKENS + i
        here = token < tokens
        start = (row * tokens + token) * C
        inside_a = real_a & here
        value_a = _residual(x, y, extra, gate_a, start + a, inside_a, HAS_Y, HAS_EXTRA, HAS_GATE)
        if REST:
            inside_b = real_b & here
            value_b = _residual(x, y, extra, gate_b, start + b, inside_b, HAS_Y, HAS_EXTRA, HAS_GATE)
        if HAS_Y:
            tl.store(out + start + a, value_a.to(out.dtype.element_ty), mask=inside_a)
            if REST:
                tl.store(out + start + b, value_b.to(out.dtype.element_ty), mask=inside_b)
        if HAS_NORM:
            total = tl.sum(value_a, 0)
            if REST:
                total += tl.sum(value_b, 0)
            mean = total / C
            value_a = tl.where(real_a, value_a - mean, 0.0)
            squares = tl.sum(value_a * value_a, 0)
            if REST:
                value_b = tl.where(real_b, value_b - mean, 0.0)
                squares += tl.sum(value_b * value_b, 0)
            inverse = tl.rsqrt(squares / C + eps)
            tl.store(normed + start + a, (value_a * inverse * gain_a + offset_a).to(normed.dtype.element_ty), mask=inside_a)
            if REST:
                tl.store(normed + start + b, (value_b * inverse * gain_b + offset_b).to(normed.dtype.element_ty), mask=inside_b)


@triton.jit(do_not_specialize=["tokens"])
def rms_kernel(
    x, weight, out, tokens, stride, eps,
    C: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, TOKENS: tl.constexpr, WHOLE: tl.constexpr,
):
    """``1 / sqrt(mean(x^2) + eps)`` of each token into ``out [tokens]``; WHOLE: x times it times weight, ``[tokens, C]``."""
    a = tl.arange(0, MAIN)
    real_a = a < C
    b = MAIN + tl.arange(0, REST if REST else 1)
    real_b = b < C
    if WHOLE:
        weight_a, weight_b = _float(weight + a, real_a), _float(weight + b, real_b)
    for i in range(TOKENS):
        token = (tl.program_id(0) * TOKENS + i).to(tl.int64)
        here = token < tokens
        value_a = _float(x + token * stride + a, real_a & here)
        squares = tl.sum(value_a * value_a, 0)
        if REST:
            value_b = _float(x + token * stride + b, real_b & here)
            squares += tl.sum(value_b * value_b, 0)
        inverse = tl.rsqrt(squares / C + eps)
        if WHOLE:
            goal = out + token * C
            tl.store(goal + a, (weight_a * (value_a * inverse)).to(out.dtype.element_ty), mask=real_a & here)
            if REST:
                tl.store(goal + b, (weight_b * (value_b * inverse)).to(out.dtype.element_ty), mask=real_b & here)
        else:
            tl.store(out + token, inverse, mask=here)


@triton.jit(do_not_specialize=["frames", "size"])
def temporal_taps_kernel(
    u, tail, out, frames, size,
    C: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr, HAS_TAIL: tl.constexpr,
):
    """Every value of ``u [B, frames, size, C]`` read once and written into the thirds of three frames' tokens.

    Programs: channels, tokens of a frame, frames of the batch. The ends get ``tail`` (or zeros) and zeros.
    """
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    token = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    which = tl.program_id(2).to(tl.int64)
    frame = which % frames
    inside = (token < size)[:, None] & (c < C)[None, :]
    value = tl.load(u + (which * size + token)[:, None] * C + c[None, :], mask=inside, other=0.0)
    goal = out + (which * size + token)[:, None] * (3 * C) + c[None, :]
    after = out + ((which + 1) * size + token)[:, None] * (3 * C) + c[None, :]
    before = out + ((which - 1) * size + token)[:, None] * (3 * C) + c[None, :]
    tl.store(goal + C, value, mask=inside)
    tl.store(after, value, mask=inside & (frame + 1 < frames))
    tl.store(before + 2 * C, value, mask=inside & (frame > 0))
    nothing = tl.zeros((ROWS, BLOCK_C), out.dtype.element_ty)
    if frame == 0:
        left = nothing
        if HAS_TAIL:
            at = tail + ((which // frames) * size + token)[:, None] * C + c[None, :]
            left = tl.load(at, mask=inside, other=0.0).to(out.dtype.element_ty)
        tl.store(goal, left, mask=inside)
    if frame == frames - 1:
        tl.store(goal + 2 * C, nothing, mask=inside)


@triton.jit
def _rotated(feature, cos, sin, n, valid, HALF: tl.constexpr, ROWS: tl.constexpr, HALF_BLOCK: tl.constexpr):
    """``feature [ROWS, 2 * HALF_BLOCK]`` with adjacent pairs turned by the angles of tokens ``n``; float32."""
    j = tl.arange(0, HALF_BLOCK)
    at = n[:, None] * HALF + j[None, :]
    inside = valid[:, None] & (j < HALF)[None, :]
    c = tl.load(cos + at, mask=inside, other=0.0)
    s = tl.load(sin + at, mask=inside, other=0.0)
    a, b = tl.split(tl.reshape(feature, (ROWS, HALF_BLOCK, 2)))
    return tl.reshape(tl.join(a * c - b * s, a * s + b * c), (ROWS, 2 * HALF_BLOCK))


@triton.jit(do_not_specialize=["tokens", "heads"])
def attention_state_kernel(
    qkv, inverse, weight, cos, sin, vk, ksum, tokens, heads,
    OPERAND: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr,
):
    """Partial sums over one split (ROWS * STEPS tokens) of one head: v k'^T ``[D, D]`` (rotated keys) and the keys ``[D]``.

    Heads come first in the grid, so that what runs at one time reads whole tokens and shares the rotary table.
    """
    row, split, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    batch, head = (row // heads).to(tl.int64), row % heads
    width = heads * D
    d = tl.arange(0, BLOCK_D)
    real = d < D
    gain = tl.load(weight + head * D + d, mask=real, other=0.0).to(tl.float32)
    base = qkv + batch * tokens * 3 * width + head * D
    state = tl.zeros((BLOCK_D, BLOCK_D), tl.float32)
    keys = tl.zeros((BLOCK_D,), tl.float32)
    for step in range(STEPS):
        n = (split * STEPS + step) * ROWS + tl.arange(0, ROWS)
        valid = n < tokens
        at = n.to(tl.int64)[:, None] * (3 * width) + d[None, :]
        inside = valid[:, None] & real[None, :]
        k = tl.load(base + width + at, mask=inside, other=0.0).to(tl.float32)
        r = tl.load(inverse + batch * tokens + n, mask=valid, other=0.0)
        k = tl.maximum(k * r[:, None] * gain[None, :], 0.0)
        keys += tl.sum(k, 0)
        turned = _rotated(k, cos, sin, n, valid, D // 2, ROWS, BLOCK_D // 2)
        v = tl.load(base + 2 * width + at, mask=inside, other=0.0)
        state += tl.dot(tl.trans(v.to(OPERAND)), turned.to(OPERAND), input_precision="ieee")
    place = row.to(tl.int64) * splits + split
    tl.store(vk + place * D * D + d[:, None] * D + d[None, :], state, mask=real[:, None] & real[None, :])
    tl.store(ksum + place * D + d, keys, mask=real)


@triton.jit(do_not_specialize=["tokens", "heads"])
def attention_apply_kernel(
    qkv, weight, cos, sin, vk, ksum, out, tokens, heads, eps,
    OPERAND: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr,
):
    """``(state q') / (ksum . q + eps)`` for TILES tiles of ROWS tokens of one head; q' is q rotated.

    The q norm's 1 / rms is a positive factor of both parts and left out (performance spec 4, identity a).
    """
    row = tl.program_id(0)
    batch, head = (row // heads).to(tl.int64), row % heads
    width = heads * D
    d = tl.arange(0, BLOCK_D)
    real = d < D
    gain = tl.load(weight + head * D + d, mask=real, other=0.0).to(tl.float32)
    total = tl.load(ksum + row * D + d, mask=real, other=0.0)
    square = row.to(tl.int64) * D * D + d[:, None] * D + d[None, :]
    state = tl.load(vk + square, mask=real[:, None] & real[None, :], other=0.0).to(OPERAND)
    for tile in range(TILES):
        n = (tl.program_id(1) * TILES + tile) * ROWS + tl.arange(0, ROWS)
        valid = n < tokens
        at = (batch * tokens + n)[:, None]
        inside = valid[:, None] & real[None, :]
        q = tl.load(qkv + at * (3 * width) + head * D + d[None, :], mask=inside, other=0.0).to(tl.float32)
        q = tl.maximum(q * gain[None, :], 0.0)
        below = tl.sum(q * total[None, :], 1) + eps
        turned = _rotated(q, cos, sin, n, valid, D // 2, ROWS, BLOCK_D // 2)
        above = tl.dot(turned.to(OPERAND), tl.trans(state), input_precision="ieee")
        result = (above / below[:, None]).to(out.dtype.element_ty)
        tl.store(out + at * width + head * D + d[None, :], result, mask=inside)
