"""Says whether a clip shows what a prompt states, by reading the frames (``vision.py``). Strict: what cannot be read is wrong.

``judge(frames, prompt)`` gives a Verdict; ``adherence`` is the share of clips with every stated thing right. Motions are
read from where a thing is, how large it is and how it is turned in each frame; at least ``SHORTEST`` frames are needed.
For films, give a window (``frames[a:b]``); ``positions`` serves to look at continuity.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import SanaVideoError
from .captions import Wanted, WantedThing, parse
from .vision import Blob, Picture, look
from .world import COLOURS, SHAPES

SHORTEST = 40  # frames: less than that does not show every motion
_STEADY = 0.8  # share of frames that must show the same colour, the same shape
_SEEN = 0.97  # share of frames in which a thing must be there
_JUMP = 14.0  # px between two frames; the fastest thing of this world moves by 4.4
_REST = 5.0  # px: a thing that stays within this does not move
ATTRIBUTES = ("count", "colour", "shape", "motion", "place", "background")


@dataclass(frozen=True)
class Reading:
    """What one thing of a clip is: names, or None where the clip does not show one clearly; ``why`` says why not."""

    colour: str | None
    shape: str | None
    motion: str | None
    why: tuple[str, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """``ok``, and for each of ATTRIBUTES True, False, or None (the prompt does not state it)."""

    ok: bool
    count: bool
    colour: bool | None
    shape: bool | None
    motion: bool | None
    place: bool | None
    background: bool | None
    readings: tuple[Reading, ...] = ()
    ground: str | None = None
    reasons: tuple[str, ...] = field(default=())


def judge(frames: Tensor, prompt: str | Wanted) -> Verdict:
    """Compare a clip ``[F, H, W, 3]`` (uint8, or float in 0..1) with a prompt or what it states."""
    wanted = parse(prompt) if isinstance(prompt, str) else prompt
    if frames.shape[0] < SHORTEST:
        raise SanaVideoError("The clip is too short to judge", found=f"{frames.shape[0]} frames",
                             expected=f"at least {SHORTEST} frames", action="Make a longer clip, or a longer window")
    return compare(look(frames), wanted)


def adherence(verdicts: Iterable[Verdict]) -> float:
    """Share of clips with every stated thing right; 0 of none."""
    marks = [v.ok for v in verdicts]
    return sum(marks) / max(len(marks), 1)


def positions(frames: Tensor) -> Tensor:
    """Where things are: ``[F, n, 2]`` float32 of x, y in px of 160x96, upper thing first, NaN where there is none.

    ``x`` is continued over the left and right edge, so a difference between frames is a movement.
    """
    blobs = look(frames).blobs
    where = [torch.stack((b.x, b.y), -1).masked_fill(~b.seen[:, None], math.nan) for b in blobs]
    return torch.stack(where, 1) if where else torch.zeros(frames.shape[0], 0, 2)


def compare(picture: Picture, wanted: Wanted) -> Verdict:
    """The verdict on what was seen. A prompt without places accepts either order of the things."""
    readings = tuple(read(b) for b in picture.blobs)
    ground = picture.ground if picture.steady else None
    background = None if wanted.background is None else ground == wanted.background
    if len(readings) != len(wanted.things):
        return Verdict(False, False, *(None if not _states(wanted, a) else False for a in ATTRIBUTES[1:4]),
                       None if wanted.things[0].place is None else False, background, readings, ground,
                       (f"{len(readings)} things instead of {len(wanted.things)}",))
    fixed, place = _by_place(wanted.things), None
    orders = list(itertools.permutations(fixed or wanted.things))
    results = [_match(order, readings) for order in orders]
    best = max(results, key=lambda marks: sum(m is not False for m in marks))
    if fixed:  # the first order is the stated one; the things are in the wrong places when only the other one fits
        place = False not in results[0] or False in best
        best = results[0] if place else best
    marks = (*best, place, background)
    reasons = [f"thing {i + 1}: {w}" for i, r in enumerate(readings) for w in r.why]
    reasons += [f"wrong {name}" for name, mark in zip(ATTRIBUTES[1:], marks) if mark is False]
    reasons += [] if picture.steady else ["the background flickers"]
    ok = all(m is not False for m in marks) and picture.steady
    return Verdict(ok, True, *marks, readings, ground, tuple(reasons))


def _states(wanted: Wanted, attribute: str) -> bool:
    return any(getattr(t, attribute) is not None for t in wanted.things)


def _by_place(things: tuple[WantedThing, ...]) -> tuple[WantedThing, ...] | None:
    """The things from top to bottom where the prompt says so."""
    if any(t.place is None for t in things):
        return None
    return tuple(sorted(things, key=lambda t: t.place != "above"))


def _match(things: tuple[WantedThing, ...], readings: tuple[Reading, ...]) -> tuple[bool | None, ...]:
    """(colour, shape, motion) of all things together; None where nothing is stated."""
    marks = []
    for name in ("colour", "shape", "motion"):
        pairs = [(getattr(t, name), getattr(r, name)) for t, r in zip(things, readings) if getattr(t, name) is not None]
        marks.append(all(a == b for a, b in pairs) if pairs else None)
    return tuple(marks)


def read(blob: Blob) -> Reading:
    """Name the colour, shape and motion of one thing."""
    why = []
    seen = float(blob.seen.float().mean())
    if seen < _SEEN:
        why.append(f"there in {seen:.0%} of the frames only")
    strayed = float((blob.stray[blob.seen] > 0.1).float().mean())
    if strayed > 0.1:
        why.append("in several pieces")
    colour = _steady(blob.colour[blob.seen], COLOURS)
    shape = _steady(blob.shape[blob.seen], SHAPES)
    why += [f"no clear {what}" for what, name in (("colour", colour), ("shape", shape)) if name is None]
    if seen < _SEEN or strayed > 0.1:
        return Reading(colour, None, None, tuple(why))
    motion, reason = read_motion(blob, rotates=shape not in (None, "circle"))
    return Reading(colour, shape, motion, (*why, reason) if reason else tuple(why))


def _steady(index: Tensor, table: dict) -> str | None:
    """The name that at least ``_STEADY`` of the frames show."""
    count = torch.bincount(index[index >= 0], minlength=len(table))
    best = int(count.argmax())
    return tuple(table)[best] if int(count[best]) >= _STEADY * max(len(index), 1) else None


def read_motion(blob: Blob, rotates: bool = True) -> tuple[str | None, str | None]:
    """(motion, None), or (None, why it is none of the world's)."""
    x, y, size = blob.x, blob.y, blob.radius.clamp(min=1).log()
    step = torch.stack((x, y)).diff(dim=1).norm(dim=0)
    if float(step.max()) > _JUMP:
        return None, f"jumps by {float(step.max()):.0f} px"
    trembling = float(size.diff().abs().mean()) > 0.1  # the fastest growth of this world is 0.08 a frame
    x, y, size = _smooth(x), _smooth(y), _smooth(size)
    wide, high, pulse = _range(x), _range(y), _range(size)
    turned, even = _turn(blob.angle) if rotates else (0.0, True)
    moves = {
        "pulse": pulse > 0.36 and not trembling,
        "spin": abs(turned) > 0.02 and even,
        **_place_moves(x, y, wide, high),
    }
    rests = {"pulse": pulse < 0.28 and not trembling, "spin": abs(turned) < 0.006}
    found = [name for name, yes in moves.items() if yes]
    unclear = [name for name, yes in rests.items() if not yes and name not in found]
    if len(found) > 1:
        return None, f"does several things ({', '.join(found)})"
    if unclear:
        return None, f"is neither still nor moving clearly ({', '.join(unclear)})"
    if found:
        moved = found[0] not in ("pulse", "spin")
        return (found[0], None) if moved or max(wide, high) < _REST else (None, f"drifts by {max(wide, high):.0f} px")
    if max(wide, high) < _REST:
        return "still", None
    return None, f"moves in no known way ({wide:.0f} px across, {high:.0f} px up and down)"


def _place_moves(x: Tensor, y: Tensor, wide: float, high: float) -> dict[str, bool]:
    """Which of the motions from place to place this is (at most one)."""
    frames = len(x)
    time = torch.arange(frames, dtype=x.dtype) - (frames - 1) / 2
    speed = float((time * x).sum() / (time * time).sum())
    bend = float((x - x.mean() - speed * time).abs().max())
    steady = high < _REST and 1.2 < abs(speed) < 4.5 and bend < 8
    orbits = wide > 8 and high > 8 and 0.6 < wide / high < 1.67 and _goes_round(x, y, frames)
    return {"right": steady and speed > 0, "left": steady and speed < 0,
            "slide": wide > 24 and high < _REST and not steady and _reverses(x, wide),
            "bounce": high > 8 and wide < _REST and _reverses(y, high), "orbit": orbits}


def _reverses(values: Tensor, span: float) -> bool:
    """True when the values go both ways: each way by at least 40 % of their range."""
    up = float((values - values.cummin(0).values).max())
    down = float((values.cummax(0).values - values).max())
    return min(up, down) > 0.4 * span


def _goes_round(x: Tensor, y: Tensor, frames: int) -> bool:
    """True when a thing circles its middle: always at about the same distance, always the same way, fast enough."""
    dx, dy = x - (x.max() + x.min()) / 2, y - (y.max() + y.min()) / 2
    angle = torch.atan2(dy, dx)
    step = angle.diff()
    step = step - torch.round(step / math.tau) * math.tau
    far = torch.sqrt(dx * dx + dy * dy)
    same = max(float((step > 0).float().mean()), float((step < 0).float().mean()))
    return abs(float(step.sum())) > math.tau * frames / 60 and same > 0.9 and float(far.std() / far.mean()) < 0.25


def _turn(angle: Tensor) -> tuple[float, bool]:
    """(radians a frame, whether it turns evenly) by a straight line through the angles."""
    time = torch.arange(len(angle), dtype=angle.dtype) - (len(angle) - 1) / 2
    speed = (time * angle).sum() / (time * time).sum()
    off = (angle - angle.mean() - speed * time).abs()
    return float(speed), bool(off.max() < 0.5)


def _smooth(values: Tensor) -> Tensor:
    """Median of five neighbours: single bad frames do not count."""
    padded = torch.nn.functional.pad(values[None, None], (2, 2), mode="replicate")[0, 0]
    return padded.unfold(0, 5, 1).median(-1).values


def _range(values: Tensor) -> float:
    low, high = torch.quantile(values, torch.tensor((0.02, 0.98), dtype=values.dtype))
    return float(high - low)
