"""The list of benchmarks and the way to one: ``python3 run.py bench NAME [--tiny]``. Each module here has ``main(argv)``."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).parents[1]
BENCHMARKS = {
    "dit": "the 2B network's CFG step beside diffusers (GPU): dit [--tiny] [--size 480p|720p_ltx2] [--compiled]",
    "operators": "every operator of a block against the table of the performance spec, and plain torch (GPU): operators [--tiny]",
    "probe": "ceilings of the card, every operator with its variants, a profile (GPU)",
    "prepare": "write full-size random model files in the public layouts: prepare BASE [--tiny]",
    "comfy_step": "the three layouts bit for bit, and the step inside ComfyUI's layers: comfy_step BASE [--tiny]",
    "comfy_server": "the real server, end to end, in three memory modes: comfy_server BASE [--tiny]",
    "fp8": "fp8 against bf16: the embedded model judged, the pace of long video (GPU): fp8 BASE [--tiny] [--clips N]",
    "step_cache": "EasyCache and LazyCache against the exact clip, embedded model: step_cache [--tiny] [--clips N]",
    "memory": "LongSANA's memory at every block, beside the official cache list (GPU): memory [--tiny] [--blocks N] [--steps N]",
    "longsana": "a minute of LongSANA: network alone, and noise to mp4 (GPU): longsana [--tiny] [--part dit|file] [--blocks N]",
    "wan_decode": "the Wan VAE's streaming decode beside diffusers (GPU): wan_decode [--tiny]",
    "film_server": "films of 30 s and 60 s through the real server, in a run folder: film_server BASE [--tiny]",
    "mini_film_cpu": "a film of the embedded model on two CPU threads (CPU): mini_film_cpu [--tiny] [--blocks N]",
    "session": "prepare, comfy_step and comfy_server in one go with time limits, or --parts=a,b (GPU)",
}


def main(arguments: list[str]) -> int:
    """Run one benchmark; without a known name, list them (exit code 2)."""
    if not arguments or arguments[0] not in BENCHMARKS:
        print("usage: run.py bench NAME [options]", file=sys.stderr)
        for name, text in BENCHMARKS.items():
            print(f"  {name:15s}{text}", file=sys.stderr)
        return 2
    # ComfyUI's nodes.py must not be hidden by our nodes/ in the benchmarks that import both.
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]
    return import_module(f".{arguments[0]}", __package__).main(arguments[1:]) or 0
