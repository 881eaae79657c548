"""Where things lie, how a line is printed, and the one kind of error that run.py turns into a message and exit code 1."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RUNTIME = ROOT / ".runtime"
VENV = RUNTIME / "venv"
COMFYUI = RUNTIME / "ComfyUI"
LOGS = RUNTIME / "logs"


class RunError(Exception):
    """Something that a person must know or do; shown without a traceback."""


def say(text: str) -> None:
    """One line for people, at once also when the output goes to a file."""
    print(text, flush=True)


def tail(path: Path, lines: int = 20) -> str:
    """The last lines of a log, or a note that there is none."""
    if not path.is_file():
        return f"(no log at {path})"
    return "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])


def python_of(venv: Path) -> Path:
    """The interpreter of a virtual environment on this system."""
    return venv / "Scripts" / "python.exe" if os.name == "nt" else venv / "bin" / "python"


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock file; the system lets go of it when the process dies, so a killed run never blocks the next."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        if not _try_lock(file):
            say(f"Another run.py is setting up {path.parent}; waiting for it.")
            _lock(file)
        yield


if sys.platform == "win32":
    import msvcrt
    import time

    def _try_lock(file) -> bool:
        try:
            file.seek(0)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

    def _lock(file) -> None:
        while not _try_lock(file):
            time.sleep(1)
else:
    import fcntl

    def _try_lock(file) -> bool:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True

    def _lock(file) -> None:
        fcntl.flock(file, fcntl.LOCK_EX)
