"""Builds every Triton kernel for cards that are not here; prints JSON rows.

    .runtime/venv/bin/python tests/helpers/kernel_builds.py [capability ...] [--no-decoder]

The fused operators are called at the 2B network's and the Wan decoder's sizes on tensors without memory; their launches are not
run but written down, and each is compiled as it would be on the card. Needs a process without Triton's interpreter.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

CAPABILITIES = (80, 89, 90, 120)  # A100 (and, but for its shared memory, RTX 30), RTX 40, H100, RTX 50
POINTERS = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32", torch.int64: "*i64",
            torch.float8_e4m3fn: "*fp8e4nv", torch.float16: "*fp16"}
REFUSED = {"add_frames_kernel": (3, 8)}  # kernels that Triton refuses from that version on; the product goes without


class Launches:
    """Stands in for ``jit.run`` and keeps (kernel, arguments by name, options) of each call."""

    def __init__(self, jit):
        self.jit, self.found = jit, []

    def __enter__(self) -> Launches:
        self.run, found = self.jit.run, self.found

        def record(kernel, *args, grid, warmup, **given):
            names = [p.name for p in kernel.params]
            values = dict(zip(names, args)) | {k: v for k, v in given.items() if k in names}
            values |= {p.name: p.default for p in kernel.params if p.name not in values}
            found.append((kernel, values, {k: v for k, v in given.items() if k not in names}))

        self.jit.run = record
        return self

    def __exit__(self, *_) -> None:
        self.jit.run = self.run


def network_calls(fused, hopper: bool) -> None:
    """Every operator of a block at 832x480x81, and the attention also with a state."""
    from sana_video_core.ops import pairs_fused
    from sana_video_core.ops.reference import Contribution

    tokens, width, hidden, heads = 21 * 30 * 52, 2240, 6720, 20
    x, y, weight, rows = new(1, tokens, width), new(1, tokens, width), new(width), new(1, 1, width)
    table = [new(tokens, width // heads // 2, dtype=torch.float32)] * 2
    past = Contribution(new(1, heads, 112, 112, dtype=torch.float32), new(1, heads, 1, 112, dtype=torch.float32))
    offset = new(1, 1, width)
    fused.modulate_norm(x, rows, rows)
    fused.modulate_norm(x, rows, rows, offset=offset)
    fused.gated_residual(x, y, rows)
    fused.gated_residual(x, y, rows, y)
    fused.residual_norm(x, y, rows, rows)
    fused.rms_norm(x, weight, 1e-6)
    for history in (None, past):
        fused.linear_attention(new(1, tokens, 3 * width), weight, weight, *table, heads, history)
    for bias in (None, new(2 * hidden)):
        fused.gated_depthwise(new(1, tokens, 2 * hidden), new(2 * hidden, 1, 3, 3), bias, (30, 52))
    for tail in (None, new(1, 1, 1560, width)):
        fused.temporal_taps(x, 21, tail)
    fused.scaled_fp8(x)
    fused.row_fp8(x)
    fused.row_fp8(new(1, tokens, hidden))
    fused.modulate_norm_fp8(x, rows, rows)
    fused.residual_norm_fp8(x, y, rows, rows)
    fused.temporal_taps_fp8(x, 21, new(1, 1, 1560, width))
    pairs_fused.time_pairs(x, 21, new(1, 1, 1560, width))
    pairs_fused.pair_weights(new(width, 3 * width))
    for given in (None, offset):
        pairs_fused.pair_residual(x, y, rows, new(1, 4, 11 * 1560, width, dtype=torch.float16), 21, offset=given)
    words = new(2, 300, width)
    fused.softmax_attention(new(2, tokens, width), words, words, heads, None, (120, 300), (weight, 1e-6))
    given = new(dtype=torch.float32)
    fused.given_fp8(x, given)
    fused.modulate_norm_fp8(x, rows, rows, given=given)
    fused.residual_norm_fp8(x, y, rows, rows, given=given)
    fused.gated_residual_fp8(x, y, rows, given=given)
    fused.temporal_taps_fp8(x, 21, given=given)
    fused.temporal_taps_fp8(x, 21, new(1, 1, 1560, width), given=given)
    fused.linear_attention(new(1, tokens, 3 * width), weight, weight, *table, heads, given=given)
    fused.gated_depthwise(new(1, tokens, 2 * hidden), new(2 * hidden, 1, 3, 3), new(2 * hidden), (30, 52), given=given)
    fused.softmax_attention(new(2, tokens, width), words, words, heads, None, (120, 100), (weight, 1e-6), given=given)
    onto_calls(given, hopper)
    if hopper:
        gluon_calls(given)
    table = [new(60, 8, dtype=torch.float32)] * 2
    fused.linear_attention(new(1, 60, 3 * 48), new(48), new(48), *table, 3)  # heads of 16 channels
    fused.gated_depthwise(new(1, 64, 2 * 65), new(2 * 65, 1, 3, 3), None, (8, 8))  # no words of two channels


def onto_calls(given, hopper: bool) -> None:
    """Products in E4M3 that are added to the tokens, as a block has them with a scale for all rows and with one each."""
    from sana_video_core.ops import onto_fused
    from sana_video_core.ops.reference import Rows

    tokens, width = 21 * 30 * 52, 2240
    x, gate, bias = new(2, tokens, width), new(2, 1, width), new(width)
    for tail in (None, new(2, 1, 1560, width)):
        framed = onto_fused.framed_fp8(x, 21, tail, given=given)
    if not hopper:
        return
    by_row = new(2, tokens, 1, dtype=torch.float32)
    for scale in (given, by_row):
        y, weight = Rows(e4m3(2, tokens, width), scale), Rows(e4m3(width, width), given)
        onto_fused.add_product_fp8(x, y, weight, bias, gate, given=None if scale is by_row else given)
        onto_fused.add_product_fp8(x, y, weight, bias)
    wide = Rows(e4m3(width, 3 * width), given)
    onto_fused.add_product_fp8(x, framed, wide, None, gate, x, frames=21)
    onto_fused.add_product_fp8(x, Rows(e4m3(2, tokens, 3 * width), by_row), wide, None, gate, x)


def gluon_calls(given) -> None:
    """Both attentions in Gluon, to the model's dtype and to E4M3, and each form in which a text is taken."""
    from sana_video_core.ops import linear_fused, softmax_fused

    tokens, width, heads = 21 * 30 * 52, 2240, 20
    table, weight, words = [new(tokens, width // heads // 2, dtype=torch.float32)] * 2, new(width), new(2, 300, width)
    for scale in (None, given):
        linear_fused.linear_attention(new(2, tokens, 3 * width), weight, weight, *table, heads, given=scale)
        for lengths in ((120, 40), (300, 300)):
            softmax_fused.softmax_attention(
                new(2, tokens, width), words, words, heads, None, lengths, (weight, 1e-6), given=scale)
    softmax_fused.softmax_attention(new(1, tokens, 2560), *[new(1, 300, 2560)] * 2, 20, None, (300,))  # heads of 128 channels


def e4m3(*shape: int) -> torch.Tensor:
    return new(*shape, dtype=torch.float8_e4m3fn)


def decoder_calls(frames_fused) -> None:
    """Every form of the Wan decoder's convolution, at the widths with tiles of their own; windows and gathers."""
    def frames(channels, *more):
        return new(1, 1, 60, 104, channels, *more)

    def step(channels, into, given=None, gamma=None, keep=True):
        weight = new(into, 3, 3, 3, channels)
        frames_fused.causal_step(new(1, 3, 62, 106, channels), None, weight, new(into), given, gamma, keep)

    step(16, 384, gamma=new(384))
    step(384, 384, frames(384), new(384))
    step(192, 192, gamma=new(192), keep=False)
    step(96, 96, frames(96), new(96))
    step(96, 96, gamma=new(96), keep=False)
    for channels in (96, 192, 384) if frames_fused._hopper(None) else ():
        total, sums, _ = frames_fused.open_pairs(
            new(1, 4, 60, 104, channels), new(1, 2, 62, 106, channels), new(channels), new(1, 4, 60, 104, channels), True)
        frames_fused.pair_conv(sums, new(4, channels, 3, 3, channels, dtype=torch.float16), new(channels))
    frames_fused.open_window(frames(192))
    frames_fused._pass(frames(96), new(96), frames(96), new(96), True, True)  # after a convolution of cuDNN
    frames_fused.upsample_conv(frames(384), new(192, 3, 3, 384), new(192))
    frames_fused.time_double(frames(384), None, new(768, 3, 1, 1, 384), new(768))
    frames_fused.pixel_conv(new(1, 3, 482, 834, 96), None, new(3, 3, 3, 3, 96), new(3))


def new(*shape: int, dtype=torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, device="meta", dtype=dtype)


def settings_of(modules, capability: int) -> None:
    """Let the operators take the launch settings of that card."""
    fused, frames, kernels, onto = modules
    hopper = capability == 90
    fused._setting = lambda name, x: fused.TUNING[name] if hopper else fused.SMALLER.get(name, fused.TUNING[name])
    frames._hopper = lambda x: hopper
    kernels.native = lambda: True
    onto._processors = lambda device: 132
    onto.frames_fault = lambda device: None


def kind_of(value) -> str:
    """Triton's name of an argument's type."""
    if isinstance(value, torch.Tensor):
        return POINTERS[value.dtype]
    if hasattr(value, "block_shape"):  # of Gluon: a matrix that is read in pieces
        return f"tensordesc<{POINTERS[value.base.dtype][1:]}[{', '.join(map(str, value.block_shape))}],{value.layout!r}>"
    if isinstance(value, float):
        return "fp32"
    return "i32" if value < 1 << 31 else "i64"


def build(kernel, values: dict, options: dict, capability: int) -> dict:
    """Compile one launch; its shared memory, registers and spilled bytes."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = [p.name for p in kernel.params]
    fixed = {p.name for p in kernel.params if p.is_constexpr}
    signature = {name: "constexpr" if name in fixed else kind_of(values[name]) for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
    source = (source_of(kernel) or ASTSource)(kernel, signature, {(names.index(n),): values[n] for n in fixed}, aligned)
    try:
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    except RuntimeError:
        least = REFUSED.get(kernel.fn.__name__)
        if least and tuple(map(int, triton.__version__.split(".")[:2])) >= least:
            return {"kernel": kernel.fn.__name__, "capability": capability, "refused": triton.__version__}
        raise
    return {"kernel": kernel.fn.__name__, "capability": capability, "shared": made.metadata.shared,
            **registers(made.asm["ptx"], capability)}


def source_of(kernel):
    """What Gluon's kernels are compiled from; None for Triton's."""
    from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction

    return GluonASTSource if isinstance(kernel, GluonJITFunction) else None


def registers(ptx: str, capability: int) -> dict:
    """What the assembler reports: registers of a thread, bytes that did not fit."""
    import triton

    tool = next((Path(triton.__file__).parent / "backends" / "nvidia" / "bin").glob("ptxas*"))
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "kernel.ptx"
        path.write_text(ptx)
        card = f"sm_{capability}" + "a" * (capability >= 90)
        report = subprocess.run([tool, "-v", f"--gpu-name={card}", path, "-o", path.with_suffix(".cubin")],
                                capture_output=True, text=True, check=True).stderr
    return {"registers": int(re.findall(r"Used (\d+) registers", report)[0]),
            "spilled": int(re.findall(r"(\d+) bytes spill stores", report)[0])}


def main(capabilities: list[int], decoder: bool) -> None:
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from triton.runtime.jit import JITFunction

    from sana_video_core.ops import frames_fused, fused, kernels, onto_fused

    for capability in capabilities:
        settings_of((fused, frames_fused, kernels, onto_fused), capability)
        with Launches(JITFunction) as launches:
            network_calls(fused, capability == 90)
            if decoder:
                decoder_calls(frames_fused)
        seen = set()
        for kernel, values, options in launches.found:
            if capability < 89 and any(getattr(v, "dtype", None) == torch.float8_e4m3fn for v in values.values()):
                continue  # these cards have no E4M3, and the operator asks for one that has
            kinds = [v.dtype if isinstance(v, torch.Tensor) else v for v in values.values()]
            if (key := repr((kernel.fn.__name__, kinds, options))) not in seen:
                seen.add(key)
                print(json.dumps(build(kernel, values, options, capability)), flush=True)


if __name__ == "__main__":
    main([int(a) for a in sys.argv[1:] if a.isdigit()] or list(CAPABILITIES), "--no-decoder" not in sys.argv)
