"""Pictures of scenes, for any frames of an endless film: anti-aliased shapes in plain torch, on any device.

Only the square around each thing is computed, so a clip of 81 frames costs some milliseconds. The left and right edges
meet: what leaves on one side enters on the other. Not covered: which scene (``world.py``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import SanaVideoError
from .world import BACKGROUNDS, COLOURS, HEIGHT, MOTIONS, PERIODS, PULSE, SHAPES, SLIDE, WIDTH, Scene, Thing

SOFT = 1.2  # px over which an edge goes from full to nothing
_BUDGET = {"cpu": 1_000_000, "cuda": 16_000_000}  # pixels of all squares that are computed at once (cache; GPU memory)


def track(things: Sequence[Thing], frames: int = 81, start: int = 0) -> Tensor:
    """Where each thing is: ``[N, frames, 4]`` float64 of x, y, size (px of 160x96) and angle (radians, clockwise).

    ``x`` lies in 0..160 (the left edge continues the right one). Frame ``i`` is frame ``start + i`` of the film.
    """
    t = torch.arange(start, start + frames, dtype=torch.float64)
    home = torch.tensor([(a.x, a.y, a.size, a.phase, a.swing) for a in things], dtype=torch.float64)
    x, y, size, phase, swing = home.unsqueeze(-1).unbind(1)
    motion = torch.tensor([MOTIONS.index(a.motion) for a in things])[:, None]
    period = torch.tensor([float(PERIODS.get(a.motion, 1)) for a in things], dtype=torch.float64)[:, None]
    cycle = torch.remainder(t / period + phase, 1.0)
    sin, cos = torch.sin(cycle * math.tau), torch.cos(cycle * math.tau)

    def moving(name: str) -> Tensor:
        return (motion == MOTIONS.index(name)).double()

    x = x + moving("slide") * SLIDE * sin + moving("orbit") * swing * cos
    x = torch.remainder(x + (moving("right") - moving("left")) * WIDTH * cycle, WIDTH)
    y = y - moving("bounce") * swing * sin + moving("orbit") * swing * sin
    size = size * (1 + moving("pulse") * PULSE * sin)
    upright = torch.tensor([math.radians(SHAPES[a.shape][3]) for a in things], dtype=torch.float64)[:, None]
    return torch.stack(torch.broadcast_tensors(x, y, size, upright + moving("spin") * cycle * math.tau), -1)


def coverage(dx: Tensor, dy: Tensor, size: Tensor, angle: Tensor, corners: Tensor, outer: Tensor, inner: Tensor,
             soft: float = SOFT) -> Tensor:
    """Share 0..1 of each pixel that a shape covers. ``dx``, ``dy`` px from its middle (y downwards); all broadcast.

    The plane is folded into one half sector between a corner and the next notch; there the outline is one straight line.
    """
    half = math.pi / corners
    radius = torch.sqrt(dx * dx + dy * dy)
    theta = torch.atan2(dx, -dy) - angle  # from the top, clockwise
    folded = (torch.remainder(theta + half, 2 * half) - half).abs()
    corner, notch = size * outer, size * inner
    ex, ey = notch * torch.cos(half) - corner, notch * torch.sin(half)  # along the side, from the corner
    px, py = radius * torch.cos(folded) - corner, radius * torch.sin(folded)
    distance = (px * ey - py * ex) / torch.sqrt(ex * ex + ey * ey)  # > 0 outside
    return (0.5 - distance / soft).clamp(0, 1)


@torch.no_grad()
def render(scenes: Sequence[Scene], frames: int = 81, size: tuple[int, int] = (WIDTH, HEIGHT), start: int = 0,
           device: torch.device | str = "cpu") -> Tensor:
    """Film of each scene: uint8 ``[B, frames, height, width, 3]`` on ``device``, the same for the same scene always
    (what is drawn along with it, and the device, may change a value at an edge by one).

    ``size`` is (width, height); another size than 160x96 shows the same scene larger or smaller.
    """
    width, height = size
    if frames < 1 or width < 16 or height < 16:
        raise SanaVideoError("There is nothing to draw", found=f"{frames} frames of {width}x{height}",
                             expected="at least one frame of 16x16")
    scale = min(width / WIDTH, height / HEIGHT)
    reach = max((a.size * SHAPES[a.shape][1] * (1 + PULSE) for s in scenes for a in s.things), default=1.0)
    square = min(2 * math.ceil(reach * scale + SOFT) + 2, width)
    chunk = max(1, _BUDGET.get(torch.device(device).type, 1_000_000) // (frames * square * square))
    parts = [_draw(scenes[i : i + chunk], frames, (width, height), start, scale, square, device)
             for i in range(0, len(scenes), chunk)]
    return torch.cat(parts) if parts else torch.zeros(0, frames, height, width, 3, dtype=torch.uint8, device=device)


def _draw(scenes: Sequence[Scene], frames: int, size: tuple[int, int], start: int, scale: float, square: int,
          device) -> Tensor:
    (width, height), pad = size, square
    ground = torch.tensor([BACKGROUNDS[s.background] for s in scenes], dtype=torch.uint8, device=device)
    canvas = ground[:, None, None, :].repeat(1, frames, (height + 2 * pad) * width, 1)
    for rank in range(2):
        rows = [i for i, s in enumerate(scenes) if len(s.things) > rank]
        if not rows:
            continue
        things = [scenes[i].things[rank] for i in rows]
        where = track(things, frames, start).to(device)
        x, y = where[..., 0] * (width / WIDTH), where[..., 1] * (height / HEIGHT)
        left, top = torch.floor(x) - square // 2, torch.floor(y) - square // 2
        step = torch.arange(square, device=device)
        columns, lines = left[..., None] + step, top[..., None] + step  # [N, F, square]
        # In float64: a vector unit rounds the last bits by a value's place in the batch, which must not reach a pixel.
        dx = (columns + 0.5 - x[..., None])[:, :, None, :]
        dy = (lines + 0.5 - y[..., None])[:, :, :, None]
        form = torch.tensor([SHAPES[a.shape][:3] for a in things], dtype=torch.float64, device=device)[:, :, None, None, None]
        alpha = coverage(dx, dy, (where[..., 2] * scale)[..., None, None],
                         where[..., 3][..., None, None], *form.unbind(1)).float().flatten(2)[..., None]
        at = ((lines.long() + pad).clamp(0, height + 2 * pad - 1)[..., :, None] * width
              + torch.remainder(columns, width).long()[..., None, :]).flatten(2)[..., None].expand(-1, -1, -1, 3)
        index = torch.tensor(rows, device=device)
        layer = canvas[index]
        paint = torch.tensor([COLOURS[a.colour] for a in things], dtype=torch.float32, device=device)[:, None, None, :]
        under = layer.gather(2, at).float()
        layer.scatter_(2, at, (under + alpha * (paint - under)).round().to(torch.uint8))
        canvas[index] = layer
    return canvas.view(len(scenes), frames, height + 2 * pad, width, 3)[:, :, pad : pad + height].contiguous()
