"""``run.py film``: a film of the embedded causal model in a run folder, without the server (design 3.4 and 3.6).

Every finished block is on disk and in ``film.mp4`` at once. The same command goes on where a run was stopped; more blocks make
the film longer; another prompt or seed makes the blocks from the first changed one on again. What is not given on the
command line is what the film in the folder was made with. Not covered: run folders themselves (``film``), measuring films
(``evaluate_film.py``).
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoint.integrity import digests
from ..errors import SanaVideoError
from ..film import Film, FilmBlock, FilmPlan, FilmSettings, FilmVideo, WanStream, make_film
from ..film.plan import fingerprint
from ..sampling.blocks import Condition, Recipe, StepHook, recipe_of, sample_blocks
from ..sampling.guidance import Caption
from ..sampling.plan import BlockPlan, Span, plan_blocks, seconds_of
from ..sampling.schedule_text import MAX_SEED, Cue, cue_of, parse_schedule
from ..specs import ModelSpec
from ..text.prompts import positive_text
from . import PROMPTS, WINDOW, load
from .captions import parse

MAX_STEPS, MAX_CFG, MAX_WINDOW = 1000, 30.0, 1000


def weights_print(module: torch.nn.Module) -> str:
    """Fingerprint of all weights: names, shapes, dtypes and every value."""
    return fingerprint(sorted(digests({name: t.cpu() for name, t in module.state_dict().items()}).items()))


class LongModel:
    """The embedded causal model on ``device``: the network, what the prompts say to it, and the VAE.

    network: with ``spec``; text: with ``positive`` and ``negative`` as ``text.encode.TextEncoder`` has them.
    """

    def __init__(self, network, text, vae, device: torch.device | str = "cpu"):
        self.network, self.text, self.vae, self.device = network, text, vae, torch.device(device)
        self.spec: ModelSpec = network.spec
        stride = self.spec.vae.stride
        self.size = self.spec.size[1] // stride[1], self.spec.size[0] // stride[2]  # latent height and width

    @classmethod
    def load(cls, device: torch.device | str = "cpu") -> LongModel:
        """The shipped weights; SanaVideoError where this copy of the pack has none."""
        return cls(*load(device, long=True), device)

    @torch.no_grad()
    def condition(self, prompts: Sequence[str], motion: int | None = None, cfg: float = 1.0) -> Condition:
        """The texts of one block of ``len(prompts)`` films; ``motion`` None is the spec's score, a negative one says nothing."""
        score = self.spec.motion_score if motion is None else motion
        negative = Caption(*self.text.negative([""])) if cfg != 1 else None
        return Condition(Caption(*self.text.positive(list(prompts), score)), negative)


# ---------------------------------------------------------------------------------------------------------------- plan

def cues_of(spans: Sequence[Span], spec: ModelSpec, prompt: str | None, seed: int | None, before: FilmPlan | None) -> list[Cue]:
    """What each block shows, complete with motion score and seed.

    ``prompt`` is one sentence or a schedule (``[0-5s] ...``). None for it or for ``seed`` takes those of the film ``before``
    (of its last block where it is shorter), else the first example prompt and 0. A seed in a schedule goes before ``seed``.
    """
    old = [] if before is None else [Cue(b.prompt, b.motion, b.seed) for b in before.blocks]
    known = [(old or [Cue(PROMPTS[0], None, 0)])[min(i, max(len(old) - 1, 0))] for i in range(len(spans))]
    if prompt is None:
        cues = [cue._replace(seed=None) for cue in known]
    elif not prompt.strip():
        raise SanaVideoError("The prompt is empty", action=f"Write for instance: {PROMPTS[0]}")
    elif prompt.lstrip().startswith("["):
        parts = parse_schedule(prompt)
        cues = [cue_of(parts, span, spec.fps, spec.vae.stride[0]) for span in spans]
    else:
        cues = [Cue(" ".join(prompt.split()), None, None)] * len(spans)
    seeds = [cue.seed if seed is None else seed for cue in known]
    return [Cue(cue.prompt, spec.motion_score if cue.motion is None else cue.motion, own if cue.seed is None else cue.seed)
            for cue, own in zip(cues, seeds)]


def film_options(before: FilmPlan | None, steps: int | None, cfg: float | None, window: int | None):
    """(steps, cfg, window), each that is None as the film ``before`` has it; None or the model's own window without one."""
    recipe = {} if before is None else before.settings.recipe
    lists = [recipe[name] if isinstance(recipe.get(name), list) else [] for name in ("steps", "sigmas")]
    count = len(lists[0]) or len(lists[1]) - 1
    if steps is None and count > 0:
        steps = count
    if cfg is None and isinstance(recipe.get("cfg"), (int, float)):
        cfg = recipe["cfg"]
    if window is None:
        window = WINDOW if before is None else before.settings.window
    return steps, cfg, window


def film_plan(model: LongModel, cues: Sequence[Cue], plan: BlockPlan, recipe: Recipe, window: int) -> FilmPlan:
    """The film of ``cues``, one a block of ``plan``. Its contracts depend on texts and weights, not on the machine."""
    text = weights_print(model.text.network)
    keys = {(c.prompt, c.motion): fingerprint([text, positive_text(c.prompt, c.motion), recipe.cfg != 1]) for c in cues}
    blocks = tuple(FilmBlock(n, c.seed, keys[c.prompt, c.motion], prompt=c.prompt, motion=c.motion)
                   for n, c in zip(plan.lengths, cues, strict=True))
    settings = FilmSettings(model.spec.name, weights_print(model.network), model.size, recipe._asdict(), window)
    return FilmPlan(settings, blocks)


def _sampler(model: LongModel, film: Film, recipe: Recipe, on_step: StepHook | None):
    """``sample`` for :func:`make_film`."""
    plan, spans = film.plan, film.plan.block_plan().spans()
    texts: dict[tuple[str, int | None], Condition] = {}

    def condition(index: int) -> Condition:
        block = plan.blocks[index]
        key = block.prompt, block.motion
        if key not in texts:
            texts[key] = model.condition([block.prompt], block.motion, recipe.cfg)
        return texts[key]

    def sample(first, state):
        part = BlockPlan(tuple(s.frames for s in spans[first:]), spans[first].index, spans[first].start)
        return sample_blocks(model.network, part, condition, spec=model.spec, size=model.size, recipe=recipe,
                             seed=lambda index: plan.blocks[index].seed, state=state, device=model.device,
                             window=plan.settings.window, recompute=plan.settings.recompute,
                             model_print=plan.settings.model, on_step=on_step, checked=False)

    return sample


class Progress:
    """Tells how far the film is: a line that moves with the steps in a terminal, a line a block elsewhere."""

    def __init__(self, spec: ModelSpec):
        self.spec, self.moving, self.spans, self.done = spec, sys.stdout.isatty(), [], 0

    def begin(self, plan: FilmPlan, done: int, folder: Path) -> None:
        """The folder is open and ``done`` of the plan's blocks are in it."""
        self.spans, self.done = plan.block_plan().spans(), done
        for text in dict.fromkeys(b.prompt for b in plan.blocks):
            self.line(f"prompt: {text}")
            try:
                parse(text)
            except SanaVideoError as error:
                self.line(f"note: {error}")
        self.line(f"film: {folder}: {done} of {len(self.spans)} blocks are finished")

    def line(self, text: str) -> None:
        print(text, flush=True)

    def step(self, block: int, step: int, steps: int, x0: Tensor) -> None:
        """``on_step`` of the sampler."""
        if self.moving:
            print(f"\r  block {block + 1} of {len(self.spans)}: step {step + 1} of {steps} ", end="", flush=True)

    def block(self, block: int, what: str) -> None:
        """``on_block`` of :func:`make_film`."""
        if what == "sampled":
            self.done = block + 1
        elif what == "shown":
            end = seconds_of(self.spans[block], self.spec.fps, self.spec.vae.stride[0])[1]
            if self.moving:
                print("\r", end="")
            self.line(f"  block {block + 1} of {len(self.spans)}: the video shows {end:.1f} s")


def make(
    model: LongModel, folder: Path, blocks: int, prompt: str | None = None, seed: int | None = None, *,
    steps: int | None = None, cfg: float | None = None, window: int | None = None, progress: Progress | None = None,
    on_step: StepHook | None = None,
) -> Path:
    """Make or finish the film of ``blocks`` blocks in ``folder``; returns the path of its video.

    Options that are None are those of the film in the folder, else the model's own. ``on_step`` as in :func:`sample_blocks`;
    what it raises ends the run with all finished blocks on disk.
    """
    with Film(folder, write=False) as film:
        before = film.plan
    plan = plan_blocks(blocks, model.spec.block_frames)
    cues = cues_of(plan.spans(), model.spec, prompt, seed, before)
    steps, cfg, window = film_options(before, steps, cfg, window)
    recipe = recipe_of(model.spec, steps, cfg)
    wanted = film_plan(model, cues, plan, recipe, window)
    progress = progress or Progress(model.spec)
    with Film(folder) as film:
        progress.begin(wanted, film.use_plan(wanted), film.folder)
        video = FilmVideo(film, WanStream(model.vae, weights_print(model.vae)), model.spec.fps,
                          overlap=model.device.type != "cpu")
        make_film(film, _sampler(model, film, recipe, on_step or progress.step), video, on_block=progress.block)
    return video.path


# ------------------------------------------------------------------------------------------------------------- command

def pick_device(name: str | None) -> torch.device:
    """The device of that name; None is the GPU where there is one. A name that torch does not know is refused."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise SanaVideoError("There is no such device", found=name, expected="cpu, cuda or cuda:1") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise SanaVideoError("There is no such device", found=name, expected=f"{torch.cuda.device_count()} CUDA devices",
                             action="Leave out --device")
    return device


def in_range(name: str, value: float | None, low: float, high: float) -> None:
    """Refuse a number outside ``low`` to ``high`` (and nan); None passes."""
    if value is not None and not (math.isfinite(value) and low <= value <= high):
        raise SanaVideoError(f"--{name} must lie from {low:g} to {high:,g}", found=value)


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="run.py film", description="A film of the embedded model in a run folder: every "
                                     "finished block is kept, and the same command goes on after a stop.")
    parser.add_argument("--blocks", type=int, required=True, help="length of the whole film; a block is 2.5 seconds")
    parser.add_argument("--dir", type=Path, required=True, help="the run folder; a film that is there is finished or made longer")
    parser.add_argument("--prompt", help="what the film shows; or a schedule, a line a part: '[0-5s] ...', '[5s-] ...' "
                                         "(default: the film's own)")
    parser.add_argument("--seed", type=int, help="another seed gives another film (default: the film's own, or 0)")
    parser.add_argument("--steps", type=int, help="sampling steps a block (default: the model's)")
    parser.add_argument("--cfg", type=float, help="guidance (default: the model's)")
    parser.add_argument("--window", type=int, help=f"blocks that are remembered, 0 for all (default: {WINDOW}, as trained)")
    parser.add_argument("--device", help="default: cuda where there is one")
    options = parser.parse_args(argv)
    in_range("seed", options.seed, 0, MAX_SEED)
    in_range("steps", options.steps, 1, MAX_STEPS)
    in_range("cfg", options.cfg, 0, MAX_CFG)
    in_range("window", options.window, 0, MAX_WINDOW)
    return options


def main(argv: Sequence[str] = ()) -> int:
    """The command; returns the exit status. The last line printed is ``video: PATH``."""
    progress = None
    try:
        options = _arguments(argv)
        plan_blocks(options.blocks)
        model = LongModel.load(pick_device(options.device))
        progress = Progress(model.spec)
        path = make(model, options.dir.resolve(), options.blocks, options.prompt, options.seed, steps=options.steps,
                    cfg=options.cfg, window=options.window, progress=progress)
    except SanaVideoError as error:
        print(f"film: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        done = progress.done if progress else 0
        print(f"\nstopped; {done} blocks are finished, the same command goes on from there", file=sys.stderr)
        return 130
    print(f"video: {path}")
    return 0
