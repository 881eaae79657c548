"""The prompt schedule of a film as readable text.

One line a part, in the order of time::

    [0-5s] a red fox runs through snow; motion 20
    [5-12.5s] the fox stops and looks up; motion 20 -> 5
    [12.5s-] it lies down                              # to the end

or by blocks, counted from 1::

    [block 1] a red fox runs through snow
    [block 2-4] the fox stops
    [block 5-] it lies down; seed 7

Times are seconds (``5``, ``5s``, ``7.5s``) or ``m:ss`` (``1:05``). A part covers its start up to but not including its end. Parts
must begin at 0 (block 1), follow each other without gap or overlap and all be in seconds or all in blocks. After the last
prompt words may stand, each after a semicolon: ``motion N`` or ``motion N -> M`` (a straight line over the part), ``seed N``.
A semicolon that belongs to the prompt is written ``\\;``, a number sign ``\\#``. ``#`` begins a comment; a line without brackets
goes on with the prompt above. Every error names line and column. Not covered: turning prompts into conditioning.
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

from ..errors import SanaVideoError
from .plan import MAX_BLOCKS, Span, seconds_of

MAX_TEXT, MAX_LINES, MAX_MOTION = 200_000, 2_000, 100
MAX_SECONDS = 100_000.0
MAX_SEED = (1 << 64) - 1
_TIME = re.compile(r"(?:(\d{1,5}):([0-5]?\d(?:\.\d{1,6})?)|(\d{1,7}(?:\.\d{1,6})?))(s?)")
_BLOCKS = re.compile(r"(?i)blocks?(?=[\s\d])")
_COMMENT = re.compile(r"(?<!\\)#.*")


class Part(NamedTuple):
    """One part: from ``start`` to ``end`` (inf = to the end of the film) in ``unit`` "s" or "block" (blocks counted from 0
    here). ``motion`` is None or (first, last) score; ``line`` is where it stands in the text."""

    unit: str
    start: float
    end: float
    prompt: str
    motion: tuple[float, float] | None = None
    seed: int | None = None
    line: int = 0


class Cue(NamedTuple):
    """What one block follows: the prompt, a whole motion score (None = not given) and a seed (None = not given)."""

    prompt: str
    motion: int | None
    seed: int | None


class ScheduleError(SanaVideoError):
    """A text that is no schedule. ``line`` and ``column`` count from 1."""

    def __init__(self, what: str, line: int, column: int, **parts):
        self.line, self.column = line, column
        super().__init__(f"Prompt schedule, line {line}, column {column}: {what}", **parts)


def parse_schedule(text: str) -> tuple[Part, ...]:
    """The parts of a schedule in order, checked: no gap, no overlap, one unit, known words only."""
    if not isinstance(text, str) or not text.strip():
        raise ScheduleError("the schedule is empty", 1, 1, expected="for example [0-5s] a fox runs; motion 20")
    if len(text) > MAX_TEXT or text.count("\n") >= MAX_LINES:
        raise ScheduleError("the schedule is too long", 1, 1, found=f"{len(text)} characters, {text.count(chr(10)) + 1} lines",
                            expected=f"at most {MAX_TEXT} characters and {MAX_LINES} lines")
    drafts: list[_Draft] = []
    for number, raw in enumerate(text.split("\n"), 1):
        line = _COMMENT.sub("", raw.rstrip("\r"))
        if not line.strip():
            continue
        column = len(line) - len(line.lstrip()) + 1
        if line.lstrip().startswith("["):
            drafts.append(_Draft(*_range(line, number, column)))
        elif drafts:
            drafts[-1].add(line, 0, number)
        else:
            raise ScheduleError("a part begins with its time in brackets", number, column, found=line.strip()[:40],
                                expected="for example [0-5s] or [block 1]")
    if not drafts:
        raise ScheduleError("the schedule holds only comments", 1, 1, expected="for example [0-5s] a fox runs; motion 20")
    parts = tuple(draft.part() for draft in drafts)
    _check_order(parts, drafts)
    return parts


class _Draft:
    """A part while its lines are read: the text with the place of every character."""

    def __init__(self, unit: str, start: float, end: float, number: int, column: int, rest: str, at: int):
        self.unit, self.start, self.end, self.number, self.column = unit, start, end, number, column
        self.text, self.places = "", []
        self.add(rest, at, number)

    def add(self, text: str, at: int, number: int) -> None:
        """``text`` stands at column ``at`` (from 0) of line ``number``."""
        if self.text:
            self.text += " "
            self.places.append((number, at + 1))
        self.text += text
        self.places += [(number, at + i + 1) for i in range(len(text))]

    def place(self, index: int) -> tuple[int, int]:
        return self.places[index] if index < len(self.places) else (self.number, self.column)

    def part(self) -> Part:
        pieces, start = [], 0
        for match in re.finditer(r"(?<!\\);", self.text):
            pieces.append((start, self.text[start:match.start()]))
            start = match.end()
        pieces.append((start, self.text[start:]))
        prompt = " ".join(pieces[0][1].replace("\\;", ";").replace("\\#", "#").split())
        if not prompt:
            raise ScheduleError("this part has no prompt", *self.place(0),
                                expected="the prompt after the brackets", action="Write what the video shows there")
        words: dict[str, object] = {}
        for at, piece in pieces[1:]:
            if not piece.strip():
                continue
            where = self.place(at + len(piece) - len(piece.lstrip()))
            name, value = _word(piece.strip(), where)
            if name in words:
                raise ScheduleError(f"'{name}' stands twice in this part", *where)
            words[name] = value
        return Part(self.unit, self.start, self.end, prompt, words.get("motion"), words.get("seed"), self.number)


def _word(piece: str, where: tuple[int, int]) -> tuple[str, object]:
    name, _, value = piece.partition(" ")
    value = value.strip()
    if name.lower() == "motion":
        match = re.fullmatch(r"(\d{1,3}(?:\.\d+)?)(?:\s*(?:->|→|\.\.|\bto\b)\s*(\d{1,3}(?:\.\d+)?))?", value)
        if not match:
            raise ScheduleError("the motion score cannot be read", *where, found=piece[:40],
                                expected="motion 20, or motion 20 -> 5")
        first, last = float(match[1]), float(match[2] or match[1])
        if max(first, last) > MAX_MOTION:
            raise ScheduleError("the motion score is too high", *where, found=piece[:40], expected=f"0 to {MAX_MOTION}")
        return "motion", (first, last)
    if name.lower() == "seed":
        if not re.fullmatch(r"\d{1,20}", value) or int(value) > MAX_SEED:
            raise ScheduleError("the seed cannot be read", *where, found=piece[:40], expected=f"a whole number to {MAX_SEED}")
        return "seed", int(value)
    raise ScheduleError("this word is not known", *where, found=piece[:40], expected="motion or seed after a semicolon",
                        action="Write \\; where a semicolon belongs to the prompt")


def _range(line: str, number: int, column: int) -> tuple[str, float, float, int, int, str, int]:
    """(unit, start, end, line, column, rest of the line, where the rest begins) of a line that begins with a bracket."""
    close = line.find("]", column)
    if close < 0:
        raise ScheduleError("the bracket is not closed", number, column, expected="for example [0-5s]")
    inside, at = line[column:close], column + 1
    blocks = _BLOCKS.match(inside.lstrip())
    at += len(inside) - len(inside.lstrip()) + (blocks.end() if blocks else 0)
    body = inside.strip()[blocks.end() if blocks else 0:]
    at, body = at + len(body) - len(body.lstrip()), body.lstrip()
    first, dash, last = (p.strip() for p in body.replace("–", "-").partition("-"))
    if blocks:
        start, end = _block(first, number, at), math.inf
        if not dash:
            end = start + 1
        elif last:
            end = _block(last, number, at + body.find(last)) + 1
        unit = "block"
    else:
        if not dash:
            raise ScheduleError("a part in seconds needs a start and an end", number, at, found=f"[{inside}]",
                                expected="[0-5s], or [5s-] for all the rest")
        start = _seconds(first, number, at)
        end = _seconds(last, number, at + body.find(dash) + 1) if last else math.inf
        unit = "s"
    if end <= start:
        raise ScheduleError("this part ends before it begins", number, column, found=f"[{inside}]")
    return unit, start, end, number, column, line[close + 1:], close + 1


def _seconds(text: str, number: int, column: int) -> float:
    match = _TIME.fullmatch(text)
    if not match or (match[1] and match[4]):
        raise ScheduleError("this is no time", number, column, found=text[:40] or "nothing", expected="5s, 7.5s or 1:05")
    value = 60 * int(match[1]) + float(match[2]) if match[1] else float(match[3])
    if value > MAX_SECONDS:
        raise ScheduleError("this time is too late", number, column, found=text[:40], expected=f"at most {MAX_SECONDS:g}s")
    return value


def _block(text: str, number: int, column: int) -> int:
    if not re.fullmatch(r"\d{1,6}", text) or not 1 <= int(text) <= MAX_BLOCKS:
        raise ScheduleError("this is no block number", number, column, found=text[:40] or "nothing",
                            expected=f"1 to {MAX_BLOCKS}; the first block is 1")
    return int(text) - 1


def _show(unit: str, value: float) -> str:
    return f"block {int(value) + 1}" if unit == "block" else f"{value:g}s"


def _check_order(parts: tuple[Part, ...], drafts: list[_Draft]) -> None:
    expected = 0.0
    for part, draft in zip(parts, drafts):
        where = (draft.number, draft.column)
        if part.unit != parts[0].unit:
            raise ScheduleError("seconds and blocks are mixed", *where, expected="all parts in seconds, or all in blocks")
        if part.start != expected:
            problem = "overlaps the part before" if part.start < expected else "leaves a gap"
            if part is parts[0]:
                problem = "does not begin at the beginning"
            raise ScheduleError(f"this part {problem}", *where, found=f"it begins at {_show(part.unit, part.start)}",
                                expected=_show(part.unit, expected) if expected < math.inf else "nothing after the end")
        expected = part.end


def part_of(parts: tuple[Part, ...], span: Span, fps: float, stride: int = 4) -> tuple[Part, float]:
    """The part that a block follows (the one its middle lies in) and how far into it, 0 to 1 (for a motion curve)."""
    if parts[0].unit == "block":
        at = float(span.index)
    else:
        at = sum(seconds_of(span, fps, stride)) / 2
    for part in parts:
        if at < part.end:
            break
    else:
        raise SanaVideoError("The film is longer than its prompt schedule",
                             found=f"block {span.index + 1} at {seconds_of(span, fps, stride)[0]:.2f}s",
                             expected=f"at most {_show(part.unit, part.end)}",
                             action="Let the last part run to the end: [..s-] or [block ..-]")
    if part.end == math.inf:
        return part, 0.0
    if part.unit == "block":
        return part, (at - part.start) / (part.end - 1 - part.start) if part.end - part.start > 1 else 0.0
    return part, min(max((at - part.start) / (part.end - part.start), 0.0), 1.0)


def cue_of(parts: tuple[Part, ...], span: Span, fps: float, stride: int = 4) -> Cue:
    """What block ``span`` follows. A motion curve over an open end keeps its first value."""
    part, along = part_of(parts, span, fps, stride)
    motion = None if part.motion is None else round(part.motion[0] + along * (part.motion[1] - part.motion[0]))
    return Cue(part.prompt, motion, part.seed)


def scores_of(part: Part, default: int) -> tuple[int, ...]:
    """Every whole motion score that blocks of this part can ask for, in the order of time."""
    if part.motion is None:
        return (default,)
    first, last = (round(v) for v in part.motion)
    return tuple(range(first, last + 1)) if first <= last else tuple(range(first, last - 1, -1))
