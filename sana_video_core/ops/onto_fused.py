"""The operators of ``onto_fp8.py`` on a card: the product as a kernel of its own for Hopper (``kernels_onto.py``)."""

from __future__ import annotations

import logging
from functools import cache
from importlib import import_module

import torch
from torch import Tensor

from . import onto_fp8
from .fused import _kernels, _row
from .fused_torch import one_dtype
from .reference import Rows
from .registry import Constraint

WARPS = 2  # of the program that frames a token
# By the first form of the kernel on an H200, a block's three sums in us: 4,608 tiles 3,005 where products and passes take 3,360,
# 1,368 tiles 1,146 and 1,082, 1,098 tiles 841 and 865. Not tried between.
LEAST_TILES = 2000
log = logging.getLogger(__name__)


def framed_fp8(u: Tensor, frames: int, tail: Tensor | None = None, *, given: Tensor) -> Rows:
    """See ``onto_fp8.framed_fp8``; one read, one write."""
    u = u.contiguous()
    batch, tokens, channels = u.shape
    size = tokens // frames
    out = torch.empty(batch * (frames + 2) * size, channels, device=u.device, dtype=torch.float8_e4m3fn)
    with torch.cuda.device_of(u):
        _kernels().framed_fp8_kernel[(size, batch * (frames + 2))](
            u, u if tail is None else tail.to(u).contiguous(), out, given, frames, size, **_row(channels),
            HAS_TAIL=tail is not None, NATIVE=_kernels().native(), num_warps=WARPS)
    return Rows(out, given)


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _tiles(batch: int, tokens: int, channels: int) -> tuple[int, int, int]:
    """(tiles of a batch row's tokens, of all tokens, of the channels)."""
    per = -(-tokens // 128)
    return per, batch * per, -(-channels // 256)


def add_product_fp8(
    x: Tensor, y: Rows, weight: Rows, bias: Tensor | None = None, gate: Tensor | None = None, extra: Tensor | None = None, *,
    frames: int = 0, given: Tensor | None = None,
) -> Tensor | Rows:
    """See ``onto_fp8.add_product_fp8``; nothing but the operands and the tokens is read or written."""
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    kernels = import_module(".kernels_onto", __package__)
    batch, tokens, channels = x.shape
    rows, columns, depth, width = (n.value for n in (kernels.ROWS, kernels.COLUMNS, kernels.DEPTH, kernels.WIDTH))

    def pieces(matrix: Tensor, *shape: int) -> TensorDescriptor:
        kind = gl.bfloat16 if matrix.dtype == torch.bfloat16 else gl.float8e4nv
        return TensorDescriptor.from_tensor(matrix, list(shape), gl.NVMMASharedLayout.get_default_for(list(shape), kind))

    a = y.values.reshape(-1, y.values.shape[-1]).contiguous()
    per, down, across = _tiles(batch, tokens, channels)
    frame = tokens // frames if frames else 0
    gate = None if gate is None else gate.expand(batch, -1, -1).contiguous()
    extra, bias = (None if t is None else t.contiguous() for t in (extra, bias))
    out = x if given is None else torch.empty_like(x, dtype=torch.float8_e4m3fn)
    matrices = pieces(a, rows, depth), pieces(weight.values.contiguous(), columns, depth), pieces(x, 1, rows, width)
    scale, factor = weight.scale.reshape(1), y.scale.reshape(-1).contiguous()
    with torch.cuda.device_of(x):
        kernels.add_product_kernel[(min(_processors(x.device), down * across),)](
            *matrices, pieces(out, 1, rows, width), *(x if t is None else t for t in (extra, gate, bias)), scale, factor,
            factor if given is None else given, down * across, down, across, per, tokens, frame, tokens + 2 * frame,
            C=channels, K=a.shape[1], TAPS=3 if frames else 1, HAS_EXTRA=extra is not None, HAS_GATE=gate is not None,
            HAS_BIAS=bias is not None, BY_ROW=len(factor) > 1, FP8=given is not None, num_warps=kernels.WARPS.value)
    return x if given is None else Rows(out, given)


@cache
def gluon_fault(device: torch.device) -> str | None:
    """Reason why the kernel does not work there, or None. Gluon is an experimental part of Triton and may change with any version
    of it: a small product is made and compared, once."""
    made = torch.Generator(device).manual_seed(0)
    x = torch.randn(2, 150, 272, generator=made, device=device).bfloat16()
    y, weight = (Rows(torch.randn(n, 144, generator=made, device=device).to(torch.float8_e4m3fn), torch.ones((), device=device))
                 for n in (300, 272))
    expected = onto_fp8.add_product_fp8(x.clone(), y, weight, gate=x[:, :1])
    try:
        error = (add_product_fp8(x.clone(), y, weight, gate=x[:, :1]) - expected).norm() / expected.norm()
        reason = None if float(error) < 0.01 else f"its kernel gives wrong values here (error {float(error):.3f})"
    except Exception as fault:  # whatever a compiler or another version's names can raise
        reason = f"its kernel does not work here ({type(fault).__name__}: {str(fault).strip()[:200]})"
    if reason:
        log.warning("add_product_fp8: %s; products in fp8 are added in passes of their own instead", reason)
    return reason


def refuses(x, y, weight, bias=None, gate=None, extra=None, *, given=None, **_) -> str | None:
    """Reason to refuse a call; of y and weight nothing but y's channels matters."""
    if gate is not None and gate.shape[1] > 1:
        return "needs one gate for all frames"
    if extra is not None and given is not None:
        return "has no room for both something more to add and an answer in E4M3"
    if not x.is_contiguous():
        return "adds to tokens that are contiguous"
    if x.shape[-1] % 16 or y.values.shape[-1] % 16:
        return "needs channels in multiples of 16"
    _, down, across = _tiles(*x.shape)
    if down * across < LEAST_TILES:
        return f"worth it from {LEAST_TILES} tiles of 128 by 256 on, here are {down * across}"
    return one_dtype(x, bias, gate, extra) or (gluon_fault(x.device) if x.is_cuda else None)


def register(operators: dict) -> None:
    """Add these functions to the operators of those names."""
    needs = {"devices": ("cuda",), "inference_only": True, "triton": True, "dtypes": (torch.bfloat16,)}
    operators["framed_fp8"].add("triton", framed_fp8, Constraint(**needs, capability=(8, 9)))
    operators["add_product_fp8"].add("gluon", add_product_fp8, Constraint(**needs, generation=9, check=refuses))
