"""``run.py test``: pytest over tests/ in the environment, with a browser at hand and threads that do not fight.

The whole suite runs in as many processes as there are cores (four at most), a file of tests in one of them; named files in one.
"""

from __future__ import annotations

import os
import subprocess

from . import browser
from .environment import Environment
from .places import ROOT, RunError

NEEDED = ("pytest", "pytest_timeout", "xdist", "hypothesis", "playwright")
MOST = 4  # processes, and threads of each
# Goldens are compared to the rounding of float32. MKL's products and exponentials round by the kind of processor unless asked for
# what it computes alike on all of them: with its AVX-512 code errors reached 3.5 times their tolerance, with this 0.6 of it.
ALIKE = {"MKL_CBWR": "COMPATIBLE"}


def run_tests(environment: Environment, arguments: list[str]) -> int:
    """pytest's exit code. ``arguments`` go to pytest; without a path among them everything under tests/ runs."""
    require_tools(environment)
    threads = os.environ.get("OMP_NUM_THREADS") or str(cores())
    variables = environment.child_env(OMP_NUM_THREADS=threads, MKL_NUM_THREADS=threads, TOKENIZERS_PARALLELISM="false",
                                      PYTHONFAULTHANDLER="1",
                                      OMP_WAIT_POLICY="PASSIVE", GOMP_SPINCOUNT="0")  # server and tests share the cores
    if needs_browser(arguments):
        variables["SANA_VIDEO_BROWSER"] = browser.ensure()
    command = [environment.python, "-m", "pytest", "-ra", *processes(arguments), *arguments]
    return subprocess.run(command, cwd=ROOT, env=variables).returncode


def cores() -> int:
    return min(MOST, os.cpu_count() or 1)


def named_paths(arguments: list[str]) -> list[str]:
    """The files and folders of tests among pytest's arguments."""
    return [a for a in arguments if not a.startswith("-") and (ROOT / a.split("::")[0]).exists()]


def processes(arguments: list[str]) -> list[str]:
    """pytest's arguments for several processes; none where tests are named (a card's tests too), or somebody looks in on one."""
    alone = any(a in ("-m", "-s", "-x", "--pdb", "--capture=no") or a.startswith(("-n", "-p")) for a in arguments)
    if alone or named_paths(arguments):
        return []
    # In the folders' order, in which the long files of few tests (browser, server) do not come last and alone.
    return ["-n", str(cores()), "--dist", "loadfile", "--no-loadscope-reorder"]


def needs_browser(arguments: list[str]) -> bool:
    """True when the browser tests are among what will run."""
    paths = named_paths(arguments)
    if "--ignore=tests/browser" in arguments or not (ROOT / "tests" / "browser").is_dir():
        return False
    return not paths or any("browser" in path or path.rstrip("/") == "tests" for path in paths)


def require_tools(environment: Environment) -> None:
    """The test tools must be there; into somebody's own ComfyUI nothing is installed."""
    code = "import importlib.util, sys; print(' '.join(n for n in sys.argv[1:] if not importlib.util.find_spec(n)))"
    missing = subprocess.run([environment.python, "-c", code, *NEEDED], capture_output=True, text=True).stdout.split()
    if missing:
        raise RunError(f"{environment.python} lacks {', '.join(missing)}. Install requirements-dev.txt into it "
                       "(run.py changes nothing in the ComfyUI of COMFYUI_PATH), or unset COMFYUI_PATH.")
