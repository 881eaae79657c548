"""The operators of ``onto_fp8.py`` on a card: the product as a kernel of its own for Hopper (``kernels_onto.py``)."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from . import onto_fp8
from .descriptors import misplaced, pieces
from .fused import _kernels, _row
from .fused_torch import one_dtype
from .reference import Rows
from .registry import Constraint, fault_of

WARPS = 2  # of the program that frames a token
TOGETHER, PLACES = 4, 32  # as in kernels_onto_frames.py
# By the first form of the kernel on an H200, a block's three sums in us: 4,608 tiles 3,005 where products and passes take 3,360,
# 1,368 tiles 1,146 and 1,082, 1,098 tiles 841 and 865. Not tried between.
LEAST_TILES = 2000


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
    size = x.shape[1] // frames if frames else 0
    shared = y.scale.numel() == 1 and size >= PLACES and frames >= TOGETHER and frames_fault(x.device) is None
    return _added(x, y, weight, bias, gate, extra, frames, frames // TOGETHER * TOGETHER if shared else 0, given)


def _added(x, y, weight, bias, gate, extra, frames: int, together: int, given: Tensor | None) -> Tensor | Rows:
    """The first ``together`` of the frames four at a time, all else row by row."""
    batch, tokens, channels = x.shape
    size = tokens // frames if frames else 0
    out = x if given is None else torch.empty_like(x, dtype=torch.float8_e4m3fn)
    extra, bias = (None if t is None else t.contiguous() for t in (extra, bias))
    y = Rows(y.values.reshape(-1, y.values.shape[-1]).contiguous(), y.scale)
    rest = {"bias": bias, "gate": None if gate is None else gate.expand(batch, -1, -1).contiguous(), "given": given}

    def rows(start: int, end: int) -> None:
        part = slice(start, end)
        _add_rows(x[:, part], Rows(y.values[start:], y.scale), weight, None if extra is None else extra[:, part], out[:, part],
                  tokens, size, **rest)

    with torch.cuda.device_of(x):
        if together < max(frames, 1):
            rows(together * size, tokens)
        if together:
            try:
                _add_frames(x, y, weight, extra, out, frames, together, **rest)
            except Exception as error:  # not built, so not run; the tokens after these have their product already
                if not type(error).__module__.startswith("triton"):
                    raise
                rows(0, together * size)
    return x if given is None else Rows(out, given)


def _operands(x: Tensor, extra, gate, bias, y: Rows, weight: Rows, given) -> tuple[list[Tensor], dict[str, bool]]:
    """(what a kernel takes as pointers, what of it is there)."""
    scale, factor = weight.scale.reshape(1), y.scale.reshape(-1).contiguous()
    pointers = [*(x if t is None else t for t in (extra, gate, bias)), scale, factor, factor if given is None else given]
    return pointers, {"HAS_EXTRA": extra is not None, "HAS_GATE": gate is not None, "HAS_BIAS": bias is not None,
                      "FP8": given is not None}


def _add_rows(x: Tensor, y: Rows, weight: Rows, extra: Tensor | None, out: Tensor, whole: int, size: int, *, gate, bias, given):
    """Any rows of each batch row; with ``size``, of a frame, those of its neighbours in time with them."""
    kernels, (batch, rows, channels) = _kernels("kernels_onto"), x.shape
    tile, columns, depth, width = (n.value for n in (kernels.ROWS, kernels.COLUMNS, kernels.DEPTH, kernels.WIDTH))
    per, down, across = _tiles(batch, rows, channels)
    pointers, there = _operands(x, extra, gate, bias, y, weight, given)
    kernels.add_product_kernel[(min(_processors(x.device), down * across),)](
        pieces(y.values, tile, depth), pieces(weight.values.contiguous(), columns, depth), pieces(x, 1, tile, width),
        pieces(out, 1, tile, width), *pointers, down * across, down, across, per, rows, whole, size, whole + 2 * size,
        C=channels, K=y.values.shape[1], TAPS=3 if size else 1, BY_ROW=y.scale.numel() > 1, **there,
        num_warps=kernels.WARPS.value)


def _add_frames(x: Tensor, y: Rows, weight: Rows, extra: Tensor | None, out: Tensor, frames: int, together: int, *, gate, bias,
                given):
    """The first ``together`` frames of each batch row, a multiple of TOGETHER."""
    kernels, (batch, whole, channels) = _kernels("kernels_onto_frames"), x.shape
    columns, depth, width = (n.value for n in (kernels.COLUMNS, kernels.DEPTH, kernels.WIDTH))
    size = whole // frames
    per, across = together // TOGETHER * -(-size // PLACES), -(-channels // columns)
    pointers, there = _operands(x, extra, gate, bias, y, weight, given)
    a = y.values.view(batch * (frames + 2), size, -1)
    tiles = batch * per * across
    kernels.add_frames_kernel[(min(_processors(x.device), tiles),)](
        pieces(a, 1, PLACES, depth), pieces(weight.values.contiguous(), columns, depth),
        *(pieces(t.view(batch * frames, size, channels), TOGETHER, PLACES, width) for t in (x, out)), *pointers, tiles,
        batch * per, across, per, together * size, whole, size, C=channels, K=a.shape[2], **there, num_warps=kernels.WARPS.value)


def _error(device: torch.device, frames: int, together: int) -> float:
    """How far a small product is from the truth."""
    made = torch.Generator(device).manual_seed(0)
    x = torch.randn(2, 5 * 40, 272, generator=made, device=device).bfloat16()
    y, weight = (Rows(torch.randn(n, k, generator=made, device=device).to(torch.float8_e4m3fn), torch.ones((), device=device))
                 for n, k in ((2 * (5 + 2) * 40 if frames else 400, 144), (272, 3 * 144 if frames else 144)))
    expected = onto_fp8.add_product_fp8(x.clone(), y, weight, gate=x[:, :1], frames=frames)
    return float((_added(x.clone(), y, weight, None, x[:, :1], None, frames, together, None) - expected).norm() / expected.norm())


@cache
def gluon_fault(device: torch.device) -> str | None:
    """Reason why the kernel does not work there, or None; tried once."""
    return fault_of("add_product_fp8", lambda: max(_error(device, 0, 0), _error(device, 5, 0)),
                    "products in fp8 are added in passes of their own instead")


@cache
def frames_fault(device: torch.device) -> str | None:
    """Reason why that for frames four at a time does not, or None; tried once. Triton 3.8 refuses its view of six frames as the
    four of a tap."""
    return fault_of("add_product_fp8, four frames", lambda: _error(device, 5, 4), "frames are taken one at a time")


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
    return one_dtype(x, bias, gate, extra) or misplaced(x) or (gluon_fault(x.device) if x.is_cuda else None)


def register(operators: dict) -> None:
    """Add these functions to the operators of those names."""
    needs = {"devices": ("cuda",), "inference_only": True, "triton": True, "dtypes": (torch.bfloat16,)}
    operators["framed_fp8"].add("triton", framed_fp8, Constraint(**needs, capability=(8, 9)))
    operators["add_product_fp8"].add("gluon", add_product_fp8, Constraint(**needs, generation=9, check=refuses))
