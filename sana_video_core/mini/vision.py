"""Reads things out of frames by classical image processing: ground, colour, place, size, outline and angle per frame.

Nothing here is learned and nothing knows a prompt. Pictures of any size are measured in pixels of 160x96. Decisions over
time (which motion, right or wrong) are in ``judge.py``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import SanaVideoError
from .world import BACKGROUNDS, COLOURS, HEIGHT, SHAPES, WIDTH

CROP = 64  # px of the square around a thing; the largest thing has a diameter of 62
_APART = 55.0  # distance in RGB (0..255) from the ground at which a pixel surely belongs to a thing; noise stays below
_SEEN = 40.0  # px of area below which a thing counts as not there
_COLOUR_REACH, _GROUND_REACH = 110.0, 45.0
_REACH = 1.9  # radii (of a disc of equal area) to which an outline is measured; the star's corners are at 1.6
_HARMONICS = (2, 3, 4, 5)
# Mean squared radius and strengths of the harmonics of the outlines (in units of the radius of a disc of equal area),
# midway between sharp and slightly blurred pictures, and how far off each number may be.
_OUTLINES = {"circle": (0.50, 0.0, 0.0, 0.0, 0.0), "square": (0.523, 0.0, 0.0, 0.155, 0.0),
             "triangle": (0.60, 0.0, 0.36, 0.0, 0.0), "star": (0.625, 0.0, 0.0, 0.0, 0.55)}
_TOLERANCES = {"circle": (0.04, 0.16, 0.15, 0.075, 0.15), "square": (0.04, 0.18, 0.15, 0.075, 0.12),
               "triangle": (0.07, 0.22, 0.17, 0.15, 0.35), "star": (0.09, 0.20, 0.20, 0.22, 0.33)}


@dataclass(frozen=True)
class Blob:
    """One thing through time; every tensor is ``[F]`` or ``[F, k]`` float32 or bool on the CPU.

    ``x`` (continued over the edge, so it may leave 0..160), ``y``, ``radius`` (of a disc of equal area) in px; ``colour``
    and ``shape`` are indices into COLOURS and SHAPES, -1 where the frame shows none of them; ``angle`` radians, continued,
    zero for circles; ``seen`` is False where there is no thing; ``stray`` is the share of its pixels that lie elsewhere.
    """

    seen: Tensor
    x: Tensor
    y: Tensor
    radius: Tensor
    colour: Tensor
    shape: Tensor
    angle: Tensor
    stray: Tensor
    outline: Tensor


@dataclass(frozen=True)
class Picture:
    """What a clip shows: its things from top to bottom, its ground (name or None), whether the ground is steady."""

    blobs: tuple[Blob, ...]
    ground: str | None
    steady: bool


def as_frames(frames: Tensor) -> Tensor:
    """float32 ``[F, 3, 96, 160]`` in 0..255 of uint8 or 0..1 float frames ``[F, H, W, 3]``."""
    if frames.dim() != 4 or frames.shape[-1] != 3 or not frames.shape[0]:
        raise SanaVideoError("The judge cannot look at this", found=f"shape {tuple(frames.shape)}",
                             expected="frames [F, height, width, 3]")
    if frames.dtype != torch.uint8:
        frames = (frames.float() * 255).nan_to_num(0).clamp(0, 255)
    frames = frames.permute(0, 3, 1, 2).float()
    if frames.shape[-2:] != (HEIGHT, WIDTH):
        frames = F.interpolate(frames, (HEIGHT, WIDTH), mode="bilinear", antialias=True)
    return frames.contiguous()


@torch.no_grad()
def look(frames: Tensor) -> Picture:
    """Find ground and things of a clip ``[F, H, W, 3]`` (uint8, or float in 0..1)."""
    x = as_frames(frames)
    grounds = x[:, :, 2::5, 2::5].flatten(2).median(-1).values  # things cover a tenth of the picture at most
    ground = grounds.median(0).values
    steady = bool(((grounds - ground).norm(dim=1) < 25).float().mean() >= 0.95)
    apart = _distance(x, ground[:, None, None], 1)
    mask = apart > _APART
    split = _split_row(mask)
    rows = [(0, HEIGHT)] if split is None else [(0, split), (split, HEIGHT)]
    blobs = tuple(_read_blob(x, apart, mask, ground, top, end) for top, end in rows)
    return Picture(tuple(b for b in blobs if b.seen.any()), _nearest_name(ground, BACKGROUNDS, _GROUND_REACH), steady)


def _distance(a: Tensor, b: Tensor, dim: int) -> Tensor:
    """Euclidean distance along a dimension of size 3 (much faster on the CPU than ``norm`` there)."""
    d = a - b
    r, g, b = d.mul_(d).unbind(dim)
    return (r + g + b).sqrt_()


def _nearest_name(value: Tensor, table: dict, reach: float) -> str | None:
    distance = (torch.tensor(list(table.values()), dtype=torch.float32) - value.cpu()).norm(dim=1)
    return tuple(table)[int(distance.argmin())] if distance.min() < reach else None


def _split_row(mask: Tensor) -> int | None:
    """The row that parts an upper from a lower thing, None where there is one thing."""
    per_row = mask.sum(-1).float()  # [F, H]
    middle = range(HEIGHT // 2 - 6, HEIGHT // 2 + 7)
    crossing = [float((per_row[:, r] > 2).float().mean()) for r in middle]
    row = min(range(len(crossing)), key=lambda i: (crossing[i], abs(i - 6)))
    cut = middle[row]
    both = (per_row[:, :cut].sum(1) > _SEEN) & (per_row[:, cut:].sum(1) > _SEEN)
    return cut if crossing[row] < 0.15 and float(both.float().mean()) > 0.5 else None


def _read_blob(x: Tensor, apart: Tensor, mask: Tensor, ground: Tensor, top: int, end: int) -> Blob:
    mask, frames = mask[:, top:end], mask.shape[0]
    total = mask.sum((1, 2)).float()
    columns, lines = mask.sum(1).float(), mask.sum(2).float()
    turn = torch.arange(WIDTH, device=x.device) * (math.tau / WIDTH)
    cx = torch.atan2(columns @ turn.sin(), columns @ turn.cos()) * (WIDTH / math.tau)
    cy = (lines @ torch.arange(top, end, device=x.device).float()) / total.clamp(min=1)
    step = torch.arange(CROP, device=x.device) - CROP // 2
    at_x = torch.remainder(cx.round().long()[:, None] + step, WIDTH)[:, None, :]
    at_y = cy.round().long()[:, None] + step
    inside = ((at_y >= top) & (at_y < end))[:, :, None]
    at_y = at_y.clamp(0, HEIGHT - 1)[:, :, None]
    index = torch.arange(frames, device=x.device)[:, None, None]
    local = apart[index, at_y, at_x] * inside
    pixels = x.permute(0, 2, 3, 1)[index, at_y, at_x]  # [F, CROP, CROP, 3]
    solid = local > _APART
    colour, index_colour, strength = _read_colour(pixels, local, solid, ground)
    alpha = ((local / strength[:, None, None] - 0.3) / 0.4).clamp(0, 1)
    area = alpha.sum((1, 2))
    seen = area > _SEEN
    dx, dy, radius, outline, phase = _measure(alpha, step.float())
    shape = _nearest_outline(outline)
    votes = torch.stack([(shape[seen] == k).sum() for k in range(len(SHAPES))])
    corners = list(SHAPES.values())[int(votes.argmax())][0]
    angle = phase[:, _HARMONICS.index(corners)] if corners in _HARMONICS else torch.zeros_like(radius)
    stray = 1 - solid.sum((1, 2)).float() / total.clamp(min=1)
    return Blob(*(v.cpu() for v in (
        seen, _continue(cx.round() + dx + 0.5, seen, WIDTH), cy.round() + dy + 0.5, radius,
        torch.where(seen, index_colour, -1), torch.where(seen, shape, -1),
        _continue(angle, seen, math.tau / corners), stray, outline)))


def _read_colour(pixels: Tensor, local: Tensor, solid: Tensor, ground: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(mean colour ``[F, 3]`` of the inner pixels, index of the palette or -1, its distance to the ground ``[F]``)."""
    peak = F.avg_pool2d(local[:, None], 3, 1).amax((1, 2, 3))  # how far from the ground the inside is, noise averaged out
    inner = (solid & (local > 0.7 * peak[:, None, None])).float()
    count = inner.sum((1, 2)).clamp(min=1)
    colour = (pixels * inner[..., None]).sum((1, 2)) / count[:, None]
    palette = torch.tensor(list(COLOURS.values()), dtype=torch.float32, device=pixels.device)
    distance = (colour[:, None] - palette).norm(dim=-1)
    best = distance.argmin(1)
    fits = (_distance(pixels, palette[best][:, None, None], -1) < _COLOUR_REACH).float() * inner
    good = (distance.min(1).values < _COLOUR_REACH) & (fits.sum((1, 2)) > 0.75 * count)
    good &= count > 0.35 * solid.sum((1, 2))
    return colour, torch.where(good, best, -1), (colour - ground).norm(dim=1).clamp(min=_APART)


def _measure(alpha: Tensor, step: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Centre (dx, dy from the crop's middle pixel), radius, outline numbers ``[F, 5]``, phases ``[F, 4]`` of the harmonics."""
    area = alpha.sum((1, 2)).clamp(min=1)
    dx, dy = (alpha.sum(1) @ step) / area, (alpha.sum(2) @ step) / area
    radius = torch.sqrt(area / math.pi)
    # From the top, clockwise, as in render.py: z = r * exp(i * angle) with the real axis up.
    real = -(step - dy[:, None])[:, :, None] / radius[:, None, None]
    imag = (step - dx[:, None])[:, None, :] / radius[:, None, None]
    square = real * real + imag * imag
    z = torch.complex(*torch.broadcast_tensors(real, imag))
    weight = alpha * (square < _REACH * _REACH) / area[:, None, None]
    numbers, phases, power = [(weight * square).sum((1, 2))], [], z
    for n in _HARMONICS:
        power = power * z
        moment = (weight * power).sum((1, 2))
        numbers.append(moment.abs())
        phases.append(moment.angle() / n)
    return dx, dy, radius, torch.stack(numbers, -1), torch.stack(phases, -1)


def _nearest_outline(outline: Tensor) -> Tensor:
    ideal = torch.tensor(list(_OUTLINES.values()), device=outline.device)
    distance = ((outline[:, None] - ideal) / torch.tensor(list(_TOLERANCES.values()), device=outline.device)).abs().amax(-1)
    return torch.where(distance.min(1).values < 1, distance.argmin(1), -1)


def _continue(values: Tensor, seen: Tensor, cycle: float) -> Tensor:
    """The same values modulo ``cycle``, without jumps; frames without a thing repeat the last value."""
    values = values.double()
    index = torch.where(seen, torch.arange(len(values), device=values.device), -1).cummax(0).values.clamp(min=0)
    values = values[index]
    step = torch.diff(values, prepend=values[:1])
    step = step - torch.round(step / cycle) * cycle
    return (values[0] + step.cumsum(0)).float()
