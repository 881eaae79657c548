"""A Linear layer's output added, times a gate, to the tokens it is meant for, within the layer's own product. Plain torch.

A matrix product can start from what stands in its result instead of from zeros. With the gate in the rows of the weight,
``x + gate * (y W^T + b)`` then takes no pass over the tokens of its own; only ``gate * b``, the same for all tokens of a row of
the batch, is left out. It is given back as an ``offset`` for those who read x next: :func:`shifted_product`, ``modulate_norm``,
``pair_residual``. Layout as in ``reference.py``; rows ``[B, 1, C]``. :class:`Onto` and :class:`Shifted` are how a Linear layer
meets this. Not covered: gradients.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .pairs import LinearInput


def add_product(x: Tensor, y: Tensor, weight: Tensor, gate: Tensor | None = None) -> Tensor:
    """``x + gate * (y weight^T)``, which takes the place of ``x [B, N, C]``; y ``[B, N, K]``, weight ``[C, K]``."""
    product = F.linear(y, weight)
    return x.copy_(x + (product if gate is None else gate * product))


def shifted_product(x: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``(x + offset) weight^T + bias``."""
    return F.linear(x + offset, weight, bias)


class Onto(LinearInput):
    """``y`` for a layer whose output goes onto x times gate: that changes x. What x still lacks is added to ``offset``."""

    x: Tensor
    gate: Tensor | None
    offset: Tensor | None

    @classmethod
    def of(cls, y: Tensor, x: Tensor, gate: Tensor | None = None, offset: Tensor | None = None) -> Onto:
        given = y.as_subclass(cls)
        given.x, given.gate, given.offset = x, gate, offset
        return given

    def product(self, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        from . import OPERATORS  # of the functions above

        if bias is not None:  # into a new tensor: the layer has only lent its bias
            gate = bias.new_ones(1, 1, 1) if self.gate is None else self.gate
            self.offset = gate * bias if self.offset is None else torch.addcmul(self.offset, gate, bias)
        return OPERATORS["add_product"](self.x, self.as_subclass(Tensor), weight, self.gate)


class Shifted(LinearInput):
    """``x`` for a layer that reads ``x + offset``."""

    offset: Tensor

    @classmethod
    def of(cls, x: Tensor, offset: Tensor) -> Shifted:
        given = x.as_subclass(cls)
        given.offset = offset
        return given

    def product(self, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        from . import OPERATORS

        return OPERATORS["shifted_product"](self.as_subclass(Tensor), self.offset, weight, bias)
