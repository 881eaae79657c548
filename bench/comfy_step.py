"""The three public layouts bit for bit through both loaders, then the step in ComfyUI's layers beside core and diffusers.

In bf16 (``comfy_overhead``: against the bare core) and in the loader's precision fp8, whose error may be ten times diffusers':
as the node loads it, with input scales where the card multiplies in fp8, and without them.
``run.py bench comfy_step BASE [--tiny]`` after ``prepare BASE``; needs COMFYUI_PATH. One process holds everything: the core,
the pack as ComfyUI loads it (its nodes' loader, ComfyUI's layer classes and patcher) and diffusers.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

import sana_video_core as svc

from . import dit, prepare
from .cli import ROOT
from .harness import Report

FP8_LIMIT = 10.0  # times diffusers' error in bf16: three bits behind the point instead of seven, and sums in float32


def load_pack():
    """ComfyUI's modules and the pack's own loading module, as ComfyUI imports it."""
    sys.path.insert(0, os.environ["COMFYUI_PATH"])
    import comfy.cli_args

    comfy.cli_args.args.cpu = not torch.cuda.is_available()
    import nodes

    if not asyncio.run(nodes.load_custom_node(str(ROOT), set(), module_parent="custom_nodes")):
        raise RuntimeError("ComfyUI could not load the pack")
    name = nodes.NODE_CLASS_MAPPINGS["SanaVideoLoader"].__module__.removesuffix(".loader")
    return sys.modules[f"{name}.loading"]


def as_the_node_loads(loading, path: Path, precision: str):
    """What 'Load SANA-Video' gives in mode 'auto': the fp8 model with input scales, where the device multiplies in fp8."""
    return sys.modules[loading.__name__.removesuffix("loading") + "calibrate"].load_scaled(str(path), precision, "auto")


def same(state: dict, expected: dict) -> tuple[int, str]:
    """(how many tensors differ in bf16, the first of them)."""
    wrong = [name for name in expected if name not in state or not torch.equal(
        state[name].to(expected[name].device, torch.bfloat16), expected[name])]
    wrong += [name for name in state if name not in expected]
    return len(wrong), wrong[0] if wrong else ""


def check_layouts(report: Report, base: Path, loading, tiny: bool) -> None:
    """Every file through the core's loader and through the node's loader against the values they were made from."""
    work = dit.workload(tiny)
    expected = {name: t.to(torch.bfloat16) for name, t in prepare.network(work.spec).items()}
    seconds: list[tuple[str, float]] = []
    for layout, path in prepare.layouts(base).items():
        start = time.perf_counter()
        state = svc.load_transformer(path).state_dict()
        seconds.append((f"load_core_{layout}", time.perf_counter() - start))
        count, first = same(state, expected)
        report.check(f"core, {layout}: tensors that differ {first}".strip(), count, 0)
        del state
        file = path if path.is_file() else next(path.glob("*-00001-of-*.safetensors"))  # what the node's list shows
        start = time.perf_counter()
        patcher = loading.load_diffusion(str(file), "bf16", "auto")
        seconds.append((f"load_node_{layout}", time.perf_counter() - start))
        count, first = same(patcher.model.diffusion_model.state_dict(), expected)
        report.check(f"node, {layout}: tensors that differ {first}".strip(), count, 0)
        del patcher
    for name, value in seconds:
        report.add(name.replace(" ", "_"), value, "s, file in the page cache")


def comfy_network(patcher) -> Callable:
    """The network of a MODEL as the server loads it, behind the core's call."""
    import comfy.model_management

    comfy.model_management.load_models_gpu([patcher], memory_required=8 << 30)
    network = patcher.model.diffusion_model
    network.compute_dtype = torch.bfloat16
    for module in network.modules():  # diffusers' constants, see dit.PEER_EPS
        if type(module).__name__ == "CrossAttention":
            module.q_norm.eps = module.k_norm.eps = dit.PEER_EPS["cross_eps"]

    def call(latent, timestep, caption, caption_mask):
        return network(latent, timestep, caption, None, {}, attention_mask=caption_mask)

    call.patcher = patcher  # keeps it loaded
    return call


def timed_load(report: Report, name: str, load: Callable):
    """A quantised MODEL; the row says how long it took and how many layers have an input scale."""
    start = time.perf_counter()
    patcher = load()
    seconds = time.perf_counter() - start
    layers = [m for m in patcher.model.diffusion_model.modules() if getattr(m, "quant_format", None) is not None]
    report.add(name, seconds, "s, file in the page cache", layers=len(layers),
               with_input_scale=sum(getattr(m, "input_scale", None) is not None for m in layers))
    return patcher


@torch.inference_mode()
def main(arguments: list[str]) -> int:
    base, tiny = Path(arguments[0]), "--tiny" in arguments
    loading = load_pack()
    report = Report("comfy_step")
    try:
        check_layouts(report, base, loading, tiny)
        path, name = prepare.layouts(base)["safetensors bf16"], dit.workload(tiny).name
        plain = timed_load(report, "load_fp8_without_scales", lambda: loading.load_diffusion(str(path), "fp8", "auto"))
        scaled = timed_load(report, "load_fp8", lambda: as_the_node_loads(loading, path, "fp8"))
        rows = {"bf16": dit.Other(comfy_network(as_the_node_loads(loading, path, "bf16")), f"{name}_in_comfyui"),
                "fp8": dit.Other(comfy_network(scaled), name.replace("bf16", "fp8"), FP8_LIMIT),
                "plain": dit.Other(comfy_network(plain), name.replace("bf16", "fp8_without_scales"), FP8_LIMIT)}
        dit.run(tiny, report=report, seed=prepare.SEED, others=list(rows.values()))
        overhead = next(r["overhead_vs_core"] for r in report.rows if r["name"] == rows["bf16"].row)
        report.add("comfy_overhead", 100 * overhead, "% of the bare core's step")
    finally:
        if not tiny:  # a check of the benchmark, not a figure
            print(report.write(), flush=True)
    return 0
