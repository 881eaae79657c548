"""Sentences about scenes, and what a sentence states.

``caption`` writes (few templates, few synonyms: a small text encoder learns them in minutes); ``parse`` reads these and
what a person would type. Order is place: the thing named first is the upper one. Not covered: motion scores and the
instruction (``text/prompts.py``), tokens (``tokenizer.py``).
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from ..errors import SanaVideoError
from .world import BACKGROUNDS, COLOURS, MOTIONS, SHAPES, Scene

PHRASES: dict[str, tuple[str, ...]] = {  # the first one is used most
    "still": ("stays still", "does not move"),
    "slide": ("slides left and right", "slides from side to side"),
    "bounce": ("bounces up and down", "moves up and down"),
    "orbit": ("moves in a circle", "goes around in a circle"),
    "spin": ("spins", "rotates"),
    "pulse": ("grows and shrinks", "pulses"),
    "right": ("moves to the right", "drifts to the right"),
    "left": ("moves to the left", "drifts to the left"),
}
SINGLE = ("A {a} on a {bg} background.", "On a {bg} background, a {a}.", "A {a}. The background is {bg}.")
PAIRED = ("A {a} above a {thing} that {does}, on a {bg} background.",
          "At the top a {a}, at the bottom a {b}, on a {bg} background.",
          "A {a} and below it a {b}. The background is {bg}.", "A {a} and a {b} on a {bg} background.")
UNSTATED = 0.15  # share of captions that do not tell the background


@dataclass(frozen=True)
class WantedThing:
    """What a prompt states of one thing; None is unstated. ``place`` is "above" or "below" where there are two."""

    shape: str
    colour: str | None = None
    motion: str | None = None
    place: str | None = None


@dataclass(frozen=True)
class Wanted:
    """What a prompt states: its things in order of mention, and the background (None: unstated)."""

    things: tuple[WantedThing, ...]
    background: str | None = None


def caption(scene: Scene, rng: random.Random, plain: bool = False) -> str:
    """One sentence about the scene; ``plain`` takes the first template and phrases, with the background."""
    def draw() -> float:
        return 0.0 if plain else rng.random()

    said = [(f"{a.colour} {a.shape}", PHRASES[a.motion][int(draw() > 0.75)]) for a in scene.things]
    templates = SINGLE if len(said) == 1 else PAIRED
    text = templates[int(draw() * len(templates))].format(
        a=" ".join(said[0]), b=" ".join(said[-1]), thing=said[-1][0], does=said[-1][1], bg=scene.background)
    if not plain and rng.random() < UNSTATED:
        text = re.sub(r",? on an? \w+ background\.| The background is \w+\.", ".", text).replace("..", ".")
        text = re.sub(r"^On an? \w+ background, a", "A", text)
    return text


def wanted(scene: Scene) -> Wanted:
    """All that can be said of a scene."""
    places = ("above", "below") if len(scene.things) == 2 else (None,)
    return Wanted(tuple(WantedThing(a.shape, a.colour, a.motion, p) for a, p in zip(scene.things, places)), scene.background)


# Reading. Motion phrases are taken out first (they contain the words "circle" and "left"), then things, then background.
_MOVE = r"(?:mov|slid|driv|drift|glid|go|travel|float|fl|roll|swing|shift)(?:es|ing|ies|ying|y|s|e)?"
_READ: tuple[tuple[str, str], ...] = (
    ("still", r"(?:(?:stay|stand|sit|remain|keep|hold|is|are)(?:s|ing)?\s+(?:completely\s+|perfectly\s+)?"
              r"(?:still|motionless|in place|at rest|put|unmoving))|(?:does|do|is)\s?(?:not|n't)\s+mov(?:e|ing)|"
              r"\brests?\b|\bresting\b|\bmotionless\b|\bwithout moving\b|(?<!, )\bstill(?=\s+(?:{colour}|{shape})\b)"),
    ("orbit", rf"(?:{_MOVE}|turn(?:s|ing)?|run(?:s|ning)?)\s+(?:a?round\s+)?(?:and (?:a?round)\s+)?"
              r"(?:in|along|on|around)\s+(?:an?\s+|the\s+)?(?:circles?|circular path|rings?|loops?)|"
              r"{not_coloured}\bcircl(?:es|ing)\b(?:\s+around)?|\borbit(?:s|ing)?\b"),
    ("slide", rf"(?:{_MOVE}|bounc(?:es|ing|e))\s+(?:from\s+)?(?:left and right|left to right and back|side to side|"
              r"right and left|back and forth|left and then right)"),
    ("bounce", rf"(?:bounc(?:es|ing|e)|jump(?:s|ing)?|hop(?:s|ping)?|bob(?:s|bing)?|{_MOVE})\s+(?:up and down|down and up|"
               r"up and then down)|\b(?:bounc(?:es|ing|e)|hop(?:s|ping)?|jump(?:s|ing)?|bob(?:s|bing)?)\b"),
    ("right", rf"{_MOVE}\s+(?:steadily\s+|slowly\s+)?(?:from left to right|(?:to|towards?)?\s*(?:the\s+)?right(?:wards?)?\b)"),
    ("left", rf"{_MOVE}\s+(?:steadily\s+|slowly\s+)?(?:from right to left|(?:to|towards?)?\s*(?:the\s+)?left(?:wards?)?\b)"),
    ("pulse", r"grow(?:s|ing)?\s+and\s+shrink(?:s|ing)?|shrink(?:s|ing)?\s+and\s+grow(?:s|ing)?|\bpuls(?:es|ing|e|ates|ating)\b|"
              r"gets?\s+(?:bigger|larger) and smaller"),
    ("spin", r"\bspin(?:s|ning)?\b(?:\s+around)?|\brotat(?:es|ing|e)\b|\bturn(?:s|ing)?\b(?:\s+a?round)?|\bwhirl(?:s|ing)?\b"),
)
_COLOUR = "|".join(COLOURS)
_SHAPE = "|".join(SHAPES)
_UNCOLOURED = "".join(f"(?<!{c} )" for c in COLOURS)  # "two red circles" is no motion
_MOTION = [(name, re.compile(p.replace("{colour}", _COLOUR).replace("{shape}", _SHAPE).replace("{not_coloured}", _UNCOLOURED)))
           for name, p in _READ]
_SYNONYMS = ((r"\bviolet\b", "purple"), (r"\bgr[ae]y\b", "grey"), (r"\bdark blue(?=\s+(?:background|backdrop))", "navy"),
             (r"\bnavy blue\b", "navy"), (r"\b(?:disc|disk|ball|dot)\b", "circle"), (r"\bbox\b", "square"))
_THING = re.compile(rf"\b(?:({_COLOUR})(?:,?\s+(?:and\s+)?(?:~+|\w+(?=\s+~)|big|small|large|little|flat))*\s+)?({_SHAPE})(s?)\b")
_GROUND = re.compile(rf"\b({'|'.join(BACKGROUNDS)})\s+(?:background|backdrop|ground)|"
                     rf"background(?:\s+(?:is|of))?\s*:?\s+({'|'.join(BACKGROUNDS)})\b|\bon\s+({'|'.join(BACKGROUNDS)})\b")
_FOREIGN = re.compile(r"\b(orange|pink|brown|black|grey|navy|cyan|teal|turquoise|magenta|gold|golden|silver|lime|violet)\s+"
                      rf"({_SHAPE})\b")
_OTHER = re.compile(r"\b(hexagon|pentagon|octagon|rectangle|cross|diamond|heart|oval|ellipse|cube|cat|dog|fox|car|person|man|"
                    r"woman|tree|house)s?\b")


_NO_GROUND = re.compile(rf"\b({_COLOUR}|orange|pink|brown|cyan)\s+(?:background|backdrop)|"
                        rf"background\s+is\s+({_COLOUR}|orange|pink)\b")


def known_words() -> str:
    """All that a prompt of this world may speak of, in one line (for errors and help)."""
    return (f"colours {', '.join(COLOURS)}; shapes {', '.join(SHAPES)}; motions "
            f"{', '.join(PHRASES[m][0] for m in MOTIONS)}; backgrounds {', '.join(BACKGROUNDS)}")


def _refuse(what: str, prompt: str) -> SanaVideoError:
    return SanaVideoError(what, found=repr(prompt[:120]), expected=known_words(),
                          action="Write for instance: A red circle bounces up and down on a black background")


def parse(prompt: str) -> Wanted:
    """What the prompt states. Raises SanaVideoError, with the known words, where it speaks of nothing this world has."""
    text = re.sub(r"\s+", " ", prompt.lower().replace("\u2019", "'")).strip()
    text = re.sub(r"motion score: \d+\.?", "", text)
    for pattern, word in _SYNONYMS:
        text = re.sub(pattern, word, text)
    ground, text = _read_ground(text)
    motions, text = _read_motions(text)
    for other in (_NO_GROUND.search(text), _FOREIGN.search(text), _OTHER.search(text)):
        if other:
            raise _refuse(f"The embedded model knows no {other.group(0)}", prompt)
    found = list(_THING.finditer(text))
    if not found:
        raise _refuse("The prompt names no shape", prompt)
    if len(found) > 2 or any(m.group(3) for m in found):
        raise _refuse("The embedded model shows one thing or two, each named with 'a'", prompt)
    moves = _assign(motions, found, prompt)
    places = _read_places(text, found)
    return Wanted(tuple(WantedThing(m.group(2), m.group(1), move, place) for m, move, place in zip(found, moves, places)), ground)


def _read_ground(text: str) -> tuple[str | None, str]:
    match = _GROUND.search(text)
    if not match:
        return None, text
    return next(g for g in match.groups() if g), text[: match.start()] + " " * len(match.group(0)) + text[match.end() :]


def _read_motions(text: str) -> tuple[list[tuple[int, str]], str]:
    """[(position, motion)] in order, and the text with these phrases blanked by ``~``."""
    found = []
    for name, pattern in _MOTION:
        for match in pattern.finditer(text):
            found.append((match.start(), name))
        text = pattern.sub(lambda m: "~" * len(m.group(0)), text)
    return sorted(found), text


def _assign(motions: list[tuple[int, str]], things: list[re.Match], prompt: str) -> list[str | None]:
    """A motion belongs to the thing before it; one that stands before a thing without its own ("a spinning star") to that."""
    moves: list[list[str]] = [[] for _ in things]
    for at, name in motions:
        inside = [i for i, m in enumerate(things) if m.start() <= at < m.end()]
        before = [i for i, m in enumerate(things) if m.end() <= at]
        owner = inside[0] if inside else before[-1] if before else 0
        if not inside and before and moves[owner] and owner + 1 < len(things):
            owner += 1
        moves[owner].append(name)
    if len(things) == 2 and motions and not moves[1] and re.search(r"\b(both|each)\b", prompt.lower()):
        moves[1] = moves[0]
    for thing, names in zip(things, moves):
        if len(set(names)) > 1:
            raise _refuse(f"The {thing.group(0).replace('~', '').strip()} cannot do two things at once", prompt)
    return [names[0] if names else None for names in moves]


_LOWER = "below|under|beneath|underneath"
_UP, _DOWN = r"(?:at|on|near) the top|\bupper\b|\bat top\b", r"(?:at|on|near) the bottom|\blower\b|\bat bottom\b"


def _read_places(text: str, things: list[re.Match]) -> list[str | None]:
    if len(things) < 2:
        return [None]
    first, between, after = text[: things[0].start()], text[things[0].end() : things[1].start()], text[things[1].end() :]
    up, down = [bool(re.search(_UP, part)) for part in (first, between, after)], [
        bool(re.search(_DOWN, part)) for part in (first, between, after)]
    upper = re.search(r"\b(?:above|over|on top of)\b(?! it)", between) or re.search(rf"\b(?:{_LOWER}) it\b", text)
    lower = re.search(rf"\b(?:{_LOWER})\b(?! it)", between) or re.search(r"\b(?:above|over) it\b", text)
    # "at the top A, at the bottom B" or "A at the top, B at the bottom": a word before the first thing shifts the others.
    upper = upper or up[0] or (down[1] and not up[1] and not down[0]) or (up[1] and down[2])
    lower = lower or down[0] or (up[1] and not down[1] and not up[0] and not down[2]) or (down[1] and up[2])
    if bool(upper) == bool(lower):
        return [None, None]
    return ["above", "below"] if upper else ["below", "above"]
