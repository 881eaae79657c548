"""Noise times for training: logit-normal for clips, and the monotone sampler for blocks (causal spec 5.3, paper section 4.3).

In block-causal training every block has its own time and later blocks are noisier or equal. The monotone sampler draws one
anchor block from the usual distribution and the others so that every rising completion of the sequence is equally likely:
to the right with weight C(T-1-t + F-1-f, F-1-f) over t >= the neighbour, to the left with C(t+f, f) over t <= the neighbour.
Times here are table indices 0..T-1; what they mean (shift, 1000 levels) is the trainer's business.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import SanaVideoError


def _log_choose(n: Tensor, k: Tensor) -> Tensor:
    """log of the binomial coefficient, float64."""
    return torch.lgamma(n + 1.0) - torch.lgamma(k + 1.0) - torch.lgamma(n - k + 1.0)


def logit_normal_times(
    count: int, steps: int = 1000, *, mean: float = 0.0, std: float = 1.0, generator: torch.Generator | None = None,
) -> Tensor:
    """``[count]`` int64 in 0..steps-1: the whole part of ``steps`` times a logit-normal number (model spec 4)."""
    z = torch.randn(count, generator=generator, dtype=torch.float64) * std + mean
    return (torch.sigmoid(z) * steps).to(torch.int64).clamp(max=steps - 1)


class MonotoneTimes:
    """Draws rising times for ``blocks`` blocks out of ``steps`` table entries.

    ``log_after [steps, blocks]``: log of how many ways the blocks to the right can be completed from time t at block f;
    ``log_before``: the same to the left.
    """

    def __init__(self, blocks: int, steps: int = 1000):
        if blocks < 1 or steps < 1:
            raise SanaVideoError("The monotone sampler needs blocks and steps", found=(blocks, steps),
                                 expected="1 or more of each")
        self.blocks, self.steps = blocks, steps
        time = torch.arange(steps, dtype=torch.float64)[:, None]
        block = torch.arange(blocks, dtype=torch.float64)[None]
        left, right = time, steps - 1 - time  # room for times on either side of t
        self.log_before = _log_choose(left + block, block.expand(steps, -1))
        self.log_after = _log_choose(right + blocks - 1 - block, (blocks - 1 - block).expand(steps, -1))
        # Sums of the weights over the admissible times are binomials again, so a draw is one look-up without cancellation.
        self._sum_before = _log_choose(left + block + 1, (block + 1).expand(steps, -1))
        self._sum_after = _log_choose(right + blocks - block, (blocks - block).expand(steps, -1))

    def sample(self, base: Tensor, anchor: Tensor | None = None, *, generator: torch.Generator | None = None) -> Tensor:
        """``[B, blocks]`` int64, rising along the blocks, with ``base [B]`` at block ``anchor [B]`` (random when None)."""
        base = base.to("cpu", torch.int64)
        if bool(((base < 0) | (base >= self.steps)).any()):
            raise SanaVideoError("A base time lies outside the table", found=base.tolist()[:8], expected=f"0..{self.steps - 1}")
        if anchor is None:
            anchor = torch.randint(0, self.blocks, base.shape, generator=generator)
        times = base[:, None].expand(-1, self.blocks).clone()
        uniform = torch.rand(times.shape, generator=generator, dtype=torch.float64).clamp(min=1e-300).log()
        for f in range(1, self.blocks):
            drawn = self._draw(self._sum_after[:, f].flip(0), self.steps - 1 - times[:, f - 1], uniform[:, f])
            times[:, f] = torch.where(f > anchor, self.steps - 1 - drawn, times[:, f])
        for f in range(self.blocks - 2, -1, -1):
            drawn = self._draw(self._sum_before[:, f], times[:, f + 1], uniform[:, f])
            times[:, f] = torch.where(f < anchor, drawn, times[:, f])
        return times

    @staticmethod
    def _draw(log_sums: Tensor, limit: Tensor, log_uniform: Tensor) -> Tensor:
        """The first index whose rising cumulative weight reaches a uniform share of that at ``limit``."""
        wanted = log_uniform + log_sums[limit]
        return torch.minimum(torch.searchsorted(log_sums.contiguous(), wanted), limit)
