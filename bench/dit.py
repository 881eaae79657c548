"""The 2B network's CFG step (two forwards) beside diffusers' network with the same weights, in one process.

``run.py bench dit [--tiny] [--size 480p|720p_ltx2] [--compiled]``. Rows: ``dit_480p_cfg_step_bf16``, one call of batch 2 as in
ComfyUI and in the pipelines of diffusers and the official code, and ``..._two_calls`` of batch 1, as ComfyUI does at short
memory; both sides in the same way. ``--compiled`` times diffusers under torch.compile too (batch 2). The check comes first:
against the reference operators in float32 our bf16 error must not be over twice diffusers' own.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from sana_video_core import ops
from sana_video_core.dit import SanaVideoTransformer
from sana_video_core.specs import LTX2, SPECS, ModelSpec

from . import weights
from .harness import Report, Timing, floor_ms, measure, peak_bytes, relative_error
from .profile import add_profile

TEXT_TOKENS = (120, 40)  # valid tokens of the prompt and of the negative prompt, of 300
# diffusers' constants (model spec 1.14): with them both networks are the same function.
PEER_EPS = {"cross_eps": 1e-5, "attention_eps": 1e-15}


class Other(NamedTuple):
    """A further way to run the same weights: a call like the network's, the name of its rows (without ``_two_calls``), and the
    error it may have, in units of diffusers' own."""

    call: Callable
    row: str
    limit: float = 2.0


@dataclass(frozen=True)
class Workload:
    """One size: its name, spec, latent grid (frames, height, width), repeats."""

    size: str
    spec: ModelSpec
    grid: tuple[int, int, int]
    check_grid: tuple[int, int, int]
    repeats: int = 7

    @property
    def name(self) -> str:
        return f"dit_{self.size}_cfg_step_bf16"


SIZES = {  # 832x480 and 1280x704, 81 frames
    "480p": Workload("480p", SPECS["sana-video-2b-480p"], (21, 60, 104), (3, 60, 104)),
    "720p_ltx2": Workload("720p_ltx2", SPECS["sana-video-2b-720p"], (11, 22, 40), (3, 22, 40)),
}


def workload(tiny: bool = False, size: str = "480p") -> Workload:
    """The 2B network at that size, or a network that a CPU runs in a second with the same kind of latent."""
    work = SIZES[size]
    if not tiny:
        return work
    mini = SPECS["sana-video-mini"]
    if size == "720p_ltx2":
        mini = replace(mini, channels=128, patch=(1, 1, 1), vae=LTX2)
    return replace(work, spec=mini, grid=(3, 8, 8), check_grid=(2, 8, 8), repeats=2)


def build(spec: ModelSpec, device: str, dtype: torch.dtype, seed: int = 0, **options) -> SanaVideoTransformer:
    """The core's network with random weights (made in float32 layer by layer, kept in ``dtype``)."""
    with torch.device(device):
        model = SanaVideoTransformer(spec, dtype=dtype, **options)
    return weights.fill(model, seed).eval().requires_grad_(False)


def inputs(spec: ModelSpec, grid: tuple[int, int, int], batch: int, device: str, dtype: torch.dtype, seed: int = 1) -> dict:
    """Fresh random arguments of one forward; row i has ``TEXT_TOKENS[i]`` valid text tokens. As in classifier-free guidance, all
    rows have one latent."""
    generator = torch.Generator(device).manual_seed(seed)

    def noise(*shape):
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    lengths = torch.tensor([TEXT_TOKENS[i % 2] for i in range(batch)], device=device)
    mask = torch.arange(spec.caption_tokens, device=device) < lengths[:, None]
    latent = noise(1, spec.channels, *grid).repeat(batch, 1, 1, 1, 1)
    return {"latent": latent, "timestep": torch.full((batch,), 875.0, device=device),
            "caption": noise(batch, spec.caption_tokens, spec.caption_channels), "caption_mask": mask.long()}


def row(args: dict, i: int) -> dict:
    """Arguments of batch row ``i`` alone."""
    return {name: t[i:i + 1] for name, t in args.items()}


def call_peer(peer, args: dict) -> torch.Tensor:
    return peer(args["latent"], args["caption"], args["timestep"], encoder_attention_mask=args["caption_mask"],
                return_dict=False)[0]


def compiled_peer(model, spec: ModelSpec, device: str):
    """diffusers' network with the weights of ``model``, its blocks under torch.compile: one graph serves all of them, where the
    whole network at once takes minutes to compile."""
    peer = weights.diffusers_model(model.state_dict(), spec, torch.bfloat16, device)
    for block in peer.transformer_blocks:
        block.compile(dynamic=False)
    return peer


def cfg_step(model, args: dict):
    """Two forwards of batch 1."""
    return [model(**row(args, i)) for i in range(2)]


def peer_step(peer, args: dict):
    return [call_peer(peer, row(args, i)) for i in range(2)]


def forward_cost(spec: ModelSpec, tokens: int, batch: int = 1) -> tuple[float, float]:
    """(FLOP, least bytes) of one forward: matrix products of the blocks, and the units of performance spec 1.2."""
    c, hidden, text = spec.width, spec.ffn_hidden, spec.caption_tokens
    per_token = 3 * c * c + c * c + 2 * c * c + 2 * hidden * c + 9 * 2 * hidden + hidden * c + 3 * c * c
    per_token += 2 * c * spec.linear_head_dim + 2 * c * text
    flop = 2.0 * batch * spec.depth * tokens * per_token
    moved = 45.0 * batch * spec.depth * tokens * c * 2
    return flop, moved


@torch.inference_mode()
def check(report: Report, work: Workload, model, peer, device: str, others: list[Other], compiled=None) -> None:
    """All networks against the reference operators in float32, on a clip of few frames; and the others against the core's network
    at the size that is timed, where kernels may run that do not pay for few frames."""
    spec, args = work.spec, inputs(work.spec, work.check_grid, 2, device, torch.float32, seed=3)
    truth_model = SanaVideoTransformer(spec, dtype=torch.float32, device=device, **PEER_EPS).eval()
    truth_model.load_state_dict({k: t.float() for k, t in model.state_dict().items()})
    with ops.force("reference"):
        truth = truth_model(**args)
    del truth_model
    half = {k: t.to(torch.bfloat16) if k in ("latent", "caption") else t for k, t in args.items()}
    theirs = relative_error(call_peer(peer, half), truth)
    report.check("diffusers bf16 against float32 (sanity: the same function)", theirs, 0.1)
    report.check("ours bf16 against float32, limit: twice diffusers' error", relative_error(model(**half), truth), 2 * theirs)
    alone = torch.cat(cfg_step(model, half))
    report.check("two rows apart against one batch", relative_error(alone, model(**half)), 2 * theirs)
    for other in others:
        report.check(f"{other.row} against float32", relative_error(other.call(**half), truth), other.limit * theirs)
    if compiled is not None:
        report.check("diffusers compiled against float32", relative_error(call_peer(compiled, half), truth), 2 * theirs)
    whole = inputs(spec, work.grid, 2, device, torch.bfloat16, seed=3)
    mine = model(**whole) if others else None
    for other in others:
        error = relative_error(other.call(**whole), mine)
        report.check(f"{other.row} against the core at the size that is timed", error, (other.limit + 2) * theirs)


@torch.inference_mode()
def run(tiny: bool = False, device: str | None = None, report: Report | None = None, seed: int = 0,
        others: list[Other] | None = None, size: str = "480p", compiled: bool = False) -> Report:
    """Check, then time; returns the report (not yet written).

    ``others``: further ways to run the same weights (made from ``seed``), timed beside the bare core. ``compiled``: diffusers
    under torch.compile as well.
    """
    device, others = device or ("cuda" if torch.cuda.is_available() else "cpu"), others or []
    work = workload(tiny, size)
    report = report or Report(work.name)
    model = build(work.spec, device, torch.bfloat16, seed, **PEER_EPS)
    peer = weights.diffusers_model(model.state_dict(), work.spec, torch.bfloat16, device)
    fast = compiled_peer(model, work.spec, device) if compiled else None
    check(report, work, model, peer, device, others, fast)
    args = inputs(work.spec, work.grid, 2, device, torch.bfloat16)
    tokens = math.prod(n // p for n, p in zip(work.grid, work.spec.patch))
    floor = floor_ms(*forward_cost(work.spec, tokens, 2))
    profiles: list[tuple[str, Callable]] = []  # made last: what is timed right after one may not be as usual
    for suffix, step, peer_call in (("", _whole, call_peer), ("_two_calls", cfg_step, peer_step)):
        peers = {"eager": lambda p=peer_call: p(peer, args)}
        if compiled and not suffix:  # another batch would compile once more
            peers["compiled"] = lambda p=peer_call: p(fast, args)
        timed = _time(report, work, suffix, lambda m, s=step: s(m, args), peers, model, others, floor, device)
        profiles += timed if not suffix else []
    for name, call in profiles:
        add_profile(report, name, call)
    return report


def _whole(model, args: dict):
    """One forward of the whole batch."""
    return model(**args)


def _time(report: Report, work: Workload, suffix: str, step, peers: dict[str, Callable], model, others: list[Other], floor,
          device) -> list[tuple[str, Callable]]:
    """The rows of one way to run a CFG step: ours, the peers', and the others'. Returns ours and the others to be profiled."""
    name = work.name + suffix
    mine = measure(lambda: step(model), 2, work.repeats, device)
    theirs = {how: measure(call, 2, max(3, work.repeats // 2), device) for how, call in peers.items()}
    report.add(name, mine, "ms", **ratios(mine, theirs, floor))
    for how, timing in theirs.items():
        report.add(f"{name}_diffusers_{how}", timing, "ms")
    report.add(f"peak_memory_{work.size}_step{suffix}", peak_bytes(lambda: step(model)) / 2**30, "GiB over weights",
               diffusers_eager=peak_bytes(peers["eager"]) / 2**30)
    for other in others:
        timing = measure(lambda t=other.call: step(t), 2, work.repeats, device)
        report.add(f"{other.row}{suffix}", timing, "ms", **ratios(timing, theirs, floor),
                   overhead_vs_core=timing.median / mine.median - 1)
    return [(name, lambda: step(model)), *((other.row, lambda t=other.call: step(t)) for other in others)]


def ratios(mine: Timing, theirs: dict[str, Timing], floor: float | None) -> dict:
    out = {f"ratio_vs_diffusers_{how}": timing.median / mine.median for how, timing in theirs.items()}
    return out if floor is None else out | {"floor_ratio": mine.median / floor}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="run.py bench dit")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--size", choices=SIZES, default="480p")
    parser.add_argument("--compiled", action="store_true")
    options = parser.parse_args(arguments)
    report = run(options.tiny, size=options.size, compiled=options.compiled)
    if not options.tiny:  # a check of the benchmark, not a figure
        print(report.write())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
