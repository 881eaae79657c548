"""What fp8 costs and gives: errors and prompts followed of the embedded model, and the pace of long video, against bf16.

``run.py bench fp8 BASE [--tiny] [--clips N]`` after ``prepare BASE``; needs COMFYUI_PATH. Both precisions run in ComfyUI's layers
as the Loader makes them, fp8 with input scales where the device multiplies in it. Checked first: the error of whole passes of the
embedded model against float32, and that of two blocks of long video against bf16.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from sana_video_core.dit import SanaVideoTransformer
from sana_video_core.mini import evaluate, files
from sana_video_core.mini.judge import adherence
from sana_video_core.sampling.plan import pixel_frames

from . import dit, prepare
from .comfy_step import as_the_node_loads, load_pack
from .harness import Report, relative_error
from .long import FULL, TINY, Long, timed
from .longsana import CHECK_FRAMES, outputs

PASS_LIMIT = 0.05  # relative error of a whole pass of the embedded model; an H200 multiplies in E4M3, a CPU in float32
LONG_LIMIT = 0.1
BLOCKS = 8
PROMPT = "A red star bounces up and down on a navy background."


class Loaded(nn.Module):
    """The network of a MODEL, loaded as the server would, under the core's calls."""

    def __init__(self, loading, path: Path, precision: str):
        import comfy.model_management

        super().__init__()
        patcher = as_the_node_loads(loading, path, precision)
        comfy.model_management.load_models_gpu([patcher], memory_required=8 << 30)
        inner = patcher.model.diffusion_model
        inner.compute_dtype = patcher.model.get_dtype_inference()
        self.kept, self.spec, self.dtype = (patcher, inner), inner.spec, inner.compute_dtype
        self.device = patcher.load_device
        self.dtype_of = nn.Parameter(torch.empty(0, dtype=self.dtype, device=self.device), requires_grad=False)

    def forward(self, *arguments, **options) -> Tensor:
        return SanaVideoTransformer.forward(self.kept[1], *arguments, **options)

    def absorb(self, *arguments, **options):
        return SanaVideoTransformer.absorb(self.kept[1], *arguments, **options)


def passes(network: Loaded, text) -> Tensor:
    """The embedded model's velocities of one noise at three times; float32 on the CPU."""
    caption, mask = (t.to(network.device) for t in text)
    latent = torch.randn(1, network.spec.channels, 6, 12, 20, generator=torch.Generator().manual_seed(0))
    latent, caption = latent.to(network.device, network.dtype), caption.to(network.dtype)
    return torch.cat([network(latent, torch.tensor([t], device=network.device), caption, mask).float().cpu()
                      for t in (900.0, 500.0, 100.0)])


def weight_errors(network: Loaded) -> list[float]:
    """Relative error of every quantised layer's weight against the file's."""
    from sana_video_core.checkpoint import convert, read_state_dict

    exact = convert(read_state_dict(files()["transformer"])[0], network.spec)
    return [relative_error(module.weight.dequantize().float(), exact[f"{name}.weight"].float())
            for name, module in network.kept[1].named_modules() if getattr(module, "quant_format", None) is not None]


def quality(report: Report, loading, clips: int) -> None:
    """Errors against float32, then the judge's verdict of the same clips in both precisions."""
    path = files()["transformer"]
    networks = {name: Loaded(loading, path, name) for name in ("fp32", "bf16", "fp8")}
    model = evaluate.MiniModel(networks["bf16"].device, dtype=networks["bf16"].dtype)
    text = model.text.positive([PROMPT])
    truth = passes(networks["fp32"], text)
    for name in ("bf16", "fp8"):
        report.check(f"the embedded model in {name} against float32", relative_error(passes(networks[name], text), truth),
                     PASS_LIMIT)
    errors = weight_errors(networks["fp8"])
    prompts, _ = evaluate.held_out_prompts(clips)
    right = {}
    for name in ("bf16", "fp8"):
        model.network = networks[name]
        verdicts, _ = evaluate.run(clips, lambda part, start: model.clips(part, start), prompts, 50 if clips >= 50 else clips)
        right[name] = adherence(verdicts)
    report.check("adherence that fp8 loses", right["bf16"] - right["fp8"], 0.02)
    report.add("mini_fp8_adherence", right["fp8"], "share of clips that show their prompt", bf16=right["bf16"], clips=clips)
    report.add("mini_fp8_layer_error", max(errors), "largest relative error of a layer's weight", layers=len(errors),
               median=statistics.median(errors))


def pace(report: Report, loading, base: Path, tiny: bool) -> None:
    """``longsana_dit_fps`` in ComfyUI's layers: blocks with the state carried, from the weights of ``prepare``."""
    path = prepare.layouts(base)["safetensors bf16"]
    networks = {name: Loaded(loading, path, name) for name in ("bf16", "fp8")}
    device, size = str(networks["bf16"].device), TINY if tiny else FULL
    size = replace(size, spec=replace(size.spec, depth=networks["bf16"].spec.depth))
    for network in networks.values():  # LongSANA is this network with other weights
        network.kept[1].spec = size.spec
    long = Long(size, device, model=networks["bf16"])
    args = [dit.inputs(long.spec, (n, *long.size.latent), 1, device, torch.bfloat16, seed=3 + i)["latent"]
            for i, n in enumerate(CHECK_FRAMES)]
    found = {name: outputs(network, args, long.condition.positive) for name, network in networks.items()}
    for what, fp8, bf16 in zip(("velocity with history", "sums v k", "sums k", "last frames"), found["fp8"], found["bf16"]):
        report.check(f"long video, {what}: fp8 against bf16", relative_error(fp8, bf16), LONG_LIMIT)
    fps = {}
    for name, network in networks.items():
        for _ in long.sample(2, network):
            pass
        seconds = [s for _, s in timed(long.sample(BLOCKS, network), device)]
        fps[name] = pixel_frames(long.plan(BLOCKS).frames) / sum(seconds)
    report.add("longsana_dit_fps_in_comfyui", fps["bf16"], "pixel frames a second, bf16", blocks=BLOCKS)
    report.add("longsana_dit_fps_fp8", fps["fp8"], "pixel frames a second", ratio_vs_bf16=fps["fp8"] / fps["bf16"],
               blocks=BLOCKS)


@torch.inference_mode()
def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="run.py bench fp8")
    parser.add_argument("base", type=Path)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--clips", type=int, default=200)
    options = parser.parse_args(arguments)
    loading, report = load_pack(), Report("fp8")
    try:
        quality(report, loading, options.clips)
        pace(report, loading, options.base, options.tiny)
    finally:
        if not options.tiny:  # a check of the benchmark, not a figure
            print(report.write(), flush=True)
    return 0
