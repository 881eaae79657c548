"""A minute of LongSANA at 832x480 with random weights: the network alone (``dit``), and from noise to a playable mp4 (``file``).

``run.py bench longsana [--tiny] [--part dit|file] [--blocks N]``. On an H200 about 35 s for ``dit`` (24 blocks of 4 steps and a
commit take 12) and 60 s for ``file``. Checked first: the block-causal network in bf16 against float32, the last block against
one whose state was made anew from all blocks before, and for the file its frames and the streamed decode against one decode.

Peers: no public pipeline runs LongSANA with a released diffusers, so the same network runs without a carried state (each block
reads the whole clip so far again), and on the plain reference operators. The file's peer samples the same blocks, then decodes
and writes them at the end.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor

from sana_video_core import ops
from sana_video_core.dit import SanaVideoTransformer
from sana_video_core.film import Film, FilmBlock, FilmPlan, FilmSettings, FilmVideo, WanStream, make_film
from sana_video_core.film.video import encode_fragment, to_uint8
from sana_video_core.sampling.blocks import Block, caption_key, seeded_noise
from sana_video_core.sampling.plan import BlockPlan, pixel_frames
from sana_video_core.state import LayerState
from sana_video_core.vae.loading import load_wan_vae
from sana_video_core.vae.wan import denormalize

from . import dit, prepare
from .harness import BenchError, Report, floor_ms, measure, peak_bytes, relative_error
from .long import FULL, SAME, TINY, Long, Marks, Size, synchronize, timed
from .profile import add_profile

BLOCKS = 24  # 241 latent frames, 961 pixel frames
CHECK_FRAMES = (4, 3)  # latent frames of the two blocks that are compared with float32
REFERENCE_BLOCKS = 3  # the first of them is left out of the time
FEW = 4  # blocks of the file's peer
NOISY_TIME = 889.0


# ------------------------------------------------------------------------------------------------------------- network

def outputs(model, latents: list[Tensor], texts: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Velocity of the second block after the first one was committed, and sums and tails of the state after both."""
    caption, mask = texts
    state = model.absorb(latents[0], caption, mask)
    time_ = torch.full((1,), NOISY_TIME, device=caption.device)
    velocity = model(latents[1], time_, caption, mask, state=state)
    state = model.absorb(latents[1], caption, mask, state=state)
    return [velocity] + [torch.cat([getattr(layer, name).flatten().float() for layer in state.layers])
                         for name in LayerState._fields]


def check_network(report: Report, long: Long) -> None:
    """Two blocks with history against the reference operators in float32; the limit is twice the reference's own bf16 error."""
    args = [dit.inputs(long.spec, (frames, *long.size.latent), 1, long.device, torch.float32, seed=3 + i)["latent"]
            for i, frames in enumerate(CHECK_FRAMES)]
    caption = long.condition.positive
    truth_model = SanaVideoTransformer(long.spec, dtype=torch.float32, device=long.device).eval()
    truth_model.load_state_dict({k: t.float() for k, t in long.model.state_dict().items()})
    with ops.force("reference"):
        truth = outputs(truth_model, args, (caption.embedding.float(), caption.mask))
        del truth_model
        theirs = outputs(long.model, args, caption)
    ours = outputs(long.model, args, caption)
    for name, mine, other, true in zip(("velocity with history", "sums v k", "sums k", "last frames"), ours, theirs, truth):
        allowed = relative_error(other, true)
        report.check(f"{name}: reference operators in bf16 against float32 (sanity)", allowed, 0.1)
        report.check(f"{name}: ours in bf16 against float32, limit: twice the reference's", relative_error(mine, true),
                     2 * allowed)


def film_floor_ms(long: Long, plan: BlockPlan) -> float | None:
    """The least time of all passes of the plan's blocks: the steps and the commit, each counted as a whole forward."""
    area = math.prod(n // p for n, p in zip(long.size.latent, long.spec.patch[1:]))
    floors = [floor_ms(*dit.forward_cost(long.spec, n * area)) for n in plan.lengths]
    return None if None in floors else (long.recipe.count + 1) * sum(floors)


def without_state(long: Long, latents: list[Tensor], number: int) -> tuple[Tensor, float]:
    """(latent, seconds) of block ``number`` (counted from 1) made from the latents before it and no state."""
    spans = long.plan(number).spans()
    one = BlockPlan((spans[-1].frames,), spans[-1].index, spans[-1].start)
    block, seconds = next(timed(long.recompute(one, latents[:number - 1]), long.device))
    return block.latent, seconds


def reference_seconds(long: Long) -> list[float]:
    """Seconds of the first blocks on the reference operators, in bf16 with the state carried."""
    with ops.force("reference"):
        return [seconds for _, seconds in timed(long.sample(REFERENCE_BLOCKS), long.device)]


def noise_ms(long: Long) -> float:
    """Milliseconds that the noise of one block takes: it is made on the CPU, so that a seed means the same everywhere."""
    noise, shape = seeded_noise(1), (1, long.spec.channels, long.size.base, *long.size.latent)
    return measure(lambda: [noise(0, step, shape).to(long.device) for step in range(long.recipe.count)], 1, 3, long.device).median


@torch.inference_mode()
def run_dit(report: Report, size: Size, device: str, blocks: int) -> None:
    """``longsana_dit_fps`` and its peers."""
    if blocks < REFERENCE_BLOCKS:
        raise BenchError(f"longsana needs {REFERENCE_BLOCKS} blocks or more, not {blocks}")
    long = Long(size, device)
    check_network(report, long)
    for _ in long.sample(2):  # both block lengths, and the commit
        pass
    latents, marks, total = [], Marks(device), 0.0

    def film() -> None:
        nonlocal total
        start = time.perf_counter()
        marks.mark()
        for block in long.sample(blocks):
            latents.append(block.latent)
            marks.mark()
        synchronize(device)
        total = time.perf_counter() - start

    peak = peak_bytes(film)
    depths = sorted({max(2, blocks // 6), max(2, blocks // 2), blocks})
    again = {n: without_state(long, latents, n) for n in depths}
    for n, (latent, _) in again.items():
        report.check(f"block {n} against one from a state made anew", relative_error(latent, latents[n - 1]), SAME)
    plain = reference_seconds(long)
    add_dit_rows(report, long, marks.seconds(), total, {n: s for n, (_, s) in again.items()}, plain, peak)
    add_profile(report, "longsana_two_blocks", lambda: [None for _ in long.sample(2)])


def add_dit_rows(report: Report, long: Long, seconds: list[float], total: float, again: dict[int, float], plain: list[float],
                 peak: int) -> None:
    plan = long.plan(len(seconds))
    frames, floor = pixel_frames(plan.frames), film_floor_ms(long, plan)
    usual, last = statistics.median(seconds[1:]), max(again)
    own = statistics.mean(seconds[1:REFERENCE_BLOCKS])
    few = {"ratio_vs_reference": statistics.mean(plain[1:]) / own, f"ratio_vs_recompute_block_{last}": again[last] / usual}
    report.add("longsana_dit_fps", frames / total, "pixel frames a second", **few, blocks=len(seconds), pixel_frames=frames,
               latent_frames=plan.frames, seconds=total, **({} if floor is None else {"floor_ratio": total * 1e3 / floor}))
    report.add("longsana_block", usual * 1e3, "ms, four steps and commit", low=min(seconds[1:]) * 1e3,
               high=max(seconds[1:]) * 1e3, first_block=seconds[0] * 1e3, noise_on_the_cpu_ms=noise_ms(long),
               peak_over_start_gib=peak / 2**30)
    for number, value in again.items():
        report.add(f"longsana_block_{number}_recompute", value * 1e3, "ms, state made anew, no commit",
                   ratio_vs_state=value / seconds[number - 1])
    report.add("longsana_block_reference_operators", statistics.mean(plain[1:]) * 1e3, "ms", low=min(plain[1:]) * 1e3,
               high=max(plain[1:]) * 1e3, repeats=len(plain) - 1)


# ---------------------------------------------------------------------------------------------------------------- file

class Parts:
    """Where the time of a film goes: seconds of sampling and of decoding on the device's clock; ``ready``: seconds until each
    block could be played. ``frames`` keeps the decoded frames of the first blocks."""

    def __init__(self, device: str):
        self.start, self.marks = time.perf_counter(), Marks(device)
        self.ready: list[float] = []
        self.frames: list[Tensor] = []

    def sampled(self, blocks: Iterator[Block]) -> Iterator[Block]:
        while True:
            self.marks.mark()
            block = next(blocks, None)
            if block is None:
                return
            self.marks.mark()
            yield block
            del block

    def seconds(self) -> tuple[float, float]:
        """(sampling, decoding): the marks are set before and after each block is sampled, in turn."""
        spans = self.marks.seconds()
        return sum(spans[::2]), sum(spans[1::2])


class TimedVideo(FilmVideo):
    """The film's file with a clock."""

    parts: Parts

    def _attach(self, *fragment) -> None:
        super()._attach(*fragment)
        self.parts.ready.append(time.perf_counter() - self.parts.start)


class KeptStream(WanStream):
    """The film's decoder, which keeps the first frames."""

    def __init__(self, vae, parts: Parts):
        super().__init__(vae, "random")
        self.parts, self.blocks = parts, 0

    def decode(self, latent: Tensor) -> Iterator[Tensor]:
        self.blocks += 1
        for piece in super().decode(latent):
            if self.blocks <= FEW:
                self.parts.frames.append(piece)
            yield piece


def make_file(long: Long, vae, folder: Path, blocks: int) -> tuple[Path, Parts, float, list[Tensor]]:
    """(the mp4, where the time went, seconds in all, the first latents) of a film in a run folder."""
    recipe, key = long.recipe._asdict(), caption_key(long.condition)
    settings = FilmSettings(long.spec.name, "random", long.size.latent, recipe)
    plan = FilmPlan(settings, tuple(FilmBlock(n, 0, key) for n in long.plan(blocks).lengths))
    synchronize(long.device)
    parts = Parts(long.device)
    with Film(folder) as film:
        film.use_plan(plan)
        video = TimedVideo(film, KeptStream(vae, parts), long.spec.fps, overlap=long.device != "cpu")
        video.parts = parts
        make_film(film, lambda first, state: parts.sampled(long.sample(blocks, checked=False)), video)
        total = time.perf_counter() - parts.start
        return video.path, parts, total, [film.latent(i) for i in range(min(FEW, blocks))]


def at_the_end(long: Long, vae, path: Path, blocks: int) -> tuple[list[Tensor], Tensor, float]:
    """(latents, frames, seconds): the same blocks sampled first, then decoded in one call and written."""
    synchronize(long.device)
    start = time.perf_counter()
    latents = [block.latent for block in long.sample(blocks)]
    weight = vae.conv2.weight
    raw = denormalize(torch.cat(latents, 2)).to(weight.device, weight.dtype)
    frames = to_uint8(vae.decode(raw)[0].movedim(0, -1))
    header, fragment, _ = encode_fragment([frames], 0, 0, Fraction(long.spec.fps))
    path.write_bytes(header + fragment)
    return latents, frames, time.perf_counter() - start


def video_facts(path: Path, decode: int = 48) -> tuple[int, int, int, str]:
    """(frames, width, height, codec) of a video; its first ``decode`` frames are decoded, the others counted."""
    import av

    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        count, shown = 0, 0
        for packet in container.demux(stream):
            count += packet.dts is not None
            shown += len(packet.decode()) if shown < decode else 0
        if shown < min(decode, count):
            raise BenchError(f"{path.name} has {count} frames, but only {shown} of the first {decode} can be decoded")
        return count, stream.width, stream.height, stream.codec_context.name


@torch.inference_mode()
def run_file(report: Report, size: Size, device: str, blocks: int, tiny: bool) -> None:
    """``longsana_file_fps`` and its peer."""
    if blocks < FEW:
        raise BenchError(f"the film needs {FEW} blocks or more, not {blocks}")
    long = Long(size, device)
    half = torch.bfloat16 if device == "cuda" else torch.float32  # a CPU takes minutes for convolutions in bf16
    vae = load_wan_vae(prepare.vae_state(tiny), half, device)
    with tempfile.TemporaryDirectory(prefix="sana_bench_") as place:
        folder = Path(place)
        make_file(long, vae, folder / "warm", 2)
        path, parts, total, kept = make_file(long, vae, folder / "film", blocks)
        latents, frames, late = at_the_end(long, vae, folder / "late.mp4", FEW)
        found, size_bytes = video_facts(path), path.stat().st_size
    count = pixel_frames(long.plan(blocks).frames)
    expected = (count, 8 * size.latent[1], 8 * size.latent[0], "h264")
    report.check(f"the film's file is {expected}", float(found != expected), 0)
    report.check("the film's latents against those sampled at once", relative_error(torch.cat(kept, 2).to(device),
                                                                                    torch.cat(latents, 2)), SAME)
    streamed = torch.cat(parts.frames).cpu()
    report.check("streamed frames against one decode, mean difference of 255",
                 float((streamed.int() - frames.int()).abs().float().mean()), 0.1)
    first = pixel_frames(long.plan(FEW).frames)
    mine, other = first / parts.ready[FEW - 1], first / late
    sample, decode = parts.seconds()
    report.add("longsana_file_fps", count / total, "pixel frames a second, noise to mp4", ratio_vs_at_the_end=mine / other,
               blocks=blocks, pixel_frames=count, seconds=total, sample_s=sample, decode_s=decode,
               wait_for_file_s=total - sample - decode, mbit_s=size_bytes * 8 * long.spec.fps / count / 1e6)
    report.add("longsana_file_first_block", parts.ready[0], "s until the first block can be played",
               at_the_end=late, at_the_end_blocks=FEW)
    report.add("longsana_file_fps_at_the_end", other, "pixel frames a second", blocks=FEW, ours_on_the_same=mine)
    report.add("longsana_file_decode", decode / count * 1e3, "ms a frame, streamed, bf16",
               sample_ms=sample / count * 1e3)


# ------------------------------------------------------------------------------------------------------------- command

def run(tiny: bool, part: str, report: Report, blocks: int | None = None) -> Report:
    """One part; returns its report (not yet written)."""
    device, size = "cuda" if torch.cuda.is_available() else "cpu", TINY if tiny else FULL
    blocks = blocks or (5 if tiny else BLOCKS)
    if part == "dit":
        run_dit(report, size, device, blocks)
    else:
        run_file(report, size, device, blocks, tiny)
    return report


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="run.py bench longsana")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--part", choices=("dit", "file"))
    parser.add_argument("--blocks", type=int)
    options = parser.parse_args(arguments)
    for part in (options.part,) if options.part else ("dit", "file"):
        report = Report("longsana" if part == "dit" else "longsana_file")
        try:
            run(options.tiny, part, report, options.blocks)
        finally:
            if not options.tiny:  # a check of the benchmark, not a figure
                print(report.write(), flush=True)
    return 0
