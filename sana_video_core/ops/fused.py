"""Operators fused into few passes over memory by Triton kernels.

Same meaning as ``reference.py`` (the truth); a call outside what :func:`register` declares runs the reference. Nothing here
imports Triton before the first call. Not covered: gradients (the reference runs), torch.compile (``library.py``).
"""

from __future__ import annotations

from importlib import import_module

import torch
from torch import Tensor

from .fused_torch import has_weight, one_dtype
from .fused_torch import softmax_attention as by_torch
from .reference import ATTENTION_EPS, E4M3_LEAST, E4M3_MAX, Contribution, Rows, e4m3_scale
from .registry import Constraint, capability

# Tokens a program sums keys of, and from how many programs on it takes twice as many: the sums of the programs are read again.
KEY_TOKENS, KEY_PROGRAMS = 16, 1024
# Programs a head, for the sums and the application of the linear attention: with 20 heads two for each of an H200's 132
# processors. The same everywhere, so that a sum does not depend on the card; a program of sums takes a multiple of SPLIT tokens.
PROGRAMS, SPLIT = 13, 64
WORDS_HELD = 128  # text tokens that a program holds; longer texts are torch's, which is faster there
# Launch settings, chosen with bench/probe.py on an H200. norm, residual, rms, row_fp8: tokens a program, warps (row_fp8: at
# most). keys, norm_fp8, residual_fp8, taps_fp8, given_taps: warps. taps: tokens, channels, warps. state, apply: tokens, warps,
# stages. totals: splits, values, parts, columns, warps. text: tokens, tiles, warps, stages. depthwise: channels, warps, form of
# the SiLU, rows ahead. fp8: values, tiles, warps.
TUNING = {
    "norm": (1, 1), "residual": (1, 4), "rms": (1, 1), "taps": (2, 256, 1), "keys": (1,), "state": (64, 4, 3),
    "totals": (16, 1024, 256, 16, 8), "apply": (64, 4, 3), "depthwise": (64, 1, "half", 4), "fp8": (2048, 8, 4),
    "row_fp8": (1, 8), "norm_fp8": (1,), "residual_fp8": (4,), "taps_fp8": (4,), "given_taps": (2,),
    "text": (64, 8, 4, 2),
}
# A thread of the depthwise convolution takes more registers if it may; with 128 it spills none, and more of them run at one time.
DEPTHWISE_REGISTERS = 128
# Elsewhere than on Hopper a product's operands and sums share the registers: smaller tiles over more warps.
SMALLER = {"state": (32, 8, 2), "apply": (32, 8, 2), "text": (32, 16, 8, 2)}


def _setting(name: str, x: Tensor) -> tuple:
    hopper = x.is_cuda and capability(x.device)[0] == 9
    return TUNING[name] if hopper else SMALLER.get(name, TUNING[name])


def _kernels(name: str = "kernels"):
    return import_module(f".{name}", __package__)


def programs_of(tokens: int, rows: int) -> tuple[int, int]:
    """(tiles of ``rows`` tokens that a program of a head takes, programs)."""
    tiles = -(-tokens // (PROGRAMS * rows))
    return tiles, -(-tokens // (tiles * rows))


def self_test(device: torch.device) -> None:
    """Build and run the smallest kernel; raises when that fails or gives a wrong value."""
    x, out = torch.full((1, 16), 2.0, device=device), torch.zeros(1, 16, device=device)
    with torch.cuda.device_of(x):
        _kernels().rms_kernel[(1,)](x, x, out, 1, 16, 0.0, C=16, MAIN=16, REST=0, TOKENS=1, num_warps=4)
    if bool((out - 2).abs().max() > 1e-6):
        raise RuntimeError(f"a kernel gave {out.tolist()} instead of 2")


def _block(n: int) -> int:
    """The power of two that holds ``n`` (at least 16, the smallest side of a matrix product)."""
    return max(16, 1 << (n - 1).bit_length())


def _row(channels: int) -> dict[str, int]:
    """How a kernel reads a row of channels: a power of two of them, and the power of two that holds the rest."""
    main = 1 << (channels.bit_length() - 1)
    rest = channels - main
    return {"C": channels, "MAIN": main, "REST": 1 << (rest - 1).bit_length() if rest else 0}


def _modulation(x: Tensor, *rows: Tensor) -> tuple[list[Tensor], int]:
    """Rows ``[B, F, C]`` of one layout, and the step from one row to the next through all of B and F."""
    batch, frames = x.shape[0], rows[0].shape[1]
    rows = [r.expand(batch, -1, -1) for r in rows]
    outer, inner, last = rows[0].stride()
    if any(r.stride() != rows[0].stride() for r in rows) or last != 1 or (batch > 1 and frames > 1 and outer != frames * inner):
        rows = [r.contiguous() for r in rows]
        outer, inner, _ = rows[0].stride()
    return rows, inner if frames > 1 else outer


def _residual_norm(x: Tensor, y: Tensor | None, extra: Tensor | None, gate: Tensor | None, shift: Tensor | None,
                   scale: Tensor | None, eps: float, fp8: bool = False, offset: Tensor | None = None,
                   given: Tensor | None = None) -> tuple[Tensor | None, Tensor | Rows | None]:
    """``x + gate * (y + extra)`` when there is y, and its modulated norm when there is a scale. ``offset``: only without y.
    ``fp8``: the norm, or without a scale the sum once more, in E4M3, at the scale ``given`` or a row's own."""
    x, y, extra = (None if t is None else t.contiguous() for t in (x, y, extra))
    batch, tokens, channels = x.shape
    wanted = [r for r in (gate, shift, scale) if r is not None]
    rows, stride = _modulation(x, *wanted) if wanted else ([], 0)
    frames = rows[0].shape[1] if rows else 1
    gate = rows.pop(0) if gate is not None else None
    shift, scale = rows or (None, None)
    out = None if y is None else torch.empty_like(x)
    normed = torch.empty_like(x, dtype=torch.float8_e4m3fn if fp8 else None) if fp8 or scale is not None else None
    factor = given if given is not None or not fp8 else torch.empty(batch, tokens, 1, device=x.device, dtype=torch.float32)
    block, warps = TUNING["residual" if scale is None else "norm"]
    if fp8:
        block, warps = 1, TUNING["norm_fp8" if y is None else "residual_fp8"][0]
    each = tokens // frames
    offset = None if offset is None else offset.expand(batch, -1, -1).contiguous()
    used = (x if t is None else t for t in (y, extra, gate, shift, scale, offset, out, normed, factor))  # the others: untouched
    with torch.cuda.device_of(x):
        _kernels().residual_norm_kernel[(-(-each // block), batch * frames)](
            x, *used, each, frames, stride, eps, LIMIT=E4M3_MAX, LEAST=E4M3_LEAST, **_row(channels), TOKENS=block,
            HAS_Y=y is not None, HAS_EXTRA=extra is not None, HAS_GATE=gate is not None, HAS_NORM=scale is not None,
            HAS_OFFSET=offset is not None, FP8=fp8, GIVEN=given is not None, NATIVE=_kernels().native(), num_warps=warps)
    return out, Rows(normed, factor) if fp8 else normed


def modulate_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6, *, offset: Tensor | None = None) -> Tensor:
    """See ``reference.modulate_norm``; one read, one write, one rounding."""
    return _residual_norm(x, None, None, None, shift, scale, eps, offset=offset)[1]


def gated_residual(x: Tensor, y: Tensor, gate: Tensor, extra: Tensor | None = None) -> Tensor:
    """See ``reference.gated_residual``; one pass, one rounding."""
    return _residual_norm(x, y, extra, gate, None, None, 0.0)[0]


def residual_norm(x: Tensor, y: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """See ``reference.residual_norm``; one pass. The norm is that of the sum before it is rounded."""
    return _residual_norm(x, y, None, None, shift, scale, eps)


def modulate_norm_fp8(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6, *, given: Tensor | None = None) -> Rows:
    """See ``reference.modulate_norm_fp8``; one read, one write. The norm is not rounded before it is scaled."""
    return _residual_norm(x, None, None, None, shift, scale, eps, True, given=given)[1]


def residual_norm_fp8(
    x: Tensor, y: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6, *, given: Tensor | None = None,
) -> tuple[Tensor, Rows]:
    """See ``reference.residual_norm_fp8``; one pass, and no rounding between the sum, its norm and the scaling."""
    return _residual_norm(x, y, None, None, shift, scale, eps, True, given=given)


def gated_residual_fp8(x: Tensor, y: Tensor, gate: Tensor, *, given: Tensor) -> tuple[Tensor, Rows]:
    """See ``reference.gated_residual_fp8``; one pass, and no rounding between the sum and its scaling."""
    return _residual_norm(x, y, None, gate, None, None, 0.0, True, given=given)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See ``reference.rms_norm``; one read, one write."""
    out = torch.empty(x.shape, device=x.device, dtype=x.dtype)
    rows = x.flatten(0, -2)
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    block, warps = TUNING["rms"]
    with torch.cuda.device_of(rows):
        _kernels().rms_kernel[(-(-rows.shape[0] // block),)](
            rows, weight.contiguous(), out, rows.shape[0], rows.stride(0), eps, **_row(rows.shape[1]), TOKENS=block,
            num_warps=warps)
    return out


def linear_attention(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, heads: int,
    history: Contribution | None = None, *, parity: bool = False, norm_eps: float = 1e-5, eps: float = ATTENTION_EPS,
    given: Tensor | None = None,
) -> tuple[Tensor | Rows, Contribution]:
    """See ``reference.linear_attention`` (``quality``). Operands of the sums' product are rounded to the dtype of qkv, those of
    its application to float16 after a scale."""
    qkv, q_weight, k_weight, cos, sin = (t.contiguous() for t in (qkv, q_weight, k_weight, cos, sin))
    batch, tokens, width = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    dim = width // heads
    split = -(-tokens // (PROGRAMS * SPLIT)) * SPLIT
    each = KEY_TOKENS if tokens < KEY_TOKENS * KEY_PROGRAMS else 2 * KEY_TOKENS
    splits, parts = -(-tokens // split), -(-tokens // each)
    new = {"device": qkv.device, "dtype": torch.float32}
    keys = torch.empty(batch, tokens, width, device=qkv.device, dtype=qkv.dtype)
    vk = torch.empty(batch, heads, splits, dim, dim, **new)
    ksum = torch.empty(batch, parts, heads, dim, **new)
    out = torch.empty_like(keys, dtype=None if given is None else torch.float8_e4m3fn)
    turns = torch.empty(tokens, dim // 2, 2, device=qkv.device, dtype=torch.float16).view(torch.int32)  # cosine, sine
    kernels, half = _kernels("kernels_attention"), qkv.dtype == torch.bfloat16
    words, key_words, gain_words = (t.view(torch.int32) if half else t for t in (qkv, keys, k_weight))
    operand, native = _kernels().operand, _kernels().native()
    block = max(_block(dim), 32)  # a product's two halves of a head have 16 channels or more
    with torch.cuda.device_of(qkv):
        sizes = {k: v for k, v in _row(heads).items() if k != "C"}
        kernels.attention_keys_kernel[(parts, batch)](
            qkv, words, k_weight, gain_words, cos, sin, turns, keys, key_words, ksum, tokens, norm_eps, WORDS=half,
            NATIVE=native, HEADS=heads, HALF=dim // 2, HALF_BLOCK=1 << (dim // 2 - 1).bit_length(), **sizes,
            TOKENS=each, num_warps=TUNING["keys"][0])
        rows, warps, stages = _setting("state", qkv)
        kernels.attention_state_kernel[(batch * heads, splits)](
            qkv, keys, vk, tokens, heads, split // rows, OPERAND=operand(qkv.dtype), D=dim, BLOCK_D=block, ROWS=rows,
            num_warps=warps, num_stages=stages)
        own, total = _totals(vk, ksum, history)
        rows, warps, stages = _setting("apply", qkv)
        tiles, programs = programs_of(tokens, rows)
        kernels.attention_apply_kernel[(batch * heads, programs)](
            qkv, words, q_weight, cos, sin, turns, total.vk.view(torch.int64), total.ksum, cos if given is None else given, out,
            tokens, heads, tiles, eps, OPERAND=operand(torch.float16), WORDS=half, FP8=given is not None, NATIVE=native, D=dim,
            BLOCK_D=block, ROWS=rows, num_warps=warps, num_stages=stages)
    return out if given is None else Rows(out, given), own


def _totals(vk: Tensor, ksum: Tensor, history: Contribution | None) -> tuple[Contribution, Contribution]:
    """(the sums of ``vk [B, heads, splits, D, D]`` and ``ksum [B, parts, heads, D]``, those with the history's)."""
    batch, heads, splits, dim, _ = vk.shape
    own = Contribution(vk.new_empty(batch, heads, dim, dim), vk.new_empty(batch, heads, 1, dim))
    total = own if history is None else Contribution(*map(torch.empty_like, own))
    past = own if history is None else Contribution(*(t.to(torch.float32).contiguous() for t in history))
    tiles, square, parts, columns, warps = TUNING["totals"]
    _kernels("kernels_attention").attention_totals_kernel[(heads * -(-dim * dim // square) + -(-heads * dim // columns), batch)](
        vk, ksum, *own, *total, *past, splits, ksum.shape[1], HAS_PAST=history is not None, D=dim, HEADS=heads, SPLITS=tiles,
        SQUARE=square, PARTS=parts, COLUMNS=columns, num_warps=warps)
    return own, total


def text_operands(q: Tensor, k: Tensor, v: Tensor, norm: tuple[Tensor, float] | None, given: Tensor | None) -> tuple:
    """(q, k and v as kernels of the text attention read them, room for its result and for a factor of each token, weight and eps
    of the norm). Without a norm neither these nor the factor are touched."""
    q = q if q.stride()[1:] == (q.shape[2], 1) else q.contiguous()  # one row may stand for all
    k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (k, v))
    out = torch.empty(q.shape, device=q.device, dtype=q.dtype if given is None else torch.float8_e4m3fn)
    factor = torch.empty(q.shape[1], device=q.device, dtype=torch.float32)
    return q, k, v, out, factor, (q, 0.0) if norm is None else (norm[0].contiguous(), norm[1])


def softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None, lengths: tuple[int, ...] | None = None,
    norm: tuple[Tensor, float] | None = None, *, given: Tensor | None = None,
) -> Tensor | Rows:
    """See ``reference.softmax_attention``, for rows of several ``lengths``: every row by itself, into one result."""
    q, k, v, out, factor, (weight, eps) = text_operands(q, k, v, norm, given)
    _, tokens, channels = q.shape
    dim, kernels, fp8 = channels // heads, _kernels("kernels_text"), given is not None
    rows, tiles, warps, stages = _setting("text", q)
    with torch.cuda.device_of(q):
        for i, count in enumerate(lengths):
            if count > WORDS_HELD:
                made = by_torch(q[i:i + 1], k[i:i + 1], v[i:i + 1], heads, None, (count,), norm)
                out[i:i + 1] = given_fp8(made, given).values if fp8 else made
                continue
            if norm is not None:
                kernels.query_factor_kernel[(tokens,)](q[i], factor, tokens, eps, **_row(channels), TOKENS=1, num_warps=1)
            kernels.text_attention_kernel[(heads, -(-tokens // (rows * tiles)))](
                q[i], factor, weight, k[i], v[i], given if fp8 else factor, out[i], tokens, count, k.stride(1), v.stride(1),
                dim**-0.5 * 1.4426950408889634, OPERAND=_kernels().operand(q.dtype), HAS_NORM=norm is not None, FP8=fp8,
                NATIVE=_kernels().native(), D=dim, BLOCK_D=_block(dim), ROWS=rows, TILES=tiles, KEYS=_block(count),
                num_warps=warps, num_stages=stages)
    return Rows(out, given) if fp8 else out


def gated_depthwise(
    x: Tensor, weight: Tensor, bias: Tensor | None, grid: tuple[int, int], overwrite: bool = False, out: Tensor | None = None,
    *, given: Tensor | None = None,
) -> Tensor | Rows:
    """See ``reference.gated_depthwise``; one pass, x is left as it is."""
    x = x.contiguous()
    batch, tokens, channels = x.shape
    height, width = grid
    hidden, frames = channels // 2, batch * tokens // (height * width)
    block, warps, form, ahead = TUNING["depthwise"]
    most = {"maxnreg": DEPTHWISE_REGISTERS} if x.is_cuda and torch.version.cuda is not None else {}
    kernels, form = _kernels("kernels_depthwise"), _kernels("kernels_silu").silu_form(form)
    strips = -(-width // kernels.COLUMNS)
    taps = weight.contiguous()
    fp8 = given is not None
    if out is None:
        out = torch.empty(batch, tokens, hidden, device=x.device, dtype=torch.float8_e4m3fn if fp8 else x.dtype)
    half, native = x.dtype == torch.bfloat16 and hidden % 2 == 0, _kernels().native()
    with torch.cuda.device_of(x):
        kernels.gated_depthwise_kernel[(-(-hidden // block) * strips * frames,)](
            x, x.view(torch.int32) if half else x, taps, taps if bias is None else bias.contiguous(), given if fp8 else taps, out,
            height, width, strips, HIDDEN=hidden, HAS_BIAS=bias is not None, WORDS=half, BLOCK_C=block, FORM=form,
            AHEAD=ahead if half and form == "half" else 0, FP8=fp8, NATIVE=native, PACKED=fp8 and native and half,
            num_warps=warps, **most)
    return Rows(out, given) if fp8 else out


def temporal_taps(u: Tensor, frames: int, tail: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """See ``reference.temporal_taps``; every value is read once."""
    u = u.contiguous()
    batch, tokens, channels = u.shape
    size = tokens // frames
    taps = torch.empty(batch, tokens, 3 * channels, device=u.device, dtype=u.dtype)
    rows, block, warps = TUNING["taps"]
    with torch.cuda.device_of(u):
        _kernels().temporal_taps_kernel[(-(-channels // block), -(-size // rows), batch * frames)](
            u, u if tail is None else tail.to(u).contiguous(), taps, frames, size, C=channels, ROWS=rows,
            BLOCK_C=min(block, _block(channels)), HAS_TAIL=tail is not None, num_warps=warps)
    return taps, u.unflatten(1, (frames, -1))[:, -1:]


def _given_taps(u: Tensor, frames: int, tail: Tensor | None, given: Tensor) -> tuple[Rows, Tensor]:
    """The taps at a scale that is given: every value is read and converted once."""
    u = u.contiguous()
    batch, tokens, channels = u.shape
    size = tokens // frames
    taps = torch.empty(batch, tokens, 3 * channels, device=u.device, dtype=torch.float8_e4m3fn)
    with torch.cuda.device_of(u):
        _kernels().given_taps_kernel[(size, batch * frames)](
            u, u if tail is None else tail.to(u).contiguous(), taps, given, frames, size, **_row(channels),
            HAS_TAIL=tail is not None, NATIVE=_kernels().native(), num_warps=TUNING["given_taps"][0])
    return Rows(taps, given), u.unflatten(1, (frames, -1))[:, -1:]


def temporal_taps_fp8(
    u: Tensor, frames: int, tail: Tensor | None = None, *, given: Tensor | None = None,
) -> tuple[Rows, Tensor]:
    """See ``reference.temporal_taps_fp8``; the same bits in one pass, and the taps are never written in the model's dtype."""
    if given is not None:
        return _given_taps(u, frames, tail, given)
    u = u.contiguous()
    batch, tokens, channels = u.shape
    size = tokens // frames
    taps = torch.empty(batch, tokens, 3 * channels, device=u.device, dtype=torch.float8_e4m3fn)
    scale = torch.empty(batch, tokens, 1, device=u.device, dtype=torch.float32)
    with torch.cuda.device_of(u):
        _kernels().temporal_taps_fp8_kernel[(size, batch * frames)](
            u, u if tail is None else tail.to(u).contiguous(), taps, scale, frames, size, LIMIT=E4M3_MAX, LEAST=E4M3_LEAST,
            **_row(channels), HAS_TAIL=tail is not None, num_warps=TUNING["taps_fp8"][0])
    return Rows(taps, scale), u.unflatten(1, (frames, -1))[:, -1:]


def row_fp8(x: Tensor) -> Rows:
    """See ``reference.row_fp8``; one read, one write."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    out = torch.empty(x.shape, device=x.device, dtype=torch.float8_e4m3fn)
    scale = torch.empty(*x.shape[:-1], 1, device=x.device, dtype=torch.float32)
    (block, most), sizes = TUNING["row_fp8"], _row(rows.shape[1])
    with torch.cuda.device_of(rows):
        _kernels().row_fp8_kernel[(-(-len(rows) // block),)](
            rows, out, scale, len(rows), LIMIT=E4M3_MAX, LEAST=E4M3_LEAST, **sizes, TOKENS=block,
            num_warps=min(most, max(1, sizes["MAIN"] // 512)))
    return Rows(out, scale)


def given_fp8(x: Tensor, given: Tensor) -> Rows:
    """See ``reference.given_fp8``; one read, one write."""
    _, rows = _residual_norm(x.reshape(1, -1, x.shape[-1]), None, None, None, None, None, 0.0, True, given=given)
    return Rows(rows.values.view(x.shape), given)


def scaled_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """See ``reference.scaled_fp8``; x is read twice, the largest value is found in a fixed order."""
    x = x.contiguous()
    count, (values, tiles, warps) = x.numel(), TUNING["fp8"]
    largest = torch.empty(-(-count // (values * tiles)), device=x.device, dtype=torch.float32)
    out = torch.empty(x.shape, device=x.device, dtype=torch.float8_e4m3fn)
    with torch.cuda.device_of(x):
        _kernels().largest_kernel[(len(largest),)](x, largest, count, VALUES=values, TILES=tiles, num_warps=warps)
        most = largest.amax()
        scale, inverse = e4m3_scale(most)
        _kernels().scale_kernel[(-(-count // values),)](
            x, inverse, out, count, VALUES=values, num_warps=warps)
    return out, scale


def _e4m3(x, given) -> str | None:
    """Reason to refuse an output in E4M3 on a card that has no such numbers."""
    lacks = given is not None and x.is_cuda and capability(x.device) < (8, 9)
    return "needs compute capability 8.9 for an output in E4M3" if lacks else None


def _depthwise(x, weight, bias, grid, overwrite=False, out=None, *, given=None) -> str | None:
    return one_dtype(x, weight, bias) or _e4m3(x, given)


def not_parity(qkv, q_weight, k_weight, cos, sin, heads, history=None, *, parity=False, given=None, **_) -> str | None:
    if reason := _e4m3(qkv, given):
        return reason
    if parity:
        return "parity mode rounds at every step like the official run"
    if cos.dtype != torch.float32:
        return "needs a float32 rotary table"
    dim = qkv.shape[-1] // 3 // heads
    return None if dim <= 128 else f"holds a head of at most 128 channels, this one has {dim}"


def _text(q, k, v, heads, mask=None, lengths=None, norm=None, **_) -> str | None:
    if lengths is None or len(set(lengths)) == 1:
        return "torch's own attention is as fast where all rows have one length"
    dim = q.shape[-1] // heads
    if dim > 128:
        return f"holds a head of at most 128 channels, this one has {dim}"
    return one_dtype(q, k, v, *(() if norm is None else norm[:1]))


def register(operators: dict) -> None:
    """Add these functions to the operators as backend 'triton'."""
    needs = {"devices": ("cuda",), "inference_only": True, "triton": True, "capability": (8, 0), "dtypes": (torch.bfloat16,)}
    checks = {"linear_attention": not_parity, "rms_norm": has_weight, "temporal_taps": None, "gated_depthwise": _depthwise}
    operators["softmax_attention"].add("triton", softmax_attention, Constraint(**needs | {"capability": (9, 0)}, check=_text))
    for function in (modulate_norm, gated_residual, residual_norm, rms_norm, linear_attention, gated_depthwise, temporal_taps):
        name = function.__name__
        operators[name].add("triton", function, Constraint(**needs, check=checks.get(name, one_dtype)))
    e4m3 = needs | {"capability": (8, 9)}
    for function in (row_fp8, scaled_fp8, given_fp8, temporal_taps_fp8, modulate_norm_fp8, residual_norm_fp8, gated_residual_fp8):
        check = one_dtype if function in (modulate_norm_fp8, residual_norm_fp8, gated_residual_fp8) else None
        operators[function.__name__].add("triton", function, Constraint(**e4m3, check=check))
