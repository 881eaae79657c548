"""Products of E4M3 matrices that are added onto the tokens: what ``onto.py`` is to layers in 16 bits. Plain torch.

Layout as in ``reference.py``; rows ``[B, 1, C]``. :class:`OntoRows` is how a Linear layer meets it. Not covered: gradients.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .reference import Rows, given_fp8


class OntoRows(NamedTuple):
    """``y``, which a layer multiplies in E4M3, and where its output goes: :func:`add_product_fp8` says what the rest means."""

    y: Tensor | Rows
    x: Tensor
    gate: Tensor | None = None
    extra: Tensor | None = None
    frames: int = 0
    given: Tensor | None = None


def framed_fp8(u: Tensor, frames: int, tail: Tensor | None = None, *, given: Tensor) -> Rows:
    """``u [B, T*S, C]`` at the scale ``given`` between the frame before, ``tail [B, 1, S, C]`` or zeros, and one of zeros:
    ``[B * (T + 2) * S, C]``. A token's neighbours in time stand S rows before and behind it, so a product can read them there.
    """
    x = u.unflatten(1, (frames, -1))
    nothing = torch.zeros_like(x[:, :1])
    return given_fp8(torch.cat((nothing if tail is None else tail.to(x), x, nothing), 1).flatten(0, 2), given)


def add_product_fp8(
    x: Tensor, y: Rows, weight: Rows, bias: Tensor | None = None, gate: Tensor | None = None, extra: Tensor | None = None, *,
    frames: int = 0, given: Tensor | None = None,
) -> Tensor | Rows:
    """``x + gate * (y weight^T + bias + extra)``, which takes the place of ``x [B, N, C]``; ``weight [C, K]`` with one scale.

    y: rows of K channels, with one scale or one each; or :func:`framed_fp8` of ``frames`` frames, whose rows are multiplied with
    their neighbours in time (K is then three times their channels). ``given``: the answer is the same in E4M3 at that scale,
    from sums that are not rounded to the dtype of x before; without it, x.
    """
    sums = torch.float64 if x.dtype == torch.float64 else torch.float32
    values = y.values.to(sums) * y.scale
    if frames:
        wide = values.unflatten(0, (len(x), frames + 2, -1))
        values = torch.cat((wide[:, :-2], wide[:, 1:-1], wide[:, 2:]), -1)
    total = values.reshape(*x.shape[:2], -1) @ (weight.values.to(sums) * weight.scale).t()
    for part in (bias, extra):
        total = total if part is None else total + part
    total = x.to(sums) + (total if gate is None else gate * total)
    x.copy_(total)
    return x if given is None else given_fp8(total, given)
