"""A short look at a card: ceilings, every operator of a 2B block with its variants, the step beside diffusers, a profile.

``python3 -m bench.probe`` from the repository root; about a minute. Figures print as they come; nothing is written but the
log, so a part that fails costs nothing but itself.
"""

from __future__ import annotations

import sys
import time
import traceback

import torch
import torch.nn.functional as F

from sana_video_core import ops
from sana_video_core.dit.embeddings import rope_table
from sana_video_core.ops import fused, reference

from . import dit
from .harness import ceilings, machine, measure, relative_error, versions

FRAMES, HEIGHT, WIDTH = 21, 30, 52
C, HEADS, HIDDEN = 2240, 20, 6720
COPY, DEVICE, TINY = 1 << 30, "cuda", False
# Settings to try, in the order of fused.TUNING.
ATTENTION = {"state": [(64, 8, 3), (64, 8, 2), (64, 8, 1), (32, 8, 2), (32, 4, 2), (64, 4, 2)],
             "apply": [(64, 4, 8, 2), (64, 2, 8, 2), (128, 2, 8, 2), (32, 4, 8, 2), (64, 4, 4, 2), (128, 4, 16, 2)]}
DEPTHWISE = [(2, 64, 32, 8), (1, 64, 32, 4), (4, 64, 32, 8), (1, 64, 64, 8), (2, 64, 16, 4), (2, 32, 64, 8), (4, 16, 64, 8)]


def show(name: str, timing, moved: float = 0.0) -> None:
    """One line; ``moved`` is the least traffic in bytes."""
    rate = f"{moved / timing.median / 1e9:6.2f} TB/s of least traffic" if moved else ""
    print(f"  {name:46s} {timing.median:9.3f} ms  (low {timing.low:.3f}) {rate}", flush=True)


def part(title: str, function) -> None:
    start = time.time()
    print(f"== {title}", flush=True)
    try:
        function()
    except Exception:
        traceback.print_exc()
        sys.stderr.flush()
    torch.cuda.empty_cache()
    print(f"   [{time.time() - start:.1f} s]", flush=True)


def limits() -> None:
    """Copy bandwidth and the rate of the block's matrix products."""
    a = torch.randn(COPY, device=DEVICE, dtype=torch.bfloat16)
    b = torch.empty_like(a)
    show("copy 2 GiB", measure(lambda: b.copy_(a), 3, 9), 2 * a.nbytes)
    tokens = FRAMES * HEIGHT * WIDTH
    for name, out, inner in (("qkv", 3 * C, C), ("proj", C, C), ("up", 2 * HIDDEN, C), ("down", C, HIDDEN),
                             ("temporal", C, 3 * C)):
        x = torch.randn(tokens, inner, device=DEVICE, dtype=torch.bfloat16)
        w = torch.randn(out, inner, device=DEVICE, dtype=torch.bfloat16) * inner**-0.5
        timing = measure(lambda x=x, w=w: F.linear(x, w), 2, 7)
        rate = 2 * tokens * out * inner / timing.median / 1e9
        print(f"  linear {name:10s} {timing.median:.3f} ms  {rate:.0f} TFLOP/s", flush=True)


def rand(*shape, scale=1.0) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE, dtype=torch.bfloat16) * scale


def streaming() -> None:
    """The operators that pass over the tokens once: error against the reference in float32, then times."""
    tokens = FRAMES * HEIGHT * WIDTH
    unit = tokens * C * 2
    x, y, rows, weight = rand(1, tokens, C), rand(1, tokens, C), rand(1, 1, 6, C), rand(C, scale=0.1) + 1
    shift, scale, gate = rows.unbind(2)[:3]
    compare("modulate_norm", fused.modulate_norm, reference.modulate_norm, (x, shift, scale), 2 * unit)
    compare("gated_residual", fused.gated_residual, reference.gated_residual, (x, y, gate), 3 * unit)
    compare("rms_norm", fused.rms_norm, reference.rms_norm, (x, weight, 1e-6), 2 * unit)
    compare("temporal_taps", fused.temporal_taps, reference.temporal_taps, (x, FRAMES), 4 * unit)
    k = rand(1, 300, C)
    mask = torch.arange(300, device=DEVICE)[None] < 120
    for name, args in (("masked", (mask,)), ("trimmed to 120", (mask, (120,))), ("all 300", ())):
        show(f"softmax, {name}", measure(lambda a=args: reference.softmax_attention(x, k, k, HEADS, *a), 2, 5), 2 * unit)


def attention() -> None:
    """The linear attention and the settings of its two passes."""
    tokens = FRAMES * HEIGHT * WIDTH
    weight, qkv = rand(C, scale=0.1) + 1, rand(1, tokens, 3 * C)
    cos, sin = rope_table(FRAMES, HEIGHT, WIDTH, C // HEADS, device=DEVICE)
    args = (qkv, weight, weight, cos, sin, HEADS)
    compare("linear_attention", fused.linear_attention, reference.linear_attention, args, 5 * tokens * C * 2)
    for name, settings in ATTENTION.items():
        tune(name, settings, lambda: fused.linear_attention(*args))


def depthwise() -> None:
    """The gated depthwise convolution and its settings."""
    tokens = FRAMES * HEIGHT * WIDTH
    up, taps, bias = rand(1, tokens, 2 * HIDDEN), rand(2 * HIDDEN, 1, 3, 3, scale=0.3), rand(2 * HIDDEN, scale=0.1)
    show("silu in place", measure(lambda: F.silu(up, inplace=True), 2, 5), 2 * up.nbytes)
    args, moved = (up, taps, bias, (HEIGHT, WIDTH)), 1.5 * up.nbytes
    compare("gated_depthwise", fused.gated_depthwise, reference.gated_depthwise, args, moved)
    tune("depthwise", DEPTHWISE, lambda: fused.depthwise_glu(*args), moved)


def compare(name: str, ours, truth, args: tuple, moved: float) -> None:
    """Error of both in bf16 against the reference in float32, then their times."""
    def first(value):
        return value[0] if isinstance(value, tuple) else value

    wide = tuple(a.float() if isinstance(a, torch.Tensor) and a.dtype == torch.bfloat16 else a for a in args)
    expected = first(truth(*wide))
    print(f"  {name}: error {relative_error(first(ours(*args)), expected):.2e}, reference bf16 "
          f"{relative_error(first(truth(*args)), expected):.2e}", flush=True)
    del wide, expected
    show(f"{name} fused", measure(lambda: ours(*args), 2, 7), moved)
    show(f"{name} reference", measure(lambda: truth(*args), 1, 3), moved)


def tune(name: str, settings: list[tuple], call, moved: float = 0.0) -> None:
    """Time ``call`` under every setting of one kernel; leaves the fastest."""
    best = None
    for setting in settings:
        fused.TUNING[name] = setting
        try:
            timing = measure(call, 1, 5)
        except Exception as error:  # a setting that does not fit this card
            print(f"  {name} {setting}: {str(error)[:100]}")
            continue
        show(f"{name} {setting}", timing, moved)
        best = min(best or (timing.median, setting), (timing.median, setting))
    if best:
        fused.TUNING[name] = best[1]


@torch.inference_mode()
def ours_profiled() -> None:
    """One forward of the full network and where its time goes."""
    work = dit.workload(TINY)
    model = dit.build(work.spec, DEVICE, torch.bfloat16, **dit.PEER_EPS)
    args = dit.row(dit.inputs(work.spec, work.grid, 2, DEVICE, torch.bfloat16), 0)
    show("forward, batch 1", measure(lambda: model(**args), 2, 5))
    activity = torch.profiler.ProfilerActivity
    kinds = [activity.CUDA if torch.cuda.is_available() else activity.CPU]
    with torch.profiler.profile(activities=kinds) as profile:
        model(**args)
    events = sorted(profile.key_averages(), key=lambda e: -e.self_device_time_total)[:22]
    for event in events:
        print(f"    {event.self_device_time_total / 1e3:8.2f} ms {event.count:5d}x  {event.key[:100]}")
    with ops.force("reference"):
        show("forward, batch 1, reference operators", measure(lambda: model(**args), 1, 2))


def beside_diffusers() -> None:
    dit.run(TINY)


def main(arguments: list[str]) -> int:
    global FRAMES, HEIGHT, WIDTH, C, HEADS, HIDDEN, COPY, DEVICE, TINY
    if "--tiny" in arguments:  # on a CPU, with TRITON_INTERPRET=1
        FRAMES, HEIGHT, WIDTH, C, HEADS, HIDDEN, COPY, DEVICE, TINY = 2, 3, 4, 32, 2, 48, 1 << 10, "cpu", True
    print(machine(), versions(), "ceilings", ceilings(), flush=True)
    part("limits", limits)
    for title, function in (("streaming operators", streaming), ("attention", attention), ("depthwise", depthwise)):
        part(title, torch.inference_mode()(function))
    part("profile", ours_profiled)
    part("beside diffusers", beside_diffusers)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
