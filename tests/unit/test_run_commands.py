"""run.py's way to the commands that work inside the environment: arguments, exit codes, Ctrl-C."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from commands import hear_ctrl_c, starter


@pytest.fixture
def start(root, comfyui_path):
    """Starts run.py with arguments, in a process group of its own as a terminal would; ends what is left of it."""
    with starter(root, comfyui_path, stderr=subprocess.PIPE, start_new_session=True) as begin:
        yield begin


def test_the_film_command_gets_its_arguments_and_gives_its_exit_code(start, tmp_path):
    process = start("film", "--blocks", "0", "--dir", str(tmp_path / "f"))
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (2, "") and err.startswith("film: The number of blocks") and err.count("\n") == 1


def test_ctrl_c_ends_a_command_in_order(start):
    process = start("judge", "--film", "9000", "--films", "1", "--world", "--device", "cpu")
    assert process.stderr.read(5)  # the first line of progress: it is at work
    if os.name == "posix":
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 130 and err.rstrip().endswith("stopped") and err.count("stopped") == 1
        assert "Traceback" not in err and out == ""


def test_a_command_that_does_not_hear_ctrl_c_is_ended_all_the_same(root):
    run = load(root)
    if os.name == "posix":
        hear_ctrl_c()
        started = time.monotonic()
        threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            run.follow([sys.executable, "-c", "import time; time.sleep(60)"], dict(os.environ), patience=0.5)
        assert 1 <= time.monotonic() - started < 30
    assert run.follow([sys.executable, "-c", "raise SystemExit(7)"], dict(os.environ)) == 7


def load(root):
    """run.py as a module."""
    spec = importlib.util.spec_from_file_location("run_entry", root / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
