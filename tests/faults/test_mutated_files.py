"""Mutated model files: no crash, no hang, no partial load; every structural damage is refused by name.

``SANA_VIDEO_MUTATIONS`` sets the number of files (default 200; a release runs 2000).
"""

from __future__ import annotations

import hashlib
import os
import random
import time
from collections import Counter

import mutate
import pytest
import torch
from checkpoints import random_state, same, small_spec
from safetensors.torch import save_file

from sana_video_core.checkpoint import convert, load_transformer, load_weights, read_state_dict, save_transformer
from sana_video_core.checkpoint.integrity import tensor_bytes
from sana_video_core.errors import CheckpointError
from sana_video_core.vae.loading import load_wan_vae, vae_names

COUNT = int(os.environ.get("SANA_VIDEO_MUTATIONS", "200"))
SECONDS = 2.0  # of this process' own time: nothing may hang
SPEC = small_spec(depth=1, width=16, linear_head_dim=8, cross_heads=2, ffn_hidden=24, caption_channels=12)


def fingerprint(model: torch.nn.Module) -> str:
    """SHA-256 over all parameters."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(name.encode() + tensor_bytes(parameter))
    return digest.hexdigest()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """{name: (bytes, the spec to load it with, its weights)}: two files of others, two of our own."""
    folder = tmp_path_factory.mktemp("files")
    out = {}
    for name, naming, dtype, own in (
            ("foreign-f32", "original", torch.float32, False), ("foreign-bf16", "diffusers", torch.bfloat16, False),
            ("own-f32", "original", torch.float32, True), ("own-bf16", "native", torch.bfloat16, True)):
        state = random_state(SPEC, naming, dtype)
        path = folder / f"{name}.safetensors"
        if own:
            save_transformer(state, SPEC, path, naming)
        else:
            save_file(state, path, {"format": "pt"})
        out[name] = (path.read_bytes(), None if own else SPEC, convert(state, SPEC))
    return out


def judge(mutation, path, spec, weights, model, whole) -> str:
    """'refused', 'harmless' (same weights) or 'unverified' (data changed, no checksum to tell); anything else fails."""
    started = time.process_time()
    try:
        loaded = load_transformer(path, spec, weights["t_block.1.bias"].dtype)
    except CheckpointError as error:
        loaded, text = None, str(error)
        assert path.name in text, text
        if mutation.victims:
            assert any(victim in text for victim in mutation.victims), f"{mutation.kind} {mutation.victims}: {text}"
    assert time.process_time() - started < SECONDS
    try:
        load_weights(model, path)
    except CheckpointError:
        assert fingerprint(model) == whole, "a refused file left something behind"
        assert loaded is None or spec is None
    if loaded is None:
        return "refused"
    if same(loaded.state_dict(), weights):
        assert loaded.spec == SPEC
        return "harmless"
    assert not read_state_dict(path)[1].verified
    return "unverified"


def test_mutated_model_files(files, tmp_path):
    rng = random.Random(20260)
    outcomes: dict[str, Counter] = {kind: Counter() for kind in mutate.KINDS}
    models = {name: load_transformer(weights, SPEC, weights["t_block.1.bias"].dtype) for name, (_, _, weights) in files.items()}
    hashes = {name: fingerprint(model) for name, model in models.items()}
    path = tmp_path / "mutated.safetensors"
    for n in range(COUNT):
        name = list(files)[n // len(mutate.KINDS) % len(files)]
        blob, spec, weights = files[name]
        mutation = mutate.mutate(blob, mutate.KINDS[n % len(mutate.KINDS)], rng)
        path.unlink(missing_ok=True)  # a mapped file must not change under an earlier network
        path.write_bytes(mutation.data)
        outcome = judge(mutation, path, spec, weights, models[name], hashes[name])
        outcomes[mutation.kind][outcome] += 1
        if outcome == "unverified":
            assert mutation.kind == "data bit" and spec is not None, f"{mutation.kind} of {name} was believed"
            load_weights(models[name], weights)
    print("\n".join(f"{kind}: {dict(counts)}" for kind, counts in outcomes.items()))
    assert sum(sum(c.values()) for c in outcomes.values()) == COUNT
    for kind in set(mutate.KINDS) - {"header byte", "data bit"}:
        assert set(outcomes[kind]) <= {"refused"}, f"{kind}: {outcomes[kind]}"
    assert outcomes["header byte"]["unverified"] == 0


def test_own_files_notice_every_data_flip(files, tmp_path):
    rng = random.Random(5)
    blob = files["own-f32"][0]
    path = tmp_path / "mutated.safetensors"
    for _ in range(max(40, COUNT // 20)):
        mutation = mutate.mutate(blob, "data bit", rng)
        path.write_bytes(mutation.data)
        with pytest.raises(CheckpointError, match=mutation.victims[0].replace(".", r"\.")):
            load_transformer(path)


def test_mutated_vae_files(tmp_path):
    generator = torch.Generator().manual_seed(0)
    state = {name: torch.randn(shape, generator=generator) for name, (_, shape) in vae_names(2).items()}
    path = tmp_path / "vae.safetensors"
    save_file(state, path)
    blob, rng = path.read_bytes(), random.Random(7)
    for n in range(max(40, COUNT // 10)):
        mutation = mutate.mutate(blob, mutate.KINDS[n % len(mutate.KINDS)], rng)
        path.unlink()
        path.write_bytes(mutation.data)
        started = time.process_time()
        try:
            vae = load_wan_vae(path)
        except CheckpointError as error:
            assert "vae.safetensors" in str(error)
            assert not mutation.victims or any(victim in str(error) for victim in mutation.victims), str(error)
        else:
            assert mutation.kind == "data bit" or same(vae.state_dict(), state), mutation.kind
        assert time.process_time() - started < SECONDS


@pytest.mark.parametrize("kind", mutate.KINDS)
def test_every_mutation_changes_the_file(files, kind):
    blob, rng = files["foreign-f32"][0], random.Random(1)
    assert all(mutate.mutate(blob, kind, rng).data != blob for _ in range(50))
