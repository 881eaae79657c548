"""Input scales of fp8 layers, found by looking on while a network runs as it will later.

A layer with such a scale gets its input from the operator before, already in E4M3; without one every row needs its largest value
first, and where an operator does not hold whole rows that is one pass more over them. E4M3 keeps its four bits over a range of
28,672, so one scale for all serves whatever does not spread further. What a typical channel holds decides it and not the largest
value that a short run happens to show: small values keep their bits all the same, and all the room that is left is above.
Not covered: the weights (``nodes/lowbit.py``).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..ops import Rows
from .formats import E4M3_MAX

ROOM = 1024.0  # what fits, over a typical channel's size: with the rounding up, a fourteenth of that size still has all bits
HEADROOM = 2.0  # how much larger than any that was seen an input may be, at least, before it is cut
SPREAD = ROOM / HEADROOM  # an input that spreads further keeps a scale a row or 16 bits (policy.RESIDUAL)


@dataclass
class Seen:
    """What was seen of a layer's input, ``[C]`` each: the largest size, the sum of squares; and the number of rows."""

    largest: Tensor
    squares: Tensor
    rows: int

    def typical(self) -> float:
        """The root mean square of the channel in the middle."""
        return float((self.squares / self.rows).sqrt().median())

    def spread(self) -> float:
        """The largest value over :meth:`typical`."""
        typical = self.typical()
        return float(self.largest.max()) / typical if typical > 0 else math.inf

    def scale(self) -> float:
        """The scale of a file's ``input_scale``: a power of two, which every way to divide by it gets exactly."""
        typical = self.typical()
        return 2.0 ** math.ceil(math.log2(typical * ROOM / E4M3_MAX)) if 0 < typical < math.inf else math.nan


@contextlib.contextmanager
def watched(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, Seen]]:
    """Within the block, {layer: Seen} grows with every input of ``layers``."""
    seen: dict[str, Seen] = {}

    def look(name: str):
        def hook(module: nn.Module, given: tuple) -> None:
            x = given[0]
            x = (x.values.float() * x.scale if isinstance(x, Rows) else x.detach()).flatten(0, -2)
            new = Seen(x.abs().amax(0).float(), torch.linalg.vector_norm(x, dim=0, dtype=torch.float32).square(), len(x))
            if name in seen:
                old = seen[name]
                new = Seen(torch.maximum(old.largest, new.largest), old.squares + new.squares, old.rows + new.rows)
            seen[name] = new
        return hook

    hooks = [layer.register_forward_pre_hook(look(name)) for name, layer in layers.items()]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
