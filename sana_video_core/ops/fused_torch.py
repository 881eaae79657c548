"""Operators in fewer passes than the reference with torch's own functions: for cards without Triton, and other dtypes.

Same meaning as ``reference.py`` (the truth). Not covered: gradients (the reference runs).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from .reference import Rows
from .registry import OPERATORS, Constraint


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See ``reference.rms_norm``; torch's fused kernel (float32 inside). It wants a weight of the dtype of x."""
    return F.rms_norm(x, x.shape[-1:], weight.to(x.dtype), eps)


def gated_residual(x: Tensor, y: Tensor, gate: Tensor, extra: Tensor | None = None) -> Tensor:
    """See ``reference.gated_residual``; one pass after the sum with ``extra``."""
    y = y if extra is None else y + extra
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


def softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None, lengths: tuple[int, ...] | None = None,
    norm: tuple[Tensor, float] | None = None, *, given: Tensor | None = None,
) -> Tensor | Rows:
    """See ``reference.softmax_attention``; the norm by its own operator, which has faster forms."""
    q = q if norm is None else OPERATORS["rms_norm"](q, *norm)
    out = reference.softmax_attention(q, k, v, heads, mask, lengths)
    return out if given is None else OPERATORS["given_fp8"](out, given)


def add_product(x: Tensor, y: Tensor, weight: Tensor, gate: Tensor | None = None) -> Tensor:
    """See ``onto.add_product``; the product starts from x. A row of the batch at a time, because each has its gate."""
    gates = [None] * len(x) if gate is None else gate.expand(len(x), -1, -1)
    for row, y_row, g in zip(x, y, gates):
        row.addmm_(y_row, (weight if g is None else weight * g.t()).t())
    return x


def shifted_product(x: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """See ``onto.shifted_product``; the offset goes into the bias, a row of the batch at a time."""
    biases = F.linear(offset, weight, bias)
    out = x.new_empty(*x.shape[:-1], len(weight))
    for goal, row, its_bias in zip(out, x, biases.expand(len(x), -1, -1)):
        torch.addmm(its_bias[0], row, weight.t(), out=goal)
    return out


def worth_adding(x, y, weight, gate=None) -> str | None:
    """Reason to refuse so few tokens that the gated weight costs more than the pass that it saves."""
    if gate is not None and gate.shape[1] > 1:
        return "needs one gate for all frames"
    return f"worth it from {len(weight)} tokens on, as many as channels" if x.shape[1] < len(weight) else None


def has_weight(x, weight, eps) -> str | None:
    """Reason to refuse an RMSNorm without weight."""
    return "needs a weight" if weight is None else None


def one_dtype(x, *others, **_) -> str | None:
    """Reason to refuse tensors of several dtypes: the reference widens, these kernels do not."""
    same = all(t.dtype == x.dtype for t in others if isinstance(t, Tensor))
    return None if same else "needs inputs of one dtype"


def register(operators: dict) -> None:
    """Add these functions to the operators as backend 'torch-fused'."""
    card = {"devices": ("cuda",), "inference_only": True}
    operators["rms_norm"].add("torch-fused", rms_norm, Constraint(**card, check=has_weight))
    operators["gated_residual"].add("torch-fused", gated_residual, Constraint(**card, check=one_dtype))
    operators["softmax_attention"].add("torch-fused", softmax_attention, Constraint(**card))
    operators["softmax_attention"].compiled["torch-fused"] = softmax_attention
    operators["temporal_taps"].add("torch-fused", temporal_taps, Constraint(**card))
    operators["add_product"].add("torch-fused", add_product, Constraint(**card, check=worth_adding))
    operators["shifted_product"].add("torch-fused", shifted_product, Constraint(**card))
