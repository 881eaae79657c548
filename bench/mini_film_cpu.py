"""A film of 30 s by the embedded model for long video on two threads of a CPU, prompt to mp4.

``run.py bench mini_film_cpu [--tiny] [--blocks N]``; uses no GPU and takes minutes: run it where nothing else runs, and not on
a machine that is paid for its GPU. The peer makes the same film without the carried state: before each block it is made anew
from all blocks so far. Checked first: both films are the same to the bit, and the file plays to its end. A copy of the pack
without ``mini_long_transformer.safetensors`` is refused; ``--tiny`` takes the embedded clip model in its place, which has the
same network and sizes, and one thread.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from sana_video_core import mini
from sana_video_core.checkpoint import load_transformer
from sana_video_core.errors import SanaVideoError
from sana_video_core.film import Film, FilmVideo, WanStream, make_film
from sana_video_core.mini import film as mini_film
from sana_video_core.sampling.blocks import Block
from sana_video_core.sampling.plan import BlockPlan, pixel_frames, plan_blocks

from .harness import Report
from .long import recomputed_blocks

BLOCKS, THREADS = 12, 2  # 481 frames, 30 s at 16 a second
TINY_BLOCKS, TINY_STEPS = 3, 2


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def long_model(tiny: bool) -> mini_film.LongModel:
    """The shipped model on the CPU; SanaVideoError where a file is missing."""
    if not tiny:
        return mini_film.LongModel.load("cpu")
    _, text, vae = mini.load("cpu")
    model = mini_film.LongModel(load_transformer(mini.files()["transformer"], dtype=torch.float32, hint="long"), text, vae)
    model.spec, model.size = replace(model.spec, block_frames=2), (4, 6)
    return model


class Clock(mini_film.Progress):
    """Quiet, and adds up the seconds of steps, of committing and storing, and of decoding with the file."""

    def __init__(self, spec):
        super().__init__(spec)
        self.mark, self.seconds = time.perf_counter(), {"sample": 0.0, "shown": 0.0, "sampled": 0.0, "decoded": 0.0}

    def step(self, block: int, step: int, steps: int, x0: torch.Tensor) -> None:
        self._until_now("sample")

    def line(self, text: str) -> None:
        pass

    def block(self, block: int, what: str) -> None:
        self._until_now(what)

    def _until_now(self, what: str) -> None:
        now = time.perf_counter()
        self.seconds[what] += now - self.mark
        self.mark = now


def with_state(model: mini_film.LongModel, folder: Path, blocks: int, steps: int | None) -> tuple[float, Clock]:
    """(seconds, where they went) of the film as ``run.py film`` makes it."""
    start, clock = time.perf_counter(), Clock(model.spec)
    mini_film.make(model, folder, blocks, steps=steps, progress=clock)
    return time.perf_counter() - start, clock


def without_state(model: mini_film.LongModel, folder: Path, blocks: int, steps: int | None) -> float:
    """Seconds of the same film with the state made anew before each block."""
    start = time.perf_counter()
    spec, plan = model.spec, plan_blocks(blocks, model.spec.block_frames)
    cues, recipe = mini_film.cues_of(plan.spans(), spec, None, None, None), mini_film.recipe_of(spec, steps)
    wanted = mini_film.film_plan(model, cues, plan, recipe, mini.WINDOW)
    condition = model.condition([cues[0].prompt], cues[0].motion, recipe.cfg)

    def sample(first, state) -> Iterator[Block]:
        return recomputed_blocks(model.network, BlockPlan(plan.lengths), condition, spec=spec, size=model.size, recipe=recipe,
                                 seed=cues[0].seed, device="cpu", window=mini.WINDOW)

    with Film(folder) as film:
        film.use_plan(wanted)
        make_film(film, sample, FilmVideo(film, WanStream(model.vae, mini_film.weights_print(model.vae)), spec.fps))
    return time.perf_counter() - start


def frames_played(folder: Path) -> int:
    """Frames that decode out of the film's file."""
    import av

    with av.open(str(folder / "film.mp4")) as container:
        return sum(1 for _ in container.decode(video=0))


def blocks_that_differ(one: Path, other: Path, blocks: int) -> int:
    with Film(one, write=False) as a, Film(other, write=False) as b:
        return sum(not torch.equal(a.latent(i), b.latent(i)) for i in range(blocks))


def run(tiny: bool = False, report: Report | None = None, blocks: int | None = None) -> Report:
    """Both films, the checks, the rows; returns the report (not yet written)."""
    report, steps = report or Report("mini_film_cpu"), TINY_STEPS if tiny else None
    blocks, count = blocks or (TINY_BLOCKS if tiny else BLOCKS), 1 if tiny else THREADS
    model = long_model(tiny)
    frames = pixel_frames(plan_blocks(blocks, model.spec.block_frames).frames)
    with tempfile.TemporaryDirectory(prefix="sana_bench_") as place, threads(count):
        ours, peer = Path(place) / "state", Path(place) / "recompute"
        seconds, clock = with_state(model, ours, blocks, steps)
        again = without_state(model, peer, blocks, steps)
        report.check("blocks that differ from those with the state made anew", blocks_that_differ(ours, peer, blocks), 0)
        report.check(f"frames of {frames} that do not play", abs(frames - frames_played(ours)), 0)
    length, recipe = frames / model.spec.fps, mini_film.recipe_of(model.spec, steps)
    about = {"film_s": length, "steps": recipe.count, "cfg": recipe.cfg, "blocks": blocks, "threads": count,
             "size": "x".join(str(8 * n) for n in model.size[::-1])}
    report.add("mini_film_cpu", seconds, "s, prompt to mp4", times_real_time=length / seconds, ratio_vs_recompute=again / seconds,
               sample_s=clock.seconds["sample"], commit_and_store_s=clock.seconds["sampled"],
               decode_and_write_s=clock.seconds["decoded"] + clock.seconds["shown"], **about)
    report.add("mini_film_cpu_recompute", again, "s, prompt to mp4", times_real_time=length / again, **about)
    return report


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="run.py bench mini_film_cpu")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--blocks", type=int)
    options = parser.parse_args(arguments)
    report = Report("mini_film_cpu")
    try:
        run(options.tiny, report, options.blocks)
    except SanaVideoError as error:
        print(f"mini_film_cpu: {error}", file=sys.stderr)
        return 1
    finally:
        if not options.tiny and report.checks:  # a check of the benchmark is no figure
            print(report.write(), flush=True)
    return 0
