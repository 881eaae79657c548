"""Operators fused into few passes over memory by Triton kernels.

Same meaning as ``reference.py`` (the truth); a call outside what :func:`register` declares runs the reference. Nothing here
imports Triton before the first call. Not covered: gradients (the reference runs), torch.compile (``library.py``).
"""

from __future__ import annotations

from importlib import import_module

import torch
from torch import Tensor

from .fused_torch import has_weight, one_dtype
from .reference import ATTENTION_EPS, E4M3_LEAST, E4M3_MAX, Contribution, e4m3_scale
from .registry import Constraint

SPLIT_TOKENS, KEY_TOKENS = 1024, 16  # tokens a program sums; by shape alone, so that a sum does not depend on the card
# Launch settings, chosen with bench/probe.py on an H200. norm, residual, rms, row_fp8: tokens a program,
# warps (row_fp8: at most); taps: tokens, channels, warps; keys: warps; state: tokens, warps, stages; apply: tokens, tiles,
# warps, stages; depthwise: channels, warps, form of the SiLU; fp8: values, tiles, warps.
TUNING = {
    "norm": (1, 1), "residual": (1, 4), "rms": (1, 1), "taps": (2, 256, 1), "keys": (2,), "state": (64, 4, 2),
    "apply": (64, 8, 4, 2), "depthwise": (64, 2, "pair"), "fp8": (2048, 8, 4), "row_fp8": (1, 8),
}
# Elsewhere than on Hopper a product's operands and sums share the registers: smaller tiles over more warps.
SMALLER = {"state": (32, 8, 2), "apply": (32, 16, 8, 2)}


def _setting(name: str, x: Tensor) -> tuple:
    hopper = x.is_cuda and torch.cuda.get_device_capability(x.device)[0] == 9
    return TUNING[name] if hopper else SMALLER.get(name, TUNING[name])


def _kernels(name: str = "kernels"):
    return import_module(f".{name}", __package__)


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
                   scale: Tensor | None, eps: float) -> tuple[Tensor | None, Tensor | None]:
    """``x + gate * (y + extra)`` when there is y, and its modulated norm when there is a scale."""
    x, y, extra = (None if t is None else t.contiguous() for t in (x, y, extra))
    batch, tokens, channels = x.shape
    given = [r for r in (gate, shift, scale) if r is not None]
    rows, stride = _modulation(x, *given) if given else ([], 0)
    frames = rows[0].shape[1] if rows else 1
    gate = rows.pop(0) if gate is not None else None
    shift, scale = rows or (None, None)
    out = None if y is None else torch.empty_like(x)
    normed = None if scale is None else torch.empty_like(x)
    block, warps = TUNING["residual" if scale is None else "norm"]
    each = tokens // frames
    used = (x if t is None else t for t in (y, extra, gate, shift, scale, out, normed))  # what is not there is not touched
    with torch.cuda.device_of(x):
        _kernels().residual_norm_kernel[(-(-each // block), batch * frames)](
            x, *used, each, stride, eps, **_row(channels), TOKENS=block, HAS_Y=y is not None, HAS_EXTRA=extra is not None,
            HAS_GATE=gate is not None, HAS_NORM=scale is not None, num_warps=warps)
    return out, normed


def modulate_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """See ``reference.modulate_norm``; one read, one write, one rounding."""
    return _residual_norm(x, None, None, None, shift, scale, eps)[1]


def gated_residual(x: Tensor, y: Tensor, gate: Tensor, extra: Tensor | None = None) -> Tensor:
    """See ``reference.gated_residual``; one pass, one rounding."""
    return _residual_norm(x, y, extra, gate, None, None, 0.0)[0]


def residual_norm(x: Tensor, y: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """See ``reference.residual_norm``; one pass. The norm is that of the sum before it is rounded."""
    return _residual_norm(x, y, None, None, shift, scale, eps)


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
) -> tuple[Tensor, Contribution]:
    """See ``reference.linear_attention`` (``quality``). Operands of the sums' product are rounded to the dtype of qkv, those of
    its application to float16 after a scale."""
    qkv, q_weight, k_weight, cos, sin = (t.contiguous() for t in (qkv, q_weight, k_weight, cos, sin))
    batch, tokens, width = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    dim = width // heads
    splits, parts = -(-tokens // SPLIT_TOKENS), -(-tokens // KEY_TOKENS)
    new = {"device": qkv.device, "dtype": torch.float32}
    keys = torch.empty(batch, tokens, width, device=qkv.device, dtype=qkv.dtype)
    vk = torch.empty(batch, heads, splits, dim, dim, **new)
    ksum = torch.empty(batch, parts, heads, dim, **new)
    out = torch.empty_like(keys)
    kernels, half = _kernels("kernels_attention"), qkv.dtype == torch.bfloat16
    words, key_words = (t.view(torch.int32) if half else t for t in (qkv, keys))
    operand, block = _kernels().operand, max(_block(dim), 32)  # a product's two halves of a head have 16 channels or more
    with torch.cuda.device_of(qkv):
        kernels.attention_keys_kernel[(parts, batch)](
            qkv, words, k_weight, cos, sin, keys, key_words, ksum, tokens, norm_eps, WORDS=half,
            HALF=dim // 2, **_row(width // 2), TOKENS=KEY_TOKENS, num_warps=TUNING["keys"][0])
        rows, warps, stages = _setting("state", qkv)
        kernels.attention_state_kernel[(batch * heads, splits)](
            qkv, keys, vk, tokens, heads, OPERAND=operand(qkv.dtype), D=dim, BLOCK_D=block, ROWS=rows,
            STEPS=SPLIT_TOKENS // rows, num_warps=warps, num_stages=stages)
        own = Contribution(vk.sum(2), ksum.sum(1)[:, :, None])
        total = own if history is None else Contribution(own.vk + history.vk, own.ksum + history.ksum)
        rows, tiles, warps, stages = _setting("apply", qkv)
        kernels.attention_apply_kernel[(batch * heads, -(-tokens // (rows * tiles)))](
            qkv, words, q_weight, cos, sin, total.vk.contiguous().view(torch.int64), total.ksum.contiguous(), out, tokens,
            heads, eps, OPERAND=operand(torch.float16), WORDS=half, D=dim, BLOCK_D=block, ROWS=rows, TILES=tiles,
            num_warps=warps, num_stages=stages)
    return out, own


def gated_depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, grid: tuple[int, int], overwrite: bool = False) -> Tensor:
    """See ``reference.gated_depthwise``; one pass, x is left as it is."""
    x = x.contiguous()
    batch, tokens, channels = x.shape
    height, width = grid
    hidden, frames = channels // 2, batch * tokens // (height * width)
    block, warps, form = TUNING["depthwise"]
    kernels = _kernels("kernels_depthwise")
    strips = -(-width // kernels.COLUMNS)
    taps = weight.reshape(channels, 9).t().contiguous()
    out = torch.empty(batch, tokens, hidden, device=x.device, dtype=x.dtype)
    with torch.cuda.device_of(x):
        kernels.gated_depthwise_kernel[(-(-hidden // block) * strips * frames,)](
            x, taps, taps if bias is None else bias.contiguous(), out, height, width, strips, HIDDEN=hidden,
            HAS_BIAS=bias is not None, BLOCK_C=block, FORM=kernels.silu_form(form), num_warps=warps)
    return out


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


def row_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """See ``reference.row_fp8``; one read, one write."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    out = torch.empty(x.shape, device=x.device, dtype=torch.float8_e4m3fn)
    scale = torch.empty(*x.shape[:-1], 1, device=x.device, dtype=torch.float32)
    (block, most), sizes = TUNING["row_fp8"], _row(rows.shape[1])
    with torch.cuda.device_of(rows):
        _kernels().row_fp8_kernel[(-(-len(rows) // block),)](
            rows, out, scale, len(rows), LIMIT=E4M3_MAX, LEAST=E4M3_LEAST, **sizes, TOKENS=block,
            num_warps=min(most, max(1, sizes["MAIN"] // 512)))
    return out, scale


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
        _kernels().scale_kernel[(-(-count // values),)](x, inverse, out, count, LIMIT=E4M3_MAX, VALUES=values, num_warps=warps)
    return out, scale


def _not_parity(qkv, q_weight, k_weight, cos, sin, heads, history=None, *, parity=False, **_) -> str | None:
    if parity:
        return "parity mode rounds at every step like the official run"
    if cos.dtype != torch.float32:
        return "needs a float32 rotary table"
    dim = qkv.shape[-1] // 3 // heads
    return None if dim <= 128 else f"holds a head of at most 128 channels, this one has {dim}"


def register(operators: dict) -> None:
    """Add these functions to the operators as backend 'triton'."""
    needs = {"devices": ("cuda",), "inference_only": True, "triton": True, "capability": (8, 0), "dtypes": (torch.bfloat16,)}
    checks = {"linear_attention": _not_parity, "rms_norm": has_weight, "temporal_taps": None}
    for function in (modulate_norm, gated_residual, residual_norm, rms_norm, linear_attention, gated_depthwise, temporal_taps):
        name = function.__name__
        operators[name].add("triton", function, Constraint(**needs, check=checks.get(name, one_dtype)))
    operators["row_fp8"].add("triton", row_fp8, Constraint(**needs | {"capability": (8, 9)}))
    operators["scaled_fp8"].add("triton", scaled_fp8, Constraint(**needs | {"capability": (8, 9)}))
