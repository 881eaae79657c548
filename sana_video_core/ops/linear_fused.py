"""The linear attention on Hopper: kernels of its own (``kernels_linear.py``), which read keys once more instead of writing them.

Elsewhere, and for heads that they are not made for, the kernels of ``fused.py`` run.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from . import reference
from .descriptors import misplaced, pieces
from .fused import _kernels, _row, _totals, not_parity, programs_of
from .reference import ATTENTION_EPS, Contribution, Rows
from .registry import Constraint, fault_of


def linear_attention(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, heads: int,
    history: Contribution | None = None, *, parity: bool = False, norm_eps: float = 1e-5, eps: float = ATTENTION_EPS,
    given: Tensor | None = None,
) -> tuple[Tensor | Rows, Contribution]:
    """See ``reference.linear_attention`` (``quality``); rounded as in ``fused.linear_attention``. With the 2B network's 20
    heads, which are taken in pairs, a program for each of an H200's 132 processors."""
    qkv, q_weight, k_weight, cos, sin = (t.contiguous() for t in (qkv, q_weight, k_weight, cos, sin))
    batch, tokens, width = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    dim, kernels = width // heads, _kernels("kernels_linear")
    rows, warps = kernels.SUM_ROWS.value, kernels.SUM_WARPS.value
    tiles, splits = programs_of(tokens, rows)
    new = {"device": qkv.device, "dtype": torch.float32}
    factor = torch.empty(batch, tokens, **new)
    vk, ksum = torch.empty(batch, heads, splits, dim, dim, **new), torch.empty(batch, splits, heads, dim, **new)
    turns = torch.empty(tokens, dim // 2, device=qkv.device, dtype=torch.int32)  # cosine, sine: float16
    out = torch.empty(batch, tokens, width, device=qkv.device, dtype=qkv.dtype if given is None else torch.float8_e4m3fn)
    with torch.cuda.device_of(qkv):
        _kernels("kernels_attention").key_factor_kernel[(tokens, batch)](
            qkv, cos, sin, turns, factor, tokens, norm_eps, **_row(width), HALF=dim // 2, HALF_BLOCK=64,
            NATIVE=_kernels().native(), num_warps=1)
        kernels.attention_sums_kernel[(batch * heads // 2, splits)](
            pieces(qkv, 1, rows, 128), pieces(turns, rows, 64), factor, k_weight, vk, ksum, tokens, heads, tiles, D=dim,
            num_warps=warps)
        own, total = _totals(vk, ksum, history)
        rows, warps = kernels.OUT_ROWS.value, kernels.OUT_WARPS.value
        tiles, programs = programs_of(tokens, rows)
        kernels.attention_outputs_kernel[(batch * heads // 2, programs)](
            pieces(qkv, 1, rows, 128), pieces(turns, rows, 64), q_weight, total.vk.view(torch.int64), total.ksum,
            cos if given is None else given, pieces(out.view(batch, tokens, heads, dim), 1, rows, 1, 128), tokens, heads, tiles,
            eps, D=dim, FP8=given is not None, num_warps=warps)
    return out if given is None else Rows(out, given), own


@cache
def gluon_fault(device: torch.device) -> str | None:
    """Reason why the kernels do not work there, or None: a small attention is made and compared, once."""
    made = torch.Generator(device).manual_seed(0)
    qkv, gain = (torch.randn(shape, generator=made, device=device).bfloat16() for shape in ((1, 150, 6 * 112), (224,)))
    angles = torch.rand(150, 56, generator=made, device=device)

    def error() -> float:
        found = linear_attention(qkv, gain, gain, angles.cos(), angles.sin(), 2)
        right = reference.linear_attention(qkv.float(), gain.float(), gain.float(), angles.cos(), angles.sin(), 2)
        pairs = (found[0], right[0]), (found[1].vk, right[1].vk), (found[1].ksum, right[1].ksum)
        return max(float((a - b).norm() / b.norm()) for a, b in pairs)

    return fault_of("linear_attention", error, "Triton's kernels run instead")


def refuses(qkv, q_weight, k_weight, cos, sin, heads, *rest, **options) -> str | None:
    """Reason to refuse a call, or None."""
    if torch.compiler.is_compiling():
        return "is not for compiled graphs"
    if reason := not_parity(qkv, q_weight, k_weight, cos, sin, heads, *rest, **options):
        return reason
    dim = qkv.shape[-1] // 3 // heads
    if dim <= 64 or dim % 16:
        return f"is made for heads of 80, 96, 112 or 128 channels, this one has {dim}"
    if heads % 2:
        return f"takes two heads side by side, here are {heads}"
    return misplaced(qkv) or (gluon_fault(qkv.device) if qkv.is_cuda else None)


def register(operators: dict) -> None:
    """Add these kernels to the operator of that name; before Triton's, so that they are asked first."""
    operators["linear_attention"].add("gluon", linear_attention, Constraint(
        devices=("cuda",), dtypes=(torch.bfloat16,), generation=9, triton=True, inference_only=True, check=refuses))
