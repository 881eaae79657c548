"""Every container that weights come in, and what is refused at the door."""

from __future__ import annotations

import json
import os
import struct

import pytest
import torch
from checkpoints import diffusers_folder, random_state, same, sharded, small_spec
from safetensors.torch import save_file

from sana_video_core.checkpoint import convert, load_transformer, read_state_dict, spec_to_text
from sana_video_core.checkpoint.header import MAX_HEADER_BYTES, read_header
from sana_video_core.checkpoint.pth import require_torch
from sana_video_core.errors import CheckpointError

SPEC = small_spec()


def container(kind: str, folder, state: dict):
    """A path (or dictionary) of that kind that holds ``state``."""
    prefixed = {f"model.{k}": v for k, v in state.items()}
    if kind == "dictionary":
        return state
    if kind == "safetensors":
        save_file(state, folder / "m.safetensors")
        return folder / "m.safetensors"
    if kind in ("modelsave", "submodule"):
        prefix = "model.diffusion_model." if kind == "modelsave" else "diffusion_model."
        save_file({f"{prefix}{k}": v for k, v in state.items()}, folder / "m.safetensors")
        return folder / "m.safetensors"
    if kind == "whole checkpoint":
        other = {"first_stage_model.decoder.conv_in.weight": torch.ones(2), "text_encoders.x.weight": torch.ones(2)}
        save_file({f"model.diffusion_model.{k}": v for k, v in state.items()} | other, folder / "m.safetensors")
        return folder / "m.safetensors"
    if kind == "index":
        return sharded(folder, "m", state, 3)
    if kind == "shard":
        sharded(folder, "m", state, 2)
        return folder / "m-00002-of-00002.safetensors"
    tops = {
        "state_dict": {"state_dict": state, "epoch": 3, "optimizer": {"state": {0: torch.ones(3)}, "lr": [1e-4]}},
        "state_dict_ema": {"state_dict_ema": state},
        "bare": dict(state),
        "bare model.": prefixed,
        "generator": {"generator": prefixed, "critic": {"model.x": torch.ones(2)}, "step": 100},
        "generator/state_dict": {"generator": {"state_dict": state}},
        "parameters": {"state_dict": {k: torch.nn.Parameter(v) for k, v in state.items()}},
    }
    torch.save(tops[kind], folder / "m.pth")
    return folder / "m.pth"


KINDS = ["dictionary", "safetensors", "modelsave", "submodule", "whole checkpoint", "index", "shard", "state_dict",
         "state_dict_ema", "bare", "bare model.", "generator", "generator/state_dict", "parameters"]


@pytest.mark.parametrize("naming", ["original", "diffusers", "native"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_container_gives_the_same_network(tmp_path, kind, naming):
    state = random_state(SPEC, naming)
    source = container(kind, tmp_path, state)
    read, origin = read_state_dict(source)
    assert same(read, state)
    assert origin.wrapper == {"state_dict": "state_dict", "state_dict_ema": "state_dict_ema", "generator": "generator",
                              "generator/state_dict": "generator", "parameters": "state_dict"}.get(kind)
    model = load_transformer(source, SPEC, torch.float32)
    assert same(model.state_dict(), convert(random_state(SPEC), SPEC))
    assert not model.training


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("inside", [False, True])
def test_diffusers_folders(tmp_path, shards, inside):
    folder = diffusers_folder(tmp_path / "repo", SPEC, random_state(SPEC, "diffusers"), shards)
    model = load_transformer(folder / "transformer" if inside else folder, dtype=torch.float32)
    assert (model.spec.linear_head_dim, model.spec.cross_heads, model.spec.causal) == (12, 4, False)
    assert same(model.state_dict(), convert(random_state(SPEC), SPEC))


def test_a_single_diffusers_file_finds_the_config_beside_it(tmp_path):
    folder = diffusers_folder(tmp_path / "repo", SPEC, random_state(SPEC, "diffusers"))
    model = load_transformer(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    assert model.spec.linear_head_dim == 12


def test_official_leftovers_are_dropped_at_the_door(tmp_path):
    extra = {"pos_embed": torch.zeros(1, 9, 24), "y_embedder.y_embedding": torch.zeros(300, 20, dtype=torch.bfloat16),
             "logvar_linear.bias": torch.zeros(1)}
    torch.save({"state_dict": random_state(SPEC) | extra}, tmp_path / "m.pth")
    assert same(read_state_dict(tmp_path / "m.pth")[0], random_state(SPEC))


def test_loading_maps_the_file_instead_of_reading_it(tmp_path):
    spec = small_spec(width=480, linear_head_dim=12, ffn_hidden=1920)
    path = container("safetensors", tmp_path, random_state(spec, "native"))
    model = load_transformer(path, spec, torch.float32)
    storages = {p.untyped_storage().data_ptr() for p in model.parameters()}
    maps = [tuple(int(n, 16) for n in line.split()[0].split("-")) for line in open("/proc/self/maps") if str(path) in line]
    assert maps and all(any(low <= p < high for low, high in maps) for p in storages)
    with torch.no_grad():
        model.t_block[1].weight.zero_()  # a private page, not the file
    assert same(read_state_dict(path)[0], random_state(spec, "native"))


def test_a_callers_dictionary_is_not_shared_with_the_network():
    state = random_state(SPEC, "native")
    model = load_transformer(state, SPEC, torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert same(state, random_state(SPEC, "native"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_of_the_network_is_the_one_asked_for(tmp_path, dtype):
    path = container("state_dict", tmp_path, random_state(SPEC))
    model = load_transformer(path, SPEC, dtype, parity=True, cross_eps=1e-5)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert model.parity and model.blocks[0].cross_attn.q_norm.eps == 1e-5


# ---------------------------------------------------------------------------------------------------------- refusals

def header(entries: dict, data: bytes = b"", metadata=None) -> bytes:
    """A safetensors file of these header entries."""
    table = ({"__metadata__": metadata} if metadata is not None else {}) | entries
    text = json.dumps(table).encode() if isinstance(entries, dict) else entries
    return struct.pack("<Q", len(text)) + text + data


def entry(shape=(2,), offsets=(0, 8), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


RAW = {
    "empty file": (b"", "0 bytes"),
    "eight zeros": (b"\0" * 8, "8 bytes"),
    "zero header": (struct.pack("<Q", 0) + b"{}" + b" " * 8, "header of 0 bytes"),
    "huge header length": (struct.pack("<Q", 1 << 63) + b"{}" + b" " * 20, "header of 9223372036854775808"),
    "header beyond the file": (struct.pack("<Q", 100) + b"{}" + b" " * 20, "header of 100 bytes"),
    "no object": (struct.pack("<Q", 2) + b"[]", "begins with"),
    "leading space": (struct.pack("<Q", 3) + b" {}", "begins with"),
    "bad json": (struct.pack("<Q", 10) + b'{"a": tru}', "not valid JSON"),
    "bad utf-8": (struct.pack("<Q", 8) + b'{"\xff\xfe": 1'[:8], "not valid JSON"),
    "nan": (struct.pack("<Q", 10) + b'{"a": NaN}', "not valid JSON"),
    "deep": (struct.pack("<Q", 200_005) + b'{"a":' + b"[" * 200_000, "not valid JSON"),
    "long number": (struct.pack("<Q", 10_006) + b'{"a":' + b"9" * 10_000 + b"}", "not valid JSON"),
}
ENTRIES = {
    "extra field": ({"a": entry() | {"x": 1}}, 8, "'a' without exactly"),
    "missing field": ({"a": {"dtype": "F32", "shape": [2]}}, 8, "'a' without exactly"),
    "entry is a list": ({"a": [1]}, 8, "'a' without exactly"),
    "unknown dtype": ({"a": entry(dtype="F31")}, 8, "'F31'"),
    "dtype is a number": ({"a": entry(dtype=3)}, 8, "dtype '3'"),
    "negative dimension": ({"a": entry(shape=(-2,))}, 8, "whole numbers"),
    "fractional dimension": ({"a": entry(shape=(2.0,))}, 8, "whole numbers"),
    "boolean dimension": ({"a": entry(shape=(True, 2))}, 8, "whole numbers"),
    "nine dimensions": ({"a": entry(shape=(1,) * 8 + (2,))}, 8, "up to 8"),
    "zero size": ({"a": entry(shape=(0,), offsets=(0, 0))}, 0, "at least one element"),
    "product overflows": ({"a": entry(shape=(1 << 40, 1 << 40))}, 8, "a size that fits"),
    "product wraps to a small number": ({"a": entry(shape=(1 << 33, 1 << 31, 2))}, 8, "a size that fits"),
    "three offsets": ({"a": entry(offsets=(0, 8, 9))}, 8, "two whole numbers"),
    "negative offset": ({"a": entry(offsets=(-8, 0))}, 8, "two whole numbers"),
    "reversed offsets": ({"a": entry(offsets=(8, 0))}, 8, "8 bytes for F32"),
    "empty offsets": ({"a": entry(offsets=(0, 0))}, 8, "with 0 bytes"),
    "size differs": ({"a": entry(shape=(3,))}, 8, "12 bytes for F32"),
    "hole at the start": ({"a": entry(offsets=(8, 16))}, 16, "leaves a hole"),
    "hole": ({"a": entry(), "b": entry(offsets=(16, 24))}, 24, "'b' leaves a hole"),
    "overlap": ({"a": entry(), "b": entry(offsets=(4, 12))}, 12, "'b' overlaps"),
    "shared": ({"a": entry(), "b": entry()}, 8, "'b' overlaps"),
    "beyond the end": ({"a": entry()}, 7, "ends at byte 8"),
    "trailing bytes": ({"a": entry()}, 9, "1 bytes after the last tensor"),
    "only data": ({}, 5, "5 bytes after"),
}


@pytest.mark.parametrize("case", RAW)
def test_broken_headers_are_refused_with_the_files_name(tmp_path, case):
    blob, words = RAW[case]
    path = tmp_path / "broken.safetensors"
    path.write_bytes(blob)
    with pytest.raises(CheckpointError) as error:
        read_header(path)
    assert "broken.safetensors" in str(error.value) and words in str(error.value)


@pytest.mark.parametrize("case", ENTRIES)
def test_inconsistent_entries_are_refused_with_the_tensors_name(tmp_path, case):
    entries, size, words = ENTRIES[case]
    path = tmp_path / "broken.safetensors"
    path.write_bytes(header(entries, b"\0" * size))
    with pytest.raises(CheckpointError) as error:
        read_header(path)
    assert "broken.safetensors" in str(error.value) and words in str(error.value)


def test_doubled_names_and_foreign_metadata_are_refused(tmp_path):
    one = json.dumps(entry())
    text = f'{{"a": {one}, "a": {one}}}'.encode()
    (tmp_path / "twice.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 8)
    with pytest.raises(CheckpointError, match="'a' occurs twice"):
        read_header(tmp_path / "twice.safetensors")
    (tmp_path / "meta.safetensors").write_bytes(header({"a": entry()}, b"\0" * 8, {"n": 3}))
    with pytest.raises(CheckpointError, match="no table of texts"):
        read_header(tmp_path / "meta.safetensors")


def test_a_header_that_is_too_large_is_not_even_read(tmp_path):
    path = tmp_path / "large.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", MAX_HEADER_BYTES + 1))
        file.truncate(MAX_HEADER_BYTES + 100)
    with pytest.raises(CheckpointError, match="within the file"):
        read_header(path)


def test_good_headers_are_read(tmp_path):
    path = tmp_path / "good.safetensors"
    save_file({"s": torch.tensor(1.0), "t": torch.zeros(2, 3, dtype=torch.bfloat16)}, path, {"format": "pt"})
    infos, metadata = read_header(path)
    assert {k: (v.dtype, v.shape) for k, v in infos.items()} == {"s": ("F32", ()), "t": ("BF16", (2, 3))}
    assert metadata == {"format": "pt"}


def write_case(case: str, folder):
    """A source that must be refused."""
    if case == "not there":
        return folder / "none.safetensors"
    if case == "pipe":
        os.mkfifo(folder / "m.safetensors")  # opening it would wait for ever
        return folder / "m.safetensors"
    if case == "gguf":
        (folder / "m.safetensors").write_bytes(b"GGUF" + b"\0" * 100)
        return folder / "m.safetensors"
    if case == "text":
        (folder / "m.txt").write_text("hello")
        return folder / "m.txt"
    if case == "legacy pickle":
        torch.save({"state_dict": random_state(SPEC)}, folder / "m.pth", _use_new_zipfile_serialization=False)
        return folder / "m.pth"
    if case == "empty folder":
        return folder
    if case == "two models":
        for n in "ab":
            save_file(random_state(SPEC), folder / f"{n}.safetensors")
        return folder
    if case == "no index":
        index = sharded(folder, "m", random_state(SPEC), 2)
        index.unlink()
        return folder
    if case == "shard missing":
        index = sharded(folder, "m", random_state(SPEC), 2)
        (folder / "m-00002-of-00002.safetensors").unlink()
        return index
    if case == "other class":
        return diffusers_folder(folder / "r", SPEC, random_state(SPEC, "diffusers"), class_name="WanTransformer3DModel")
    if case == "escaping shard":
        index = sharded(folder, "m", random_state(SPEC), 2)
        index.write_text(index.read_text().replace("m-00001-of-00002", "../m-00001-of-00002"))
        return index
    if case == "index lies":
        index = sharded(folder, "m", random_state(SPEC), 2)
        index.write_text(index.read_text().replace('"t_block.1.bias"', '"t_block.1.bais"'))
        return index
    if case == "both prefixes":
        state = random_state(SPEC)
        return {f"model.{k}": v for k, v in state.items()} | {"t_block.1.bias": state["t_block.1.bias"]}
    assert case == "no tensors"
    return {"state_dict": {"a": 1, "b": torch.ones(2)}}


@pytest.mark.parametrize(("case", "words"), [
    ("not there", "none.safetensors cannot be read"), ("pipe", "neither a file nor a folder"), ("gguf", "GGUF"),
    ("text", "no known kind"),
    ("legacy pickle", "m.pth is not accepted"), ("empty folder", "no single model"),
    ("two models", "a.safetensors, b.safetensors"),
    ("no index", "shards without their index"), ("shard missing", "no file m-00002-of-00002.safetensors"),
    ("other class", "WanTransformer3DModel"), ("escaping shard", "shard name"), ("index lies", "t_block.1.bais"),
    ("both prefixes", "t_block.1.bias' twice"), ("no tensors", "no tensors: a"),
])
def test_other_sources_are_refused_with_a_reason(tmp_path, case, words):
    with pytest.raises(CheckpointError) as error:
        load_transformer(write_case(case, tmp_path), SPEC)
    assert words in str(error.value)


ODD = {
    "sparse": lambda: torch.eye(24).to_sparse(),
    "csr": lambda: torch.eye(24).to_sparse_csr(),
    "quantised": lambda: torch.quantize_per_tensor(torch.eye(24), 0.1, 0, torch.qint8),
    "expanded": lambda: torch.ones(1).expand(1000, 1000),
    "no elements": lambda: torch.ones(0, 3),
    "conjugated": lambda: torch.ones(3, dtype=torch.complex64).conj(),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("where", ["dictionary", "pth"])
def test_odd_tensors_are_refused(tmp_path, odd, where):
    state = random_state(SPEC) | {"blocks.0.attn.proj.bias": ODD[odd]()}
    source = state
    if where == "pth":
        torch.save({"state_dict": state}, tmp_path / "m.pth")
        source = tmp_path / "m.pth"
    with pytest.raises(CheckpointError):
        load_transformer(source, SPEC)


@pytest.mark.parametrize(("version", "good"), [("2.9.1", False), ("2.10.0", True), ("2.13.0+cpu", True), ("1.13.1", False),
                                               ("3.0.0a0+git1", True), ("2.10.0.dev2026", True)])
def test_pth_needs_a_torch_without_known_holes(version, good):
    if good:
        require_torch(version)
    else:
        with pytest.raises(CheckpointError, match="too old"):
            require_torch(version)


def test_the_spec_can_travel_as_a_tensor(tmp_path):
    state = {f"model.diffusion_model.{k}": v for k, v in random_state(SPEC, "native").items()}
    text = torch.tensor(list(spec_to_text(SPEC).encode()), dtype=torch.uint8)
    save_file(state | {"sana_video_spec": text}, tmp_path / "m.safetensors")
    assert load_transformer(tmp_path / "m.safetensors").spec == SPEC
    save_file(state | {"sana_video_spec": text.float()}, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match="sana_video_spec"):
        load_transformer(tmp_path / "m.safetensors")
