"""Our own files: complete or absent, self-describing, and able to notice a flipped bit."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from checkpoints import random_state, same, small_spec
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sana_video_core.checkpoint import convert, load_transformer, load_weights, read_state_dict, save_transformer
from sana_video_core.checkpoint.integrity import CHECK_KEY
from sana_video_core.errors import CheckpointError, SanaVideoError

SPEC = small_spec()


@pytest.mark.parametrize("start", ["original", "native", "diffusers"])
@pytest.mark.parametrize("to", ["original", "native", "diffusers"])
def test_saved_files_load_without_being_told_anything(tmp_path, start, to):
    path = save_transformer(random_state(SPEC, start), SPEC, tmp_path / "m.safetensors", to)
    assert same(load_file(path), {k: v.contiguous() for k, v in convert(random_state(SPEC), SPEC, to).items()})
    model = load_transformer(path, dtype=torch.float32)
    assert model.spec == SPEC and same(model.state_dict(), convert(random_state(SPEC), SPEC))
    assert list(tmp_path.iterdir()) == [path]


def test_a_network_is_saved_with_its_own_spec_and_the_dtype_asked_for(tmp_path):
    model = load_transformer(random_state(SPEC), SPEC, torch.float32)
    path = save_transformer(model, None, tmp_path / "m.safetensors", dtype=torch.bfloat16)
    state, source = read_state_dict(path)
    assert source.verified and {t.dtype for t in state.values()} == {torch.bfloat16}
    assert load_transformer(path).spec == SPEC


def test_mixed_dtypes_stay_aligned(tmp_path):
    state = random_state(SPEC, "native", torch.bfloat16)
    for key in list(state)[::3]:
        state[key] = state[key].float()
    assert same(load_file(save_transformer(state, SPEC, tmp_path / "m.safetensors", "native")), state)


def test_what_cannot_be_saved_is_refused_and_leaves_no_file(tmp_path):
    state = random_state(SPEC)
    for wrong in ({"path": "m.pth"}, {"spec": None}, {"to": "kohya"}, {"dtype": torch.int8}):
        call = {"spec": SPEC, "path": "m.safetensors"} | wrong
        with pytest.raises(SanaVideoError):
            save_transformer(state, call.pop("spec"), tmp_path / call.pop("path"), **call)
    state.pop("t_block.1.bias")
    with pytest.raises(CheckpointError, match=r"t_block\.1\.bias"):
        save_transformer(state, SPEC, tmp_path / "m.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_a_failing_disk_leaves_the_old_file_as_it_was(tmp_path, monkeypatch, call):
    path = save_transformer(random_state(SPEC), SPEC, tmp_path / "m.safetensors")
    before = path.read_bytes()

    def fail(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    if call == "write":
        real = Path.open

        def broken(self, mode="r", *args, **kwargs):
            file = real(self, mode, *args, **kwargs)
            return Full(file) if "x" in mode else file

        monkeypatch.setattr(Path, "open", broken)
    else:
        monkeypatch.setattr(os, call, fail)
    with pytest.raises(SanaVideoError, match="No space left"):
        save_transformer(random_state(SPEC, seed=1), SPEC, path)
    monkeypatch.undo()
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


class Full:
    """A file on a disk that fills up after a kilobyte."""

    def __init__(self, file):
        self.file, self.room = file, 1000

    def write(self, data):
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.file.write(data)

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.file.close()


def flip(path: Path, offset: int, bit: int = 0) -> None:
    blob = bytearray(path.read_bytes())
    blob[offset] ^= 1 << bit
    path.write_bytes(blob)


def test_every_flipped_bit_of_a_weight_is_noticed_and_named(tmp_path):
    path = save_transformer(random_state(SPEC), SPEC, tmp_path / "m.safetensors")
    whole = path.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    from sana_video_core.checkpoint.header import read_header

    infos, _ = read_header(path)
    for n, (name, info) in enumerate(infos.items()):
        flip(path, start + info.start + n % (info.end - info.start), n % 8)
        with pytest.raises(CheckpointError) as error:
            load_transformer(path)
        assert name in str(error.value) and "m.safetensors" in str(error.value) and "1 tensors" in str(error.value)
        path.write_bytes(whole)
    assert load_transformer(path).spec == SPEC


def test_a_changed_description_is_noticed(tmp_path):
    path = save_transformer(random_state(SPEC), SPEC, tmp_path / "m.safetensors")
    blob = path.read_bytes()
    path.write_bytes(blob.replace(b'\\"linear_head_dim\\": 12', b'\\"linear_head_dim\\": 24'))
    with pytest.raises(CheckpointError, match="description does not match"):
        load_transformer(path)


def test_verification_can_be_forced_or_left_out_and_is_never_claimed(tmp_path, monkeypatch):
    path = save_transformer(random_state(SPEC), SPEC, tmp_path / "m.safetensors")
    assert read_state_dict(path)[1].verified and not read_state_dict(path, verify=False)[1].verified
    monkeypatch.setattr("sana_video_core.checkpoint.integrity.VERIFY_LIMIT", 100)
    assert not read_state_dict(path)[1].verified and read_state_dict(path, verify=True)[1].verified
    save_file(random_state(SPEC), tmp_path / "foreign.safetensors")
    assert not read_state_dict(tmp_path / "foreign.safetensors", verify=True)[1].verified


def test_a_tool_that_keeps_the_old_checksum_is_told_what_to_do(tmp_path):
    path = save_transformer(random_state(SPEC), SPEC, tmp_path / "m.safetensors")
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file(random_state(SPEC, seed=9), path, metadata)
    with pytest.raises(CheckpointError, match=f"42 tensors.*{CHECK_KEY}|.*drop the metadata entry {CHECK_KEY}"):
        load_transformer(path)
    save_file(random_state(SPEC, seed=9), path, {k: v for k, v in metadata.items() if k != CHECK_KEY})
    assert load_transformer(path).spec == SPEC


def test_a_reordered_copy_keeps_its_checksum(tmp_path):
    path = save_transformer(random_state(SPEC), SPEC, tmp_path / "m.safetensors")
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    state = load_file(path)
    save_file({k: state[k] for k in reversed(list(state))}, tmp_path / "copy.safetensors", metadata)
    assert read_state_dict(tmp_path / "copy.safetensors")[1].verified


def test_the_metadata_is_readable_by_anyone(tmp_path):
    path = save_transformer(random_state(SPEC), SPEC, tmp_path / "m.safetensors")
    with safe_open(path, "pt") as file:
        told = json.loads(file.metadata()["sana_video_spec"])
    assert (told["name"], told["linear_head_dim"], told["vae"]["name"]) == ("small", 12, "wan2.1")


def test_loading_into_a_network_replaces_all_or_nothing(tmp_path):
    model = load_transformer(random_state(SPEC), SPEC, torch.float32)
    good = save_transformer(random_state(SPEC, seed=5), SPEC, tmp_path / "m.safetensors", "diffusers")
    bad = random_state(SPEC, seed=5)
    bad["final_layer.linear.bias"] = torch.zeros(3)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"final_layer\.linear\.bias"):
        load_weights(model, bad)
    assert same(model.state_dict(), before)
    source = load_weights(model, good)
    assert source.verified and same(model.state_dict(), convert(random_state(SPEC, seed=5), SPEC))
