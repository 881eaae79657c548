"""Every operator of a 2B block at the sizes of the performance spec's table 1.2, against its row there and against plain torch.

``run.py bench operators [--tiny]``; on an H200 about 60 s. Rows ``<size>_<operator>`` in microseconds, bf16, one row of a batch:
``floor_ratio`` against the table (an H200's, so only there), ``ratio_vs_plain`` against the reference in bf16 (for single
products there is none: they are torch's own on both sides). ``every_operator`` names those beyond 1.25 of their row. Checked
first, each: the error against float64, at most twice that of the reference in bf16.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sana_video_core import ops
from sana_video_core.dit.embeddings import rope_table
from sana_video_core.dit.layers import add_onto
from sana_video_core.ops import reference

from .harness import Report, Timing, machine, relative_error, steady

BAR = 1.25
CALLS, REST = 10, 0.15  # calls in one measurement; seconds of rest before it
SIZES = {"480p": (21, 30, 52), "longsana": (10, 30, 52), "720p_ltx2": (11, 22, 40)}
# Microseconds of performance spec 1.2 (H200, bf16) at these sizes; rows of one operator here are added up.
FLOORS = {
    "modulated_norm": (68, 33, 20), "qkv": (1248, 594, 369), "linear_attention": (34 + 68 + 68, 16 + 33 + 33, 10 + 20 + 20),
    "attention_out": (416, 198, 123), "text_queries": (416, 198, 123), "text_attention": (186, 88, 55),
    "text_out": (416, 198, 123), "ffn_up": (2497, 1189, 738), "gated_depthwise": (307, 146, 91), "ffn_down": (1248, 594, 369),
    "temporal": (1248, 594, 369),
}


class Case(NamedTuple):
    """One operator: ``ours`` as the network calls it, ``plain`` the reference over the same arguments ``given``; ``seen`` makes
    of what ours returns what plain does (it is not timed). Ours may go on from its own last result: check the first."""

    ours: Callable[[], object]
    plain: Callable[..., Tensor] | None = None
    given: tuple = ()
    seen: Callable[[object], Tensor] = lambda result: result


class Width(NamedTuple):
    """The network's width, heads, hidden width, and text tokens."""

    channels: int = 2240
    heads: int = 20
    hidden: int = 6720
    text: int = 300


def linear(out: int, inner: int, noise, bias: bool = True) -> nn.Linear:
    layer = nn.Linear(inner, out, bias=bias, device="meta", dtype=torch.bfloat16).requires_grad_(False)
    layer.weight = nn.Parameter(noise(out, inner, scale=inner ** -0.5), requires_grad=False)
    if bias:
        layer.bias = nn.Parameter(noise(out), requires_grad=False)
    return layer


def attentions(grid: tuple[int, int, int], width: Width, noise, device: str) -> dict[str, Case]:
    """The operators of a block's first half: both attentions with their norms and products."""
    tokens, c, heads = grid[0] * grid[1] * grid[2], width.channels, width.heads
    x, y, text = noise(1, tokens, c), noise(1, tokens, c), noise(2, 1, width.text, c)
    shift, scale, gate = noise(1, 1, 3, c, scale=0.3).unbind(2)
    gains, qkv = [noise(c, scale=0.1) + 1 for _ in range(2)], noise(1, tokens, 3 * c)
    table = rope_table(*grid, c // heads, device=device)
    wide, square = linear(3 * c, c, noise, bias=False), linear(c, c, noise)
    offset = noise(1, 1, c)
    weight, bias = square.weight, square.bias
    norm = gains[0], 1e-6

    def normed_text(q, k, v, gain):
        return reference.softmax_attention(q, k, v, heads, None, (width.text,), (gain, 1e-6))

    def out(gated: bool) -> Case:
        g, goal = gate if gated else None, x.clone()
        plain = (lambda x, y, w, b, g: reference.gated_residual(x, F.linear(y, w, b), g)) if gated else (
            lambda x, y, w, b: x + F.linear(y, w, b))
        return Case(lambda: add_onto(square, goal, y, g), plain, (x, y, weight, bias, *([gate] if gated else [])),
                    lambda more: goal + more)

    return {
        "modulated_norm": Case(lambda: ops.modulate_norm(x, shift, scale), reference.modulate_norm, (x, shift, scale)),
        "qkv": Case(lambda: wide(x)),
        "linear_attention": Case(
            lambda: ops.linear_attention(qkv, *gains, *table, heads),
            lambda qkv, a, b, cos, sin: reference.linear_attention(qkv, a, b, cos, sin, heads)[0], (qkv, *gains, *table),
            lambda result: result[0]),
        "attention_out": out(True),
        "text_queries": Case(lambda: square(ops.Shifted.of(x, offset)),
                             lambda x, o, w, b: F.linear(x + o, w, b), (x, offset, weight, bias)),
        "text_attention": Case(lambda: ops.softmax_attention(x, *text, heads, None, (width.text,), norm), normed_text,
                               (x, *text, gains[0])),
        "text_out": out(False),
    }


def mixing(grid: tuple[int, int, int], width: Width, noise) -> dict[str, Case]:
    """The operators of a block's second half: the feed-forward part and the temporal convolution with the end of the block."""
    tokens, c, hidden = grid[0] * grid[1] * grid[2], width.channels, width.hidden
    x, u = noise(1, tokens, c), noise(1, tokens, c)
    up, down = linear(2 * hidden, c, noise), linear(c, hidden, noise, bias=False)
    wide, gated = noise(1, tokens, 2 * hidden), noise(1, tokens, hidden)
    taps, bias, gate = noise(2 * hidden, 1, 3, 3, scale=0.3), noise(2 * hidden, scale=0.1), noise(1, 1, c)
    time_conv = linear(c, 3 * c, noise, bias=False)

    def temporal() -> Tensor:
        return ops.pair_residual(x, u, gate, time_conv(ops.AlongTime.of(u, grid[0], None)), grid[0])

    def by_taps(x, u, gate, weight):
        return reference.gated_residual(x, u, gate, F.linear(reference.temporal_taps(u, grid[0])[0], weight))

    return {
        "ffn_up": Case(lambda: up(x)),
        "gated_depthwise": Case(lambda: ops.gated_depthwise(wide, taps, bias, grid[1:]),
                                lambda *given: reference.gated_depthwise(*given, grid[1:]), (wide, taps, bias)),
        "ffn_down": Case(lambda: down(gated)),
        "temporal": Case(temporal, by_taps, (x, u, gate, time_conv.weight)),
    }


def time_of(function: Callable[[], object], device: str, calls: int, repeats: int = 5) -> Timing:
    """Microseconds of one call."""
    t = steady(function, calls, repeats, device, captured=True, rest=REST)
    return Timing(t.median * 1e3, t.low * 1e3, t.high * 1e3, repeats)


def check(report: Report, name: str, case: Case) -> None:
    """The error of ours against the reference in float64; limit: twice that of the reference in bf16."""
    truth = case.plain(*(t.double() for t in case.given))
    allowed = relative_error(case.plain(*case.given), truth)
    report.check(f"{name} against float64, limit: twice the reference's in bf16", relative_error(case.seen(case.ours()), truth),
                 2 * max(allowed, 1e-3))


def figures(report: Report, name: str, case: Case, device: str, calls: int) -> tuple[Timing, dict]:
    """Our time, after the check, and how much longer plain torch takes."""
    if case.plain is None:
        return time_of(case.ours, device, calls), {}
    check(report, name, case)
    timing, plain = time_of(case.ours, device, calls), time_of(lambda: case.plain(*case.given), device, 1, 3)
    return timing, {"ratio_vs_plain": plain.median / timing.median}


@torch.inference_mode()
def run(report: Report, device: str, tiny: bool) -> None:
    width = Width(48, 3, 40, 7) if tiny else Width()
    generator, beyond, worst = torch.Generator(device).manual_seed(0), [], 0.0
    known = "H200" in machine().get("gpu", "")

    def noise(*shape, scale=1.0) -> Tensor:
        return (torch.randn(shape, generator=generator, device=device) * scale).bfloat16()

    for i, (size, grid) in enumerate(SIZES.items()):
        grid = (5 - i, 4, 5) if tiny else grid
        for half in (lambda g: attentions(g, width, noise, device), lambda g: mixing(g, width, noise)):
            for name, case in half(grid).items():
                timing, more = figures(report, f"{size} {name}", case, device, 1 if tiny else CALLS)
                if known:
                    more["floor_ratio"] = timing.median / FLOORS[name][i]
                    worst = max(worst, more["floor_ratio"])
                    beyond += [f"{size}_{name}"] * (more["floor_ratio"] > BAR)
                report.add(f"{size}_{name}", timing, "us", **more)
    if known:
        report.add("every_operator", worst, "times its row, the worst", bar=BAR, operators=len(FLOORS) * len(SIZES),
                   beyond=", ".join(beyond))


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="run.py bench operators")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args(arguments)
    report = Report("operators")
    try:
        run(report, "cuda" if torch.cuda.is_available() else "cpu", options.tiny)
    finally:
        if not options.tiny:  # a check of the benchmark, not a figure
            print(report.write(), flush=True)
    return 0
