"""Noise levels: the schedules of the official scripts, of diffusers and of LongSANA (model spec 3.5, causal spec 4.2).

Every function returns float32 levels from noise (near 1) down to exactly 0, ``steps + 1`` of them, and is exact to the last
bit or two of the published tables. ``shift`` k bends a level: ``k*s / (1 + (k-1)*s)``. Times are 1000 times a level; the
network cuts them to whole numbers itself. Not covered: what a solver does with the levels (``solvers.py``).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import SanaVideoError

TRAIN_STEPS = 1000
# The four levels of the distilled LongSANA model as network times: the shift-8 warp of 1, 3/4, 1/2, 1/4 (causal spec 4.2).
LONGSANA_TIMES = (1000, 960, 889, 727)
LONGSANA_SHIFT = 7.0
_FIRST_UNIPC = 1 - 1e-6  # UniPC's logarithm needs a first level below 1


class FewStep(NamedTuple):
    """One step of a few-step sampler.

    ``time``: what the network is told (0..1000); ``sigma``: level of x, for the estimate of x0; ``after``: level of the
    fresh noise put on x0 afterwards, 0 for the last step.
    """

    time: float
    sigma: float
    after: float


def shifted(sigma, shift: float):
    """``sigma`` (number or tensor in 0..1) bent by ``shift``; 0 and 1 stay."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def _check(steps: int, shift: float) -> None:
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise SanaVideoError("A schedule needs at least one step", found=steps, expected="a whole number of 1 or more")
    if not 0 < float(shift) < float("inf"):
        raise SanaVideoError("The flow shift must be a positive number", found=shift, expected="1 to 20, 8 at 480p")


def _with_zero(levels: Tensor) -> Tensor:
    return torch.cat((levels, levels.new_zeros(1))).float()


def flow_dpm_sigmas(steps: int, shift: float) -> Tensor:
    """Levels of the official flow-DPM sampler: evenly spaced 0 .. 0.999, shifted once, falling."""
    _check(steps, shift)
    return shifted(1 - torch.linspace(1, 1 / TRAIN_STEPS, steps + 1), shift).flip(0)


def flow_euler_sigmas(steps: int, shift: float) -> Tensor:
    """Levels of the flow Euler sampler: from 1 to the shifted 0.001, shifted a second time, then 0."""
    _check(steps, shift)
    first = torch.tensor(1 / TRAIN_STEPS, dtype=torch.float32)
    last = float(shifted(first, shift))
    return _with_zero(shifted(torch.linspace(1, last, steps, dtype=torch.float64), shift))


def _even(count: int) -> Tensor:
    """``count`` evenly spaced float64 numbers from 1 to 0.001, formed from the left as numpy does."""
    last = 1 / TRAIN_STEPS
    values = torch.arange(count, dtype=torch.float64) * ((last - 1) / max(1, count - 1)) + 1
    values[-1] = last
    return values


def diffusers_dpm_sigmas(steps: int, shift: float) -> Tensor:
    """Levels of diffusers' DPM-Solver with flow levels: those of :func:`flow_dpm_sigmas`, rounded once."""
    _check(steps, shift)
    return _with_zero(shifted(1 - _even(steps + 1), shift).flip(0)[:-1])


def diffusers_dpm_times(steps: int, shift: float) -> Tensor:
    """Whole-number times ``[steps]`` int64 of :func:`diffusers_dpm_sigmas`, cut before the levels are rounded."""
    _check(steps, shift)
    return (shifted(1 - _even(steps + 1), shift).flip(0)[:-1] * TRAIN_STEPS).to(torch.int64)


def unipc_sigmas(steps: int, shift: float) -> Tensor:
    """Levels of diffusers' UniPC with flow levels: from just under 1, ``steps`` levels, then 0."""
    return _with_zero(_unipc(steps, shift))


def unipc_times(steps: int, shift: float) -> Tensor:
    """Whole-number times ``[steps]`` int64 of :func:`unipc_sigmas`."""
    return (_unipc(steps, shift) * TRAIN_STEPS).to(torch.int64)


def _unipc(steps: int, shift: float) -> Tensor:
    _check(steps, shift)
    levels = shifted(_even(steps + 1)[:-1], shift)
    levels[0] = min(float(levels[0]), _FIRST_UNIPC)
    return levels


def linear_quadratic_sigmas(steps: int) -> Tensor:
    """Levels that fall by 0.001 in the first half of the steps and as a parabola in the second; takes no shift."""
    _check(steps, 1.0)
    first = (steps + 1) // 2
    rest = steps + 1 - first
    line = 1 - torch.arange(first + 1, dtype=torch.float64) / (TRAIN_STEPS - 1)
    curve = line[-1] * (1 - (torch.arange(1, rest + 1, dtype=torch.float64) / rest).square())
    return (torch.cat((line[:-1], curve)) * (1 - 1 / TRAIN_STEPS)).float()


def whole_times(sigmas: Tensor) -> Tensor:
    """Whole-number network times ``[steps]`` int64 of all levels but the last zero, cut as the network cuts them."""
    return (sigmas[:-1] * TRAIN_STEPS).to(torch.int64)


class LevelTable:
    """LongSANA's table of 1000 levels; a level belongs to a time by the nearest entry, not by ``t/1000``.

    ``sigmas``, ``times`` ``[1000]`` float32, falling; ``weights`` ``[1000]`` float32: the loss weights of its training,
    a bell over the times with a mean of 1.
    """

    def __init__(self, shift: float = LONGSANA_SHIFT):
        _check(1, shift)
        self.shift = float(shift)
        self.sigmas = shifted(torch.linspace(1, 0, TRAIN_STEPS + 1)[:-1], self.shift)
        self.times = self.sigmas * TRAIN_STEPS

    def index(self, time: float) -> int:
        """Index of the entry nearest to ``time`` (0..1000); of two equally near ones the first."""
        return int((self.times - time).abs().argmin())

    def sigma(self, time: float) -> float:
        """Level of the nearest entry."""
        return float(self.sigmas[self.index(time)])

    @property
    def weights(self) -> Tensor:
        bell = torch.exp(-2 * ((self.times - TRAIN_STEPS / 2) / TRAIN_STEPS) ** 2)
        bell = bell - bell.min()
        return bell * (TRAIN_STEPS / bell.sum())


def longsana_steps(
    times: Sequence[float] = LONGSANA_TIMES, shift: float = LONGSANA_SHIFT, time_dtype: torch.dtype = torch.float32,
) -> tuple[FewStep, ...]:
    """The steps of LongSANA's sampler. A trailing 0 in ``times`` is dropped, as the official code does.

    ``time_dtype`` bfloat16 repeats the released half-precision run, where the network and its x0 use the rounded time
    (889 becomes 888) but the fresh noise the exact one (causal spec 4.3).
    """
    table = LevelTable(shift)
    times = [float(t) for t in times if t > 0]
    if not times or any(a <= b for a, b in itertools.pairwise(times)):
        raise SanaVideoError("The step list of a few-step sampler must fall from at most 1000 to above 0", found=times)
    seen = torch.tensor(times, dtype=time_dtype).float().tolist()
    after = [table.sigma(t) for t in times[1:]] + [0.0]
    return tuple(FewStep(t, table.sigma(t), a) for t, a in zip(seen, after))


def few_steps(sigmas: Tensor | Sequence[float]) -> tuple[FewStep, ...]:
    """Steps through falling ``sigmas`` that end with 0; times are 1000 times the level, not cut."""
    levels = torch.as_tensor(sigmas, dtype=torch.float32).tolist()
    if len(levels) < 2 or levels[-1] != 0 or any(a <= b for a, b in itertools.pairwise(levels)):
        raise SanaVideoError("Levels must fall and end with 0", found=levels[:6], expected="for example 1, 0.9, 0.6, 0")
    times = (torch.tensor(levels) * TRAIN_STEPS).tolist()  # rounded to float32 before the network cuts them
    return tuple(FewStep(t, a, b) for t, (a, b) in zip(times, itertools.pairwise(levels)))


def dmd_steps(steps: int = 4, shift: float = 6.0) -> tuple[FewStep, ...]:
    """The four stochastic steps of the distilled 2.0 preview: the flow-DPM levels of shift 6 (model spec 5.7)."""
    return few_steps(flow_dpm_sigmas(steps, shift))
