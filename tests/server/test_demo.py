"""``run.py demo`` as a newcomer runs it, in the environment of these tests."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from pathlib import Path

import psutil
import pytest
from commands import starter

GROUP = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP} if os.name == "nt" else {}
CTRL_C = signal.CTRL_BREAK_EVENT if os.name == "nt" else signal.SIGINT


@pytest.fixture
def demo(root, comfyui_path, tmp_path):
    """Starts run.py demo with further arguments; ends what is left of it afterwards."""
    with starter(root, comfyui_path, "demo", "--out", tmp_path, stderr=subprocess.STDOUT, **GROUP) as start:
        yield start


def test_demo_makes_a_video_that_shows_what_the_prompt_says(demo, tmp_path):
    process = demo()
    text, _ = process.communicate(timeout=280)
    path = re.search(r"^video: (.+)$", text, re.MULTILINE)
    assert path and Path(path.group(1)) == tmp_path.resolve() / "demo_001.mp4" and Path(path.group(1)).stat().st_size > 2000, text
    assert re.search(r"^file: h264, 4[89]\d frames of 160x96, 16 a second", text, re.MULTILINE), text
    assert "judge: agrees with the prompt" in text and process.returncode == 0, text


def test_ctrl_c_stops_the_demo_and_its_server(demo):
    process = demo()
    for line in process.stdout:
        if line.startswith("prompt: "):
            break
    children = psutil.Process(process.pid).children(recursive=True)
    assert any("main.py" in " ".join(child.cmdline()) for child in children)
    process.send_signal(CTRL_C)
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and text.rstrip().endswith("stopped")
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive
