"""A short look at a card: every operator of a 2B block with its settings, the step beside diffusers, a profile, ceilings.

``python3 -m bench.probe`` from the repository root; about 100 seconds. Cheap and telling parts come first, figures print as
they come, and nothing is written but the log, so a part that fails costs nothing but itself. The fastest setting of every
kernel is kept for the parts after it. ``python3 -m bench.probe depthwise temporal`` runs those parts alone.
"""

from __future__ import annotations

import sys
import time
import traceback

import torch
import torch.nn.functional as F

from sana_video_core import ops
from sana_video_core.dit.embeddings import rope_table
from sana_video_core.ops import fused, fused_torch, reference

from . import dit, harness
from .harness import Timing, ceilings, machine, measure, relative_error, versions
from .profile import by_kind, device_times

FRAMES, HEIGHT, WIDTH = 21, 30, 52
C, HEADS, HIDDEN = 2240, 20, 6720
COPY, DEVICE, TINY, CALLS = 1 << 30, "cuda", False, 10
# Settings to try, in the order of fused.TUNING.
SETTINGS = {
    "depthwise": [(64, 1, "half", 4), (64, 1, "half", 0), (64, 1, "half", 2), (128, 2, "half", 4), (64, 1, "plain", 0)],
    "norm": [(4, 4), (1, 4), (8, 4), (4, 8), (2, 2), (1, 1)],
    "residual": [(4, 4), (1, 4), (8, 4), (4, 8), (2, 2)],
    "rms": [(4, 4), (1, 4), (8, 4), (2, 2), (1, 1)],
    "taps": [(8, 256, 4), (16, 128, 4), (4, 512, 4), (8, 256, 8), (2, 256, 1)],
    "keys": [(4,), (2,), (1,), (8,)],
    "text": [(64, 8, 4, 2), (64, 16, 4, 2), (64, 4, 4, 2), (128, 4, 8, 2), (128, 8, 8, 2), (64, 8, 4, 3), (64, 8, 8, 2),
             (128, 8, 4, 2)],
    "norm_fp8": [(1,), (2,), (4,)], "residual_fp8": [(4,), (2,), (1,), (8,)], "taps_fp8": [(4,), (2,), (8,), (1,)],
    "given_taps": [(2,), (1,), (4,), (8,)],
    "state": [(64, 4, 3), (64, 4, 2), (64, 4, 4), (64, 8, 3), (32, 4, 4), (128, 8, 3), (128, 4, 2)],
    "row_fp8": [(1, 8), (2, 8), (4, 8), (1, 4), (1, 16)],
    "fp8": [(2048, 8, 4), (1024, 8, 4), (4096, 8, 8), (2048, 32, 4), (2048, 2, 4)],
    "apply": [(64, 4, 3), (64, 4, 2), (64, 8, 2), (32, 4, 2), (32, 8, 2), (16, 4, 2)],
}


def show(name: str, timing: Timing, moved: float = 0.0) -> None:
    """One line; ``moved`` is the least traffic in bytes."""
    rate = f"{moved / timing.median / 1e9:6.2f} TB/s of least traffic" if moved else ""
    print(f"  {name:46s} {timing.median:9.4f} ms  (low {timing.low:.4f}) {rate}", flush=True)


def steady(function, repeats: int = 5) -> Timing:
    return harness.steady(function, CALLS, repeats, DEVICE)


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


def rand(*shape, scale=1.0) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE, dtype=torch.bfloat16) * scale


def first(value) -> torch.Tensor:
    return value[0] if isinstance(value, tuple) else value


def last(value) -> torch.Tensor:
    return value[-1] if isinstance(value, tuple) else value


def wide(args: tuple) -> tuple:
    return tuple(a.float() if isinstance(a, torch.Tensor) and a.dtype == torch.bfloat16 else a for a in args)


def compare(name: str, args: tuple, moved: float, pick=first) -> None:
    """Error of both forms in bf16 against the reference in float32, then their times."""
    ours, truth = getattr(fused, name), getattr(reference, name)
    expected = pick(truth(*wide(args)))
    print(f"  {name}: error {relative_error(pick(ours(*args)), expected):.2e}, reference bf16 "
          f"{relative_error(pick(truth(*args)), expected):.2e}", flush=True)
    del expected
    show(f"{name} fused", steady(lambda: ours(*args)), moved)
    show(f"{name} reference", measure(lambda: truth(*args), 1, 3), moved)


def tune(name: str, call, moved: float = 0.0, expected: torch.Tensor | None = None) -> None:
    """Time ``call`` under every setting of one kernel; leaves the fastest. With ``expected``: its error too."""
    best = None
    fused.SMALLER.pop(name, None)  # measured settings count on every card
    for setting in SETTINGS[name]:
        fused.TUNING[name] = setting
        try:
            error = "" if expected is None else f"  error {relative_error(first(call()), expected):.2e}"
            timing = steady(call, 4)
        except Exception as failure:  # a setting that does not fit this card
            print(f"  {name} {setting}: {str(failure)[:100]}")
            continue
        show(f"{name} {setting}{error}", timing, moved)
        best = min(best or (timing.median, setting), (timing.median, setting))
    if best:
        fused.TUNING[name] = best[1]


def depthwise() -> None:
    """The gated depthwise convolution: settings and forms, on inputs around zero and on mostly negative ones."""
    tokens = FRAMES * HEIGHT * WIDTH
    taps, bias = rand(2 * HIDDEN, 1, 3, 3, scale=0.3), rand(2 * HIDDEN, scale=0.1)
    for shift in (-3.0, 0.0):
        args = (rand(1, tokens, 2 * HIDDEN) + shift, taps, bias, (HEIGHT, WIDTH))
        expected = reference.gated_depthwise(*wide(args))
        print(f"  inputs around {shift}: reference bf16 error "
              f"{relative_error(reference.gated_depthwise(*args), expected):.2e}", flush=True)
        tune("depthwise", lambda a=args: fused.gated_depthwise(*a), 1.5 * args[0].nbytes, expected)
        del expected
    show("depthwise reference", measure(lambda: reference.gated_depthwise(*args), 1, 3), 1.5 * args[0].nbytes)


def streaming() -> None:
    """The operators that pass over the tokens once: error against the reference in float32, times, settings."""
    tokens = FRAMES * HEIGHT * WIDTH
    unit = tokens * C * 2
    x, y, extra, rows, weight = rand(1, tokens, C), rand(1, tokens, C), rand(1, tokens, C), rand(1, 1, 6, C), rand(C) * 0.1 + 1
    shift, scale, gate = rows.unbind(2)[:3]
    compare("residual_norm", (x, y, shift, scale), 4 * unit, last)
    tune("norm", lambda: fused.residual_norm(x, y, shift, scale), 4 * unit)
    compare("modulate_norm", (x, shift, scale), 2 * unit)
    compare("gated_residual", (x, y, gate, extra), 4 * unit)
    tune("residual", lambda: fused.gated_residual(x, y, gate, extra), 4 * unit)
    compare("gated_residual", (x, y, gate), 3 * unit)
    compare("rms_norm", (x, weight, 1e-6), 2 * unit)
    tune("rms", lambda: fused.rms_norm(x, weight, 1e-6), 2 * unit)
    compare("temporal_taps", (x, FRAMES), 4 * unit)
    tune("taps", lambda: fused.temporal_taps(x, FRAMES), 4 * unit)


def attention() -> None:
    """The linear attention, its three passes and their settings; the text attention."""
    tokens = FRAMES * HEIGHT * WIDTH
    weight, qkv = rand(C, scale=0.1) + 1, rand(1, tokens, 3 * C)
    cos, sin = rope_table(FRAMES, HEIGHT, WIDTH, C // HEADS, device=DEVICE)
    args = (qkv, weight, weight, cos, sin, HEADS)
    compare("linear_attention", args, 5 * tokens * C * 2)
    for name in ("keys", "state", "apply"):
        tune(name, lambda: fused.linear_attention(*args), 5 * tokens * C * 2)
    before = fused.PROGRAMS
    for programs in (20, 26, before):
        fused.PROGRAMS = programs
        show(f"{programs} programs a head", steady(lambda: fused.linear_attention(*args)))
    q, k = rand(1, tokens, C), rand(1, 300, C)
    mask = torch.arange(300, device=DEVICE)[None] < 120
    for name, more in (("masked", (mask,)), ("trimmed to 120", (mask, (120,)))):
        show(f"softmax, {name}", steady(lambda a=more: reference.softmax_attention(q, k, k, HEADS, *a)), 2 * tokens * C * 2)
    both, lengths, norm = (rand(2, tokens, C), *2 * (rand(2, 300, C),)), (120, 40), (weight, 1e-6)
    args = (*both, HEADS, None, lengths)
    expected = reference.softmax_attention(*wide(args), (weight.float(), 1e-6))
    print(f"  two rows, normed: error {relative_error(fused_torch.softmax_attention(*args, norm), expected):.2e}", flush=True)
    show("two rows, norm and torch", steady(lambda: fused_torch.softmax_attention(*args, norm)), 6 * tokens * C * 2)
    tune("text", lambda: fused.softmax_attention(*args, norm), 6 * tokens * C * 2, expected)


def fp8() -> None:
    """E4M3 with one scale: the two passes that make it, and the block's products with it (one scale, and one a row)."""
    tokens = FRAMES * HEIGHT * WIDTH
    x = rand(1, tokens, HIDDEN)
    tune("fp8", lambda: fused.scaled_fp8(x), 2.5 * x.nbytes)
    show("scaled_fp8 reference", measure(lambda: reference.scaled_fp8(x), 1, 3), 2.5 * x.nbytes)
    tune("row_fp8", lambda: fused.row_fp8(x), 1.5 * x.nbytes)
    narrow = rand(1, tokens, C)
    show("row_fp8 of a narrow tensor", steady(lambda: fused.row_fp8(narrow)), 1.5 * narrow.nbytes)
    rows = rand(1, 1, 6, C).unbind(2)[:2]
    tune("residual_fp8", lambda: fused.residual_norm_fp8(narrow, narrow, *rows), 3.5 * narrow.nbytes)
    tune("norm_fp8", lambda: fused.modulate_norm_fp8(narrow, *rows), 1.5 * narrow.nbytes)
    tune("taps_fp8", lambda: fused.temporal_taps_fp8(narrow, FRAMES), 2.5 * narrow.nbytes)
    given = torch.tensor(2.0**-6, device=DEVICE)
    tune("given_taps", lambda: fused.temporal_taps_fp8(narrow, FRAMES, given=given), 2.5 * narrow.nbytes)
    for name, out, inner in (("qkv", 3 * C, C), ("proj", C, C), ("up", 2 * HIDDEN, C), ("down", C, HIDDEN), ("time", C, 3 * C)):
        (a, s), (b, t) = fused.scaled_fp8(rand(tokens, inner)), fused.scaled_fp8(rand(out, inner, scale=inner**-0.5))
        rows, columns = s.expand(tokens, 1).contiguous(), t.expand(1, out).contiguous()
        for how, scales in (("one scale", (s, t)), ("a scale a row", (rows, columns))):
            for fast in (False, True):
                def product(a=a, b=b, scales=scales, fast=fast) -> torch.Tensor:
                    return torch._scaled_mm(a, b.t(), *scales, out_dtype=torch.bfloat16, use_fast_accum=fast)

                timing = steady(product, 4)
                print(f"  {name}, {how}{', fast sums' * fast}: {timing.median:.3f} ms  "
                      f"{2 * tokens * out * inner / timing.median / 1e9:.0f} TFLOP/s", flush=True)


def temporal() -> None:
    """Three forms of the temporal convolution, with what each needs around it."""
    tokens, size = FRAMES * HEIGHT * WIDTH, HEIGHT * WIDTH
    u, weight = rand(1, tokens, C), rand(C, 3 * C, scale=(3 * C) ** -0.5)
    expected = F.linear(reference.temporal_taps(u.float(), FRAMES)[0], weight.float())
    parts = weight.unflatten(1, (3, C)).unbind(1)
    kernel = weight.view(C, 3, 1, C).permute(0, 3, 1, 2)

    def taps() -> torch.Tensor:
        return F.linear(fused.temporal_taps(u, FRAMES)[0], weight)

    def products() -> torch.Tensor:
        out = F.linear(u, parts[1])
        out[0, size:].addmm_(u[0, :-size], parts[0].t())
        out[0, :-size].addmm_(u[0, size:], parts[2].t())
        return out

    def convolution() -> torch.Tensor:
        out = F.conv2d(u.view(1, FRAMES, size, C).permute(0, 3, 1, 2), kernel, padding=(1, 0))
        return out.permute(0, 2, 3, 1).flatten(1, 2)

    for form in (taps, products, convolution):
        error = relative_error(form(), expected)
        show(f"temporal, {form.__name__}  error {error:.2e}", steady(form))


def limits() -> None:
    """Copy bandwidth and the rate of the block's matrix products."""
    a = torch.randn(COPY, device=DEVICE, dtype=torch.bfloat16)
    b = torch.empty_like(a)
    show("copy 2 GiB", measure(lambda: b.copy_(a), 3, 9), 2 * a.nbytes)
    tokens = FRAMES * HEIGHT * WIDTH
    for name, out, inner in (("qkv", 3 * C, C), ("proj", C, C), ("up", 2 * HIDDEN, C), ("down", C, HIDDEN)):
        x, w = rand(tokens, inner), rand(out, inner, scale=inner**-0.5)
        timing = measure(lambda x=x, w=w: F.linear(x, w), 2, 7)
        rate = 2 * tokens * out * inner / timing.median / 1e9
        print(f"  linear {name:10s} {timing.median:.3f} ms  {rate:.0f} TFLOP/s", flush=True)


def profile() -> None:
    """One forward of the full network and where its time goes."""
    print(f"  settings: {fused.TUNING}", flush=True)
    work = dit.workload(TINY)
    model = dit.build(work.spec, DEVICE, torch.bfloat16, **dit.PEER_EPS)
    both = dit.inputs(work.spec, work.grid, 2, DEVICE, torch.bfloat16)
    for batch, args in (("2", both), ("1", dit.row(both, 0))):
        show(f"forward, batch {batch}", measure(lambda a=args: model(**a), 2, 7))
        kernel_times(lambda a=args: model(**a))
    with ops.force("reference"):
        show("forward, batch 1, reference operators", measure(lambda: model(**args), 1, 2))


def kernel_times(function) -> None:
    """Where the device's time goes during one call."""
    times = device_times(function)
    print(f"  on the device {sum(ms for _, ms, _ in times):.1f} ms: "
          + ", ".join(f"{kind} {ms:.1f}" for kind, ms in by_kind(times).items()), flush=True)
    for name, ms, count in times[:45]:
        if ms > 0.02:
            print(f"    {ms:8.2f} ms {count:5d}x  {name[:110]}")


def beside_diffusers() -> None:
    dit.run(TINY)


PARTS = {"depthwise": depthwise, "streaming": streaming, "attention": attention, "temporal": temporal, "fp8": fp8,
         "profile": profile, "beside": beside_diffusers, "limits": limits}


def main(arguments: list[str]) -> int:
    global FRAMES, HEIGHT, WIDTH, C, HEADS, HIDDEN, COPY, DEVICE, TINY, CALLS
    if "--tiny" in arguments:  # on a CPU, with TRITON_INTERPRET=1
        FRAMES, HEIGHT, WIDTH, C, HEADS, HIDDEN, COPY, DEVICE, TINY, CALLS = 2, 3, 4, 32, 2, 48, 1 << 10, "cpu", True, 1
    chosen = [name for name in PARTS if name in arguments] or list(PARTS)
    print(machine(), versions(), "ceilings", ceilings(), flush=True)
    for name in chosen:
        part(name, PARTS[name] if name == "beside" else torch.inference_mode()(PARTS[name]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
