"""Films of 30 s and 60 s at 832x480 through the real ComfyUI server: the shipped workflow long_video_minute in a run folder.

``run.py bench film_server BASE [--tiny]``; needs COMFYUI_PATH, and writes the model files that BASE lacks (``prepare``). On an
H200 about 170 s with the files there: two servers (each with a fresh count of memory) that a film of one block warms up, a film
of 12 and one of 24 blocks, and for the peer 12 blocks without a run folder. While a film runs, every state of its growing file
is played from here.

Peer: the same graph without a run folder, where the film becomes one batch of frames before anything can be seen. Checked
first: both give the same latents, the file plays after every block and to its end, and 60 s take no more memory than 30 s.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from sana_video_core.film import Film
from sana_video_core.sampling.plan import pixel_frames, plan_blocks
from sana_video_core.vae.wan import denormalize
from tools import workflow
from tools.server import ComfyServer

from . import prepare
from .cli import ROOT
from .comfy_server import Memory, new_server, queue
from .harness import Report, relative_error
from .long import SAME

LAYOUT = "safetensors bf16"
BLOCKS = {"30s": 12, "60s": 24}
TINY_BLOCKS = {"30s": 3, "60s": 5}
TINY_INPUTS = {"width": 64, "height": 64, "block_frames": 2, "solver": "flow-DPM"}  # the small model has its own steps
BASE_FRAMES, TINY_BASE_FRAMES = 10, 2
LIMIT_S = 280  # of one prompt
GROWTH_GIB = 1.0  # 30 s more as a batch of float32 frames would be 2.1 GiB


class HostMemory(threading.Thread):
    """Samples a process's memory: (time, resident bytes, of them not shared with a file)."""

    def __init__(self, pid: int, pause: float = 0.05):
        super().__init__(daemon=True)
        import psutil

        self.process, self.pause, self.ended = psutil.Process(pid), pause, threading.Event()
        self.samples: list[tuple[float, int, int]] = []

    def sample(self) -> None:
        info = self.process.memory_info()
        self.samples.append((time.perf_counter(), info.rss, info.rss - getattr(info, "shared", 0)))

    def run(self) -> None:
        while not self.ended.wait(self.pause):
            self.sample()

    def peak_gib(self, start: float, end: float) -> tuple[float, float]:
        """(resident, private) at most between two times."""
        inside = [s for s in self.samples if start <= s[0] <= end]
        return tuple(max((s[i] for s in inside), default=0) / 2**30 for i in (1, 2))


def newest(path: Path) -> tuple[int, int]:
    """(frames in a video, frames that decode from its last key frame on). A film's blocks begin with key frames."""
    import av

    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        packets = [p for p in container.demux(stream) if p.dts is not None]
        last = max((i for i, p in enumerate(packets) if p.is_keyframe), default=len(packets))
        shown = sum(len(p.decode()) for p in packets[last:])
        return len(packets), shown + len(stream.codec_context.decode(None))


def played(path: Path) -> tuple[int, int, int, str]:
    """(frames that decode, width, height, codec) of a whole video."""
    import av

    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        return sum(1 for _ in container.decode(stream)), stream.width, stream.height, stream.codec_context.name


@dataclass(frozen=True)
class Look:
    """One play of the growing file: when, frames it has, frames that came out of its newest block."""

    time: float
    frames: int
    shown: int


class Watcher(threading.Thread):
    """Plays a film's file each time that it has grown and is at rest. ``faults``: looks that failed, such as at half a block."""

    def __init__(self, path: Path, pause: float = 0.02):
        super().__init__(daemon=True)
        self.path, self.pause, self.ended = path, pause, threading.Event()
        self.looks: list[Look] = []
        self.faults: list[str] = []
        self._size = self._played = 0

    def look(self) -> None:
        size = self.path.stat().st_size if self.path.exists() else 0
        if size == self._size and size not in (0, self._played):
            try:
                self.looks.append(Look(time.perf_counter(), *newest(self.path)))
                self._played = size
            except Exception as error:  # the next look tries again; a block that never plays turns the check red
                self.faults.append(f"{type(error).__name__}: {error}")
        self._size = size

    def run(self) -> None:
        while not self.ended.wait(self.pause):
            self.look()


def graph(object_info: dict, base: Path, blocks: int, folder: str, tiny: bool) -> dict:
    """The shipped workflow as a prompt; without ``folder`` the film is one batch of frames, and its latent is saved."""
    prompt = workflow.to_api(json.loads((ROOT / "workflows" / "long_video_minute.json").read_text(encoding="utf-8")), object_info)
    by_type = {entry["class_type"]: key for key, entry in prompt.items()}
    sampler, decode = by_type["SanaVideoBlockSampler"], by_type["SanaVideoDecode"]
    prompt[by_type["SanaVideoLoader"]]["inputs"] |= {
        "model": prepare.layouts(base)[LAYOUT].name, "text_encoder": prepare.TEXT, "vae": prepare.VAE}
    prompt[sampler]["inputs"] |= {"blocks": blocks, "run_folder": folder}
    if tiny:
        prompt[sampler]["inputs"] |= TINY_INPUTS
        prompt[by_type["SanaVideoTextEncode"]]["inputs"] |= {"prompt": "a red ball bounces"}
    if not folder:
        prompt[decode]["inputs"] |= {"samples": [sampler, 0], "run_folder": ""}
        prompt["keep"] = {"class_type": "SaveLatent", "inputs": {"samples": [sampler, 0], "filename_prefix": "bench_at_once"}}
    return prompt


@dataclass
class Result:
    """One prompt: seconds in all and a node, peaks in GiB, looks at the file and its whole play, raw latent, files made."""

    blocks: int
    start: float
    total: float
    nodes: dict[str, float]
    host: tuple[float, float]
    host_before: float
    card: float
    looks: list[Look]
    faults: list[str]
    film: tuple[int, int, int, str] | None
    latent: Tensor | None
    files: list[Path]


def run_prompt(server: ComfyServer, base: Path, info: dict, blocks: int, folder: str, tiny: bool) -> Result:
    """Run one graph and measure; the run folder is removed afterwards."""
    place = base / "output" / "sana_video" / folder
    if folder:
        shutil.rmtree(place, ignore_errors=True)
    watcher, memory = Watcher(place / "film.mp4"), HostMemory(server.process.pid)
    memory.sample()
    before = memory.samples[0][1] / 2**30
    memory.start()
    if folder:
        watcher.start()
    try:
        with Memory() as card:
            outcome, nodes, start, end = queue(server, graph(info, base, blocks, folder, tiny), LIMIT_S)
    finally:
        for thread in (watcher, memory):
            thread.ended.set()
            if thread.is_alive():
                thread.join()
    film = latent = None
    if folder:
        film = played(place / "film.mp4")
        with Film(place, write=False) as run:
            latent = denormalize(torch.cat([run.latent(i) for i in range(blocks)], 2))
        shutil.rmtree(place)
    files = [base / "output" / f.get("subfolder", "") / f["filename"] for f in outcome.files()]
    return Result(blocks, start, end - start, nodes, memory.peak_gib(start, end), before, card.peak_gib(start, end),
                  watcher.looks, watcher.faults, film, latent, files)


def boundaries(blocks: int, tiny: bool) -> list[int]:
    """Pixel frames of a film after each of its blocks."""
    return [pixel_frames(s.end) for s in plan_blocks(blocks, TINY_BASE_FRAMES if tiny else BASE_FRAMES).spans()]


def check_film(report: Report, name: str, result: Result, tiny: bool) -> None:
    ends = boundaries(result.blocks, tiny)
    expected = (ends[-1], 64, 64, "h264") if tiny else (ends[-1], 832, 480, "h264")
    report.check(f"{name}: the film's file should play as {expected} and plays as {result.film}",
                 float(result.film != expected), 0)
    seen = {look.frames: look.shown for look in result.looks}
    lengths = {end: end - begin for begin, end in zip([0, *ends], ends)}
    missed = [end for end in ends if seen.get(end, 0) < lengths[end]]
    # The last block's file is replaced by the finished one at once; the whole play above covers it.
    report.check(f"{name}: block ends at which the growing file did not play {missed or ''}".strip(),
                 len([end for end in missed if end != ends[-1]]), 0)


def check_batch(report: Report, film: Result, batch: Result) -> None:
    """The graph without a run folder: the same latent, and a video of the same length."""
    (saved,) = (path for path in batch.files if path.suffix == ".latent")
    report.check("30s: the film's latents against those without a run folder",
                 relative_error(film.latent, load_file(saved)["latent_tensor"]), SAME)
    shown = [played(path)[0] for path in batch.files if path.suffix == ".mp4"]
    report.check(f"30s: frames without a run folder {shown}", float(shown != [film.film[0]]), 0)


def add_rows(report: Report, films: dict[str, Result], warm: dict[str, Result], batch: Result, tiny: bool) -> None:
    at_once = boundaries(batch.blocks, tiny)[-1] / batch.total
    for name, result in films.items():
        frames, looks = boundaries(result.blocks, tiny)[-1], result.looks
        sampler = result.nodes["SanaVideoBlockSampler"]
        steady = (looks[-1].frames - looks[0].frames) / (looks[-1].time - looks[0].time)
        ratio = {"ratio_vs_at_once": frames / result.total / at_once} if result.blocks == batch.blocks else {}
        report.add(f"film_server_fps_{name}", frames / sampler, "pixel frames a second of the block sampler, decoded and written",
                   steady_fps=steady, total_s=result.total, sampler_s=sampler, pixel_frames=frames,
                   first_block_playable_s=looks[0].time - result.start, warm_up_s=warm[name].total,
                   load_s=warm[name].nodes.get("SanaVideoLoader", 0.0), **ratio)
        report.add(f"film_server_host_peak_{name}", result.host[0], "GiB resident", private=result.host[1],
                   before=result.host_before)
        report.add(f"film_server_card_peak_{name}", result.card, "GiB used on the card")
        report.add(f"film_server_plays_{name}", len({look.frames for look in looks}),
                   f"of {result.blocks} lengths of the growing file played while the film ran",
                   frames_seen=" ".join(str(look.frames) for look in looks), failed_looks=len(result.faults))
    (short, long) = films.values()
    report.add("film_server_host_growth_30s_to_60s", long.host[0] - short.host[0], "GiB resident",
               private=long.host[1] - short.host[1], ratio=long.host[0] / short.host[0])
    report.add("film_server_at_once_30s", at_once, "pixel frames a second in all, nothing playable before", total_s=batch.total,
               host_peak_gib=batch.host[0], host_peak_private_gib=batch.host[1], before=batch.host_before,
               card_peak_gib=batch.card, sampler_s=batch.nodes["SanaVideoBlockSampler"],
               decode_s=batch.nodes["SanaVideoDecode"], save_s=batch.nodes["SaveVideo"])


def run(base: Path, out: Path, tiny: bool, report: Report, servers=new_server) -> Report:
    """Both films and the peer; the checks; the rows (not yet written). ``servers(base, log)`` gives a server to enter."""
    models = base / "models"
    files = prepare.layouts(base)[LAYOUT], models / "text_encoders" / prepare.TEXT, models / "vae" / prepare.VAE
    if not all(file.exists() for file in files):
        prepare.write_all(base, tiny, {LAYOUT})
    films: dict[str, Result] = {}
    warm: dict[str, Result] = {}
    for name, blocks in (TINY_BLOCKS if tiny else BLOCKS).items():
        with servers(base, out / f"server_film_{name}.log") as server:
            info = server.client.get("/object_info")
            warm[name] = run_prompt(server, base, info, 1, "bench_warm", tiny)
            films[name] = run_prompt(server, base, info, blocks, f"bench_{name}", tiny)
            check_film(report, name, films[name], tiny)
            if name == "30s":
                batch = run_prompt(server, base, info, blocks, "", tiny)
                check_batch(report, films[name], batch)
    growth = films["60s"].host[1] - films["30s"].host[1]
    report.check("private host memory of the 60s film more than of the 30s film, GiB", growth, GROWTH_GIB)
    add_rows(report, films, warm, batch, tiny)
    return report


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="run.py bench film_server")
    parser.add_argument("base", type=Path)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args(arguments)
    report = Report("film_server")
    try:
        run(options.base, Path(os.environ.get("OUT") or options.base), options.tiny, report)
    finally:
        print(report.write(options.base if options.tiny else None), flush=True)
    return 0
