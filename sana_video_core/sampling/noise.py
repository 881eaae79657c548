"""Starting noise of clips: always from the CPU, so a seed means the same picture on every machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..errors import SanaVideoError

SEEDS = 1 << 64


def seeds_of(seed: int | Sequence[int], batch: int) -> tuple[int, ...]:
    """One seed a video: the given ones, or ``seed``, ``seed + 1``, ... for a single number."""
    if isinstance(seed, int) and not isinstance(seed, bool):
        seeds = tuple((seed + i) % SEEDS if seed >= 0 else seed for i in range(batch))
    else:
        seeds = tuple(seed)
    if len(seeds) != batch or any(not isinstance(s, int) or not 0 <= s < SEEDS for s in seeds):
        raise SanaVideoError("The seeds do not fit the videos", found=seeds[:8], expected=f"{batch} whole numbers of 0 or more")
    return seeds


def noise_streams(shape: Sequence[int], seed: int | Sequence[int]) -> Callable[[int], Tensor]:
    """``draw(step)``: the next float32 noise in ``shape [B, C, T, H, W]``, every video from its own generator.

    A video's noise depends on its seed alone, not on its neighbours; the first draw of a seed is what
    ``torch.manual_seed(seed)`` and ``randn([1, C, T, H, W])`` give.
    """
    generators = [torch.Generator("cpu").manual_seed(s) for s in seeds_of(seed, shape[0])]
    return lambda step=0: torch.cat([torch.randn((1, *shape[1:]), generator=g, dtype=torch.float32) for g in generators])


def clip_noise(shape: Sequence[int], seed: int | Sequence[int]) -> Tensor:
    """Starting noise ``shape [B, C, T, H, W]``, float32 on the CPU."""
    return noise_streams(shape, seed)(0)
