"""Four steps a block for the embedded causal model: its own films, corrected by the teacher (LongSANA's third stage in small).

Every process keeps a batch of films that its student makes block by block as at inference: four steps with fresh noise, a
commit, the window. Each iteration trains on the block just made: from the latent that the student met at each of the four
levels, it must say at once where the teacher, with guidance and many steps, would end from the very same latent after the same
history. So the student sees what its own errors lead to (self-forcing), and learns a definite target at every level. Beside
them stand rows of true film. Films are begun again after a random number of blocks that grows during the run; some go on
from true latents; now and then the prompt changes. With ``--opening 1 --truths 0`` no true film is made at all, which a CPU
would need long for. Not covered: adversarial or distribution-matching losses.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .. import mini
from ..checkpoint import load_transformer, save_transformer
from ..dit.model import SanaVideoTransformer
from ..sampling.blocks import Recipe, denoise_block
from ..sampling.guidance import TIME_SCALE, Caption, guided
from ..sampling.schedules import flow_dpm_sigmas, shifted
from ..specs import get_spec
from ..state import LayerState, RecurrentState
from ..state.recurrent import tensors
from .causal import SPEC, add_options, load_network, load_pieces
from .common import Average, Clock, Graphed, Optimiser, Processes, Record
from .continuation import continuation_errors
from .pieces import BASE, Pieces, empty_caption
from .replay import Places, Player, layers_of, place_state

PIECE_BLOCKS = 3  # of true film: two blocks of history and the one that follows
PAST = (1 + BASE, BASE)
WARM_UP = 3  # blocks


class Target(NamedTuple):
    """What the student learns from: at ``x [B, C, T, h, w]`` of level ``sigma [B]``, told ``time [B]``, say ``clean``."""

    x: Tensor
    time: Tensor
    sigma: Tensor
    clean: Tensor
    text: Caption
    state: RecurrentState

    def flat(self, places: Places) -> tuple[Tensor, ...]:
        """All tensors in a row, for a recorded graph, the rotary table of the place among them."""
        angles = places.at(self.state.position, self.x.shape[2])
        return (*self[:4], *self.text, *angles, *tensors(self.state.layers))


def joined(a: RecurrentState, b: RecurrentState) -> RecurrentState:
    """The rows of both states, for reading: they must end at the same frame of the film."""
    assert a.position == b.position
    layers = tuple(LayerState(*(torch.cat(pair) for pair in zip(x, y))) for x, y in zip(a.layers, b.layers, strict=True))
    return a._replace(batch=a.batch + b.batch, layers=layers, recent=(), undo=None)


def last_rows(state: RecurrentState, count: int) -> RecurrentState:
    """The last rows of a state, for reading."""
    layers = tuple(LayerState(*(t[-count:] for t in layer)) for layer in state.layers)
    return state._replace(batch=count, layers=layers, recent=(), undo=None)


def endpoint(velocity, x: Tensor, levels: Sequence[float]) -> Tensor:
    """Where the flow ends from ``x``, along ``levels`` that fall to 0.

    Straight steps with ``velocity(x, level)``. Second-order rules were no closer to the end at these few steps and guidance
    (clip model, 8 steps from 0.889 against 24: squared error 0.0010 for Euler, Adams-Bashforth and DPM-Solver++ 2M alike).
    """
    for level, after in itertools.pairwise(levels):
        x = x + (after - level) * velocity(x, level)
    return x


def falling_levels(sigma: float, steps: int, shift: float) -> list[float]:
    """``steps + 1`` levels from ``sigma`` to 0, even before the bend by ``shift``."""
    start = sigma / (shift - (shift - 1) * sigma)
    return shifted(torch.linspace(1, 0, steps + 1) * start, shift).tolist()


class Films:
    """One batch of films in the making, with the states of the student and of the teacher after their last block.

    ``runner`` is the student as it is sampled. To be used within ``places.operators()``.
    """

    def __init__(self, runner: SanaVideoTransformer, teacher: SanaVideoTransformer, pieces: Pieces, args: argparse.Namespace):
        self.spec, self.device = runner.spec, pieces.latents.device
        self.size = tuple(pieces.latents.shape[3:])
        self.grid = tuple(n // p for n, p in zip(self.size, self.spec.patch[1:]))
        frames = sum(PAST) + BASE * (max(args.longest, WARM_UP) + 1)  # that a film may have after its first position
        self.places = Places(self.spec, self.grid, -sum(PAST), args.max_position + frames, self.device)
        self.runner, self.teacher = (Player(n, self.places, not args.no_graphs) for n in (runner, teacher))
        self.pieces, self.args = pieces, args
        self.recipe = Recipe.few_step(None, 1.0, shift=self.spec.flow_shift)
        steps = torch.tensor(self.recipe.steps, device=self.device)  # [4, (time, sigma, after)]
        self.times, self.sigmas = steps[:, 0], steps[:, 1]
        self.left = 0  # blocks still to be made before new films begin

    def texts(self, pick: Tensor) -> tuple[Caption, Caption]:
        """(rows of the student, rows of the teacher: [empty, stated])."""
        text, mask = (t[:, 0] for t in self.pieces.captions(pick))
        return Caption(text, mask), Caption(torch.cat((text, text)), torch.cat((empty_caption(mask), mask)))

    def restart(self, blocks: int, opening: bool) -> None:
        """New films of so many blocks: from the first block on (``opening``), or going on from true latents."""
        size = self.args.batch
        self.left = blocks
        pick = self.pieces.draw(size)
        self.text, self.teacher_text = self.texts(pick)
        position = 0 if opening else int(torch.randint(self.args.max_position + 1, ()))
        self.state, self.teacher_state = (
            place_state(self.spec, self.grid, rows, position, self.args.window, True) for rows in (size, 2 * size))
        if not opening:
            film = self.pieces.latents[pick, :sum(PAST)].float().transpose(1, 2)
            for part in film.split(PAST, 2):
                self.commit(part)

    def commit(self, latent: Tensor) -> None:
        """Both states after a block."""
        self.state = self.runner.absorb(latent, *self.text, state=self.state)
        self.teacher_state = self.teacher.absorb(torch.cat((latent, latent)), *self.teacher_text, state=self.teacher_state)

    def switch(self) -> None:
        """New prompts for all films: the block before is committed again with them, as the sampler does."""
        self.text, self.teacher_text = self.texts(self.pieces.draw(self.args.batch))
        self.state, latent = self.state.before_last()
        self.teacher_state, _ = self.teacher_state.before_last()
        self.commit(latent)

    def block(self) -> tuple[Tensor, list[Tensor]]:
        """(the next block as the student samples it, the latents ``x`` that it met at the levels)."""
        frames = BASE if self.state.layers else 1 + BASE
        shape = (self.args.batch, self.spec.channels, frames, *self.size)
        met: list[Tensor] = []
        latent = denoise_block(self.runner, shape, self.recipe, self.text, self.state,
                               lambda step: torch.randn(shape, device=self.device), device=self.device,
                               callback=lambda step, x0, x: met.append(x))
        return latent, met

    def solve(self, x: Tensor, step: int) -> Tensor:
        """The teacher's solution from ``x``, met at the student's step, after the films so far.

        Later steps have less to go and take fewer of the teacher's. Guidance decides what is shown, which is settled at high
        levels; at low ones it costs a second call and shifts colours.
        """
        size, args = len(x), self.args
        stated = last_rows(self.teacher_state, size)

        def velocity(x: Tensor, level: float) -> Tensor:
            times = torch.full((2 * size,), TIME_SCALE * level, device=self.device)
            if level > args.guided_above:
                v = self.teacher(torch.cat((x, x)), times, *self.teacher_text, state=self.teacher_state)
                return guided(*v.chunk(2), args.cfg).float()
            return self.teacher(x, times[:size], *(t[-size:] for t in self.teacher_text), state=stated).float()

        count = max(1, round(args.solver_steps * (1 - step / self.recipe.count)))
        return endpoint(velocity, x, falling_levels(self.recipe.steps[step].sigma, count, args.solver_shift))

    def truth(self, size: int) -> Target:
        """Rows of true film that end where the films do: history with a little noise, then the block that follows."""
        pick = self.pieces.draw_uncut(size, sum(PAST) + BASE)
        text, _ = self.texts(pick)
        film = self.pieces.latents[pick].float().transpose(1, 2)
        rough = self.args.rough * torch.rand(size, 1, 1, 1, 1, device=self.device)
        state = place_state(self.spec, self.grid, size, self.state.position - sum(PAST), self.args.window)
        for part in film[:, :, :sum(PAST)].split(PAST, 2):
            state = self.runner.absorb(part + rough * torch.randn_like(part), *text, state=state)
        clean = film[:, :, sum(PAST):sum(PAST) + BASE]
        step = torch.randint(len(self.sigmas), (size,), device=self.device)
        level = self.sigmas[step].view(-1, 1, 1, 1, 1)
        noisy = (1 - level) * clean + level * torch.randn_like(clean)
        return Target(noisy, self.times[step], self.sigmas[step], clean, text, state)

    def advance(self, longest: int) -> Target:
        """Make one block more and say what is to be learned from it."""
        if self.left <= 0:
            self.restart(int(torch.randint(1, longest + 1, ())), float(torch.rand(())) < self.args.opening)
        elif float(torch.rand(())) < self.args.switch:
            self.switch()
        latent, met = self.block()
        clean = torch.cat([self.solve(x, step) for step, x in enumerate(met)])
        times, sigmas = (levels.repeat_interleave(len(latent)) for levels in (self.times, self.sigmas))
        count = len(met)
        text, states = Caption(*(torch.cat((t,) * count) for t in self.text)), functools.reduce(joined, (self.state,) * count)
        own = Target(torch.cat(met), times, sigmas, clean, text, states)
        true = self.truth(self.args.truths) if self.state.layers and self.args.truths else None
        self.commit(latent)
        self.left -= 1
        return own if true is None else both(own, true)


def both(a: Target, b: Target) -> Target:
    """The rows of both."""
    parts = (torch.cat(pair) for pair in zip(a[:4], b[:4]))
    return Target(*parts, Caption(*(torch.cat(pair) for pair in zip(a.text, b.text))), joined(a.state, b.state))


def regression_loss(student: SanaVideoTransformer, places: Places, *tensors: Tensor) -> Tensor:
    """Mean squared error of the clean latent that the student tells from the velocity; takes :meth:`Target.flat`."""
    x, time, sigma, clean, text, mask, cos, sin, *layers = tensors
    places.angles = cos, sin
    grid = tuple(n // p for n, p in zip(x.shape[3:], student.spec.patch[1:]))
    state = place_state(student.spec, grid, len(x), 0)._replace(layers=layers_of(layers))
    with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
        v = student(x, time, text, mask, state=state)
    return (x - sigma.view(-1, 1, 1, 1, 1) * v.float() - clean).square().mean()


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add_options(parser, seconds=150, batch=12, pieces=2000, lr=6e-4, decay=0.99)
    parser.add_argument("--teacher", type=Path, required=True, help="transformer file of the causal model")
    parser.add_argument("--truths", type=int, help="rows of true film beside the films (default: as many as films)")
    parser.add_argument("--opening", type=float, default=0.5, help="share of films that begin with their first block")
    parser.add_argument("--longest", type=int, default=8, help="blocks of the longest films")
    parser.add_argument("--cfg", type=float, default=get_spec("sana-video-mini").cfg, help="guidance of the teacher")
    parser.add_argument("--guided-above", type=float, default=0.75, help="lowest noise level with guidance")
    parser.add_argument("--no-graphs", action="store_true", help="launch every kernel instead of replaying CUDA graphs")
    parser.add_argument("--solver-steps", type=int, default=20, help="of the teacher from pure noise; fewer later on")
    parser.add_argument("--solver-shift", type=float, default=get_spec(SPEC).flow_shift, help="of its levels")
    parser.add_argument("--rough", type=float, default=0.1, help="largest noise added to a true history")
    args = parser.parse_args(argv)
    args.truths = args.batch if args.truths is None else args.truths
    return args


def frozen(network: SanaVideoTransformer, device) -> SanaVideoTransformer:
    """A copy that only computes, in the precision of inference on a GPU."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return copy.deepcopy(network).to(dtype).eval().requires_grad_(False)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    processes = Processes()
    device = processes.device
    untrue = args.truths == 0 and args.opening >= 1
    pieces, tests = load_pieces(args, 0 if untrue else PIECE_BLOCKS, 0.0, processes)
    causal = load_transformer(args.teacher, dtype=torch.float32, device=device, hint="long")
    teacher = frozen(causal, device)
    student = load_network(args.resume or args.teacher, device)
    runner, average = frozen(student, device), Average(student, args.decay)
    films = Films(runner, teacher, pieces, args)
    optimiser = Optimiser([student], args.lr, muon=not args.adamw, keep_grads=True)
    if not args.no_compile:
        torch._dynamo.config.recompile_limit = 64  # first blocks and later ones, films of three lengths of rows
        for block in (*student.blocks, *teacher.blocks, *runner.blocks):
            block.compile(dynamic=False)
    torch.manual_seed(200 + processes.rank)
    with films.places.operators():
        history = train(student, films, average, optimiser, args, processes)
    if processes.first:
        args.out.mkdir(parents=True, exist_ok=True)
        save_transformer(average.module, average.module.spec, args.out / mini.LONG, dtype=torch.float16)
        (args.out / "distill_history.json").write_text(json.dumps(history))
        if tests is not None:
            print(continuation_errors(average.module, tests, films.recipe, args.window))
            many = Recipe.multi_step(flow_dpm_sigmas(20, student.spec.flow_shift), cfg=args.cfg)
            print("teacher:", continuation_errors(causal, tests, many, args.window))
    processes.close()


def train(student, films: Films, average, optimiser, args, processes) -> list[tuple[int, float, float]]:
    """The loop; returns (step, progress, smoothed loss) rows."""
    learn = Lessons(student, films.places, optimiser, not args.no_graphs)
    warm_up(learn, films, processes)
    clock = Clock(processes, args.seconds)
    record = Record("distill", processes, clock, 25, 0.04)
    mine, theirs = list(films.runner.network.parameters()), list(student.parameters())
    while (progress := clock.tick()) < 1:
        longest = 1 + round((args.longest - 1) * min(1.0, 2 * progress))
        loss = learn(films.advance(longest))
        optimiser.step(clock.factor(progress), processes)
        average.update(student, clock.step)
        with torch.no_grad():
            torch._foreach_copy_(mine, theirs)
        record.add(loss, progress, f" (films of up to {longest} blocks)")
    return record.finish()


class Lessons:
    """Loss and gradients of a target: a recorded graph for first blocks, one for later ones (and none on a CPU)."""

    def __init__(self, student: SanaVideoTransformer, places: Places, optimiser: Optimiser, graphs: bool = True):
        self.places, self.parameters, self.use_graphs = places, optimiser.parameters, graphs
        self.work = functools.partial(regression_loss, student, places)
        self.graphs: dict[bool, Graphed] = {}

    def __call__(self, target: Target) -> Tensor:
        """Fills ``.grad`` of every weight of the student; returns the loss."""
        given = target.flat(self.places)
        if not self.use_graphs:
            for p in self.parameters:
                p.grad = None
            loss = self.work(*given)
            loss.backward()
            return loss.detach()
        later = bool(target.state.layers)
        if later not in self.graphs:
            self.graphs[later] = Graphed(self.work, given, self.parameters)
        return self.graphs[later](*given)


def warm_up(learn: Lessons, films: Films, processes: Processes) -> None:
    """Compile and record for a film's first block and for later ones before the clock starts, then begin new films."""
    began = time.time()
    films.restart(WARM_UP, True)
    for _ in range(WARM_UP):
        learn(films.advance(1))
    films.left = 0
    processes.say(f"distill: first steps {time.time() - began:.0f} s")
    processes.agree(0.0)  # nobody's clock runs before all are ready


if __name__ == "__main__":
    main()
