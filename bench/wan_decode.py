"""The Wan 2.1 VAE's decoder on 81 frames of 832x480: the core's streaming decode beside diffusers' AutoencoderKLWan.

``run.py bench wan_decode [--tiny]``. On an H200 about 60 s. Random weights, the same in both. *Whole*: one call, pixels stay on
the card. *Streamed*: block by block with the cache carried, frames to the CPU as bytes, as a film does it. Both are exact.
Checked first, on fewer frames, with TF32 off: float32 against diffusers' float32; then bf16 against float32, where our error
must not be over twice diffusers' own; and the streamed frames against the whole ones. Timed float32 is what PyTorch does by
itself: its convolutions use TF32 on a card that has it; ``exact`` is without.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sana_video_core import ops
from sana_video_core.film import WanStream
from sana_video_core.film.transfer import to_cpu
from sana_video_core.film.video import to_uint8
from sana_video_core.vae.loading import convert_vae, load_wan_vae
from sana_video_core.vae.wan import WanCache, WanVAE, denormalize

from . import prepare
from .harness import BenchError, Report, measure, peak_bytes, relative_error

BLOCKS = (11, 10)  # latent frames of the streamed pieces: those of LongSANA; 81 pixel frames
Decode = Callable[[Tensor], Tensor]  # raw latent [1, 16, T, H, W] -> pixels -1..1


@dataclass(frozen=True)
class Work:
    """Latent (height, width), latent frames of the check, repeats in (bf16, float32)."""

    latent: tuple[int, int]
    blocks: tuple[int, ...]
    check_frames: int
    repeats: tuple[int, int]


FULL, TINY = Work((60, 104), BLOCKS, 5, (5, 2)), Work((2, 4), (2, 1), 2, (1, 1))


def diffusers_decode(state: dict[str, Tensor], dim: int, dtype: torch.dtype, device: str) -> Decode:
    """diffusers' VAE with the same weights, loaded strictly; it clamps to -1..1."""
    try:
        from diffusers import AutoencoderKLWan
    except ImportError as error:
        raise BenchError(f"wan_decode needs diffusers, its peer: {error}") from error
    with torch.device("meta"):
        vae = AutoencoderKLWan(base_dim=dim)
    weights = {name: t.to(device, dtype) for name, t in convert_vae(state, to="diffusers").items()}
    vae.load_state_dict(weights, strict=True, assign=True)
    vae.eval().requires_grad_(False)
    return lambda latent: vae.decode(latent.to(dtype), return_dict=False)[0]


@contextlib.contextmanager
def exact_convolutions() -> Iterator[None]:
    """float32 convolutions and products without TF32."""
    backends = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [b.allow_tf32 for b in backends]
    for b in backends:
        b.allow_tf32 = False
    try:
        yield
    finally:
        for b, old in zip(backends, before):
            b.allow_tf32 = old


def whole(vae: WanVAE, raw: Tensor) -> Tensor:
    return vae.decode(raw.to(vae.conv2.weight.dtype))


def streamed(vae: WanVAE, latent: Tensor, blocks: tuple[int, ...]) -> list[Tensor]:
    """Frames ``[n, H, W, 3]`` uint8 on the CPU of a model-space latent, as a film's decoder gives them block by block."""
    stream = WanStream(vae)
    stream.start(None)
    return [frames for block in latent.split(blocks, 2) for frames in to_cpu(stream.decode(block))]


def check(report: Report, work: Work, ours: dict[torch.dtype, WanVAE], peers: dict[torch.dtype, Decode], latent: Tensor) -> None:
    """All decoders against float32 without TF32, on the first latent frames."""
    raw = denormalize(latent[:, :, :work.check_frames])
    half, single = torch.bfloat16, torch.float32
    with exact_convolutions():
        truth = whole(ours[single], raw).clamp(-1, 1)
        report.check("ours float32 against diffusers float32", relative_error(peers[single](raw), truth), 1e-4)
    theirs = relative_error(peers[half](raw), truth)
    report.check("diffusers bf16 against float32 (sanity: the same function)", theirs, 0.1)
    report.check("ours bf16 against float32, limit: twice diffusers' error",
                 relative_error(whole(ours[half], raw).clamp(-1, 1), truth), 2 * theirs)
    for dtype, vae in ours.items():
        once = to_uint8(whole(vae, denormalize(latent))[0].movedim(0, -1))
        pieces = torch.cat(streamed(vae, latent, work.blocks))
        report.check(f"{dtype}: streamed frames against one call, mean difference of 255",
                     float((once.int() - pieces.int()).abs().float().mean()), 0.1)


def add_rows(report: Report, work: Work, ours: dict[torch.dtype, WanVAE], peers: dict[torch.dtype, Decode], latent: Tensor,
             device: str) -> None:
    """Times and peaks; every ratio is to diffusers in bf16."""
    raw, half, single = denormalize(latent), torch.bfloat16, torch.float32
    (many, few), name = work.repeats, "wan_vae_decode_81f"
    theirs = measure(lambda: peers[half](raw), 1, max(1, many - 2), device)
    cases = {"": (half, many, lambda: whole(ours[half], raw)),
             "_streamed": (half, many, lambda: streamed(ours[half], latent, work.blocks)),
             "_fp32": (single, few, lambda: whole(ours[single], raw)),
             "_fp32_streamed": (single, few, lambda: streamed(ours[single], latent, work.blocks))}
    for suffix, (dtype, repeats, call) in cases.items():
        timing = measure(call, 1, repeats, device)
        report.add(name + suffix, timing, "ms", ratio_vs_diffusers_bf16=theirs.median / timing.median,
                   peak_gib=peak_bytes(call) / 2**30, dtype=str(dtype).removeprefix("torch."))
    with exact_convolutions():
        exact = measure(cases["_fp32"][2], 0, 1, device)
    report.add(f"{name}_fp32_exact", exact, "ms", ratio_vs_diffusers_bf16=theirs.median / exact.median)
    with ops.force("reference"):
        plain = measure(cases[""][2], 1, few, device)
    report.add(f"{name}_reference_operators", plain, "ms", ratio_vs_diffusers_bf16=theirs.median / plain.median, dtype="bfloat16")
    report.add(f"{name}_diffusers_bf16", theirs, "ms", peak_gib=peak_bytes(lambda: peers[half](raw)) / 2**30)
    cache = WanCache()
    for _ in ours[half].decode_stream(raw[:, :, :3].to(half), cache):
        pass
    report.add("wan_vae_decode_cache", cache.nbytes() / 2**20, "MiB, bf16")


@torch.inference_mode()
def run(tiny: bool = False, report: Report | None = None, peer=diffusers_decode) -> Report:
    """Check, then time; returns the report (not yet written). ``peer`` as :func:`diffusers_decode`."""
    device, report, work = "cuda" if torch.cuda.is_available() else "cpu", report or Report("wan_decode"), TINY if tiny else FULL
    state, dtypes = prepare.vae_state(tiny), (torch.bfloat16, torch.float32)
    ours = {dtype: load_wan_vae(state, dtype, device) for dtype in dtypes}
    peers = {dtype: peer(state, ours[dtype].dim, dtype, device) for dtype in dtypes}
    generator = torch.Generator(device).manual_seed(2)
    latent = torch.randn((1, 16, sum(work.blocks), *work.latent), generator=generator, device=device)
    check(report, work, ours, peers, latent)
    add_rows(report, work, ours, peers, latent, device)
    return report


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="run.py bench wan_decode")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args(arguments)
    report = Report("wan_decode")
    try:
        run(options.tiny, report)
    finally:
        if not options.tiny:  # a check of the benchmark, not a figure
            print(report.write(), flush=True)
    return 0
