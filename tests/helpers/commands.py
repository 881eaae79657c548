"""``run.py`` as a process of its own, as a person starts it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path


def hear_ctrl_c() -> None:
    """Tests that were started in the background of a shell were told to ignore Ctrl-C, and so are the processes they start."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextlib.contextmanager
def starter(root: Path, comfyui: Path, *first, **options) -> Iterator[Callable[..., subprocess.Popen]]:
    """Within the block, a function that starts ``run.py first... further...`` in the tests' environment; afterwards ends what is
    left. ``options`` go to Popen."""
    hear_ctrl_c()
    started = []
    variables = os.environ | {"COMFYUI_PATH": str(comfyui), "COMFYUI_PYTHON": sys.executable}

    def start(*further: str) -> subprocess.Popen:
        started.append(subprocess.Popen([sys.executable, root / "run.py", *first, *further], text=True, env=variables,
                                        stdout=subprocess.PIPE, **options))
        return started[-1]

    try:
        yield start
    finally:
        for process in started:
            process.kill()
            process.communicate()
