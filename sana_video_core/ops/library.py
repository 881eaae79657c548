"""The Triton operators as torch.library operators: torch.compile keeps them whole instead of tracing into their launches.

:data:`COMPILED` has a function for each, with the signature of the operator. Without compilation ``fused.py`` is called
directly, because torch.library costs time at every call. No operator changes its inputs, and none returns a part of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch import Tensor

from . import fused
from .reference import ATTENTION_EPS, Contribution, Rows

# The package's own name: two copies of it in one process must not define one operator twice.
NAMESPACE = re.sub(r"\W", "_", __package__)


def _define(schema: str, function: Callable, fake: Callable) -> Callable:
    """An operator by its schema; ``fake`` gives empty results of the right shapes."""
    name, _, signature = schema.partition("(")
    op = torch.library.custom_op(f"{NAMESPACE}::{name}", function, mutates_args=(), schema=f"({signature}")
    op.register_fake(fake)
    return op


def _like(x: Tensor, *_) -> Tensor:
    return x.new_empty(x.shape)


def _attention(qkv, q_weight, k_weight, cos, sin, heads, vk, ksum, norm_eps, eps):
    history = None if vk is None else Contribution(vk, ksum)
    out, own = fused.linear_attention(qkv, q_weight, k_weight, cos, sin, heads, history, norm_eps=norm_eps, eps=eps)
    return out, own.vk, own.ksum


def _attention_fake(qkv, q_weight, k_weight, cos, sin, heads, *_):
    batch, tokens, width = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    dim = width // heads
    return (qkv.new_empty(batch, tokens, width), qkv.new_empty(batch, heads, dim, dim, dtype=torch.float32),
            qkv.new_empty(batch, heads, 1, dim, dtype=torch.float32))


_modulate_norm = _define(
    "modulate_norm(Tensor x, Tensor shift, Tensor scale, float eps) -> Tensor", fused.modulate_norm, _like)
_gated_residual = _define(
    "gated_residual(Tensor x, Tensor y, Tensor gate, Tensor? extra) -> Tensor", fused.gated_residual, _like)
_residual_norm = _define(
    "residual_norm(Tensor x, Tensor y, Tensor shift, Tensor scale, float eps) -> (Tensor, Tensor)", fused.residual_norm,
    lambda x, *_: (_like(x), _like(x)))
_rms_norm = _define("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor", fused.rms_norm, _like)
_linear_attention = _define(
    "linear_attention(Tensor qkv, Tensor q_weight, Tensor k_weight, Tensor cos, Tensor sin, int heads, Tensor? vk, "
    "Tensor? ksum, float norm_eps, float eps) -> (Tensor, Tensor, Tensor)", _attention, _attention_fake)
_gated_depthwise = _define(
    "gated_depthwise(Tensor x, Tensor weight, Tensor? bias, int height, int width) -> Tensor",
    lambda x, weight, bias, height, width: fused.gated_depthwise(x, weight, bias, (height, width)),
    lambda x, *_: x.new_empty(x.shape[0], x.shape[1], x.shape[2] // 2))
_temporal_taps = _define(
    "temporal_taps(Tensor u, int frames, Tensor? tail) -> Tensor",
    lambda u, frames, tail: fused.temporal_taps(u, frames, tail)[0],
    lambda u, frames, tail: u.new_empty(u.shape[0], u.shape[1], 3 * u.shape[2]))


def _softmax(q, k, v, heads, lengths, weight, eps):
    return fused.softmax_attention(q, k, v, heads, None, tuple(lengths), None if weight is None else (weight, eps))


_softmax_attention = _define(
    "softmax_attention(Tensor q, Tensor k, Tensor v, int heads, int[] lengths, Tensor? weight, float eps) -> Tensor", _softmax,
    _like)


def _rows_like(x: Tensor, *_, times: int = 1) -> tuple[Tensor, Tensor]:
    shape = (*x.shape[:-1], times * x.shape[-1])
    return x.new_empty(shape, dtype=torch.float8_e4m3fn), x.new_empty((*shape[:-1], 1), dtype=torch.float32)


def _residual_norm_rows(x, y, shift, scale, eps):
    total, rows = fused.residual_norm_fp8(x, y, shift, scale, eps)
    return total, *rows


_row_fp8 = _define("row_fp8(Tensor x) -> (Tensor, Tensor)", lambda x: tuple(fused.row_fp8(x)), _rows_like)
_modulate_norm_fp8 = _define(
    "modulate_norm_fp8(Tensor x, Tensor shift, Tensor scale, float eps) -> (Tensor, Tensor)",
    lambda *call: tuple(fused.modulate_norm_fp8(*call)), _rows_like)
_residual_norm_fp8 = _define(
    "residual_norm_fp8(Tensor x, Tensor y, Tensor shift, Tensor scale, float eps) -> (Tensor, Tensor, Tensor)",
    _residual_norm_rows, lambda x, *_: (_like(x), *_rows_like(x)))
_temporal_taps_fp8 = _define(
    "temporal_taps_fp8(Tensor u, int frames, Tensor? tail) -> (Tensor, Tensor)",
    lambda u, frames, tail: tuple(fused.temporal_taps_fp8(u, frames, tail)[0]), lambda u, *_: _rows_like(u, times=3))
_scaled_fp8 = _define(
    "scaled_fp8(Tensor x) -> (Tensor, Tensor)", fused.scaled_fp8,
    lambda x: (x.new_empty(x.shape, dtype=torch.float8_e4m3fn), x.new_empty((), dtype=torch.float32)))


# ``offset`` and ``given`` are None in a compiled graph: what comes with them is left to the plain form (``dit/layers.py``).

def modulate_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6, *, offset: None = None) -> Tensor:
    return _modulate_norm(x, shift, scale, eps)


def gated_residual(x: Tensor, y: Tensor, gate: Tensor, extra: Tensor | None = None) -> Tensor:
    return _gated_residual(x, y, gate, extra)


def residual_norm(x: Tensor, y: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    return _residual_norm(x, y, shift, scale, eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _rms_norm(x, weight, eps)


def linear_attention(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, heads: int,
    history: Contribution | None = None, *, parity: bool = False, norm_eps: float = 1e-5, eps: float = ATTENTION_EPS,
    given: None = None,
) -> tuple[Tensor, Contribution]:
    vk, ksum = (None, None) if history is None else history
    out, vk, ksum = _linear_attention(qkv, q_weight, k_weight, cos, sin, heads, vk, ksum, norm_eps, eps)
    return out, Contribution(vk, ksum)


def softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None, lengths: tuple[int, ...] | None = None,
    norm: tuple[Tensor, float] | None = None, *, given: None = None,
) -> Tensor:
    weight, eps = (None, 0.0) if norm is None else norm
    return _softmax_attention(q, k, v, heads, list(lengths), weight, eps)


def gated_depthwise(
    x: Tensor, weight: Tensor, bias: Tensor | None, grid: tuple[int, int], overwrite: bool = False, out: Tensor | None = None,
    *, given: None = None,
) -> Tensor:
    made = _gated_depthwise(x, weight, bias, *grid)
    return made if out is None else out.copy_(made)


def temporal_taps(u: Tensor, frames: int, tail: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return _temporal_taps(u, frames, tail), u.unflatten(1, (frames, -1))[:, -1:]


def row_fp8(x: Tensor) -> Rows:
    return Rows(*_row_fp8(x))


def modulate_norm_fp8(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6, *, given: None = None) -> Rows:
    return Rows(*_modulate_norm_fp8(x, shift, scale, eps))


def residual_norm_fp8(
    x: Tensor, y: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6, *, given: None = None,
) -> tuple[Tensor, Rows]:
    total, *rows = _residual_norm_fp8(x, y, shift, scale, eps)
    return total, Rows(*rows)


def temporal_taps_fp8(
    u: Tensor, frames: int, tail: Tensor | None = None, *, given: None = None,
) -> tuple[Rows, Tensor]:
    return Rows(*_temporal_taps_fp8(u, frames, tail)), u.unflatten(1, (frames, -1))[:, -1:]


def scaled_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    return _scaled_fp8(x)


COMPILED = (
    modulate_norm, gated_residual, residual_norm, rms_norm, linear_attention, softmax_attention, gated_depthwise, temporal_taps,
    row_fp8, scaled_fp8, modulate_norm_fp8, residual_norm_fp8, temporal_taps_fp8)


def register(operators: dict) -> None:
    """Tell the operators what to call in place of their backend 'triton' inside a compiled graph."""
    for function in COMPILED:
        operators[function.__name__].compiled["triton"] = function
