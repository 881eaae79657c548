"""The key table against the official inventories, and conversion between the namings."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from checkpoints import meta_state, random_state, same, shapes, small_spec

from sana_video_core import SPECS, ops
from sana_video_core.checkpoint import convert, validate
from sana_video_core.checkpoint.keys import UNUSED, key_table
from sana_video_core.dit import SanaVideoTransformer
from sana_video_core.errors import CheckpointError, SanaVideoError

DATA = Path(__file__).parents[1] / "data"
ROWS = {"SANA-Video_2B_480p": "sana-video-2b-480p", "SANA-Video_2B_720p_LTX2": "sana-video-2b-720p"}


def inventory(row: str) -> tuple[dict[str, tuple[int, ...]], int]:
    """({name: shape} of an official full-size model, its parameter total)."""
    table = json.loads(gzip.decompress((DATA / "key_inventory.json.gz").read_bytes()))[row]
    out = {}
    for key, value in table["keys"].items():
        if isinstance(value, dict):
            out.update({key.format(i=i): tuple(value["shape"]) for i in value["layers"]})
        else:
            out[key] = tuple(value)
    assert len(out) == table["tensors"]
    return out, table["parameters"]


@pytest.mark.parametrize("naming", ["original", "diffusers"])
@pytest.mark.parametrize("official", ROWS)
def test_full_size_names_and_shapes_are_the_official_ones(official, naming):
    wanted, total = inventory(f"{official}/{naming}")
    spec = SPECS[ROWS[official]]
    wanted = {key: shape for key, shape in wanted.items() if not UNUSED.fullmatch(key)}
    made = shapes(meta_state(spec, naming))
    assert made == wanted
    assert sum(torch.Size(s).numel() for s in made.values()) == total
    assert validate(wanted, spec) == naming


@pytest.mark.parametrize("name", ["sana-video-2b-480p", "sana-video-2b-720p", "longsana-2b-480p", "sana-video-mini"])
def test_native_names_are_the_modules_of_the_network(name):
    model = SanaVideoTransformer(SPECS[name], device="meta")
    assert shapes(dict(model.named_parameters())) == {key: entry.native for key, entry in key_table(SPECS[name]).items()}
    assert shapes(meta_state(SPECS[name], "native")) == shapes(model.state_dict())


def test_known_parameter_totals():
    totals = {name: sum(t.numel() for t in meta_state(SPECS[name]).values()) for name in ROWS.values()}
    assert totals == {"sana-video-2b-480p": 2_056_862_144, "sana-video-2b-720p": 2_057_148_928}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("start", ["native", "original", "diffusers"])
@pytest.mark.parametrize("to", ["native", "original", "diffusers"])
def test_every_round_trip_is_bit_equal(start, to, dtype):
    spec = small_spec()
    state = random_state(spec, start, dtype)
    before = {key: tensor.clone() for key, tensor in state.items()}
    assert same(convert(convert(state, spec, to), spec, start), before)
    assert same(state, before)


@pytest.mark.parametrize("patch", [(1, 2, 2), (1, 1, 1)])
def test_matrices_do_what_the_official_convolutions_do(patch):
    spec = small_spec(patch=patch, channels=8, depth=1)
    state = random_state(spec, seed=3)
    native = convert(state, spec)
    g = torch.Generator().manual_seed(1)
    latent = torch.randn(1, 8, 3, 4, 6, generator=g)
    from sana_video_core.dit.embeddings import patchify

    ours = patchify(latent, patch) @ native["x_embedder.proj.weight"].T
    theirs = F.conv3d(latent, state["x_embedder.proj.weight"], stride=patch).flatten(2).transpose(1, 2)
    assert torch.allclose(ours, theirs, atol=1e-5)
    frames, space = 4, 5
    u = torch.randn(1, frames * space, spec.width, generator=g)
    taps, _ = ops.temporal_taps(u, frames)
    ours = taps @ native["blocks.0.mlp.t_conv.weight"].T
    theirs = F.conv2d(u.unflatten(1, (frames, space)).permute(0, 3, 1, 2), state["blocks.0.mlp.t_conv.weight"], padding=(1, 0))
    assert torch.allclose(ours, theirs.permute(0, 2, 3, 1).flatten(1, 2), atol=1e-5)


def test_diffusers_splits_are_the_rows_in_the_order_q_k_v():
    spec = small_spec()
    state = random_state(spec)
    parts = convert(state, spec, "diffusers")
    d = spec.width
    for n, part in enumerate("qkv"):
        assert torch.equal(parts[f"transformer_blocks.1.attn1.to_{part}.weight"],
                           state["blocks.1.attn.qkv.weight"][n * d:(n + 1) * d])
    assert torch.equal(parts["transformer_blocks.0.attn2.to_v.bias"], state["blocks.0.cross_attn.kv_linear.bias"][d:])


def test_conversion_makes_views_where_it_can():
    spec = small_spec()
    state = random_state(spec)
    native = convert(state, spec)
    shared = [key for key in native if native[key].untyped_storage().data_ptr() == state[key].untyped_storage().data_ptr()]
    assert set(native) - set(shared) == {f"blocks.{i}.mlp.t_conv.weight" for i in range(spec.depth)}


def test_unused_official_tensors_are_dropped():
    spec = small_spec()
    state = random_state(spec)
    extra = {"pos_embed": torch.zeros(1, 8, 24), "y_embedder.y_embedding": torch.zeros(300, 20, dtype=torch.bfloat16),
             "logvar_linear.weight": torch.zeros(1, 24), "logvar_linear.bias": torch.zeros(1)}
    assert same(convert(state | extra, spec, "original"), state)


def damage(state, how):
    """(a state dict with one fault, the words that the error must hold)."""
    key = "blocks.1.cross_attn.kv_linear.weight"
    if how == "missing":
        state.pop(key)
        return state, [key, "1 missing"]
    if how == "unexpected":
        return state | {"blocks.1.attn.extra.weight": torch.zeros(3)}, ["blocks.1.attn.extra.weight", "1 unexpected"]
    if how == "renamed":
        state["blocks.1.cross_attn.kv_linaer.weight"] = state.pop(key)
        return state, [key, "kv_linaer", "1 missing", "1 unexpected"]
    if how == "misshaped":
        state[key] = state[key].T.contiguous()
        return state, [f"{key} [24, 48] instead of [48, 24]", "1 of another shape"]
    if how == "integers":
        state[key] = state[key].to(torch.int32)
        return state, [f"{key} int32", "1 of a wrong dtype"]
    state = {k: t.bfloat16() for k, t in state.items()}
    state[key] = state[key].to(torch.float16)
    return state, [f"{key} float16 among bfloat16"]


@pytest.mark.parametrize("how", ["missing", "unexpected", "renamed", "misshaped", "integers", "mixed halves"])
@pytest.mark.parametrize("to", ["native", "original", "diffusers"])
def test_faults_are_listed_by_name(how, to):
    spec = small_spec()
    state, words = damage(random_state(spec), how)
    with pytest.raises(CheckpointError) as error:
        convert(state, spec, to, name="some.safetensors")
    assert all(word in str(error.value) for word in [*words, "some.safetensors", "small"])


def test_long_lists_of_faults_are_cut_with_their_count():
    spec = small_spec()
    state = {k: t for k, t in random_state(spec).items() if not k.startswith("blocks.1.")}
    with pytest.raises(CheckpointError, match=r"20 missing \(blocks\.1\.\S+, blocks\.1\.\S+, .*and 16 more\)"):
        convert(state, spec)


def test_quantised_layers_may_be_packed_or_absent():
    spec = small_spec()
    state = convert(random_state(spec), spec)
    packed, absent = "blocks.0.attn.qkv", "blocks.1.mlp.t_conv"
    state[f"{packed}.weight"] = torch.zeros(80, 16, dtype=torch.uint8)
    state.pop(f"{absent}.weight")
    with pytest.raises(CheckpointError):
        convert(state, spec)
    marks = {f"{packed}.comfy_quant", f"{packed}.weight_scale", f"{absent}.comfy_quant"}
    assert validate(shapes(state), spec, quantised=marks) == "original"
    with_scale = state | {f"{packed}.weight_scale": torch.ones(1)}
    native = convert(with_scale, spec, quantised={packed, absent})
    assert native[f"{packed}.weight"] is state[f"{packed}.weight"] and f"{packed}.weight_scale" in native
    with pytest.raises(SanaVideoError, match="Quantised weights"):
        convert(state, spec, "diffusers", quantised={packed, absent})
    with pytest.raises(CheckpointError, match=r"blocks\.7\.attn\.qkv \(quantised\)"):
        convert(state, spec, quantised={packed, absent, "blocks.7.attn.qkv"})


def test_unknown_naming_is_refused():
    with pytest.raises(SanaVideoError, match="kohya"):
        convert({}, small_spec(), "kohya")
