"""The shipped workflow t2v_480p through the real ComfyUI server, noise to mp4, in three memory modes.

``run.py bench comfy_server BASE [--tiny]`` after ``prepare BASE``; needs COMFYUI_PATH. Each mode starts a server of its own,
loads another of the three public layouts, runs the workflow twice (loading included, then warm) and leaves its latent for
comparison. Steps are fewer than the workflow's to save time on the card; everything else is as shipped.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from safetensors.torch import load_file

from tools import workflow
from tools.client import Event, Outcome
from tools.environment import Environment
from tools.server import ComfyServer, link_folder

from . import prepare
from .cli import ROOT
from .harness import BenchError, Report, relative_error

STEPS = 8
TINY_SIZE = {"width": 64, "height": 64, "frames": 9}
MODES = {  # name -> (server flags, layout)
    "dynamic": ((), "official .pth float32"),
    "static": (("--disable-dynamic-vram",), "safetensors bf16"),
    # ComfyUI ignores --lowvram while DynamicVRAM is on; alone it would repeat the first mode.
    "lowvram": (("--lowvram", "--disable-dynamic-vram"), "diffusers folder bf16"),
    "dynamic_bf16": ((), "safetensors bf16"),
}
# The same weights and seed. In the lowvram mode the text encoder runs on the CPU in another precision, and a random network
# amplifies that; the other two modes do the same arithmetic.
LIMITS = {"static": 1e-2, "lowvram": 0.5, "dynamic_bf16": 1e-2}


class ThisPython(Environment):
    """This interpreter with its PYTHONPATH kept: where ComfyUI's packages lie beside a machine's own."""

    def child_env(self, **extra: str) -> dict[str, str]:
        return os.environ | super().child_env(**extra) | ({} if "PYTHONPATH" not in os.environ else {
            "PYTHONPATH": os.environ["PYTHONPATH"]})


@dataclass
class Memory:
    """Polls the card's used memory (all processes) as nvidia-smi tells it; (time, MiB) samples."""

    samples: list[tuple[float, float]] = field(default_factory=list)
    process: subprocess.Popen | None = None

    def __enter__(self) -> Memory:
        command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "-lms", "200"]
        try:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        except OSError:
            return self
        threading.Thread(target=self._read, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        if self.process:
            self.process.terminate()

    def _read(self) -> None:
        for line in self.process.stdout:
            try:
                self.samples.append((time.perf_counter(), float(line)))
            except ValueError:
                continue

    def peak_gib(self, start: float, end: float) -> float:
        return max((mib for t, mib in self.samples if start <= t <= end + 0.3), default=0.0) / 1024


def graph(object_info: dict, layout: Path, steps: int, seed: int, prefix: str, tiny: bool) -> dict:
    """The shipped workflow as a prompt: its model file chosen, fewer steps, the clock before and the report after the sampler."""
    prompt = workflow.to_api(json.loads((ROOT / "workflows" / "t2v_480p.json").read_text(encoding="utf-8")), object_info)
    by_type = {entry["class_type"]: key for key, entry in prompt.items()}
    loader, sampler = by_type["SanaVideoLoader"], by_type["KSampler"]
    choices = object_info["SanaVideoLoader"]["input"]["required"]["model"]
    options = choices[0] if isinstance(choices[0], list) else choices[1]["options"]
    name = next((o for o in options if o == layout.name or o.startswith(f"{layout.name}{os.sep}")), None)
    if name is None:
        raise BenchError(f"the Loader does not list {layout.name}: {options}")
    prompt[loader]["inputs"] |= {"model": name, "text_encoder": prepare.TEXT, "vae": prepare.VAE}
    prompt[sampler]["inputs"] |= {"steps": steps, "seed": seed}
    if tiny:
        prompt[by_type["SanaVideoEmptyLatent"]]["inputs"] |= TINY_SIZE
        prompt[by_type["SanaVideoTextEncode"]]["inputs"] |= {"prompt": "a red ball bounces", "negative_prompt": "blue"}
    prompt["clock"] = {"class_type": "SanaBenchClock", "inputs": {"model": prompt[sampler]["inputs"]["model"]}}
    prompt[sampler]["inputs"]["model"] = ["clock", 0]
    prompt["report"] = {"class_type": "SanaBenchReport", "inputs": {"samples": [sampler, 0]}}
    prompt[by_type["SanaVideoDecode"]]["inputs"]["samples"] = ["report", 0]
    prompt["keep"] = {"class_type": "SaveLatent", "inputs": {"samples": ["report", 0], "filename_prefix": prefix}}
    return prompt


def queue(server: ComfyServer, prompt: dict, timeout: float = 150) -> tuple[Outcome, dict[str, float], float, float]:
    """Queue a prompt and wait: (outcome, {node class: seconds}, start, end)."""
    marks: list[tuple[float, str]] = []

    def mark(event: Event) -> None:
        if event.type == "executing":
            marks.append((time.perf_counter(), event.data.get("node") or ""))

    start = time.perf_counter()
    outcome = server.client.run(prompt, on_event=mark, timeout=timeout)
    end = time.perf_counter()
    if not outcome.ok:
        raise BenchError(f"the workflow failed: {outcome.error}")
    nodes: dict[str, float] = {}
    for (began, node), (ended, _) in zip(marks, [*marks[1:], (end, "")]):
        if node:
            kind = prompt[node]["class_type"]
            nodes[kind] = round(nodes.get(kind, 0.0) + ended - began, 3)
    return outcome, nodes, start, end


def run_once(server: ComfyServer, prompt: dict, memory: Memory, log: Path) -> dict:
    """Queue a prompt; {"total_s", "nodes": {class: seconds}, "card_peak_gib", "files", ...the report node's line}."""
    outcome, nodes, start, end = queue(server, prompt)
    line = json.loads(log.read_text(encoding="utf-8").splitlines()[-1])
    return {"total_s": round(end - start, 2), "nodes": nodes, "card_peak_gib": memory.peak_gib(start, end),
            "files": outcome.files(), **line}


def step_ms(line: dict, steps: int) -> list[float]:
    """Milliseconds from step to step. A step is one call of batch 2 or two of batch 1."""
    starts, per_step = line["starts"], len(line["starts"]) // steps
    firsts = starts[::per_step]
    return [b - a for a, b in zip(firsts, firsts[1:])]


def new_server(base: Path, log: Path, flags: tuple[str, ...] = ()) -> ComfyServer:
    """The real server in this Python, not yet started; SANA_BENCH_FRONT names a front end where none is installed."""
    front = os.environ.get("SANA_BENCH_FRONT")
    flags = (*flags, *(("--front-end-root", front) if front else ()))
    environment = ThisPython(Path(sys.executable), Path(os.environ["COMFYUI_PATH"]), own=False)
    return ComfyServer(environment, base, log, flags, prepare.device() == "cuda")


def run_mode(mode: str, base: Path, out: Path, tiny: bool) -> dict:
    """One server: boot, two runs; everything measured."""
    flags, layout = MODES[mode]
    if prepare.device() != "cuda":
        flags = tuple(f for f in flags if f != "--lowvram")  # CPU and low memory exclude each other
    log = base / f"report_{mode}.jsonl"
    log.unlink(missing_ok=True)
    os.environ["SANA_BENCH_LOG"] = str(log)
    (base / "custom_nodes").mkdir(parents=True, exist_ok=True)
    link_folder(ROOT / "bench" / "comfy_probe", base / "custom_nodes" / "sana_bench_probe")
    begun = time.perf_counter()
    with Memory() as memory, new_server(base, out / f"server_{mode}.log", flags) as server:
        boot = time.perf_counter() - begun
        info = server.client.get("/object_info")
        steps = 2 if tiny else STEPS
        path = prepare.layouts(base)[layout]
        first, warm = (run_once(server, graph(info, path, steps, seed, f"bench_{mode}_{seed}", tiny), memory, log)
                       for seed in (1, 2))
        stats = server.client.get("/system_stats")
    return {"mode": mode, "flags": list(MODES[mode][0]), "layout": layout, "boot_s": round(boot, 1), "steps": steps,
            "first": first, "warm": warm, "comfyui": stats["system"].get("comfyui_version"),
            "device": stats["devices"][0]["name"]}


def latent(base: Path, mode: str):
    """The latent that the first run of a mode left."""
    return load_file(next((base / "output").glob(f"bench_{mode}_1*.latent")))["latent_tensor"]


def check_video(report: Report, base: Path, result: dict, tiny: bool) -> None:
    """The mp4 of the first run: frames, size and codec."""
    import av

    file = next(f for f in result["first"]["files"] if f["filename"].endswith(".mp4"))
    with av.open(str(base / "output" / file.get("subfolder", "") / file["filename"])) as container:
        stream = container.streams.video[0]
        found = (sum(1 for _ in container.decode(stream)), stream.width, stream.height, stream.codec_context.name)
    expected = (9, 64, 64, "h264") if tiny else (81, 832, 480, "h264")
    report.check(f"{result['mode']}: mp4 of {found}", float(found != expected), 0)
    report.check(f"{result['mode']}: latent finite", float(not result["first"]["finite"]), 0)


def add_rows(report: Report, result: dict) -> None:
    """The figures of one mode."""
    mode, first, warm = result["mode"], result["first"], result["warm"]
    steps = step_ms(warm, result["steps"])
    about = {"layout": result["layout"], "flags": " ".join(result["flags"]), "dynamic_vram": str(warm["dynamic_vram"])}
    calls = sorted({batch for batch, _ in warm["calls"]})
    report.add(f"comfy_2b_{mode}_step", statistics.median(steps), "ms", low=min(steps), high=max(steps),
               network_calls=f"batch {calls}, {len(warm['calls'])} for {result['steps']} steps", **about)
    report.add(f"comfy_2b_{mode}_card_peak", max(first["card_peak_gib"], warm["card_peak_gib"]), "GiB used on the card",
               torch_peak_sampling=warm.get("torch_peak_gib", 0.0), torch_reserved=warm.get("torch_reserved_gib", 0.0))
    report.add(f"comfy_2b_{mode}_load", first["nodes"].get("SanaVideoLoader", 0.0), "s, loader node", boot_s=result["boot_s"])
    for kind, label in (("SanaVideoTextEncode", "text"), ("KSampler", "sampling"), ("SanaVideoDecode", "decode"),
                        ("SaveVideo", "save")):
        report.add(f"comfy_2b_{mode}_{label}", warm["nodes"].get(kind, 0.0), "s, warm", first=first["nodes"].get(kind, 0.0))
    report.add(f"comfy_2b_{mode}_total", warm["total_s"], "s, warm", first=first["total_s"], steps=result["steps"])


def main(arguments: list[str]) -> int:
    base, tiny = Path(arguments[0]), "--tiny" in arguments
    out = Path(os.environ.get("OUT") or base)
    modes = [m for m in arguments[1:] if m in MODES] or list(MODES)
    report, failed = Report("comfy_2b"), []
    for mode in modes:
        try:
            result = run_mode(mode, base, out, tiny)
            check_video(report, base, result, tiny)
            if mode in LIMITS and modes[0] == "dynamic":
                report.check(f"{mode}: latent against dynamic", relative_error(latent(base, mode), latent(base, "dynamic")),
                             LIMITS[mode])
            add_rows(report, result)
        except Exception as error:  # the other modes are still worth their time
            failed.append(mode)
            print(f"MODE {mode} FAILED: {type(error).__name__}: {error}", flush=True)
        print(report.write(out), flush=True)
    return len(failed)
