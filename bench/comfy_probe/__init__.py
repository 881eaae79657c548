"""Two ComfyUI nodes for the benchmark server only: a clock on the model, and a report after the sampler.

Linked into the benchmark's own custom_nodes folder; never part of the pack. The report is one JSON line a run in the file
that SANA_BENCH_LOG names.
"""

import json
import os
import time

import comfy.memory_management
import comfy.model_management as management
import comfy.patcher_extension
import torch

CALLS: list[tuple] = []


def stamp():
    """A point in time on the device's own clock."""
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(first, second) -> float:
    """Milliseconds from one stamp to another."""
    return first.elapsed_time(second) if torch.cuda.is_available() else (second - first) * 1e3


class BenchClock:
    """Passes a MODEL on and stamps every call of its network."""

    CATEGORY = "bench"
    FUNCTION = "run"
    RETURN_TYPES = ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",)}}

    def run(self, model):
        def timed(executor, x, *args, **kwargs):
            start = stamp()
            result = executor(x, *args, **kwargs)
            CALLS.append((int(x.shape[0]), start, stamp()))
            return result

        CALLS.clear()
        clone = model.clone()
        clone.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, "bench", timed)
        return (clone,)


class BenchReport:
    """Passes a LATENT on and writes what the clock saw: (batch, ms) a call, ms between calls, memory."""

    CATEGORY = "bench"
    FUNCTION = "run"
    RETURN_TYPES = ("LATENT",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"samples": ("LATENT",)}}

    def run(self, samples):
        data = {"dynamic_vram": comfy.memory_management.aimdo_enabled,
                "vram_state": management.vram_state.name, "finite": bool(torch.isfinite(samples["samples"]).all())}
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            data |= {"torch_peak_gib": torch.cuda.max_memory_allocated() / 2**30,
                     "torch_reserved_gib": torch.cuda.max_memory_reserved() / 2**30}
            torch.cuda.reset_peak_memory_stats()
        data["calls"] = [(batch, between(start, end)) for batch, start, end in CALLS]
        data["starts"] = [between(CALLS[0][1], start) for _, start, _ in CALLS]
        CALLS.clear()
        with open(os.environ["SANA_BENCH_LOG"], "a", encoding="utf-8") as log:
            log.write(json.dumps(data) + "\n")
        return (samples,)


NODE_CLASS_MAPPINGS = {"SanaBenchClock": BenchClock, "SanaBenchReport": BenchReport}
