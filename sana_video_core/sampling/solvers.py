"""The solvers of the official scripts and of diffusers, as plain functions over ``velocity(x, sigma)`` (model spec 3.6, 3.7).

v = noise - x0 and x = (1 - sigma) * x0 + sigma * noise, sigma from 1 (noise) to 0. Every solver takes float32 latents
``x [B, C, T, H, W]`` and ``sigmas [steps + 1]``, falling, the last one 0 for a finished picture, and returns the latent at the
last level. ``callback(i, x0, x)`` is called in every step with the estimate of the clean latent and the latent it was made
from; what it raises ends the run (that is how a caller cancels). With ``times`` the velocity is asked with ``times[i]`` instead
of ``sigmas[i]``. Not covered: guidance and captions (``guidance.py``), levels (``schedules.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..errors import SanaVideoError
from .guidance import Pair, Velocity, guided
from .schedules import FewStep

Callback = Callable[[int, Tensor, Tensor], object]
NoiseSource = Callable[[int], Tensor]  # step index -> fresh standard normal noise in the shape of x
# A multistep solver works with log(1 - sigma). A first level of 1 (other schedules begin there) is taken as this one; the
# official schedules stay below by themselves, with any shift up to 100.
PURE_NOISE, HIGHEST = 1 - 5e-6, 1 - 1e-4


def _levels(sigmas: Tensor | Sequence[float], highest: float = 1.0) -> Tensor:
    """Checked float32 levels on the CPU, a first one of (nearly) 1 lowered to ``highest``."""
    levels = torch.as_tensor(sigmas, dtype=torch.float32).cpu().flatten().clone()
    falling = len(levels) > 1 and bool((levels[1:] < levels[:-1]).all())
    if not falling or not bool(torch.isfinite(levels).all()) or levels[-1] < 0 or levels[0] > 1:
        raise SanaVideoError("A flow solver needs noise levels that fall from at most 1 to 0",
                             found=[round(s, 5) for s in levels.tolist()[:6]], action="Use the schedule of SANA-Video")
    if levels[0] > PURE_NOISE:
        levels[0] = levels[0].clamp(max=highest)
    if levels[0] <= levels[1]:
        raise SanaVideoError("The first two noise levels are too close to 1 for this solver", found=levels.tolist()[:2])
    return levels


def _asked(levels: Tensor, times) -> Sequence:
    if times is not None and len(times) != len(levels) - 1:
        raise SanaVideoError("A solver needs one time a step", found=f"{len(times)} times", expected=len(levels) - 1)
    return levels if times is None else times


def _log_snr(sigma: Tensor) -> Tensor:
    return torch.log(1 - sigma) - torch.log(sigma)


def flow_dpm_solver(
    velocity: Callable, x: Tensor, sigmas: Tensor, callback: Callback | None = None, *, cfg: float | None = None,
    times: Sequence | None = None,
) -> Tensor:
    """The official flow DPM-Solver++ 2M, in its own order of operations.

    It goes through the noise ``(1 - sigma) v + x`` and back, which loses some digits at levels near 1 and is part of the
    official pictures. ``velocity`` may return a :class:`Pair`; then ``cfg`` guides the two noises, as the official code does.
    """
    levels = _levels(sigmas, HIGHEST)
    asked = _asked(levels, times)
    before: Tensor | None = None
    for i in range(len(levels) - 1):
        sigma, after = levels[i], levels[i + 1]
        v = velocity(x, asked[i])
        if isinstance(v, Pair):
            noise = guided(*((1 - sigma) * part + x for part in v), 1.0 if cfg is None else cfg)
        else:
            noise = (1 - sigma) * v + x
        x0 = (x - sigma * noise) / (1 - sigma)
        if callback is not None:
            callback(i, x0, x)
        x = _dpm_step(x, x0, before, levels, i, torch.exp(torch.log(1 - after)))
        before = x0
    return x


def _dpm_step(x: Tensor, x0: Tensor, before: Tensor | None, levels: Tensor, i: int, alpha: Tensor) -> Tensor:
    """One step of DPM-Solver++ 2M from level i to i + 1: first order in the first and the last step, second otherwise."""
    sigma, after = levels[i], levels[i + 1]
    h = _log_snr(after) - _log_snr(sigma)
    phi = torch.expm1(-h)
    y = after / sigma * x - alpha * phi * x0
    if before is None or i == len(levels) - 2:
        return y
    ratio = (_log_snr(sigma) - _log_snr(levels[i - 1])) / h
    return y - 0.5 * (alpha * phi) * ((1 / ratio) * (x0 - before))


def dpm_solver(
    velocity: Velocity, x: Tensor, sigmas: Tensor, callback: Callback | None = None, *, times: Sequence | None = None,
) -> Tensor:
    """DPM-Solver++ 2M in the direct form of diffusers: ``x0 = x - sigma v``; the better rounding, not the official one."""
    levels = _levels(sigmas, HIGHEST)
    asked = _asked(levels, times)
    before: Tensor | None = None
    for i in range(len(levels) - 1):
        x0 = x - levels[i] * velocity(x, asked[i])
        if callback is not None:
            callback(i, x0, x)
        x = _dpm_step(x, x0, before, levels, i, 1 - levels[i + 1])
        before = x0
    return x


def flow_euler_solver(
    velocity: Velocity, x: Tensor, sigmas: Tensor, callback: Callback | None = None, *, times: Sequence | None = None,
) -> Tensor:
    """Straight steps: ``x + (next - sigma) v``."""
    levels = _levels(sigmas)
    asked = _asked(levels, times)
    for i in range(len(levels) - 1):
        v = velocity(x, asked[i])
        if callback is not None:
            callback(i, x - levels[i] * v, x)
        x = x + (levels[i + 1] - levels[i]) * v
    return x


def ltx_euler_solver(
    velocity: Velocity, x: Tensor, sigmas: Tensor, first_frame: Tensor, callback: Callback | None = None, *,
    condition_noise: float = 0.0, noise: NoiseSource | torch.Generator | None = None,
) -> Tensor:
    """Euler for image to video: frame 0 is ``first_frame [B, C, 1, H, W]``, the other frames are denoised (model spec 3.7).

    ``velocity(x, sigma)`` gets one level a frame, 0 for frame 0. With ``condition_noise`` c, frame 0 is shown with
    ``c * noise * sigma**2`` added, fresh in every step, and the last of them stays in the result as it does officially.
    """
    levels = _levels(sigmas)
    source = noise_source(noise, x) if condition_noise else None
    clean = first_frame.to(x)
    x = torch.cat((clean, x[:, :, 1:]), 2)
    for i in range(len(levels) - 1):
        sigma = levels[i]
        if source is not None:
            x = torch.cat((clean + condition_noise * source(i).to(x)[:, :, :1] * sigma**2, x[:, :, 1:]), 2)
        per_frame = sigma.repeat(x.shape[2])
        per_frame[0] = 0
        v = velocity(x, per_frame)
        if callback is not None:
            callback(i, torch.cat((clean, x[:, :, 1:] - sigma * v[:, :, 1:]), 2), x)
        x = torch.cat((x[:, :, :1], x[:, :, 1:] + (levels[i + 1] - sigma) * v[:, :, 1:]), 2)
    return x


def unipc_solver(
    velocity: Velocity, x: Tensor, sigmas: Tensor, callback: Callback | None = None, *, times: Sequence | None = None,
) -> Tensor:
    """UniPC of order 2 (variant bh2) on the clean estimate, as diffusers runs it: corrector, then predictor, one call a step."""
    levels = _levels(sigmas, 1 - 1e-6)
    asked = _asked(levels, times)
    x_before = x0_before = x0_older = None
    order = 1
    for i in range(len(levels) - 1):
        x0 = x - levels[i] * velocity(x, asked[i])
        if callback is not None:
            callback(i, x0, x)
        if i:
            x = _unipc_step(x_before, x0_before, x0_older if order == 2 else None, levels, i - 1, x0)
        order = min(2, i + 1, len(levels) - 1 - i)
        x_before, x0_before, x0_older = x, x0, x0_before
        x = _unipc_step(x, x0, x0_older if order == 2 else None, levels, i, None)
    return x


def _unipc_step(
    x: Tensor, x0: Tensor, older: Tensor | None, levels: Tensor, i: int, x0_after: Tensor | None,
) -> Tensor:
    """From level i to i + 1. ``older``: the x0 one level before (order 2); ``x0_after``: x0 at i + 1 (corrector only)."""
    sigma, after = levels[i], levels[i + 1]
    h = _log_snr(after) - _log_snr(sigma)
    phi = torch.expm1(-h)
    alpha = 1 - after
    y = after / sigma * x - alpha * phi * x0
    slope = None if older is None else (older - x0) / ((_log_snr(levels[i - 1]) - _log_snr(sigma)) / h)
    if x0_after is None:
        return y if slope is None else y - alpha * phi * (0.5 * slope)
    if slope is None:
        return y - alpha * phi * (0.5 * (x0_after - x0))
    ratio = (_log_snr(levels[i - 1]) - _log_snr(sigma)) / h
    first = phi / -h - 1
    rows = torch.stack((torch.ones(2), torch.stack((ratio, torch.ones(())))))
    right = torch.stack((first / phi, (first / -h - 0.5) * 2 / phi))
    weights = torch.linalg.solve(rows, right)
    return y - alpha * phi * (weights[0] * slope + weights[1] * (x0_after - x0))


def few_step_solver(
    velocity: Velocity, x: Tensor, steps: Sequence[FewStep], noise: NoiseSource | torch.Generator | None,
    callback: Callback | None = None,
) -> Tensor:
    """The stochastic few-step sampler of the distilled models: x0, then fresh noise of the next level (causal spec 4.3).

    ``velocity(x, time)`` is asked with network times (0..1000). x0 is formed in float64 and rounded to the dtype of the
    velocity; the re-noised latent has the dtype of the noise. Both are float32 unless a half-precision run is repeated.
    """
    source = noise_source(noise, x) if len(steps) > 1 else None
    x0 = x
    for i, (time, sigma, after) in enumerate(steps):
        v = velocity(x, torch.tensor(time, dtype=torch.float32))
        x0 = (x.double() - sigma * v.double()).to(v.dtype)
        if callback is not None:
            callback(i, x0, x)
        if i < len(steps) - 1:
            fresh = source(i).to(x.device)
            x = ((1 - after) * x0.float() + after * fresh.float()).to(fresh.dtype)
    return x0


def noise_source(noise: NoiseSource | torch.Generator | None, like: Tensor) -> NoiseSource:
    """``noise`` as a function of the step: itself, or draws of a CPU generator in the shape of ``like``."""
    if noise is None:
        raise SanaVideoError("This sampler needs a source of noise", action="Pass a torch.Generator or a function of the step")
    if isinstance(noise, torch.Generator):
        return lambda step: torch.randn(like.shape, generator=noise, dtype=torch.float32)
    return noise
