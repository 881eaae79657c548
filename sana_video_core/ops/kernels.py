"""Triton kernels that pass over the tokens: residuals and norms, temporal neighbours, E4M3 with one scale.

Import only where Triton is there; called by ``fused.py``. All sums, norms, rotations and denominators are float32; only
the operands of matrix products and the results are rounded to the model dtype (performance spec 4: accuracy). Sums over
tokens are split in a way that depends on shapes alone and reduced in a fixed order, so a result repeats bit for bit.

A row of C channels is read as MAIN channels and REST more (both powers of two, REST may be 0): one power of two that holds
2240 would leave almost half of the threads without work. Counts of tokens are not specialised: one build serves all sizes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


def native() -> bool:
    """Whether the kernels may use NVIDIA's own instructions: not in Triton's interpreter, not on other cards."""
    return torch.version.cuda is not None and not triton.knobs.runtime.interpret


def operand(dtype):
    """The type to which a product's operands are rounded. Triton's interpreter (CPU tests) cannot multiply bfloat16."""
    return tl.float32 if triton.knobs.runtime.interpret else getattr(tl, str(dtype).removeprefix("torch."))


@triton.jit
def _float(at, inside):
    return tl.load(at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _row(given, a, b, real_a, real_b, HAS: tl.constexpr, ELSE: tl.constexpr):
    """Both parts of a row of channels, or ELSE twice."""
    first, second = ELSE, ELSE
    if HAS:
        first, second = _float(given + a, real_a), _float(given + b, real_b)
    return first, second


@triton.jit
def _residual(x, y, extra, gate, offset, at, inside, HAS_Y: tl.constexpr, HAS_EXTRA: tl.constexpr, HAS_GATE: tl.constexpr,
              HAS_OFFSET: tl.constexpr):
    """``x + offset + gate * (y + extra)`` at ``at``, with what is there; float32."""
    value = _float(x + at, inside)
    if HAS_OFFSET:
        value += offset
    if HAS_Y:
        more = _float(y + at, inside)
        if HAS_EXTRA:
            more += _float(extra + at, inside)
        value += more * gate if HAS_GATE else more
    return value


@triton.jit
def _size(value):
    """The bits of the largest size in a row: those of NaN are above all numbers', which a maximum of floats would drop it for."""
    return tl.max(value.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0)


@triton.jit
def _row_scale(bits, LIMIT: tl.constexpr, LEAST: tl.constexpr):
    """(scale, its inverse) that bring a largest size to LIMIT. LEAST: smallest size that a scale is made for."""
    most = bits.to(tl.float32, bitcast=True)
    most = tl.where(most < LEAST, LEAST, most)  # NaN stays
    return most * (1 / LIMIT), tl.div_rn(1.0, most) * LIMIT


@triton.jit
def cut(value, FP8: tl.constexpr, NATIVE: tl.constexpr):
    """Values within E4M3's range, where FP8 are to become that: NVIDIA's conversion cuts by itself."""
    if FP8 and not NATIVE:
        value = tl.clamp(value, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
    return value


@triton.jit
def _over_scale(value_a, value_b, real_a, real_b, factor, at, here, LIMIT: tl.constexpr, LEAST: tl.constexpr, REST: tl.constexpr,
                GIVEN: tl.constexpr, NATIVE: tl.constexpr):
    """Both parts of a row over a scale of its own, which goes into ``factor`` at ``at``, or (GIVEN) the one that stands there."""
    if GIVEN:
        inverse = 1.0 / tl.load(factor)
    else:
        most = _size(tl.where(real_a, value_a, 0.0))
        if REST:
            most = tl.maximum(most, _size(tl.where(real_b, value_b, 0.0)))
        scale, inverse = _row_scale(most, LIMIT, LEAST)
        tl.store(factor + at, scale, mask=here)
    return cut(value_a * inverse, GIVEN, NATIVE), cut(value_b * inverse, GIVEN, NATIVE)


@triton.jit(do_not_specialize=["tokens", "frames"])
def residual_norm_kernel(
    x, y, extra, gate, shift, scale, offset, out, normed, factor, tokens, frames, row_stride, eps, LIMIT: tl.constexpr,
    LEAST: tl.constexpr, C: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, TOKENS: tl.constexpr, HAS_Y: tl.constexpr,
    HAS_EXTRA: tl.constexpr, HAS_GATE: tl.constexpr, HAS_NORM: tl.constexpr, HAS_OFFSET: tl.constexpr, FP8: tl.constexpr,
    GIVEN: tl.constexpr, NATIVE: tl.constexpr,
):
    """``out = x + gate * (y + extra)`` and ``normed = LayerNorm(out) * (1 + scale) + shift``, or one of the two. HAS_OFFSET: of
    ``x + offset [B, C]``; B comes with ``frames`` modulation rows each.

    TOKENS tokens of one modulation row (``tokens`` of them each) a program. The norm is that of the float32 sum. FP8: it, or the
    sum where there is no norm, is divided by a scale of the token (see ``_over_scale``).
    """
    row = tl.program_id(1).to(tl.int64)
    a, b = tl.arange(0, MAIN), MAIN + tl.arange(0, REST if REST else 1)
    real_a, real_b = a < C, b < C
    place = row * row_stride
    gate_a, gate_b = _row(gate + place, a, b, real_a, real_b, HAS_GATE, 1.0)
    more_a, more_b = _row(offset + row // frames * C, a, b, real_a, real_b, HAS_OFFSET, 0.0)
    if HAS_NORM:
        gain_a, gain_b = 1.0 + _float(scale + place + a, real_a), 1.0 + _float(scale + place + b, real_b)
        offset_a, offset_b = _float(shift + place + a, real_a), _float(shift + place + b, real_b)
    for i in range(TOKENS):
        token = tl.program_id(0) * TOKENS + i
        here = token < tokens
        start = (row * tokens + token) * C
        inside_a = real_a & here
        value_a = _residual(x, y, extra, gate_a, more_a, start + a, inside_a, HAS_Y, HAS_EXTRA, HAS_GATE, HAS_OFFSET)
        inside_b, value_b = real_b & here, 0.0
        if REST:
            value_b = _residual(x, y, extra, gate_b, more_b, start + b, inside_b, HAS_Y, HAS_EXTRA, HAS_GATE, HAS_OFFSET)
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
            value_a = value_a * inverse * gain_a + offset_a
            if REST:
                value_b = value_b * inverse * gain_b + offset_b
        if FP8:
            value_a, value_b = _over_scale(value_a, value_b, real_a, real_b, factor, row * tokens + token, here, LIMIT, LEAST,
                                           REST, GIVEN, NATIVE)
        if HAS_NORM or FP8:
            tl.store(normed + start + a, value_a.to(normed.dtype.element_ty), mask=inside_a)
            if REST:
                tl.store(normed + start + b, value_b.to(normed.dtype.element_ty), mask=inside_b)


@triton.jit(do_not_specialize=["tokens"])
def rms_kernel(
    x, weight, out, tokens, stride, eps, C: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, TOKENS: tl.constexpr,
):
    """``x / sqrt(mean(x^2) + eps) * weight`` of every token."""
    a = tl.arange(0, MAIN)
    real_a = a < C
    b = MAIN + tl.arange(0, REST if REST else 1)
    real_b = b < C
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
        goal = out + token * C
        tl.store(goal + a, (weight_a * (value_a * inverse)).to(out.dtype.element_ty), mask=real_a & here)
        if REST:
            tl.store(goal + b, (weight_b * (value_b * inverse)).to(out.dtype.element_ty), mask=real_b & here)


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
def _taps_row(u, tail, place, past, frame, frames, size, n, real, C: tl.constexpr, HAS_TAIL: tl.constexpr):
    """Channels ``n`` of one token in the frame before, in its own, and in the frame after; float32."""
    step = size.to(tl.int64) * C
    before = _float(u + place - step + n, real & (frame > 0))
    if HAS_TAIL:
        before = tl.where(frame > 0, before, _float(tail + past + n, real & (frame == 0)))
    return before, _float(u + place + n, real), _float(u + place + step + n, real & (frame + 1 < frames))


@triton.jit(do_not_specialize=["frames", "size"])
def temporal_taps_fp8_kernel(
    u, tail, out, factor, frames, size, LIMIT: tl.constexpr, LEAST: tl.constexpr,
    C: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, HAS_TAIL: tl.constexpr,
):
    """The three taps of one token ``[3C]`` over a scale of theirs, which goes into ``factor``.

    Tokens of a frame, frames of the batch: the neighbours' rows are still in the cache when their turn comes.
    """
    token, which = tl.program_id(0), tl.program_id(1).to(tl.int64)
    frame = which % frames
    a = tl.arange(0, MAIN)
    b = MAIN + tl.arange(0, REST if REST else 1)
    real_a, real_b = a < C, b < C
    row = which * size + token
    past = ((which // frames) * size + token) * C
    a0, a1, a2 = _taps_row(u, tail, row * C, past, frame, frames, size, a, real_a, C, HAS_TAIL)
    if REST:
        b0, b1, b2 = _taps_row(u, tail, row * C, past, frame, frames, size, b, real_b, C, HAS_TAIL)
    most = tl.maximum(tl.maximum(_size(a0), _size(a1)), _size(a2))
    if REST:
        most = tl.maximum(most, tl.maximum(tl.maximum(_size(b0), _size(b1)), _size(b2)))
    scale, inverse = _row_scale(most, LIMIT, LEAST)
    tl.store(factor + row, scale)
    kind = out.dtype.element_ty
    goal = out + row * (3 * C)
    tl.store(goal + a, (a0 * inverse).to(kind), mask=real_a)
    tl.store(goal + C + a, (a1 * inverse).to(kind), mask=real_a)
    tl.store(goal + 2 * C + a, (a2 * inverse).to(kind), mask=real_a)
    if REST:
        tl.store(goal + b, (b0 * inverse).to(kind), mask=real_b)
        tl.store(goal + C + b, (b1 * inverse).to(kind), mask=real_b)
        tl.store(goal + 2 * C + b, (b2 * inverse).to(kind), mask=real_b)


@triton.jit
def _given_taps(
    u, tail, out, row, past, inverse, frame, frames, size, n, real, C: tl.constexpr, HAS_TAIL: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """Channels ``n`` of one token into the taps of three frames."""
    kind = out.dtype.element_ty
    value = cut(_float(u + row * C + n, real) * inverse, True, NATIVE).to(kind)
    step = size.to(tl.int64) * (3 * C)
    goal = out + row * (3 * C) + n
    tl.store(goal + C, value, mask=real)
    tl.store(goal + step, value, mask=real & (frame + 1 < frames))
    tl.store(goal - step + 2 * C, value, mask=real & (frame > 0))
    if frame == 0:
        left = tl.zeros_like(value)
        if HAS_TAIL:
            left = cut(_float(tail + past + n, real) * inverse, True, NATIVE).to(kind)
        tl.store(goal, left, mask=real)
    if frame == frames - 1:
        tl.store(goal + 2 * C, tl.zeros_like(value), mask=real)


@triton.jit(do_not_specialize=["frames", "size"])
def given_taps_kernel(
    u, tail, out, given, frames, size, C: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, HAS_TAIL: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """``temporal_taps_kernel`` over ``given []``; a token is one program."""
    token, which = tl.program_id(0), tl.program_id(1).to(tl.int64)
    frame, row = which % frames, which * size + token
    past = ((which // frames) * size + token) * C
    inverse = 1.0 / tl.load(given)
    a = tl.arange(0, MAIN)
    _given_taps(u, tail, out, row, past, inverse, frame, frames, size, a, a < C, C, HAS_TAIL, NATIVE)
    if REST:
        b = MAIN + tl.arange(0, REST)
        _given_taps(u, tail, out, row, past, inverse, frame, frames, size, b, b < C, C, HAS_TAIL, NATIVE)


@triton.jit(do_not_specialize=["frames", "size"])
def framed_fp8_kernel(
    u, tail, out, given, frames, size, C: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, HAS_TAIL: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """One token of ``frames + 2`` frames over ``given []``: first ``tail`` (or zeros), then u, then zeros."""
    token, which = tl.program_id(0), tl.program_id(1).to(tl.int64)
    frame, batch = which % (frames + 2), which // (frames + 2)
    inside = (frame > 0) & (frame <= frames)
    from_tail = HAS_TAIL & (frame == 0)
    inverse = 1.0 / tl.load(given)
    kind = out.dtype.element_ty
    source, past = ((batch * frames + frame - 1) * size + token) * C, (batch * size + token) * C
    for part in tl.static_range(2):
        if part == 0 or REST:
            n = tl.arange(0, MAIN) if part == 0 else MAIN + tl.arange(0, REST if REST else 1)
            real = n < C
            value = _float(u + source + n, real & inside)
            if HAS_TAIL:
                value = tl.where(from_tail, _float(tail + past + n, real & from_tail), value)
            tl.store(out + (which * size + token) * C + n, cut(value * inverse, True, NATIVE).to(kind), mask=real)


@triton.jit(do_not_specialize=["count"])
def largest_kernel(x, out, count, VALUES: tl.constexpr, TILES: tl.constexpr):
    """The largest size of TILES tiles of VALUES values into ``out [programs]`` float32; NaN where there is one."""
    first = tl.program_id(0).to(tl.int64) * (VALUES * TILES)
    most = tl.zeros((VALUES,), tl.float32)
    for tile in range(TILES):
        at = first + tile * VALUES + tl.arange(0, VALUES)
        most = tl.maximum(most, tl.abs(_float(x + at, at < count)), propagate_nan=tl.PropagateNan.ALL)
    broken = tl.sum((most != most).to(tl.int32), 0) > 0  # a maximum over a tile drops NaN
    tl.store(out + tl.program_id(0), tl.where(broken, float("nan"), tl.max(most, 0)))


@triton.jit(do_not_specialize=["count"])
def scale_kernel(x, inverse, out, count, VALUES: tl.constexpr):
    """``x * inverse`` in ``out``'s type, which holds them."""
    at = tl.program_id(0).to(tl.int64) * VALUES + tl.arange(0, VALUES)
    inside = at < count
    value = _float(x + at, inside) * tl.load(inverse)
    tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def row_fp8_kernel(
    x, out, scale, tokens, LIMIT: tl.constexpr, LEAST: tl.constexpr,
    C: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, TOKENS: tl.constexpr,
):
    """Every token over its largest size (LEAST or more), times LIMIT, in ``out``'s type, and the factor that undoes it."""
    a = tl.arange(0, MAIN)
    b = MAIN + tl.arange(0, REST if REST else 1)
    real_a, real_b = a < C, b < C
    for i in range(TOKENS):
        token = (tl.program_id(0) * TOKENS + i).to(tl.int64)
        here = token < tokens
        start = token * C
        value_a = _float(x + start + a, real_a & here)
        most = _size(value_a)
        if REST:
            value_b = _float(x + start + b, real_b & here)
            most = tl.maximum(most, _size(value_b))
        row_scale, inverse = _row_scale(most, LIMIT, LEAST)
        tl.store(scale + token, row_scale, mask=here)
        tl.store(out + start + a, (value_a * inverse).to(out.dtype.element_ty), mask=real_a & here)
        if REST:
            tl.store(out + start + b, (value_b * inverse).to(out.dtype.element_ty), mask=real_b & here)
