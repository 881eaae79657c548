"""The operators as training needs them, for the length of a run: the plain references, with the attention outside autocast.

Backends without a gradient are put aside, and the attention's sums stay in float32. (The depthwise convolution as nine
shifted products was tried too and not used: see the CHANGELOG.) Not covered: inference.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .. import ops
from ..ops import reference


def full_precision_attention(qkv: Tensor, *args, **kwargs):
    """As ``reference.linear_attention``, float32 inside whatever autocast says."""
    with torch.autocast(qkv.device.type, enabled=False):
        return reference.linear_attention(qkv, *args, **kwargs)


@contextlib.contextmanager
def replaced_operators(**forms: Callable) -> Iterator[None]:
    """Within the block no operator has backends, and the named ones run these functions."""
    before = {name: (op.reference, op.backends) for name, op in ops.OPERATORS.items()}
    for name, op in ops.OPERATORS.items():
        op.reference, op.backends = forms.get(name, op.reference), {}
    try:
        yield
    finally:
        for name, (function, backends) in before.items():
            ops.OPERATORS[name].reference, ops.OPERATORS[name].backends = function, backends


@contextlib.contextmanager
def training_operators() -> Iterator[None]:
    """Within the block the network uses the forms above."""
    with replaced_operators(linear_attention=full_precision_attention):
        yield
