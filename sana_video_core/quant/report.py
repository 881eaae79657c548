"""What few bits cost: relative error of every weight and of the whole model, as a table to read.

The error is relative and root mean square: ``|stored - exact| / |exact|``. On normal weights fp8 and mxfp8 give 0.027, int8
0.007 (a scale a row), nvfp4 0.096 (comfyui spec 5.2); far more than that means a wrong layout, not rounding.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from torch import Tensor

from ..checkpoint.keys import BLOCK_NAME


class LayerError(NamedTuple):
    """One layer: its format, relative error, and bytes of the weight before (in 16 bits) and after."""

    layer: str
    format: str
    error: float
    before: int
    after: int


def relative_error(found: Tensor, exact: Tensor) -> float:
    """``|found - exact| / |exact|``, reckoned in float64; the plain norm of ``found`` where ``exact`` is zero."""
    found, exact = found.double(), exact.double()
    return float((found - exact).norm() / (exact.norm() or 1.0))


def table(rows: Iterable[LayerError], whole: Mapping[str, float], every: bool = False) -> str:
    """A line for each kind of layer (mean and worst error over the blocks), one for each figure of ``whole``.

    every: a line for each layer instead.
    """
    rows = list(rows)
    groups: dict[tuple[str, str], list[LayerError]] = {}
    for row in rows:
        kind = row.layer if every else row.layer[block.end():] if (block := BLOCK_NAME.match(row.layer)) else row.layer
        groups.setdefault((kind, row.format), []).append(row)
    lines = [f"{'layer':<36}{'format':<18}{'number':>6}{'error':>10}{'worst':>10}"]
    for (kind, form), members in groups.items():
        errors = [row.error for row in members]
        lines.append(f"{kind:<36}{form:<18}{len(errors):>6}{sum(errors) / len(errors):>10.4f}{max(errors):>10.4f}")
    before, after = sum(row.before for row in rows), sum(row.after for row in rows)
    lines.append(f"these {len(rows)} layers: {after / 1e6:.2f} MB instead of {before / 1e6:.2f} MB in 16 bits")
    return "\n".join(lines + [f"{what}: {figure:.4f}" for what, figure in whole.items()])
