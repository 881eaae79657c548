"""Forms of two operators that train faster than the reference, swapped in for the length of a training run.

The depthwise convolution is written as nine shifted products, which a compiler fuses forwards and backwards (a library's
depthwise backward pass is several times slower than memory allows). The attention runs outside autocast, so that its sums
stay in float32. Not covered: inference.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ..ops import reference


def nine_taps(x: Tensor, weight: Tensor, bias: Tensor | None, grid: tuple[int, int], overwrite: bool = False) -> Tensor:
    """As ``reference.gated_depthwise``."""
    height, width = grid
    frames = F.pad(F.silu(x).reshape(-1, height, width, x.shape[-1]), (0, 0, 1, 1, 1, 1))
    kernel = weight.flatten(1).to(frames.dtype)
    y = 0 if bias is None else bias.to(frames.dtype)
    for row in range(3):
        for column in range(3):
            y = y + frames[:, row:row + height, column:column + width] * kernel[:, 3 * row + column]
    a, g = y.view(x.shape).chunk(2, -1)
    return a * F.silu(g)


def full_precision_attention(qkv: Tensor, *args, **kwargs):
    """As ``reference.linear_attention``, float32 inside whatever autocast says."""
    with torch.autocast(qkv.device.type, enabled=False):
        return reference.linear_attention(qkv, *args, **kwargs)


@contextlib.contextmanager
def training_operators(nine: bool = True) -> Iterator[None]:
    """Within the block the network uses the forms above."""
    wanted = {"linear_attention": full_precision_attention}
    if nine:
        wanted["gated_depthwise"] = nine_taps
    before = {name: (op.reference, op.backends) for name, op in ops.OPERATORS.items()}
    for name, op in ops.OPERATORS.items():
        op.reference, op.backends = wanted.get(name, op.reference), {}
    try:
        yield
    finally:
        for name, (function, backends) in before.items():
            ops.OPERATORS[name].reference, ops.OPERATORS[name].backends = function, backends
