"""The operators of ``pairs.py`` as Triton kernels; the products between them are the card's own matrix products."""

from __future__ import annotations

from importlib import import_module

import torch
from torch import Tensor

from .fused import _block, _modulation
from .fused_torch import one_dtype
from .pairs import SCALE, narrow
from .registry import Constraint

TUNING = {"pairs": (2, 256, 1), "weights": (512, 2), "residual": (2, 256, 1)}  # tokens, channels, warps


def _kernels():
    return import_module(".kernels_pairs", __package__)


def time_pairs(u: Tensor, frames: int, tail: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """See ``pairs.time_pairs``; one pass."""
    u = u.contiguous()
    batch, tokens, channels = u.shape
    size, (rows, block, warps) = tokens // frames, TUNING["pairs"]
    out = torch.empty(batch, 4, (frames + 1) // 2 * size, channels, device=u.device, dtype=narrow(u.dtype))
    with torch.cuda.device_of(u):
        _kernels().time_pairs_kernel[(-(-channels // block), -(-size // rows), batch)](
            u, u if tail is None else tail.to(u).contiguous(), out, frames, size, SCALE, C=channels, ROWS=rows,
            BLOCK_C=min(block, _block(channels)), HAS_TAIL=tail is not None, num_warps=warps)
    return out, u.unflatten(1, (frames, -1))[:, -1:]


def pair_weights(weight: Tensor) -> Tensor:
    """See ``pairs.pair_weights``; one pass."""
    channels, (block, warps) = len(weight), TUNING["weights"]
    out = torch.empty(4, channels, channels, device=weight.device, dtype=narrow(weight.dtype))
    block = min(block, _block(channels))
    with torch.cuda.device_of(weight):
        _kernels().pair_weights_kernel[(-(-channels // block), channels)](
            weight.contiguous(), out, C=channels, BLOCK_C=block, num_warps=warps)
    return out


def pair_residual(
    x: Tensor, y: Tensor, gate: Tensor, products: Tensor, frames: int, *, offset: Tensor | None = None,
) -> Tensor:
    """See ``pairs.pair_residual``; one pass, one rounding."""
    x, y, products = x.contiguous(), y.contiguous(), products.contiguous()
    batch, tokens, channels = x.shape
    size, (rows, block, warps) = tokens // frames, TUNING["residual"]
    (gate,), stride = _modulation(x, gate)
    out, more = torch.empty_like(x), x if offset is None else offset.expand(batch, -1, -1).contiguous()
    with torch.cuda.device_of(x):
        _kernels().pair_residual_kernel[(-(-channels // block), -(-size // rows), batch * ((frames + 1) // 2))](
            x, y, gate, more, products, out, frames, size, gate.shape[1], stride, 1 / SCALE, C=channels, ROWS=rows,
            BLOCK_C=min(block, _block(channels)), HAS_OFFSET=offset is not None, num_warps=warps)
    return out


def _one_kind(x: Tensor, y: Tensor, gate: Tensor, products: Tensor, frames: int, **_) -> str | None:
    return one_dtype(x, y, gate)


def register(operators: dict) -> None:
    """Add these functions to the operators of those names."""
    needs = {"devices": ("cuda",), "inference_only": True, "triton": True, "capability": (8, 0), "dtypes": (torch.bfloat16,)}
    for function, check in ((time_pairs, None), (pair_weights, None), (pair_residual, _one_kind)):
        operators[function.__name__].add("triton", function, Constraint(**needs, check=check))
