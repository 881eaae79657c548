"""The benchmarks that run the embedded model inside ComfyUI, in their small form, each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

import inprocess as ip


def bench(*words: str) -> str:
    """What ``run.py bench`` prints; it must end well."""
    environment = os.environ | {"COMFYUI_PATH": str(ip.COMFYUI)}
    done = subprocess.run([sys.executable, str(ip.PACK / "run.py"), "--inside", "bench", *words], cwd=ip.PACK, env=environment,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.timeout(300)
def test_fp8_is_judged_and_timed(tmp_path):
    bench("prepare", str(tmp_path), "--tiny")
    text = bench("fp8", str(tmp_path), "--tiny", "--clips", "1")
    assert "RED" not in text and text.count(" ok\n") == 7
    for row in ("mini_fp8_adherence", "mini_fp8_layer_error", "longsana_dit_fps_fp8", "longsana_dit_fps_in_comfyui"):
        assert f"name={row} " in text


@pytest.mark.timeout(300)
def test_step_caches_are_judged():
    text = bench("step_cache", "--tiny", "--clips", "1")
    assert "RED" not in text and "name=exact " in text
    shares = [line for line in text.splitlines() if "Cache_0." in line]
    assert len(shares) == 4 and any("steps_made=1.0 " not in line for line in shares)
