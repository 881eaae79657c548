"""Rotary tables, the time sinusoid, and patches to tokens and back (model spec 1.3, 1.4, 1.6, 1.12; causal spec 1.4)."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

ROPE_BASE = 10000.0


def axis_split(head_dim: int) -> tuple[int, int, int]:
    """Channels of (time, height, width) inside one head: height and width get 2*floor(d/6) each, time the rest."""
    side = head_dim // 6 * 2
    return head_dim - 2 * side, side, side


@lru_cache(maxsize=2)  # a film asks for a new table every block: keeping more would grow for sixteen blocks
def rope_table(
    frames: int, height: int, width: int, head_dim: int, start: int = 0,
    dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """(cos, sin), each ``[N, head_dim/2]``, for a token grid whose first frame is the absolute frame ``start``.

    Angles are formed in float64 and have no upper limit; ``dtype`` float64 keeps the official rotation exactly.
    """
    positions = (torch.arange(start, start + frames), torch.arange(height), torch.arange(width))
    with torch.inference_mode(False):  # a cached table must stay usable in training
        cos, sin = [], []
        for axis, (position, channels) in enumerate(zip(positions, axis_split(head_dim))):
            frequency = ROPE_BASE ** (-torch.arange(0, channels, 2, dtype=torch.float64) / channels)
            angle = position.double()[:, None] * frequency
            shape = [1, 1, 1, channels // 2]
            shape[axis] = len(position)
            for parts, function in ((cos, torch.cos), (sin, torch.sin)):  # an axis at a time: few angles, and no large copy
                part = function(angle).to(dtype).to(device, non_blocking=True)
                parts.append(part.view(shape).expand(frames, height, width, -1))
        return tuple(torch.cat(parts, -1).reshape(frames * height * width, -1) for parts in (cos, sin))


def time_sinusoid(times: Tensor, width: int = 256, truncate: bool = True) -> Tensor:
    """``[..., width]`` float32: cos then sin of the whole-number times (0..1000), as the network was trained to see them.

    ``truncate=False`` keeps fractions (a diffusers habit with Euler schedules, model spec 3.5).
    """
    half = width // 2
    times = times.to(torch.int64).float() if truncate else times.float()
    frequency = torch.exp(-math.log(10000.0) * torch.arange(half, dtype=torch.float32, device=times.device) / half)
    angle = times[..., None] * frequency
    return torch.cat((angle.cos(), angle.sin()), -1)


def patchify(latent: Tensor, patch: tuple[int, int, int]) -> Tensor:
    """``[B, C, T, H, W]`` -> tokens ``[B, N, C*pt*ph*pw]``, contiguous, in the order of a convolution kernel."""
    b, c, t, h, w = latent.shape
    pt, ph, pw = patch
    x = latent.view(b, c, t // pt, pt, h // ph, ph, w // pw, pw) if latent.is_contiguous() else latent.reshape(
        b, c, t // pt, pt, h // ph, ph, w // pw, pw)
    return x.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(b, -1, c * pt * ph * pw)


def unpatchify(tokens: Tensor, grid: tuple[int, int, int], patch: tuple[int, int, int]) -> Tensor:
    """Tokens ``[B, N, pt*ph*pw*C]`` (channel fastest) -> ``[B, C, T, H, W]``."""
    (f, h, w), (pt, ph, pw) = grid, patch
    x = tokens.view(tokens.shape[0], f, h, w, pt, ph, pw, -1)
    return x.permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(tokens.shape[0], -1, f * pt, h * ph, w * pw)
