"""The temporal convolution for two frames at a time: four products where there are six (Winograd's F(2, 3)). Plain torch.

Out of frames ``d0 .. d3`` and taps ``g0, g1, g2`` come ``y0 = g0 d0 + g1 d1 + g2 d2`` and ``y1 = g0 d1 + g1 d2 + g2 d3``, with

    m0 = g0 (d0 - d2)    m1 = (g0 + g1 + g2) / 2 (d1 + d2)    m2 = (g0 - g1 + g2) / 2 (d2 - d1)    m3 = g2 (d1 - d3)
    y0 = m0 + m1 + m2    y1 = m1 - m2 - m3

A model in bfloat16 has its sums and products in float16, whose three more bits make up for what the additions lose (a whole
convolution is as exact as bfloat16's own); frames are scaled by :data:`SCALE`, so that values up to half a million fit.
Source: S. Winograd, "Arithmetic Complexity of Computations" (1980); Lavin and Gray, arXiv 1509.09308.
Layout as in ``reference.py``. :class:`AlongTime` is how a Linear layer meets it. Not covered: gradients.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SCALE = 2.0**-4


def narrow(dtype: torch.dtype) -> torch.dtype:
    """What the sums and products of a model in ``dtype`` are kept in."""
    return torch.float16 if dtype == torch.bfloat16 else dtype


def frame_sums(x: Tensor, pairs: int, dim: int) -> Tensor:
    """The four sums of frames ``x [B, 2 + 2 * pairs, ...]`` for each pair, stacked along ``dim``."""
    d0, d1, d2, d3 = (x[:, i:i + 2 * pairs:2] for i in range(4))
    return torch.stack((d0 - d2, d1 + d2, d2 - d1, d1 - d3), dim)


def tap_sums(taps: Tensor) -> Tensor:
    """The four sums of taps ``[out, 3, ...]`` -> ``[4, out, ...]``."""
    g0, g1, g2 = (taps.float() if taps.dtype == torch.bfloat16 else taps).unbind(1)
    return torch.stack((g0, (g0 + g1 + g2) / 2, (g0 - g1 + g2) / 2, g2)).to(narrow(taps.dtype))


def time_pairs(u: Tensor, frames: int, tail: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The four sums of frames of every two outputs: ``u [B, T*S, C]`` -> ``[B, 4, ceil(T / 2) * S, C]``, and u's own tail
    ``[B, 1, S, C]``. Left of the first frame stands ``tail`` of the block before (zeros when None), right of the last zeros."""
    x, pairs = u.unflatten(1, (frames, -1)), (frames + 1) // 2
    nothing = torch.zeros_like(x[:, :1])
    after = nothing.expand(-1, 1 + frames % 2, -1, -1)
    wide = torch.cat((nothing if tail is None else tail.to(x), x, after), 1)
    wide = wide.float() if u.dtype == torch.bfloat16 else wide
    return (frame_sums(wide, pairs, 1) * SCALE).flatten(2, 3).to(narrow(u.dtype)), x[:, -1:]


def pair_weights(weight: Tensor) -> Tensor:
    """The four sums of taps: ``[C, 3C]`` (previous | same | next frame) -> ``[4, C, C]``."""
    return tap_sums(weight.unflatten(1, (3, -1)))


def pair_residual(
    x: Tensor, y: Tensor, gate: Tensor, products: Tensor, frames: int, *, offset: Tensor | None = None,
) -> Tensor:
    """``x + gate * (y + temporal)`` of ``products [B, 4, ceil(T / 2) * S, C]``; gate rows ``[B, 1 or T, C]``.

    ``offset`` ``[B, 1, C]`` is added too (``onto.py``)."""
    m0, m1, m2, m3 = (products.float() if products.dtype == torch.float16 else products).unbind(1)
    size = x.shape[1] // frames
    both = torch.stack([t.unflatten(1, (-1, size)) for t in (m0 + m1 + m2, m1 - m2 - m3)], 2)  # B, pairs, 2, S, C
    temporal = both.flatten(1, 2)[:, :frames].flatten(1, 2) / SCALE
    total = (y + temporal).unflatten(1, (gate.shape[1], -1))
    total = (x.unflatten(1, (gate.shape[1], -1)) + gate[:, :, None] * total).flatten(1, 2)
    return (total if offset is None else total + offset).to(x.dtype)


class LinearInput(torch.Tensor):
    """The input of a Linear layer whose product is to be another one.

    Whatever the layer does to bring its weight to the card (casts, offloading, LoRAs), it ends in ``linear(x, weight, bias)``,
    and that in :meth:`product` here. Other work on it is that of a tensor.
    """

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is not F.linear:
            return super().__torch_function__(function, types, args, kwargs or {})
        return args[0].product(*args[1:], **kwargs or {})


class AlongTime(LinearInput):
    """``u [B, T*S, C]`` for a layer ``[C, 3C]`` that holds the temporal convolution: gives the four products of
    :func:`time_pairs` and :func:`pair_weights`, ``[B, 4, ceil(T / 2) * S, C]``."""

    frames: int
    tail: Tensor | None

    @classmethod
    def of(cls, u: Tensor, frames: int, tail: Tensor | None) -> AlongTime:
        given = u.as_subclass(cls)
        given.frames, given.tail = frames, tail
        return given

    def product(self, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return products(self.as_subclass(Tensor), self.frames, self.tail, weight)


def products(u: Tensor, frames: int, tail: Tensor | None, weight: Tensor) -> Tensor:
    """The four products of every two frames with the sums of a weight's taps; a row of the batch at a time, which leaves one
    row's sums in memory and not all."""
    from . import OPERATORS  # of the functions above

    weights, out = OPERATORS["pair_weights"](weight).transpose(1, 2), None
    for row, one in enumerate(u.split(1)):
        sums, _ = OPERATORS["time_pairs"](one, frames, None if tail is None else tail[row:row + 1])
        if out is None:
            out = sums.new_empty(len(u), *sums.shape[1:])
        torch.bmm(sums[0], weights, out=out[row])
        del sums  # before the next row's are made
    return out
