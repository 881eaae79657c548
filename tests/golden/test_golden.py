"""The golden checker on copies of the goldens: everything holds, names do not matter, and what is wrong is found."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import check
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tools.places import ROOT
from tools.testing import ALIKE

DATA = ROOT / "tests" / "data" / "golden"
FOLDERS = ("model", "vae_text", "causal")
FILES = [path for folder in FOLDERS for path in sorted((DATA / folder).glob("*.safetensors"))]


@pytest.fixture(scope="module")
def opened():
    """{folder: (files by name, weights)}"""
    found = {}
    for folder in FOLDERS:
        files = {p.stem: check.Golden(p) for p in sorted((DATA / folder).glob("*.safetensors"))}
        found[folder] = files, check.Weights([g for g in files.values() if g.kind == "weights"])
    return found


def judged(folder: Path, answer: Path) -> dict[str, dict]:
    """{name: record} of ``run.py golden``'s verdicts, from a process that rounds alike on every processor."""
    command = [sys.executable, ROOT / "run.py", "--inside", "golden", folder, "--json", answer]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600, env={**os.environ, **ALIKE})
    assert answer.exists(), run.stdout[-2000:] + run.stderr[-2000:]
    return json.loads(answer.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """{folder: records}"""
    answers = tmp_path_factory.mktemp("golden")
    return {folder: judged(DATA / folder, answers / f"{folder}.json") for folder in FOLDERS}


@pytest.mark.parametrize("path", FILES, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_file_agrees_with_the_official_values(rows, path):
    row = rows[path.parent.name][path.stem]
    assert row["verdict"] == check.PASS, [row["reason"], *row["misses"]]
    assert row["kind"] == "weights" or not any("not used" in note for note in row["notes"])


def rewrite(source: Path, target: Path, change=None, meta=None) -> Path:
    """Copy a golden file with changed tensors or metadata."""
    with safe_open(source, "pt") as f:
        metadata = dict(f.metadata())
    tensors = load_file(source)
    if change is not None:
        change(tensors)
    save_file(tensors, target, metadata={**metadata, **(meta or {})})
    return target


def copies(folder: Path, target: Path, *patterns: str, prefix: str = "") -> Path:
    target.mkdir(exist_ok=True)
    for pattern in patterns:
        for path in folder.glob(pattern):
            shutil.copy(path, target / f"{prefix}{path.name}")
    return target


def test_names_carry_no_meaning(tmp_path):
    """Prefixed and scrambled names: weights are still found by their seed, or by their sizes."""
    copies(DATA / "model", tmp_path, "p1_*", "p2_t2v*", "p2_w*")
    for path in (DATA / "causal").glob("*_[ab]*"):
        shutil.copy(path, tmp_path / f"held_{path.name}")
    for i, path in enumerate(sorted(tmp_path.glob("*"))):
        path.rename(tmp_path / f"{(7 * i) % 101:03}.safetensors")
    found = judged(tmp_path, tmp_path / "answer.json")
    assert len(found) > 10
    assert {r["verdict"] for r in found.values()} == {check.PASS}, {k: (r["reason"], r["misses"][:2]) for k, r in found.items()}


def test_a_case_without_a_seed_finds_its_weights_among_equal_sizes(tmp_path):
    """Two weights files of the same sizes: only one makes the recorded run."""
    source = DATA / "causal"
    copies(source, tmp_path, "interactive_b_switch_at_chunk2_recache1*", "sampling_b_weights*")
    config = json.loads(safe_open(source / "sampling_b_weights.safetensors", "pt").metadata()["config"])

    def other_values(tensors):
        for key in tensors:
            tensors[key] = tensors[key] * 1.1

    rewrite(source / "sampling_b_weights.safetensors", tmp_path / "a.safetensors", other_values,
            {"config": json.dumps({**config, "weight_seed": 1})})
    found = judged(tmp_path, tmp_path / "answer.json")
    assert found["interactive_b_switch_at_chunk2_recache1"]["verdict"] == check.PASS


MUTANTS = [
    ("model/p2_t2v_masked", "orig.output"), ("model/p2_t2v_masked", "orig.block1.cross_attn"),
    ("model/p2_i2v_frame_times", "diffusers.output"), ("model/p1_single_frame", "in.latent"),
    ("model/p1_single_frame", "in.mask"),
    ("model/p1_i2v_odd_grid", "orig.rope_sin"), ("model/p1_i2v_odd_grid", "in.timestep"),
    ("model/p2_sampler", "orig_flow_dpm.final"), ("model/p2_sampler", "diffusers_i2v_unipc.model_x"),
    ("model/p2_sampler", "in.first_frame_latent"), ("model/schedules_shift12", "unipc.50.timesteps"),
    ("model/schedules_shift8", "flow_euler.20.sigmas"), ("vae_text/wan21_vae_tiny", "out.encode_logvar"),
    ("vae_text/wan21_vae_tiny", "vae.decoder.middle.1.proj.weight"), ("vae_text/gemma2_tiny", "out.sana_embed.no_softcap"),
    ("vae_text/gemma2_tiny", "in.select_index"), ("causal/chunk_forward_a", "chunk2/kv_out/block1/tconv"),
    ("causal/chunk_forward_uneven", "history_after_all_chunks/block0/k_sum"), ("causal/sampling_b_window1", "output"),
    ("causal/sampling_b", "chunk1/step2/t_model"), ("causal/interactive_b_switch_at_chunk1_recache1", "prompt_embeds"),
    ("causal/sigma_tables", "shift5/lookup_sigma"), ("causal/incremental_timesteps", "F4_T10/log_mat_s"),
]


def damage(tensor: torch.Tensor) -> torch.Tensor:
    """One value of ``tensor`` changed by a few per cent, or by one."""
    tensor = tensor.clone()
    flat = tensor.view(-1)
    where = flat.abs().argmax()
    flat[where] = flat[where] * 1.03 + 0.01 if tensor.is_floating_point() else flat[where] ^ 1
    return tensor


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """{file/key: record} of every mutant, beside the weights that it needs."""
    found = {}
    for folder in FOLDERS:
        target = copies(DATA / folder, tmp_path_factory.mktemp(f"damaged_{folder}"), "*weights*")
        mutants = {f"mutant{i}": (file, key) for i, (file, key) in enumerate(MUTANTS) if file.startswith(f"{folder}/")}
        for name, (file, key) in mutants.items():
            rewrite(DATA / f"{file}.safetensors", target / f"{name}.safetensors",
                    lambda tensors, key=key: tensors.update({key: damage(tensors[key])}))
        records = judged(target, target / "answer.json")
        found.update({f"{file}/{key}": records[name] for name, (file, key) in mutants.items()})
    return found


@pytest.mark.parametrize(("file", "key"), MUTANTS)
def test_one_changed_value_is_found(damaged, file, key):
    row = damaged[f"{file}/{key}"]
    assert row["verdict"] == check.FAIL and row["misses"], row["reason"]


def test_a_changed_weight_fails_the_cases_that_use_it(tmp_path):
    copies(DATA / "model", tmp_path, "p1_single_frame*")
    key = "blocks.1.mlp.t_conv.weight"
    rewrite(DATA / "model/p1_weights_original.safetensors", tmp_path / "w.safetensors", lambda t: t.update({key: damage(t[key])}))
    rows = {row.kind: row for row in check.check_directory(tmp_path)}
    assert rows["forward"].verdict == check.FAIL and "orig.block1.mlp" in rows["forward"].misses[0]


def test_the_official_bf16_run_is_repeated_to_the_bit_or_to_rounding(rows):
    row = rows["causal"]["sampling_b_bf16"]
    assert row["verdict"] == check.PASS and any("bit-equal" in note for note in row["notes"])


def test_the_reference_defect_is_not_in_our_default(opened):
    files, weights = opened["causal"]
    row = check.check_file(files["interactive_b_switch_at_chunk1_recache1"], weights)
    assert "the default differs" in row.cells[-1]
    assert any("free of the reference's defect" in c.name for c in row.report.checks)


def test_missing_weights_and_broken_files_fail_with_a_reason(tmp_path, capsys):
    copies(DATA / "model", tmp_path, "p1_single_frame*", "schedules_shift12*")
    (tmp_path / "cut.safetensors").write_bytes((DATA / "model/p2_t2v.safetensors").read_bytes()[:1000])
    assert check.main([str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "no weights with weight_seed 1002" in out and "cannot be read" in out
    assert "3 files: 1 pass, 2 fail, 0 unsupported" in out


@pytest.mark.parametrize("meta", [
    {"meta": json.dumps({"case": {"name": "x", "timestep": [1.0]}, "config": {"softmax_ratio": 0.25}})},
    {"kind": "ltx23 video VAE tiny fp32 golden"}, {"kind": "DC-AE-V (chunk-causal) tiny fp32 golden"}, {"note": "something new"},
])
def test_unsupported_kinds_need_the_flag(tmp_path, capsys, meta):
    save_file({"in.latent": torch.zeros(1)}, tmp_path / "new.safetensors", metadata=meta)
    assert check.main([str(tmp_path)]) == 1
    assert check.main([str(tmp_path), "--allow-unsupported"]) == 0
    assert "unsupported" in capsys.readouterr().out


def test_a_known_kind_with_an_unknown_part_is_no_pass(tmp_path):
    copies(DATA / "model", tmp_path, "p1_w*")
    rewrite(DATA / "model/p1_single_frame.safetensors", tmp_path / "x.safetensors",
            lambda t: t.update({"orig.block0.new_part": torch.zeros(3)}))
    rows = {row.kind: row for row in check.check_directory(tmp_path)}
    assert rows["forward"].verdict == check.FAIL and "new_part" in rows["forward"].reason


def test_wrong_directories(tmp_path, capsys):
    assert check.main([str(tmp_path)]) == 2
    assert check.main([str(tmp_path / "nowhere")]) == 2
    assert "no .safetensors" in capsys.readouterr().err


def test_details_list_every_comparison(tmp_path, capsys):
    copies(DATA / "model", tmp_path, "schedules_shift12*")
    assert check.main([str(tmp_path), "--details"]) == 0
    out = capsys.readouterr().out
    assert out.count("sigmas:") == 5 and "10 " in out
