"""``run.py demo``: the real ComfyUI runs a workflow of the embedded model, and the judge looks at the video that comes out."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from .client import Event
from .environment import Environment
from .places import LOGS, ROOT, RUNTIME, RunError, say, tail
from .server import ComfyServer
from .workflow import to_api


class Demo(NamedTuple):
    """A workflow (by its name), the frames that its video has at least, and the seconds after which it is given up."""

    workflow: str
    frames: int
    patience: int

    @property
    def path(self) -> Path:
        return ROOT / "workflows" / f"{self.workflow}.json"


CLIP, FILM = Demo("mini_t2v", 80, 600), Demo("mini_long_video", 480, 3600)
SHOWN = FILM  # what ``run.py demo`` makes
FILMS = "output/sana_video"  # run folders, below the server's base folder
TEXT_NODE, SEED_NAMES = "SanaVideoTextEncode", ("seed", "noise_seed")


def demo(environment: Environment, options: argparse.Namespace) -> int:
    """Make a video and print ``video: PATH``; 0 when the judge agrees with the prompt, 1 when it does not.

    ``options``: prompt and seed (None: the workflow's), out (folder), gpu.
    """
    started = time.monotonic()
    workflow, base = json.loads(SHOWN.path.read_text(encoding="utf-8")), RUNTIME / "demo"
    shutil.rmtree(base / FILMS, ignore_errors=True)  # a film that is there would be finished, not made
    say("starting ComfyUI ...")
    with ComfyServer(environment, base, LOGS / "demo.log", gpu=options.gpu) as server:
        graph = to_api(workflow, server.client.get("/object_info"))
        text = change(graph, options.prompt, options.seed)
        say(f"prompt: {text}")
        progress = Progress({key: node["_meta"]["title"] for key, node in graph.items()})
        outcome = server.client.run(graph, progress.show, timeout=SHOWN.patience)
        progress.end()
        if not outcome.ok:
            raise RunError(f"{tail(server.log)}\nThe workflow did not finish: {outcome.error}\nThe whole log: {server.log}")
        video = keep(server.base, outcome.files(), options.out.resolve())
        say(f"video: {video}")
        say(f"made in {time.monotonic() - started:.0f} s; judging ...")
        command = [environment.python, ROOT / "run.py", "--inside", "judge-video", video, text, str(SHOWN.frames)]
        judge = subprocess.Popen(command, env=environment.child_env())  # beside the server's end
    return judge.wait()


def change(graph: dict, prompt: str | None, seed: int | None) -> str:
    """Put the asked-for prompt and seed into the graph; returns the prompt that will run."""
    texts = [node for node in graph.values() if node["class_type"] == TEXT_NODE]
    if len(texts) != 1:
        raise RunError(f"{SHOWN.workflow} should hold one {TEXT_NODE} node, it holds {len(texts)}.")
    if prompt:
        texts[0]["inputs"]["prompt"] = prompt
    if seed is not None:
        for node in graph.values():
            node["inputs"].update({name: seed for name in SEED_NAMES if name in node["inputs"]})
    return texts[0]["inputs"]["prompt"]


def keep(base: Path, files: list[dict], out: Path) -> Path:
    """Copy the video that the server saved into ``out`` under a name that is still free."""
    videos = [item for item in files if item["filename"].endswith(".mp4")]
    if not videos:
        raise RunError(f"The workflow ended without an mp4 file; it gave {[item['filename'] for item in files] or 'nothing'}.")
    source = base / videos[-1].get("type", "output") / videos[-1].get("subfolder", "") / videos[-1]["filename"]
    out.mkdir(parents=True, exist_ok=True)
    number = 1
    while (target := out / f"demo_{number:03d}.mp4").exists():
        number += 1
    shutil.copyfile(source, target)
    return target


class Progress:
    """Shows each node's progress: one line that moves in a terminal, a line a node elsewhere."""

    def __init__(self, titles: dict[str, str]):
        self.titles, self.moving, self.last = titles, sys.stdout.isatty(), ""

    def show(self, event: Event) -> None:
        if event.type != "progress" or not event.data.get("max"):
            return
        value, total = event.data["value"], event.data["max"]
        line = f"  {self.titles.get(str(event.data.get('node')), 'node')}: {value}/{total}"
        if self.moving:
            print(f"\r{line:<{len(self.last)}}", end="", flush=True)
            self.last = line
        elif value == total:
            say(line)

    def end(self) -> None:
        if self.last:
            print()
