"""The proof on a GPU in one go: model files, layouts and step, the server's three modes; a table last.

``python3 run.py --inside bench session [--tiny] [--parts=a,b]`` with COMFYUI_PATH set, in a Python that has torch. Parts are
processes of their own with time limits; one that fails or hangs is reported and the next one runs. Without ``--parts`` the clip
model's run; those of long video are asked for by name. Results and logs go to the folder OUT (else bench/results).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from .cli import ROOT
from .harness import RESULTS

CLIP = {"prepare": 120, "comfy_step": 170, "comfy_server": 280}  # name -> seconds at most
LONG = {"memory": 120, "longsana": 240, "wan_decode": 120, "film_server": 330}
PARTS = CLIP | LONG
WITH_FILES = {*CLIP, "film_server"}  # these take the folder of the model files
BASE = "SANA_BENCH_BASE"
SHOWN = ("ratio", "floor", "overhead", "diffusers", "first")


def run_part(name: str, limit: float, base: Path, extra: list[str], log) -> tuple[str, float]:
    """(how it ended, seconds). Output goes to the screen and the log; the whole process group ends at the limit."""
    start = time.perf_counter()
    command = [sys.executable, str(ROOT / "run.py"), "--inside", "bench", name,
               *([str(base)] if name in WITH_FILES else []), *extra]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
                               start_new_session=True)
    timer = threading.Timer(limit, lambda: os.killpg(process.pid, signal.SIGKILL))
    timer.start()
    try:
        for line in process.stdout:
            print(line, end="", flush=True)
            log.write(line)
            log.flush()
        code = process.wait()
    finally:
        timer.cancel()
    seconds = time.perf_counter() - start
    return ("ok" if code == 0 else f"over its {limit:.0f} s" if seconds >= limit else f"failed ({code})"), seconds


def table(out: Path) -> list[str]:
    """One line a row of every result file, and the red checks."""
    lines = []
    for path in sorted(out.glob("*.json")):
        data = json.loads(path.read_text(encoding="utf-8"))
        lines += [f"RED {c['name']}: {c['error']:.3g} > {c['limit']:.3g}" for c in data.get("checks", ()) if not c["green"]]
        for row in data.get("rows", ()):
            value = f"{row['value']:.3f}" if isinstance(row["value"], float) else str(row["value"])
            more = " ".join(f"{k}={v}" for k, v in row.items() if k.startswith(SHOWN))
            lines.append(f"{row['name']:52s} {value:>11s} {row['unit'][:26]:26s} {more}")
    return lines


def main(arguments: list[str]) -> int:
    tiny = [a for a in arguments if a == "--tiny"]
    wanted = next((a.split("=", 1)[1].split(",") for a in arguments if a.startswith("--parts=")), list(CLIP))
    out = Path(os.environ.get("OUT") or RESULTS)
    out.mkdir(parents=True, exist_ok=True)
    base = Path(os.environ.get(BASE) or (out / "base"))
    endings = {}
    with (out / "session.log").open("w", encoding="utf-8") as log:
        for name in wanted:
            print(f"===== {name}", flush=True)
            endings[name] = run_part(name, PARTS[name], base, tiny, log)
            print(f"===== {name}: {endings[name][0]}, {endings[name][1]:.0f} s", flush=True)
    print("\n".join(table(out)))
    print("; ".join(f"{name}: {how} in {seconds:.0f} s" for name, (how, seconds) in endings.items()))
    return sum(how != "ok" for how, _ in endings.values())
