"""``run.py`` as a process of its own, as a person starts it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path


@contextlib.contextmanager
def starter(root: Path, comfyui: Path, *first, **options) -> Iterator[Callable[..., subprocess.Popen]]:
    """Within the block, a function that starts ``run.py first... further...`` in the tests' environment; afterwards ends what is
    left. ``options`` go to Popen."""
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
