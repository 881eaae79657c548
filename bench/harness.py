"""Timing, correctness gates and the result file shared by all benchmarks.

A benchmark checks first and times after: :meth:`Report.check` raises when a result is wrong, and a report with a red check
refuses every figure. Times are CUDA events (or the clock, on a CPU), after a warm-up; a row holds the median and the spread.
Not covered: what is timed (the other files here).
"""

from __future__ import annotations

import gc
import json
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "triton", "diffusers", "transformers", "safetensors", "comfy-kitchen", "comfy-aimdo")
# Measured ceilings (performance spec 1.1): bf16 FLOP/s of large products, bytes/s of a large copy (read and write counted).
CEILINGS = {"H200": (790e12, 4.3e12), "H100": (790e12, 3.0e12)}


class BenchError(Exception):
    """A benchmark could not run, or its correctness check is red."""


@dataclass(frozen=True)
class Timing:
    """Milliseconds: median, fastest, slowest of ``repeats`` runs."""

    median: float
    low: float
    high: float
    repeats: int

    def __str__(self) -> str:
        return f"{self.median:.3f} ms ({self.low:.3f}-{self.high:.3f}, {self.repeats} runs)"


def measure(function: Callable[[], object], warmup: int = 2, repeats: int = 7, device: str | None = None) -> Timing:
    """Time ``function`` on its device: CUDA events when there is a GPU, else the clock."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    for _ in range(warmup):
        function()
    collects = gc.isenabled()
    gc.disable()  # as Python's timeit: a step has up to a thousand launches, and a card that catches up with them waits
    try:
        times = [_once_on_gpu(function) if device.startswith("cuda") else _once_on_cpu(function) for _ in range(repeats)]
    finally:
        if collects:
            gc.enable()
    return Timing(statistics.median(times), min(times), max(times), repeats)


def steady(function: Callable[[], object], calls: int, repeats: int, device: str, *, captured: bool = False, rest: float = 0.0,
           ) -> Timing:
    """Milliseconds of one call among ``calls`` of them, as inside a step, which is ahead of the card with its launches.

    ``captured``: a graph of them all, so that a short one's launches are not counted either. ``rest``: seconds before each
    measurement, because a card in a row of them slows down.
    """
    def several() -> None:
        for _ in range(calls):
            function()

    run = several
    if captured and device.startswith("cuda"):
        function()  # kernels are built, and libraries find their memory, before the capture
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            several()
        run = graph.replay
    times = []
    for _ in range(repeats):
        time.sleep(rest if device.startswith("cuda") else 0)
        times.append(measure(run, 1, 1, device).median / calls)
    return Timing(statistics.median(times), min(times), max(times), repeats)


def _once_on_gpu(function: Callable[[], object]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    function()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def _once_on_cpu(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return (time.perf_counter() - start) * 1e3


def peak_bytes(function: Callable[[], object]) -> int:
    """Most memory that torch held above what it held before, during one call (0 without a GPU)."""
    if not torch.cuda.is_available():
        function()
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """``|found - expected| / |expected|`` in float64; NaN and infinities give infinity."""
    found, expected = found.detach().to(expected.device).double(), expected.detach().double()
    error = float((found - expected).norm() / expected.norm().clamp_min(1e-300))
    return error if math.isfinite(error) else math.inf


@dataclass
class Report:
    """Rows of one benchmark. ``check`` must be green before ``add`` accepts a figure."""

    name: str
    rows: list[dict] = field(default_factory=list)
    checks: list[dict] = field(default_factory=list)

    def check(self, name: str, error: float, limit: float) -> None:
        """Record a correctness check; raises when it is red."""
        green = error <= limit  # a NaN is red
        self.checks.append({"name": name, "error": error, "limit": limit, "green": green})
        print(f"check {name}: {error:.3g} (limit {limit:.3g}) {'ok' if green else 'RED'}", flush=True)
        if not green:
            raise BenchError(f"{self.name}: the check '{name}' is red ({error:.3g} > {limit:.3g}); no times are given")

    def add(self, name: str, value: float | Timing, unit: str = "ms", **more: float | str) -> None:
        """Append a row; ``more`` holds ratios to peers and the floor. Refused without a green check."""
        if not self.checks or not all(c["green"] for c in self.checks):
            raise BenchError(f"{self.name}: no figure without a green check")
        row: dict = {"name": name, "value": value, "unit": unit}
        if isinstance(value, Timing):
            row |= {"value": round(value.median, 4), "low": round(value.low, 4), "high": round(value.high, 4),
                    "repeats": value.repeats}
        row |= {key: round(v, 4) if isinstance(v, float) else v for key, v in more.items()}
        self.rows.append(row)
        print("  ".join(f"{k}={v}" for k, v in row.items()), flush=True)

    def data(self) -> dict:
        return {"machine": machine(), "versions": versions(), "commit": commit(), "checks": self.checks, "rows": self.rows}

    def write(self, folder: Path | None = None) -> Path:
        """Write ``<name>.json``; returns its path."""
        path = Path(folder or os.environ.get("OUT") or RESULTS) / f"{self.name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.data(), indent=1) + "\n", encoding="utf-8")
        return path


def machine() -> dict:
    """The card (or processor) the figures belong to."""
    facts = {"cpu_cores": os.cpu_count(), "platform": platform.machine()}
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        facts |= {"gpu": card.name, "gpu_memory_gib": round(card.total_memory / 2**30, 1),
                  "capability": f"{card.major}.{card.minor}", "cuda": torch.version.cuda}
    return facts


def versions() -> dict:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """The commit that was measured: SANA_VIDEO_COMMIT, else git's HEAD, else 'unknown'."""
    if os.environ.get("SANA_VIDEO_COMMIT"):
        return os.environ["SANA_VIDEO_COMMIT"]
    try:
        return subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True,
                              check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def ceilings() -> tuple[float, float] | None:
    """(bf16 FLOP/s, bytes/s) of this card if it was measured, else None."""
    name = machine().get("gpu", "")
    return next((rates for card, rates in CEILINGS.items() if card in name), None)


def floor_ms(flop: float, moved: float) -> float | None:
    """The least time for that arithmetic and that traffic on this card; None on a card without measured ceilings."""
    rates = ceilings()
    return None if rates is None else max(flop / rates[0], moved / rates[1]) * 1e3
