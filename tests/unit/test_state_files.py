"""State files: the same bits come back, any change is refused, a failed write leaves the old file."""

from __future__ import annotations

import errno
import json
import random
import struct

import pytest
import torch
from safetensors import safe_open

from faults import failing
from longvideo import caption, latent, same_state, tiny_model, tiny_spec
from sana_video_core.errors import StateError
from sana_video_core.state import RecurrentState, sealed
from sana_video_core.state.files import load_state, save_state


def make_state(parity=False, dtype=torch.float32, **options):
    model, (text, mask) = tiny_model(parity=parity), caption(0)
    if dtype != torch.float32:
        import copy

        model = copy.deepcopy(model).to(dtype)
    state = RecurrentState.empty("tiny-long", (2, 3), 1, "parity" if parity else "quality", model="abc", **options)
    for i, frames in enumerate((3, 2, 2)):
        state = model.absorb(latent(frames, i), text, mask, state=state)
    return state._replace(caption="def")


@pytest.mark.parametrize("options", [
    {}, {"keep_undo": True}, {"window": 2}, {"window": 1, "keep_undo": True}, {"parity": True, "dtype": torch.bfloat16},
])
def test_round_trip_keeps_every_bit(tmp_path, options):
    state = make_state(**options)
    state.save(tmp_path / "s.safetensors", {"vae": "v", "settings": "x"})
    loaded, prints = load_state(tmp_path / "s.safetensors", tiny_spec(), {"vae": "v"})
    assert same_state(state, loaded) and prints == {"vae": "v", "settings": "x"}
    assert same_state(state, RecurrentState.load(tmp_path / "s.safetensors"))


def test_an_empty_state_can_be_saved(tmp_path):
    state = RecurrentState.empty("tiny-long", (2, 3), 1)
    state.save(tmp_path / "s.safetensors")
    assert same_state(state, RecurrentState.load(tmp_path / "s.safetensors", tiny_spec()))


def test_the_file_is_ordinary_safetensors(tmp_path):
    state = make_state()
    state.save(tmp_path / "s.safetensors")
    with safe_open(tmp_path / "s.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("layers.0.vk"), state.layers[0].vk)


def test_saving_twice_gives_the_same_bytes_and_no_other_file(tmp_path):
    for name in ("a", "b"):
        make_state().save(tmp_path / f"{name}.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]


def test_sha256_is_used_where_blake3_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(sealed, "best_algorithm", lambda: "sha256")
    make_state().save(tmp_path / "s.safetensors")
    assert b'"digest":"sha256:' in (tmp_path / "s.safetensors").read_bytes()
    assert same_state(make_state(), RecurrentState.load(tmp_path / "s.safetensors"))


def mutate(data: bytes, kind: int, rng: random.Random) -> bytes:
    """One of ten kinds of damage to a safetensors file."""
    out, length = bytearray(data), struct.unpack("<Q", data[:8])[0]
    header_at, data_at = rng.randrange(8, 8 + length), rng.randrange(8 + length, len(data))
    if kind == 0:
        return bytes(out[: rng.randrange(len(data))])
    if kind == 1:
        out[rng.randrange(8)] ^= 1 << rng.randrange(8)
    elif kind == 2:
        out[header_at] ^= 1 << rng.randrange(8)
    elif kind == 3:
        out[data_at] ^= 1 << rng.randrange(8)
    elif kind == 4:
        out += bytes(rng.randrange(1, 50))
    elif kind == 5:
        out[header_at] = rng.randrange(256)
    elif kind == 6:
        del out[data_at]
    elif kind == 7:
        out.insert(data_at, rng.randrange(256))
    else:
        header = json.loads(data[8:8 + length])
        name = rng.choice([n for n in header if n != "__metadata__"])
        if kind == 8:
            header[name]["shape"] = [1, *header[name]["shape"]]
        else:
            header[name.replace("vk", "ksum") + "x"] = header.pop(name)
        raw = json.dumps(header, separators=(",", ":")).encode()
        raw += b" " * (-len(raw) % 8)
        return struct.pack("<Q", len(raw)) + raw + data[8 + length:]
    return bytes(out)


@pytest.mark.parametrize("kind", range(10))
def test_no_altered_file_is_accepted(tmp_path, kind):
    path = tmp_path / "s.safetensors"
    make_state(keep_undo=True).save(path)
    good, rng, tried = path.read_bytes(), random.Random(kind), 0
    for _ in range(60):
        bad = mutate(good, kind, rng)
        if bad == good:
            continue
        path.write_bytes(bad)
        tried += 1
        with pytest.raises(StateError):
            load_state(path)
    assert tried > 40
    path.write_bytes(good)
    load_state(path)


def reseal(path, change_record=None, change_table=None):
    """Write the file again with another record and a valid checksum: a hostile file rather than a damaged one."""
    record, tensors = sealed.read_sealed(path, "file", 1 << 30)
    if change_record:
        change_record(record)
    if change_table:
        change_table(tensors)
    sealed.write_sealed(path, tensors, record)


@pytest.mark.parametrize("change", [
    lambda r: r["state"].update(layers=1), lambda r: r["state"].update(layers=-1), lambda r: r["state"].update(grid=[3, 3]),
    lambda r: r["state"].update(batch=2), lambda r: r["state"].update(recent=4), lambda r: r["state"].pop("position"),
    lambda r: r["state"].update(position="0"), lambda r: r["state"].update(version=7), lambda r: r.update(format=2),
    lambda r: r.update(kind="other"), lambda r: r.update(state=[]), lambda r: r["state"].update(undo={"position": 1}),
    lambda r: r["state"].update(keep_undo=1), lambda r: r["state"].update(layers=True),
])
def test_a_sealed_file_with_a_false_record_is_refused(tmp_path, change):
    path = tmp_path / "s.safetensors"
    make_state().save(path)
    reseal(path, change)
    with pytest.raises(StateError):
        load_state(path)


@pytest.mark.parametrize("change", [
    lambda t: t.update({"layers.0.vk": torch.zeros(1, 2, 12, 11)}), lambda t: t.pop("layers.1.tail"),
    lambda t: t.update(extra=torch.zeros(1)), lambda t: t.update({"layers.0.ksum": torch.zeros(1, 2, 1, 12, dtype=torch.uint8)}),
])
def test_a_sealed_file_with_false_tensors_is_refused(tmp_path, change):
    path = tmp_path / "s.safetensors"
    make_state().save(path)
    reseal(path, None, change)
    with pytest.raises(StateError):
        load_state(path)


def test_the_differing_field_is_named(tmp_path):
    path = tmp_path / "s.safetensors"
    save_state(make_state(), path, {"vae": "a", "settings": "b"})
    with pytest.raises(StateError, match="vae differs"):
        load_state(path, None, {"vae": "z"})
    with pytest.raises(StateError, match="text encoder differs"):
        load_state(path, None, {"text encoder": "z"})
    with pytest.raises(StateError, match="model differs"):
        load_state(path, tiny_spec(name="another"))
    with pytest.raises(StateError, match="layers differs"):
        load_state(path, tiny_spec(depth=3))


def test_nothing_is_allocated_beyond_the_file(tmp_path):
    path = tmp_path / "s.safetensors"
    make_state().save(path)
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:8 + length])
    header["layers.0.vk"]["shape"] = [1 << 20, 1 << 20]
    raw = json.dumps(header, separators=(",", ":")).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data[8 + length:])
    with pytest.raises(StateError, match="damaged"):
        load_state(path)
    with pytest.raises(StateError, match="too large"):
        sealed.read_sealed(tmp_path_with(make_state(), tmp_path), "state file", 100)


def tmp_path_with(state, folder):
    state.save(folder / "other.safetensors")
    return folder / "other.safetensors"


def test_a_missing_file_says_so(tmp_path):
    with pytest.raises(StateError, match="no such state file"):
        load_state(tmp_path / "nothing.safetensors")


@pytest.mark.parametrize(("number", "words"), [
    (errno.ENOSPC, "disk is full"), (errno.EROFS, "read-only"), (errno.EACCES, "not allowed"), (errno.EIO, "input/output"),
])
def test_every_failing_call_leaves_a_whole_file(tmp_path, number, words):
    path, old = tmp_path / "s.safetensors", make_state()
    new = old._replace(caption="new")
    failures = 0
    for nth in range(1, 60):
        old.save(path)
        with failing(nth, number) as fault:
            try:
                new.save(path)
            except StateError as error:
                failures += 1
                assert words in str(error)
        if not fault.struck:
            break
        found = RecurrentState.load(path)
        assert same_state(found, old) or same_state(found, new)
        assert [p.name for p in tmp_path.iterdir()] == ["s.safetensors"]
    assert failures >= 5 and same_state(RecurrentState.load(path), new)
