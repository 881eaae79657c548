"""``run.py judge --film BLOCKS``: does the embedded causal model keep to the prompt over a long film, and is the film one piece?

*Adherence* in blocks 1-10 and in the last ten. A window is two blocks long and the next one begins two blocks later: about 80
frames, as long as the clips of ``run.py judge``, so the two numbers compare; it holds a border between blocks, so a jump there
counts against it; and no frame is judged twice.
*Continuity*: how far a thing lies from where the two frames before would take it (``|x[t+1] - 2 x[t] + x[t-1]|``, px of 160x96),
over borders of blocks and, for comparison, over borders of latent frames inside blocks (a border of blocks is one of these
too, so the VAE plays the same part in both). Once with the state carried, once with every block started afresh: the same
prompts, noise and positions, but an empty state.
*Prompt switch*: films whose prompt becomes one of other colours, shapes and motions; after how many blocks the judge accepts it.
*Steps*: adherence with the model's steps and with many, and of the clip model (``--compare-steps``).

Films are decoded and read block by block; memory does not grow with their length. ``--world`` reads films of the renderer
instead, which shows what a perfect model would get. Not covered: how a window is read (``judge.py``).
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import SanaVideoError
from ..sampling.blocks import Block, Condition, Recipe, sample_blocks, seeded_noise
from ..sampling.plan import MAX_BLOCKS, BlockPlan, plan_blocks
from ..state import RecurrentState
from ..vae.wan import WAN21_MEAN, WanCache, denormalize
from . import WINDOW
from .captions import Wanted, caption, parse
from .evaluate import MiniModel, held_out_prompts
from .film import MAX_CFG, MAX_STEPS, MAX_WINDOW, LongModel, in_range, pick_device, recipe_of
from .judge import ATTRIBUTES, Verdict, adherence, judge, positions
from .render import render
from .world import Scene, random_scene

WINDOW_BLOCKS = 2  # blocks that are judged together
SPAN = 10  # blocks at the beginning and at the end that are judged; and so many are started afresh
BEFORE = 8  # frames of the block before that are read with a block
STRIDE = 4  # frames a latent frame
SWITCH_BEFORE, SWITCH_AFTER = 4, 4  # blocks of the two prompts in the films that change theirs


class Case(NamedTuple):
    """One film: a held-out prompt and its scene, and those that it changes to in the test of switches."""

    prompt: str
    scene: Scene
    later: str
    later_scene: Scene


def draw_cases(films: int, seed: int = 2) -> list[Case]:
    """The prompts of ``run.py judge``, each with another held-out one that shares no colour, shape or motion with it."""
    rng = random.Random(seed + 1)
    cases = []
    for prompt, scene in zip(*held_out_prompts(films, seed)):
        later = scene
        while not _differ(scene, later):
            later = random_scene(rng, held_out=True)
        cases.append(Case(prompt, scene, caption(later, rng), later))
    return cases


def _differ(a: Scene, b: Scene) -> bool:
    return all(mine != theirs for x in a.things for y in b.things for mine, theirs in zip(x.triple, y.triple))


# ---------------------------------------------------------------------------------------------------------------- films

class ModelFilms:
    """Films of the model. Each method yields the pictures of one block of all the films ``rows``: uint8 ``[B, F, H, W, 3]``
    on the model's device. Film i starts from noise ``seed + i``; a batch equals single films up to rounding."""

    def __init__(self, model: LongModel, cases: Sequence[Case], recipe: Recipe, window: int = WINDOW, seed: int = 0):
        self.model, self.cases, self.recipe, self.window, self.seed = model, cases, recipe, window, seed

    def carried(self, rows: range, blocks: int) -> Iterator[Tensor]:
        """Films as the sampler makes them."""
        return self._pictures(self._sample(rows, self._plan(blocks), self._texts(rows)))

    def afresh(self, rows: range, blocks: int) -> Iterator[Tensor]:
        """The same with an empty state before every block."""
        return self._pictures(self._restarting(rows, blocks))

    def switched(self, rows: range, before: int, after: int) -> Iterator[Tensor]:
        """Films of ``before`` blocks of the first prompt and ``after`` blocks of the later one."""
        texts = self._texts(rows), self._texts(rows, later=True)
        plan = self._plan(before + after)
        return self._pictures(self._sample(rows, plan, lambda block: texts[block >= before], switch=True))

    def _plan(self, blocks: int) -> BlockPlan:
        return plan_blocks(blocks, self.model.spec.block_frames)

    def _texts(self, rows: range, later: bool = False) -> Condition:
        return self.model.condition([self.cases[i].later if later else self.cases[i].prompt for i in rows], cfg=self.recipe.cfg)

    def _sample(self, rows: range, plan: BlockPlan, texts, switch: bool = False, state=None) -> Iterator[Block]:
        streams = [seeded_noise(self.seed + i) for i in rows]
        return sample_blocks(
            self.model.network, plan, texts, spec=self.model.spec, size=self.model.size, recipe=self.recipe, batch=len(rows),
            state=state, device=self.model.device, window=self.window, recompute=switch, keep_undo=switch, commit_last=False,
            noise=lambda block, step, shape: torch.cat([draw(block, step, (1, *shape[1:])) for draw in streams]))

    def _restarting(self, rows: range, blocks: int) -> Iterator[Block]:
        spec, texts = self.model.spec, self._texts(rows)
        grid = tuple(n // p for n, p in zip(self.model.size, spec.patch[1:]))
        count = len(rows) * (1 if self.recipe.cfg == 1 else 2)
        for span in self._plan(blocks).spans():
            empty = RecurrentState.empty(spec.name, grid, count, window=self.window)
            yield from self._sample(rows, BlockPlan((span.frames,), span.index, span.start), texts,
                                    state=empty._replace(blocks=span.index, position=span.start))

    def _pictures(self, blocks: Iterable[Block]) -> Iterator[Tensor]:
        cache, weight = WanCache(), self.model.vae.conv2.weight
        for block in blocks:
            latent = denormalize(block.latent) if block.latent.shape[1] == len(WAN21_MEAN) else block.latent
            with torch.no_grad():
                pieces = [(p.clamp(-1, 1) * 127.5 + 127.5).to(torch.uint8)
                          for p in self.model.vae.decode_stream(latent.to(weight.device, weight.dtype), cache)]
            yield torch.cat(pieces, 2).movedim(1, -1)


class WorldFilms:
    """Films of the renderer with the same methods: what a perfect model would make, and what forgetting would look like."""

    def __init__(self, cases: Sequence[Case], block_frames: int = 10, seed: int = 0, device: torch.device | str = "cpu"):
        self.cases, self.block_frames, self.seed, self.device = cases, block_frames, seed, device

    def carried(self, rows: range, blocks: int) -> Iterator[Tensor]:
        """Endless motion."""
        return self._draw(blocks, lambda block: [self.cases[i].scene for i in rows])

    def afresh(self, rows: range, blocks: int) -> Iterator[Tensor]:
        """Every block begins somewhere in its motion."""
        def scenes(block: int) -> list[Scene]:
            rng = [random.Random(f"{self.seed} {i} {block}") for i in rows]
            return [replace(self.cases[i].scene, things=tuple(replace(a, phase=r.random()) for a in self.cases[i].scene.things))
                    for i, r in zip(rows, rng)]

        return self._draw(blocks, scenes)

    def switched(self, rows: range, before: int, after: int) -> Iterator[Tensor]:
        """The later scene follows at once."""
        return self._draw(before + after,
                          lambda block: [self.cases[i].scene if block < before else self.cases[i].later_scene for i in rows])

    def _draw(self, blocks: int, scenes: Callable[[int], list[Scene]]) -> Iterator[Tensor]:
        for span in plan_blocks(blocks, self.block_frames).spans():
            start, end = span.pixels(STRIDE)
            yield render(scenes(span.index), end - start, start=start, device=self.device)


# -------------------------------------------------------------------------------------------------------------- reading

def window_ends(blocks: int) -> tuple[set[int], set[int]]:
    """The last blocks (from 0) of the windows at the beginning and of those at the end of a film."""
    span = min(SPAN, blocks) // WINDOW_BLOCKS * WINDOW_BLOCKS
    return (set(range(WINDOW_BLOCKS - 1, span, WINDOW_BLOCKS)),
            set(range(blocks - span + WINDOW_BLOCKS - 1, blocks, WINDOW_BLOCKS)))


def bends(places: Tensor) -> Tensor:
    """``[F - 2, n]`` px: how far each place ``[F, n, 2]`` from the third on lies from where the two before point to."""
    return (places[2:] - 2 * places[1:-1] + places[:-2]).norm(dim=-1)


@dataclass
class FilmReading:
    """What was read of films. ``border`` and ``inside``: bends in px at borders of blocks and of latent frames inside blocks,
    one a thing; ``unread``: borders where a thing was not seen."""

    early: list[Verdict] = field(default_factory=list)
    late: list[Verdict] = field(default_factory=list)
    border: list[float] = field(default_factory=list)
    inside: list[float] = field(default_factory=list)
    unread: int = 0

    def read(self, pictures: Iterable[Tensor], wanted: Sequence[Wanted], blocks: int, verdicts: bool = True,
             motion: bool = True) -> None:
        """Add films whose blocks are ``pictures`` (each ``[B, F, H, W, 3]``), ``wanted`` being what each of them should show."""
        early, late = window_ends(blocks) if verdicts else (set(), set())
        before: list[Tensor] = []  # the last blocks
        for number, now in enumerate(pictures):
            if before and motion:
                for film in torch.cat((before[-1][:, -BEFORE:], now), 1):
                    self._read_motion(bends(positions(film)))
            before = [*before, now][-WINDOW_BLOCKS:]
            if number in early or number in late:
                found = [judge(film, w) for film, w in zip(torch.cat(before, 1), wanted)]
                self.early += found if number in early else []
                self.late += found if number in late else []

    def _read_motion(self, bent: Tensor) -> None:
        at = BEFORE - 2  # of these three frames the first two lie in the block before
        if bent.shape[1] == 0 or not bool(bent[at].isfinite().all()):
            self.unread += 1
        else:
            self.border += bent[at].tolist()
        others = bent[at + STRIDE::STRIDE].flatten()
        self.inside += others[others.isfinite()].tolist()

    def least(self) -> float:
        """The lower of the adherence at the beginning and at the end."""
        return min(adherence(self.early), adherence(self.late))


def blocks_to_follow(pictures: Iterable[Tensor], wanted: Sequence[Wanted], switch: int) -> list[int | None]:
    """For each film the number of blocks from block ``switch`` (from 0) on until one alone shows what is ``wanted`` (1: the first
    does), None where none of them does."""
    found: list[int | None] = [None] * len(wanted)
    for number, now in enumerate(pictures):
        for i, film in enumerate(now):
            if number >= switch and found[i] is None and judge(film, wanted[i]).ok:
                found[i] = number - switch + 1
    return found


class Evaluation:
    """All measures of one set of films, made in batches with a line of progress on stderr."""

    def __init__(self, films, cases: Sequence[Case], batch: int):
        self.films, self.cases, self.batch = films, cases, batch
        self.began = time.monotonic()

    def reading(self, blocks: int, afresh: bool = False, motion: bool = True) -> FilmReading:
        """Adherence (unless ``afresh``) and bends of films of ``blocks`` blocks."""
        out, make = FilmReading(), self.films.afresh if afresh else self.films.carried
        for rows in self._batches():
            wanted = [parse(self.cases[i].prompt) for i in rows]
            what = "every block afresh" if afresh else "state carried"
            out.read(self._told(make(rows, blocks), what, rows, blocks), wanted, blocks, not afresh, motion)
        return out

    def switches(self, before: int = SWITCH_BEFORE, after: int = SWITCH_AFTER) -> list[int | None]:
        """Blocks until each film follows its later prompt."""
        found: list[int | None] = []
        for rows in self._batches():
            wanted = [parse(self.cases[i].later) for i in rows]
            pictures = self._told(self.films.switched(rows, before, after), "prompt switch", rows, before + after)
            found += blocks_to_follow(pictures, wanted, before)
        return found

    def _batches(self) -> list[range]:
        count = len(self.cases)
        return [range(start, min(start + self.batch, count)) for start in range(0, count, self.batch)]

    def _told(self, pictures: Iterable[Tensor], what: str, rows: range, blocks: int) -> Iterator[Tensor]:
        for number, now in enumerate(pictures):
            yield now
            print(f"\r{what}: films {rows[0] + 1}-{rows[-1] + 1} of {len(self.cases)}, block {number + 1} of {blocks}, "
                  f"{time.monotonic() - self.began:.0f} s   ", end="", file=sys.stderr, flush=True)
        print(file=sys.stderr)


# ----------------------------------------------------------------------------------------------------------------- report

def adherence_table(reading: FilmReading, blocks: int) -> str:
    """Share right of each attribute in the windows of the beginning and of the end, then the commonest reasons of failure."""
    span, columns = max(window_ends(blocks)[0]) + 1, (reading.early, reading.late)
    heads = f"blocks 1-{span}", f"blocks {blocks - span + 1}-{blocks}"
    lines = [f"{'attribute':12} {heads[0]:>14} {heads[1]:>14}"]
    for name in ATTRIBUTES:
        marks = [[getattr(v, name) for v in column if getattr(v, name) is not None] for column in columns]
        if all(marks):
            lines.append(f"{name:12} " + " ".join(f"{sum(m) / len(m):14.3f}" for m in marks))
    lines.append(f"{'all':12} " + " ".join(f"{adherence(c):14.3f}" for c in columns))
    lines.append(f"{'windows':12} " + " ".join(f"{len(c):14d}" for c in columns))
    judged = {id(v): v for column in columns for v in column}.values()  # in a short film a window may count for both
    failed = Counter(r for v in judged if not v.ok for r in v.reasons)
    return "\n".join(lines + [f"{count:5d} x {reason}" for reason, count in failed.most_common(8)])


def continuity_table(carried: FilmReading, afresh: FilmReading) -> str:
    """Mean, median and 95th percentile of the bends in px, the difference of the means, and how many borders were read."""
    numbers = f"{'mean':>7} {'median':>7} {'95 %':>7}"
    lines = [f"{'continuity, px':20} {'at borders of blocks':>23} {'inside blocks':>23} {'more':>7}",
             f"{'':20} {numbers} {numbers} {'(mean)':>7}  things read at borders"]
    for name, reading in (("state carried", carried), ("every block afresh", afresh)):
        border, inside = (torch.tensor(v or [float("nan")]) for v in (reading.border, reading.inside))
        cells = [f"{float(f):7.2f}" for v in (border, inside) for f in (v.mean(), v.median(), v.quantile(0.95))]
        lines.append(f"{name:20} {' '.join(cells)} {float(border.mean() - inside.mean()):7.2f}  {len(reading.border)}"
                     f" ({reading.unread} borders not read)")
    return "\n".join(lines)


def switch_line(found: Sequence[int | None]) -> str:
    """How many films follow a new prompt, and how soon."""
    shares = [sum(n is not None and n <= most for n in found) / len(found) for most in range(1, SWITCH_AFTER + 1)]
    told = ", ".join(f"{most}: {share:.3f}" for most, share in enumerate(shares, 1))
    return f"prompt switch: share of films that show the new prompt within blocks {told} (two blocks: {shares[1]:.3f})"


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="run.py judge --film", description="Adherence, continuity and prompt switches of "
                                     "films of the embedded causal model.")
    parser.add_argument("--film", type=int, required=True, metavar="BLOCKS", help="length of the films; a block is 2.5 seconds")
    parser.add_argument("--films", type=int, default=8, help="number of films (default 8)")
    parser.add_argument("--compare-steps", type=int, nargs="?", const=20, metavar="STEPS",
                        help="adherence with so many steps too (20 when no number is given), and of the clip model")
    parser.add_argument("--world", action="store_true", help="films of the renderer instead: what a perfect model would get")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="sampling steps a block (default: the model's)")
    parser.add_argument("--cfg", type=float, help="guidance (default: the model's)")
    parser.add_argument("--window", type=int, default=WINDOW, help=f"blocks that are remembered, 0 for all (default {WINDOW})")
    parser.add_argument("--batch", type=int, help="films at once (default 64 on a GPU, 4 without)")
    parser.add_argument("--device", help="default: cuda where there is one")
    options = parser.parse_args(argv)
    for name, low, high in (("film", WINDOW_BLOCKS, MAX_BLOCKS), ("films", 1, 100_000), ("batch", 1, 100_000),
                            ("steps", 1, MAX_STEPS), ("cfg", 0, MAX_CFG), ("window", 0, MAX_WINDOW), ("seed", 0, 1 << 62)):
        in_range(name, getattr(options, name), low, high)
    in_range("compare-steps", options.compare_steps, 1, MAX_STEPS)
    if options.world and options.compare_steps:
        raise SanaVideoError("The renderer has no steps", action="Leave out --world or --compare-steps")
    return options


def judge_films(argv: Sequence[str]) -> int:
    """``run.py judge --film BLOCKS ...``. Prints ``adherence: X`` last, the lower of beginning and end; returns 0."""
    options = _arguments(argv)
    device = pick_device(options.device)
    batch, cases, blocks = options.batch or (64 if device.type == "cuda" else 4), draw_cases(options.films), options.film
    if options.world:
        model, films, how = None, WorldFilms(cases, seed=options.seed, device=device), "drawn by the renderer"
    else:
        model = LongModel.load(device)
        recipe = recipe_of(model.spec, options.steps, options.cfg)
        films = ModelFilms(model, cases, recipe, options.window, options.seed)
        how = f"{recipe.count} steps, CFG {recipe.cfg:g}, window {options.window}, {device}"
    evaluation = Evaluation(films, cases, batch)
    carried = evaluation.reading(blocks)
    afresh = evaluation.reading(min(blocks, SPAN), afresh=True)
    found = evaluation.switches()
    print(f"{len(cases)} films of {blocks} blocks from held-out prompts, {how}")
    print(adherence_table(carried, blocks))
    print(continuity_table(carried, afresh))
    print(switch_line(found))
    if options.compare_steps:
        print(_compare(model, cases, options, batch, carried, films.recipe))
    print(f"adherence: {carried.least():.3f}")
    return 0


def _compare(model: LongModel, cases: Sequence[Case], options: argparse.Namespace, batch: int, carried: FilmReading,
             recipe: Recipe) -> str:
    """Adherence at the beginning of films with other steps, and of clips (two blocks long) of the clip model."""
    many = recipe_of(model.spec, options.compare_steps, options.cfg)
    films = ModelFilms(model, cases, many, options.window, options.seed)
    other = Evaluation(films, cases, batch).reading(min(options.film, SPAN), motion=False)
    clips, verdicts = MiniModel(model.device), []
    for start in range(0, len(cases), batch):
        part = [case.prompt for case in cases[start:start + batch]]
        verdicts += [judge(clip, parse(prompt)) for prompt, clip in zip(part, clips.clips(part, options.seed + start))]
    spec = clips.network.spec
    rows = ((f"{recipe.count} steps ({recipe.solver})", carried.early), (f"{many.count} steps ({many.solver})", other.early),
            (f"clip model, {spec.steps} steps, CFG {spec.cfg:g}", verdicts))
    return "\n".join(f"steps: {name:34} {adherence(marks):.3f} of {len(marks)}" for name, marks in rows)
