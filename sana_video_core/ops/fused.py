"""Operators fused into few passes over memory: Triton kernels, and torch's own fused functions where those suffice.

Same meaning as ``reference.py`` (the truth); a call outside what :data:`FUSED` declares runs the reference. Nothing here
imports Triton before the first call. Not covered: gradients, torch.compile (both run the reference).
"""

from __future__ import annotations

from importlib import import_module

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference import ATTENTION_EPS, Contribution
from .registry import Constraint

SPLIT_TOKENS = 1024  # tokens a program sums; by shape alone, so that a sum does not depend on the card
# Launch settings, first guesses that no card has timed yet (bench/probe.py does).
# state: rows, warps, stages; apply: rows, tiles, warps, stages; depthwise: rows, columns, channels, warps.
TUNING = {"state": (64, 8, 2), "apply": (64, 4, 8, 2), "depthwise": (2, 64, 32, 8)}


def _kernels():
    return import_module(".kernels", __package__)


def self_test(device: torch.device) -> None:
    """Build and run the smallest kernel; raises when that fails or gives a wrong value."""
    x, out = torch.full((1, 16), 2.0, device=device), torch.zeros(1, device=device)
    with torch.cuda.device_of(x):
        _kernels().inverse_rms_kernel[(1,)](x, out, 16, 16, 0.0, BLOCK=16, num_warps=4)
    if abs(float(out) - 0.5) > 1e-6:
        raise RuntimeError(f"a kernel gave {float(out)} instead of 0.5")


def _block(n: int) -> int:
    """The power of two that holds ``n`` (at least 16, the smallest side of a matrix product)."""
    return max(16, 1 << (n - 1).bit_length())


def modulate_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """See ``reference.modulate_norm``; one read, one write, one rounding."""
    x = x.contiguous()
    batch, tokens, channels = x.shape
    rows = shift.shape[1]
    if shift.stride() != scale.stride() or shift.stride(-1) != 1 or (batch > 1 and shift.stride(0) != rows * shift.stride(1)):
        shift, scale = shift.contiguous(), scale.contiguous()
    stride = shift.stride(1) if rows > 1 or batch == 1 else shift.stride(0)
    out = torch.empty_like(x)
    with torch.cuda.device_of(x):
        _kernels().modulate_norm_kernel[(batch * tokens,)](
            x, shift, scale, out, tokens // rows, channels, stride, eps, BLOCK=_block(channels), num_warps=4)
    return out


def linear_attention(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, heads: int,
    history: Contribution | None = None, *, parity: bool = False, norm_eps: float = 1e-5, eps: float = ATTENTION_EPS,
) -> tuple[Tensor, Contribution]:
    """See ``reference.linear_attention`` (``quality``). Operands of the two products are rounded to the dtype of qkv."""
    qkv = qkv.contiguous()
    batch, tokens, width = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    dim = width // heads
    splits = -(-tokens // SPLIT_TOKENS)
    new = {"device": qkv.device, "dtype": torch.float32}
    inverse = torch.empty(batch, tokens, **new)
    vk = torch.empty(batch, heads, splits, dim, dim, **new)
    ksum = torch.empty(batch, heads, splits, dim, **new)
    out = torch.empty(batch, tokens, width, device=qkv.device, dtype=qkv.dtype)
    kernels = _kernels()
    sizes = {"OPERAND": kernels.operand(qkv.dtype), "D": dim, "BLOCK_D": _block(dim)}
    rows, warps, stages = TUNING["state"]
    with torch.cuda.device_of(qkv):
        kernels.inverse_rms_kernel[(batch * tokens,)](
            qkv[..., width:], inverse, width, 3 * width, norm_eps, BLOCK=_block(width), num_warps=4)
        kernels.attention_state_kernel[(splits, batch * heads)](
            qkv, inverse, k_weight, cos, sin, vk, ksum, tokens, heads, **sizes, ROWS=rows, STEPS=SPLIT_TOKENS // rows,
            num_warps=warps, num_stages=stages)
        own = Contribution(vk.sum(2), ksum.sum(2)[:, :, None])
        total = own if history is None else Contribution(own.vk + history.vk, own.ksum + history.ksum)
        rows, tiles, warps, stages = TUNING["apply"]
        kernels.attention_apply_kernel[(-(-tokens // (rows * tiles)), batch * heads)](
            qkv, q_weight, cos, sin, total.vk.contiguous(), total.ksum.contiguous(), out, tokens, heads, eps,
            **sizes, ROWS=rows, TILES=tiles, num_warps=warps, num_stages=stages)
    return out, own


def gated_depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, grid: tuple[int, int], overwrite: bool = False) -> Tensor:
    """See ``reference.gated_depthwise``."""
    x = F.silu(x, inplace=True) if overwrite else F.silu(x)
    return depthwise_glu(x.contiguous(), weight, bias, grid)


def depthwise_glu(x: Tensor, weight: Tensor, bias: Tensor | None, grid: tuple[int, int]) -> Tensor:
    """Depthwise 3x3 and gate of activations ``x [B', N, 2E]`` that have had their SiLU -> ``[B', N, E]``."""
    batch, tokens, channels = x.shape
    height, width = grid
    hidden, frames = channels // 2, batch * tokens // (height * width)
    block_h, block_w, block_c, warps = TUNING["depthwise"]
    block_w = min(block_w, _block(width))
    strips, columns = -(-height // block_h), -(-width // block_w)
    taps = weight.reshape(channels, 9).t().contiguous()
    out = torch.empty(batch, tokens, hidden, device=x.device, dtype=x.dtype)
    with torch.cuda.device_of(x):
        _kernels().gated_depthwise_kernel[(-(-hidden // block_c), frames * strips * columns)](
            x, taps, taps if bias is None else bias, out, height, width, hidden, strips, columns,
            HAS_BIAS=bias is not None, BLOCK_H=block_h, BLOCK_W=block_w, BLOCK_C=block_c, num_warps=warps)
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See ``reference.rms_norm``; torch's fused kernel (float32 inside). It wants a weight of the dtype of x."""
    return F.rms_norm(x, x.shape[-1:], weight.to(x.dtype), eps)


def gated_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """See ``reference.gated_residual``; one pass."""
    rows = gate.shape[1]
    return torch.addcmul(x.unflatten(1, (rows, -1)), gate[:, :, None], y.unflatten(1, (rows, -1))).flatten(1, 2)


def temporal_taps(u: Tensor, frames: int, tail: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """See ``reference.temporal_taps``; every value is written once."""
    x = u.unflatten(1, (frames, -1))
    channels = u.shape[-1]
    taps = u.new_empty(*x.shape[:-1], 3 * channels)
    before, same, after = taps.split(channels, -1)
    same.copy_(x)
    before[:, 1:].copy_(x[:, :-1])
    after[:, :-1].copy_(x[:, 1:])
    before[:, :1] = 0 if tail is None else tail.to(u)
    after[:, -1:] = 0
    return taps.flatten(1, 2), x[:, -1:]


def _not_parity(qkv, q_weight, k_weight, cos, sin, heads, history=None, *, parity=False, **_) -> str | None:
    if parity:
        return "parity mode rounds at every step like the official run"
    if cos.dtype != torch.float32:
        return "needs a float32 rotary table"
    dim = qkv.shape[-1] // 3 // heads
    return None if dim <= 128 else f"holds a head of at most 128 channels, this one has {dim}"


def _has_weight(x, weight, eps) -> str | None:
    return "needs a weight" if weight is None else None


def _one_dtype(x, y, gate) -> str | None:
    return None if x.dtype == y.dtype == gate.dtype else "needs inputs of one dtype"


def register(operators: dict) -> None:
    """Add these functions to the operators as backends 'triton' and 'torch-fused'."""
    card = {"devices": ("cuda",), "inference_only": True}
    triton = {**card, "triton": True, "capability": (8, 0), "dtypes": (torch.bfloat16,)}
    operators["modulate_norm"].add("triton", modulate_norm, Constraint(**triton))
    operators["linear_attention"].add("triton", linear_attention, Constraint(**triton, check=_not_parity))
    operators["gated_depthwise"].add("triton", gated_depthwise, Constraint(**triton))
    operators["rms_norm"].add("torch-fused", rms_norm, Constraint(**card, check=_has_weight))
    operators["gated_residual"].add("torch-fused", gated_residual, Constraint(**card, check=_one_dtype))
    operators["temporal_taps"].add("torch-fused", temporal_taps, Constraint(**card))
