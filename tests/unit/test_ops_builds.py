"""Every kernel builds for the cards that users have, without such a card: the interpreter takes code that no compiler does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HELPER = Path(__file__).parents[1] / "helpers" / "kernel_builds.py"
SHARED = {80: 166912, 89: 101376, 90: 232448, 120: 101376}  # bytes of shared memory that a program can have
SPILLED = 100  # bytes of a thread that do not fit into registers: more cost time in a loop


@pytest.mark.parametrize(("capability", "options"), [(90, ()), (120, ("--no-decoder",))], ids=["H100", "RTX 50"])
def test_kernels_build_and_fit(capability, options, tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, HELPER, str(capability), *options], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    kernels = {"residual_norm", "rms", "attention_keys", "attention_state", "attention_totals", "attention_apply",
               "gated_depthwise", "temporal_taps", "time_pairs", "pair_weights", "pair_residual", "largest", "scale", "row_fp8",
               "temporal_taps_fp8", "given_taps", "framed_fp8", "query_factor", "text_attention"}
    if not options:  # on Hopper alone two frames are decoded at a time, and there are kernels in Gluon
        kernels |= {"add_product", "add_frames", "key_factor", "attention_sums", "attention_outputs", "text_softmax"}
        kernels |= {"frame_conv", "window", "gather_taps", "pairs", "pair_conv"}
    assert {row["kernel"] for row in rows} == {f"{name}_kernel" for name in kernels}
    assert {row["kernel"] for row in rows if "refused" in row} <= {"add_frames_kernel"}
    for row in rows:
        assert "refused" in row or row["shared"] <= SHARED[capability] and row["spilled"] <= SPILLED, row
