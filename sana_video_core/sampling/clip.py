"""A whole clip from captions, without ComfyUI: noise, levels, guidance, solver. Used by the judge and by training.

The result is the latent in the network's space; decoding is the VAE's business (``vae.wan.denormalize``, then ``decode``).
Not covered: long video (``blocks.py``), prompts (``text``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..errors import SanaVideoError
from ..specs import ModelSpec, require_frames, require_size
from . import schedules, solvers
from .guidance import TIME_SCALE, Caption, network_velocity, pair_velocity, with_first_frame
from .noise import noise_streams

FLOW_DPM, FLOW_EULER, UNIPC, DPM, RENOISE = "flow-DPM", "flow Euler", "UniPC", "DPM direct", "few-step re-noise"
CLIP_SOLVERS = (FLOW_DPM, FLOW_EULER, UNIPC, DPM, RENOISE)


def clip_shape(spec: ModelSpec, batch: int, size: tuple[int, int] | None = None, frames: int | None = None) -> tuple[int, ...]:
    """``[B, C, T, H, W]`` of a clip of ``size`` (width, height) and ``frames`` in pixels; the spec's own when None."""
    width, height = require_size(spec, *(size or spec.size))
    length = spec.latent_frames(require_frames(spec, spec.frames if frames is None else frames))
    return batch, spec.channels, length, height // spec.vae.stride[1], width // spec.vae.stride[2]


@torch.no_grad()
def sample_clip(
    model: Callable, positive: Caption | tuple, negative: Caption | tuple | None, spec: ModelSpec, *,
    seed: int | Sequence[int] = 0, steps: int | None = None, cfg: float | None = None, solver: str = FLOW_DPM,
    shift: float | None = None, size: tuple[int, int] | None = None, frames: int | None = None,
    first_frame: Tensor | None = None, device: torch.device | str = "cpu", callback: solvers.Callback | None = None,
    one_batch: bool = True,
) -> Tensor:
    """The clean latents ``[B, C, T, H, W]`` float32 of B clips, B being the rows of ``positive``.

    positive, negative: (embedding ``[B, L, D]``, mask ``[B, L]`` or None); one negative row may serve all.
    seed:        one a clip, or one number for the first (the others follow). A batch equals single runs up to rounding.
    steps, cfg, shift, size, frames: those of the spec when None. ``few-step re-noise`` takes LongSANA's levels at 4 steps.
    first_frame: known first latent frame ``[B or 1, C, 1, H, W]`` in the network's space (image to video).
    callback:    ``callback(step, x0, x)``; what it raises ends the run.
    one_batch:   CFG as one call of twice the batch; otherwise two calls for half the memory.
    """
    positive = Caption(*positive)
    cfg = spec.cfg if cfg is None else float(cfg)
    steps = spec.steps if steps is None else steps
    shift = spec.flow_shift if shift is None else float(shift)
    if cfg != 1 and negative is None:
        raise SanaVideoError("CFG needs a negative caption", found=f"CFG {cfg:g} and none",
                             action="Encode an empty negative prompt, or set CFG to 1")
    if solver not in CLIP_SOLVERS:
        raise SanaVideoError("Unknown solver", found=solver, expected=", ".join(CLIP_SOLVERS))
    shape = clip_shape(spec, positive.embedding.shape[0], size, frames)
    draw = noise_streams(shape, seed)
    x = draw(0).to(device)
    positive, negative = (None if c is None else _on(Caption(*c), device) for c in (positive, negative))
    scale = 1 if solver == RENOISE else TIME_SCALE  # the few-step sampler asks with times, the others with levels
    if solver == FLOW_DPM and cfg != 1:  # guides the noise predictions, as officially done
        velocity = pair_velocity(model, positive, negative, one_batch=one_batch, scale=scale)
    else:
        velocity = network_velocity(model, positive, negative, cfg, one_batch=one_batch, scale=scale)
    if first_frame is None:
        return _solve(solver, velocity, x, steps, shift, cfg, draw, callback)
    first = _checked_first(first_frame, shape).to(x)
    if shape[2] == 1:
        return first
    rest = _solve(solver, with_first_frame(velocity, first), x[:, :, 1:], steps, shift, cfg, lambda i: draw(i)[:, :, 1:],
                  None if callback is None else lambda i, *parts: callback(i, *(torch.cat((first, p), 2) for p in parts)))
    return torch.cat((first, rest), 2)


def _solve(solver: str, velocity, x: Tensor, steps: int, shift: float, cfg: float, draw, callback) -> Tensor:
    if solver == FLOW_DPM:
        return solvers.flow_dpm_solver(velocity, x, schedules.flow_dpm_sigmas(steps, shift), callback, cfg=cfg)
    if solver == FLOW_EULER:
        return solvers.flow_euler_solver(velocity, x, schedules.flow_euler_sigmas(steps, shift), callback)
    if solver == UNIPC:
        return solvers.unipc_solver(velocity, x, schedules.unipc_sigmas(steps, shift), callback)
    if solver == DPM:
        return solvers.dpm_solver(velocity, x, schedules.diffusers_dpm_sigmas(steps, shift), callback)
    four = steps == len(schedules.LONGSANA_TIMES)
    plan = schedules.longsana_steps(shift=shift) if four else schedules.dmd_steps(steps, shift)
    return solvers.few_step_solver(velocity, x, plan, draw, callback)


def _on(caption: Caption, device) -> Caption:
    return Caption(*(None if t is None else t.to(device) for t in caption))


def _checked_first(first_frame: Tensor, shape: tuple[int, ...]) -> Tensor:
    expected = (shape[1], 1, *shape[3:])
    if first_frame.ndim != 5 or tuple(first_frame.shape[1:]) != expected or first_frame.shape[0] not in (1, shape[0]):
        raise SanaVideoError("The first frame does not fit the clip", found=f"shape {list(first_frame.shape)}",
                             expected=f"[{shape[0]}, {', '.join(map(str, expected))}]",
                             action="Encode the picture at the size of the clip")
    return first_frame.expand(shape[0], -1, -1, -1, -1)
