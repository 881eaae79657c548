"""Triton kernels of the network's memory-bound operators. Import only where Triton is there; called by ``fused.py``.

All sums, norms, rotations and denominators are float32; only the operands of matrix products and the results are rounded
to the model dtype (performance spec 4: accuracy). Sums over tokens are split in a way that depends on shapes alone and
reduced in a fixed order, so a result repeats bit for bit.
"""

from __future__ import annotations

import triton
import triton.language as tl


def operand(dtype):
    """The type to which a product's operands are rounded. Triton's interpreter (CPU tests) cannot multiply bfloat16."""
    return tl.float32 if triton.knobs.runtime.interpret else getattr(tl, str(dtype).removeprefix("torch."))


@triton.jit
def modulate_norm_kernel(x, shift, scale, out, tokens_per_row, channels, row_stride, eps, BLOCK: tl.constexpr):
    """One token a program: LayerNorm, ``* (1 + scale) + shift`` with the modulation row of the token's frame."""
    token = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    inside = c < channels
    value = tl.load(x + token * channels + c, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(value, 0) / channels
    centred = tl.where(inside, value - mean, 0.0)
    inverse = tl.rsqrt(tl.sum(centred * centred, 0) / channels + eps)
    row = (token // tokens_per_row) * row_stride
    gain = tl.load(scale + row + c, mask=inside, other=0.0).to(tl.float32)
    offset = tl.load(shift + row + c, mask=inside, other=0.0).to(tl.float32)
    result = centred * inverse * (1.0 + gain) + offset
    tl.store(out + token * channels + c, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def inverse_rms_kernel(x, out, channels, stride, eps, BLOCK: tl.constexpr):
    """``1 / sqrt(mean(x^2) + eps)`` of one token's channels a program."""
    token = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    value = tl.load(x + token * stride + c, mask=c < channels, other=0.0).to(tl.float32)
    tl.store(out + token, tl.rsqrt(tl.sum(value * value, 0) / channels + eps))


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


@triton.jit
def attention_state_kernel(
    qkv, inverse, weight, cos, sin, vk, ksum, tokens, heads,
    OPERAND: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr,
):
    """Partial sums over one split (ROWS * STEPS tokens) of one head: v k'^T ``[D, D]`` (rotated keys) and the keys ``[D]``."""
    split, splits, row = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
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


@triton.jit
def attention_apply_kernel(
    qkv, weight, cos, sin, vk, ksum, out, tokens, heads, eps,
    OPERAND: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr,
):
    """``(state q') / (ksum . q + eps)`` for TILES tiles of ROWS tokens of one head; q' is q rotated.

    The q norm's 1 / rms is a positive factor of both parts and left out (performance spec 4, identity a).
    """
    row = tl.program_id(1)
    batch, head = (row // heads).to(tl.int64), row % heads
    width = heads * D
    d = tl.arange(0, BLOCK_D)
    real = d < D
    gain = tl.load(weight + head * D + d, mask=real, other=0.0).to(tl.float32)
    total = tl.load(ksum + row * D + d, mask=real, other=0.0)
    square = row.to(tl.int64) * D * D + d[:, None] * D + d[None, :]
    state = tl.load(vk + square, mask=real[:, None] & real[None, :], other=0.0).to(OPERAND)
    for tile in range(TILES):
        n = (tl.program_id(0) * TILES + tile) * ROWS + tl.arange(0, ROWS)
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


@triton.jit
def gated_depthwise_kernel(
    x, taps, bias, out, height, width, hidden, strips, column_blocks,
    HAS_BIAS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """Depthwise 3x3 of the value channels and the matching gate channels, then value * SiLU(gate).

    x ``[frames, height, width, 2 * hidden]`` (already activated), taps ``[9, 2 * hidden]``. A program makes BLOCK_H rows of
    BLOCK_W pixels: the nine reads of a value fall into the first-level cache. Taps are read where they are used, because
    kept ones would not fit the registers.
    """
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    place = tl.program_id(1)
    column, place = place % column_blocks, place // column_blocks
    strip, frame = place % strips, (place // strips).to(tl.int64)
    pixel = tl.arange(0, BLOCK_H * BLOCK_W)
    h, w = strip * BLOCK_H + pixel // BLOCK_W, column * BLOCK_W + pixel % BLOCK_W
    real = c < hidden
    channels = 2 * hidden
    a = tl.zeros((BLOCK_H * BLOCK_W, BLOCK_C), tl.float32)
    g = tl.zeros((BLOCK_H * BLOCK_W, BLOCK_C), tl.float32)
    if HAS_BIAS:
        a += tl.load(bias + c, mask=real, other=0.0).to(tl.float32)[None, :]
        g += tl.load(bias + hidden + c, mask=real, other=0.0).to(tl.float32)[None, :]
    for dh in tl.static_range(3):
        for dw in tl.static_range(3):
            row, col = h + dh - 1, w + dw - 1
            seen = (row >= 0) & (row < height) & (col >= 0) & (col < width)
            inside = seen[:, None] & real[None, :]
            at = x + ((frame * height + row) * width + col)[:, None] * channels + c[None, :]
            tap = taps + (dh * 3 + dw) * channels + c
            tap_a = tl.load(tap, mask=real, other=0.0).to(tl.float32)
            tap_g = tl.load(tap + hidden, mask=real, other=0.0).to(tl.float32)
            a += tl.load(at, mask=inside, other=0.0).to(tl.float32) * tap_a[None, :]
            g += tl.load(at + hidden, mask=inside, other=0.0).to(tl.float32) * tap_g[None, :]
    result = a * (g / (1.0 + tl.exp(-g)))
    goal = out + ((frame * height + h) * width + w)[:, None] * hidden + c[None, :]
    keep = ((h < height) & (w < width))[:, None] & real[None, :]
    tl.store(goal, result.to(out.dtype.element_ty), mask=keep)
