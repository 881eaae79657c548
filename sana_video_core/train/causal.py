"""Train the embedded causal model from the clip model: blocks of a film, each from the blocks that a state holds.

Only the transformer learns; text encoder and VAE stay. In most rows the history is as it is when sampling: clean latents
at time 0 (with a little noise added, untold, since what a film has made so far is not perfect) and every later block noisy
at its own level. In the other rows all blocks are noisy at once, later ones at least as much (paper section 4.3, causal spec
5.3). Cut pieces teach a change of prompt: the blocks after the cut, and the one before it as its recomputed commit sees
it, read the new caption (causal spec 4.5). ``parallel.py`` has the one-pass form. Not covered: few steps (``distill.py``).
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checkpoint import load_transformer, save_transformer
from ..dit.embeddings import rope_table
from ..dit.model import SanaVideoTransformer
from ..mini import NAMES, WINDOW
from ..sampling.blocks import Recipe
from ..sampling.schedules import flow_dpm_sigmas, shifted
from ..specs import ModelSpec, get_spec
from ..text.encode import load_text_encoder
from ..vae.loading import load_wan_vae
from .common import Average, Clock, Graphed, Optimiser, Processes, Record
from .continuation import continuation_errors
from .parallel import Arrangement, BlockCausal, Layout, arrange, block_causal_operators
from .pieces import BASE, Pieces, empty_caption, make_pieces
from .timesteps import MonotoneTimes, logit_normal_times

SPEC = "sana-video-mini-long"
CAUSAL = "mini_causal_transformer.safetensors"  # before the distillation; mini.LONG is what comes out of it
LEVELS = 1000
PLACES = 16  # rotary positions at which the rows of a run begin
TEST_BLOCKS = 6


class Options(NamedTuple):
    """What a batch looks like; shares are of the rows.

    ``opening``: from a film's first block on (else from its middle); ``monotone``: all blocks noisy; ``drop``: empty captions;
    ``rough``: largest noise added to a clean history; ``shifts``: of the noise levels, one of them a row; ``max_position``:
    latest first frame. (Rotary places enter as differences only, so a position is rounding to the network and nothing else.)
    """

    opening: float = 0.4
    monotone: float = 0.25
    drop: float = 0.1
    rough: float = 0.1
    shifts: tuple[float, ...] = (3.0, 10.0)
    max_position: int = 3000


class Batch(NamedTuple):
    """Rows ``clean``, ``seen``, ``noise`` ``[B, F, C, h, w]``, frames second, ``times [B, F]``, ``weight [B, F]`` (1 where the
    loss counts), the captions ``text [B, K * L, D]``, ``mask [B, K * L]``, and who reads what."""

    clean: Tensor
    seen: Tensor
    noise: Tensor
    times: Tensor
    weight: Tensor
    text: Tensor
    mask: Tensor
    layout: Layout

    def flat(self) -> tuple[Tensor, ...]:
        """All tensors in a row, for a recorded graph."""
        return (*self[:-1], *self.layout)

    @classmethod
    def of(cls, tensors) -> Batch:
        """The inverse of :meth:`flat`."""
        own = len(cls._fields) - 1
        return cls(*tensors[:own], Layout(*tensors[own:]))


class Rows:
    """Makes batches out of pieces: two kinds of rows of one length, from the opening of a film and from its middle."""

    def __init__(self, pieces: Pieces, spec: ModelSpec, blocks: int, window: int, options: Options):
        self.pieces, self.options, self.device = pieces, options, pieces.latents.device
        first, middle = row_lengths(blocks, window)
        opening = arrange(first, 0, window)
        kinds = [opening, arrange(middle, window or 2, window, len(opening.source))]
        self.tables = Arrangement(*(torch.stack(parts).to(self.device) for parts in zip(*kinds)))
        self.blocks = max(k.blocks for k in kinds)
        self.samplers = [MonotoneTimes(k.blocks, LEVELS) for k in kinds]
        self.skip = torch.tensor([0, 1 + BASE], device=self.device)  # a middle begins after the piece's first block
        self.shifts = torch.tensor(options.shifts, device=self.device)
        grid = [n // p for n, p in zip(pieces.latents.shape[3:], spec.patch[1:])]
        frames = 1 + int(self.tables.source.max())
        starts = torch.randint(options.max_position + 1, (PLACES,)).tolist()
        angles = [rope_table(frames, *grid, spec.linear_head_dim, start, device=self.device) for start in starts]
        self.angles = [torch.stack(part).unflatten(1, (frames, -1)) for part in zip(*angles)]  # [PLACES, frames, S, D/2]

    def levels(self, kind: Tensor, monotone: Tensor) -> Tensor:
        """``[B, blocks]`` noise levels of the blocks: rising where ``monotone``, else each on its own."""
        size = len(kind)
        base = logit_normal_times(size, LEVELS)
        rising = torch.zeros(2, size, self.blocks)
        for i, sampler in enumerate(self.samplers):
            rising[i, :, :sampler.blocks] = sampler.sample(base).float() / LEVELS
        rising = rising.to(self.device)[kind, torch.arange(size, device=self.device)]
        single = torch.sigmoid(torch.randn(size, self.blocks, device=self.device))
        shift = self.shifts[torch.randint(len(self.shifts), (size, 1), device=self.device)]
        return shifted(torch.where(monotone[:, None], rising, single), shift)

    def batch(self, size: int) -> Batch:
        """A random batch of ``size`` rows."""
        o, device = self.options, self.device
        pick = self.pieces.draw(size)
        kind = (torch.rand(size, device=device) >= o.opening).long()
        monotone = torch.rand(size, device=device) < o.monotone
        table = Arrangement(*(t[kind] for t in self.tables))
        start = self.skip[kind]
        clean = self.pieces.latents[pick[:, None], start[:, None] + table.source].float()
        block = table.block.clamp(min=0)
        level = self.levels(kind, monotone).gather(1, block)
        history = ~table.target & ~monotone[:, None]
        level = torch.where(history | (table.block < 0), 0.0, level)
        noise = self._noise(clean, table.source)
        rough = torch.rand(size, 1, device=device) * o.rough * history
        s, r = level[..., None, None, None], rough[..., None, None, None]
        text, mask = self.pieces.captions(pick)
        dropped = torch.rand(size, device=device) < o.drop
        mask = torch.where(dropped[:, None, None], empty_caption(mask), mask)
        second = self._second_scene(table, self.pieces.cut[pick] - start).long()
        place = torch.randint(PLACES, (size, 1), device=device)
        layout = Layout(table.reads, table.before, table.after, F.one_hot(second, mask.shape[1]).float(),
                        *(t[place, table.source] for t in self.angles))
        return Batch(clean, (1 - s) * clean + (s + r) * noise, noise, LEVELS * level, table.target.float(),
                     text.flatten(1, 2), mask.flatten(1), layout)

    @staticmethod
    def _noise(clean: Tensor, source: Tensor) -> Tensor:
        """Standard normal; both copies of a frame get the same, so that monotone rows are one noisy film."""
        noise = torch.randn_like(clean)
        return noise.gather(1, source[..., None, None, None].expand_as(noise))

    @staticmethod
    def _second_scene(table: Arrangement, cut: Tensor) -> Tensor:
        """``[B, F]`` True where a frame reads the caption after the cut at frame ``cut [B]`` of the row: the blocks from
        there on, and the history of the block before, which is committed again when the prompt changes."""
        after = table.source >= cut[:, None]
        edge = torch.where(after, table.block, table.block.max() + 2).amin(1, keepdim=True)  # block of the cut
        return (after | (~table.target & (table.block == edge - 1))) & (table.block >= 0)


def row_lengths(blocks: int, window: int) -> tuple[list[int], list[int]]:
    """Block lengths of an opening with ``blocks`` targets, and of the longest middle that fits into as many frames.

    A middle's first ``window`` blocks (2 with all history) are read only: what came before them is missing.
    """
    frames = 2 * (1 + BASE * blocks) - BASE
    idle = window or 2
    middle = max((frames // BASE + 1 + idle) // 2, idle + 1)
    if (2 * middle - 1 - idle) * BASE > frames:
        raise ValueError(f"{blocks} blocks are too few for a window of {window}: take {idle + 1} or more")
    return [1 + BASE] + [BASE] * (blocks - 1), [BASE] * middle


def causal_loss(network, parallel: BlockCausal, batch: Batch) -> Tensor:
    """Mean squared error of the velocity over the targets."""
    parallel.layout = batch.layout
    device = batch.seen.device
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        v = network(batch.seen.transpose(1, 2), batch.times, batch.text, batch.mask)
    error = (v.float().transpose(1, 2) - (batch.noise - batch.clean)).square().mean((2, 3, 4))
    return (error * batch.weight).sum() / batch.weight.sum()


def load_network(path: Path, device) -> SanaVideoTransformer:
    """A trainable causal network with the weights of ``path`` (a clip model or a causal one)."""
    weights = load_transformer(path, dtype=torch.float32, device=device, hint="long").state_dict()
    network = SanaVideoTransformer(get_spec(SPEC), device=device)
    network.load_state_dict(weights)
    return network


def add_options(parser: argparse.ArgumentParser, *, seconds: float, batch: int, pieces: int, lr: float, decay: float) -> None:
    """What both long-video scripts take."""
    parser.add_argument("--seconds", type=float, default=seconds, help="training time without making the pieces")
    parser.add_argument("--batch", type=int, default=batch, help="rows a step on each GPU")
    parser.add_argument("--pieces", type=int, default=pieces, help="pieces of film on each GPU")
    parser.add_argument("--lr", type=float, default=lr)
    parser.add_argument("--decay", type=float, default=decay, help="of the weight average")
    parser.add_argument("--window", type=int, default=WINDOW, help="blocks that are remembered (0: all)")
    parser.add_argument("--max-position", type=int, default=3000, help="latest latent frame at which a row begins")
    parser.add_argument("--switch", type=float, default=0.15, help="share of changes of prompt (of pieces; distill: of blocks)")
    parser.add_argument("--clip", type=Path, required=True, help="folder with the weights of the clip model")
    parser.add_argument("--vae", type=Path, required=True)
    parser.add_argument("--resume", type=Path, help="transformer file to go on from")
    parser.add_argument("--seed", type=int, default=7, help="of the pieces")
    parser.add_argument("--adamw", action="store_true", help="AdamW for everything")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--tests", type=int, default=16, help="unseen pieces for the figures at the end")
    parser.add_argument("--out", type=Path, required=True, help="folder for the transformer file")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add_options(parser, seconds=150, batch=16, pieces=2000, lr=1.5e-3, decay=0.998)
    parser.add_argument("--blocks", type=int, default=5, help="blocks of a row that begins with the film")
    parser.add_argument("--shifts", type=float, nargs="+", default=Options().shifts, help="shifts of the noise times")
    parser.add_argument("--monotone", type=float, default=Options().monotone, help="share of rows with all blocks noisy")
    parser.add_argument("--rough", type=float, default=Options().rough, help="largest noise added to a clean history")
    return parser.parse_args(argv)


def load_pieces(args: argparse.Namespace, blocks: int, switch: float, processes: Processes) -> tuple[Pieces, Pieces | None]:
    """(pieces to learn from, unseen ones without cuts for the figures at the end; the latter in the first process only).

    ``blocks`` 0: captions without film, and no unseen pieces."""
    began, device = time.time(), processes.device
    vae, text = load_wan_vae(args.vae, device=device), load_text_encoder(args.clip / NAMES["text"], device=device)
    pieces = make_pieces(vae, text, args.pieces, args.seed + processes.rank, device, blocks, switch)
    tests = make_pieces(vae, text, args.tests, 99, device, TEST_BLOCKS, 0.0) if processes.first and blocks else None
    processes.say(f"pieces: {tuple(pieces.latents.shape)}, {time.time() - began:.0f} s")
    return pieces, tests


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    processes = Processes()
    device = processes.device
    blocks = 1 + len(row_lengths(args.blocks, args.window)[1])
    pieces, tests = load_pieces(args, blocks, args.switch, processes)
    network = load_network(args.resume or args.clip / NAMES["transformer"], device)
    average = Average(network, args.decay)
    options = Options(monotone=args.monotone, rough=args.rough, shifts=tuple(args.shifts), max_position=args.max_position)
    rows = Rows(pieces, network.spec, args.blocks, args.window, options)
    processes.say(f"causal: {sum(p.numel() for p in network.parameters())} weights, rows of {rows.tables.source.shape[1]} frames")
    optimiser = Optimiser([network], args.lr, muon=not args.adamw, keep_grads=True)
    if not args.no_compile:
        for block in network.blocks:
            block.compile(dynamic=False)
    torch.manual_seed(100 + processes.rank)
    with block_causal_operators() as parallel:
        history = train(network, parallel, average, optimiser, rows, args, processes)
    if processes.first:
        args.out.mkdir(parents=True, exist_ok=True)
        save_transformer(average.module, average.module.spec, args.out / CAUSAL, dtype=torch.float16)
        (args.out / "causal_history.json").write_text(json.dumps(history))
        recipe = Recipe.multi_step(flow_dpm_sigmas(20, network.spec.flow_shift), cfg=get_spec("sana-video-mini").cfg)
        print(continuation_errors(average.module, tests, recipe, args.window))
    processes.close()


def train(network, parallel, average, optimiser, rows: Rows, args, processes) -> list[tuple[int, float, float]]:
    """The loop; returns (step, progress, smoothed loss) rows."""
    began = time.time()
    loss_and_gradients = Graphed(lambda *tensors: causal_loss(network, parallel, Batch.of(tensors)),
                                 rows.batch(args.batch).flat(), optimiser.parameters)
    processes.say(f"causal: first steps {time.time() - began:.0f} s")
    processes.agree(0.0)  # nobody's clock runs before all are ready
    clock = Clock(processes, args.seconds)
    record = Record("causal", processes, clock, 50)
    while (progress := clock.tick()) < 1:
        loss = loss_and_gradients(*rows.batch(args.batch).flat())
        optimiser.step(clock.factor(progress), processes)
        average.update(network, clock.step)
        record.add(loss, progress)
    return record.finish()


if __name__ == "__main__":
    main()
