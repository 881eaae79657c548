"""A process whose children make a film and are killed at random moments; prints one JSON line a kill.

Run as ``python film_victim.py FOLDER KILLS SEED``. The parent never computes, so its children can be forked safely.
"""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import conftest  # noqa: E402, F401  (makes the core importable)

from faults import Fault, deadly, watched  # noqa: E402
from films import digests, shoot  # noqa: E402


def make(folder: Path, fault: Fault, report: Path | None = None) -> None:
    """Finish the film; every step and every call of the file layer is an event."""
    sampled: set[int] = set()

    def on_step(block, step, *rest):
        sampled.add(block)
        fault.event()

    with watched(fault, short_writes=True):
        shoot(folder, on_step=on_step, on_block=lambda *a: fault.event(), overlap=bool(fault.nth % 2))
    if report is not None:
        report.write_text(json.dumps({"events": fault.count, "sampled": sorted(sampled), "files": digests(folder)}))


def child(work) -> int:
    """The exit status of ``work`` in a process of its own."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            print(json.dumps({"error": repr(error)}), flush=True)
            os._exit(1)
    return os.waitpid(pid, 0)[1]


def main(folder: Path, kills: int, seed: int) -> None:
    report = folder / "report.json"
    assert child(lambda: make(folder / "whole", Fault(0, None), report)) == 0
    whole = json.loads(report.read_text())
    print(json.dumps(whole), flush=True)
    rng = random.Random(seed)
    for n in range(kills):
        moments = [rng.randrange(1, whole["events"] + 1)]
        if n % 3 == 2:
            moments.append(rng.randrange(1, 40))  # once more, while resuming
        print(json.dumps(kill(folder / f"run{n}", moments, report)), flush=True)


def kill(target: Path, moments: list[int], report: Path) -> dict:
    """Make the film with one kill a moment, then once more in peace; what happened."""
    status = [child(lambda at=at: make(target, deadly(at))) for at in moments]
    done = len(list(target.glob("block_*.safetensors"))) if target.exists() else 0
    assert child(lambda: make(target, Fault(0, None), report)) == 0
    return {"moments": moments, "killed": [s == 9 for s in status], "done": done, **json.loads(report.read_text())}


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
