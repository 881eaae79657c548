"""The real ComfyUI server as a child process, in a base folder of its own that holds nothing but this pack."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

from .client import Client
from .environment import SERVER_FLAGS, Environment
from .places import ROOT, RunError, tail

PACK_NAME = "sana_video"  # the folder's name under custom_nodes; the browser's addresses carry it
MODEL_FOLDERS = ("diffusion_models", "text_encoders", "vae", "loras")


class ComfyServer:
    """Starts on entering a ``with`` block, stops on leaving it. ``client`` talks to it, ``log`` is its output.

    base:   folder for custom_nodes, models, input, output and temp; made when missing.
    flags:  further command line flags. gpu: leave out ``--cpu``.
    """

    def __init__(self, environment: Environment, base: Path, log: Path, flags: tuple[str, ...] = (), gpu: bool = False):
        self.environment, self.base, self.log = environment, base, log
        self.flags = (*SERVER_FLAGS, *(() if gpu else ("--cpu",)), *flags)
        self.process: subprocess.Popen | None = None
        self.client = Client("127.0.0.1", 0)

    def __enter__(self) -> ComfyServer:
        prepare_base(self.base)
        self.client = Client("127.0.0.1", free_port())
        self.log.parent.mkdir(parents=True, exist_ok=True)
        command = [self.environment.python, self.environment.comfyui / "main.py", "--listen", "127.0.0.1",
                   "--port", str(self.client.port), "--base-directory", self.base, "--disable-auto-launch", *self.flags]
        with self.log.open("w", encoding="utf-8") as output:
            # A group of its own: Ctrl-C then reaches run.py alone, which stops the server in order.
            self.process = subprocess.Popen([str(part) for part in command], stdout=output, stderr=subprocess.STDOUT,
                                            cwd=self.environment.comfyui, env=self.environment.child_env(), **new_group())
        try:
            self.wait_until_up()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    def wait_until_up(self, timeout: float = 180) -> None:
        """Returns when the server answers and the pack is loaded; shows the log's end otherwise."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RunError(f"{tail(self.log)}\nComfyUI ended while starting (exit code {self.process.returncode}). "
                               f"The whole log: {self.log}")
            try:
                self.client.get("/system_stats")
                break
            except OSError:
                time.sleep(0.2)
        else:
            raise RunError(f"{tail(self.log)}\nComfyUI did not answer within {timeout:g} s. The whole log: {self.log}")
        if "IMPORT FAILED" in self.import_report():
            raise RunError(f"{tail(self.log, 40)}\nComfyUI could not load the pack. The whole log: {self.log}")

    def import_report(self) -> str:
        """The log's lines about our folder."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(line for line in lines if PACK_NAME in line)

    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def stop(self) -> None:
        """Ask the server to end, and end it when it does not."""
        if not self.alive():
            return
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def prepare_base(base: Path) -> None:
    """The folders that ComfyUI expects, and this repository as a custom node."""
    for name in ("custom_nodes", "input", "output", "temp", "user", *(f"models/{kind}" for kind in MODEL_FOLDERS)):
        (base / name).mkdir(parents=True, exist_ok=True)
    link_folder(ROOT, base / "custom_nodes" / PACK_NAME)


def link_folder(target: Path, link: Path) -> None:
    """A symbolic link; on Windows, where that needs a privilege, a junction; failing both, a copy of what would ship."""
    if link.exists() and link.resolve() == target.resolve():
        return
    if link.is_symlink():
        link.unlink()
    elif link.exists():
        shutil.rmtree(link)
    try:
        link.symlink_to(target, target_is_directory=True)
    except OSError:
        if os.name == "nt" and subprocess.run(["cmd", "/c", "mklink", "/J", link, target], capture_output=True).returncode == 0:
            return
        shutil.copytree(target, link, ignore=shutil.ignore_patterns(".*", "__pycache__", "out", "tests", "bench"))


def free_port() -> int:
    """A port that nobody listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def new_group() -> dict:
    """Popen arguments that keep the terminal's Ctrl-C from the child."""
    return {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP} if os.name == "nt" else {"start_new_session": True}


def stop_on_terminate() -> None:
    """Make the polite kill unwind like Ctrl-C, so that 'with' blocks stop their servers."""
    def unwind(*_):
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, unwind)
    if os.name == "nt":
        signal.signal(signal.SIGBREAK, unwind)
