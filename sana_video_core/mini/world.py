"""The world of the embedded model: coloured flat shapes that move on a plain background, for ever.

A scene has one thing, or two in an upper and a lower lane. Every motion is periodic or wraps around the left and right
edge, so a film may go on without end and any 40 frames show what moves how. Lengths are pixels of a 160x96 picture,
times are frames (16 a second). Pictures come from ``render.py``, sentences from ``captions.py``.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from ..errors import SanaVideoError

WIDTH, HEIGHT = 160, 96
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (228, 36, 36), "yellow": (250, 218, 40), "green": (40, 205, 80),
    "blue": (48, 116, 255), "purple": (182, 66, 226), "white": (246, 246, 246),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {"black": (8, 8, 10), "grey": (66, 66, 70), "navy": (14, 26, 84)}
# shape -> (corners, radius of the corners, radius of the notches between them, angle of a corner when it stands upright).
# Radii are multiples of the thing's size, the angle is in degrees clockwise from the top. A regular polygon has its
# "notches" at the middle of its sides; a circle is a polygon of very many corners.
SHAPES: dict[str, tuple[int, float, float, float]] = {
    "circle": (64, 1.0, 1.0, 0.0), "square": (4, 1.22, 1.22 * 0.70710678, 45.0),
    "triangle": (3, 1.4, 0.7, 0.0), "star": (5, 1.4, 0.6, 0.0),
}
MOTIONS = ("still", "slide", "bounce", "orbit", "spin", "pulse", "right", "left")
PERIODS = {"slide": 40, "bounce": 32, "orbit": 40, "spin": 96, "pulse": 32, "right": 64, "left": 64}  # frames a cycle
SLIDE = 28.0  # px from the middle to either end
SWING = {1: 20.0, 2: 7.0}  # px: height of a bounce and radius of an orbit, by the number of things in the scene
PULSE = 0.3  # share by which a pulsing thing grows and shrinks
SIZES = {1: (14.0, 17.0), 2: (10.0, 11.0)}  # px, by the number of things in the scene
LANES = (23.0, 73.0)  # px: home height of the upper and the lower thing of a pair
PAIRS = 0.3  # share of scenes with two things


@dataclass(frozen=True)
class Thing:
    """One shape. ``size`` px (about its radius), home ``x``, ``y`` px, ``phase`` 0..1 of its cycle at frame 0, ``swing`` px."""

    colour: str
    shape: str
    motion: str
    size: float = 14.0
    x: float = 80.0
    y: float = 48.0
    phase: float = 0.0
    swing: float = 20.0

    def __post_init__(self):
        for what, value, known in (("colour", self.colour, COLOURS), ("shape", self.shape, SHAPES),
                                   ("motion", self.motion, MOTIONS)):
            if value not in known:
                raise SanaVideoError(f"The world has no such {what}", found=value, expected=", ".join(known))
        if (self.shape, self.motion) == ("circle", "spin"):
            raise SanaVideoError("A spinning circle looks like a still one", action="Give the circle another motion")

    @property
    def triple(self) -> tuple[str, str, str]:
        return self.colour, self.shape, self.motion


@dataclass(frozen=True)
class Scene:
    """One thing, or two (the upper one first), on a plain background."""

    things: tuple[Thing, ...]
    background: str = "black"

    def __post_init__(self):
        if not 1 <= len(self.things) <= 2:
            raise SanaVideoError("A scene has one or two things", found=len(self.things))
        if self.background not in BACKGROUNDS:
            raise SanaVideoError("The world has no such background", found=self.background, expected=", ".join(BACKGROUNDS))


def is_held_out(colour: str, shape: str, motion: str) -> bool:
    """True for the eighth of all (colour, shape, motion) that no training scene shows.

    Each colour and shape meets seven of the eight motions in training, so nothing is unknown but the combination.
    """
    c, s, m = tuple(COLOURS).index(colour), tuple(SHAPES).index(shape), MOTIONS.index(motion)
    return (c + 2 * s + m) % len(MOTIONS) == 0


TRIPLES = tuple((c, s, m) for c in COLOURS for s in SHAPES for m in MOTIONS if (s, m) != ("circle", "spin"))
HELD_OUT = tuple(t for t in TRIPLES if is_held_out(*t))
TRAINING = tuple(t for t in TRIPLES if not is_held_out(*t))


def random_scene(rng: random.Random, held_out: bool = False, pair: bool | None = None) -> Scene:
    """A scene of the training world, or (``held_out``) one with at least one combination that training never showed.

    ``pair`` fixes the number of things (None: two in ``PAIRS`` of the scenes). The two things of a pair differ in colour.
    Only ``rng.random()`` is drawn, so a seed gives the same scenes in every Python version.
    """
    count = 2 if (rng.random() < PAIRS if pair is None else pair) else 1
    triples = [_pick(rng, HELD_OUT if held_out else TRAINING)]
    if count == 2:
        others = [t for t in (TRIPLES if held_out else TRAINING) if t[0] != triples[0][0]]
        triples.insert(int(rng.random() * 2), _pick(rng, others))
    things = tuple(_place(rng, triple, lane, count) for lane, triple in enumerate(triples))
    return Scene(things, _pick(rng, tuple(BACKGROUNDS)))


def _pick(rng: random.Random, items):
    return items[int(rng.random() * len(items))]


def _place(rng: random.Random, triple: tuple[str, str, str], lane: int, count: int) -> Thing:
    """A thing of random size, phase and home such that its motion stays inside the picture and inside its lane."""
    colour, shape, motion = triple
    size, swing = _pick(rng, SIZES[count]), SWING[count]
    reach = size * SHAPES[shape][1] * (1 + PULSE * (motion == "pulse")) + 2
    wide = reach + {"slide": SLIDE, "orbit": swing}.get(motion, 0)
    high = reach + (swing if motion in ("bounce", "orbit") else 0)
    x = WIDTH * rng.random() if motion in ("right", "left") else wide + (WIDTH - 2 * wide) * rng.random()
    y = high + max(HEIGHT - 2 * high, 0.0) * rng.random()
    y = min(y, HEIGHT / 2) if 2 * high > HEIGHT else y
    return Thing(colour, shape, motion, size, x, LANES[lane] if count == 2 else y, rng.random(), swing)
