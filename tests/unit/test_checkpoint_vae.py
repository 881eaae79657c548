"""Wan 2.1 VAE files in both namings; other VAEs are refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoints import same, shapes
from safetensors.torch import save_file

from sana_video_core.errors import CheckpointError
from sana_video_core.vae.loading import convert_vae, load_wan_vae, to_diffusers, vae_names
from sana_video_core.vae.wan import WanVAE

DATA = Path(__file__).parents[1] / "data"


def wan(dim: int = 4, dtype=torch.float32) -> dict[str, torch.Tensor]:
    """A random VAE in official names."""
    g = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=g).to(dtype) for name, (_, shape) in vae_names(dim).items()}


def test_the_rule_gives_all_194_names():
    listed = json.loads((DATA / "wan21_vae_names.json").read_text())
    assert {name: to_diffusers(name) for name in vae_names()} == listed and len(listed) == 194


def test_the_public_size():
    assert sum(torch.Size(shape).numel() for _, shape in vae_names(96).values()) == 126_892_531


def test_both_directions_are_bit_equal():
    state = wan()
    theirs = convert_vae(state, "diffusers")
    assert set(theirs) == set(map(to_diffusers, state))
    assert same(convert_vae(theirs, "official"), state) and same(convert_vae(theirs, "diffusers"), theirs)


def written(kind: str, folder: Path, state: dict):
    """A source of that kind."""
    if kind == "dictionary":
        return state
    if kind == "pth":
        torch.save(state, folder / "Wan2.1_VAE.pth")
        return folder / "Wan2.1_VAE.pth"
    if kind == "prefixed":
        save_file({f"first_stage_model.{k}": v for k, v in state.items()}, folder / "m.safetensors")
        return folder / "m.safetensors"
    if kind in ("repository", "folder"):
        inner = folder / "repo" / "vae"
        inner.mkdir(parents=True)
        (inner / "config.json").write_text('{"_class_name": "AutoencoderKLWan"}')
        save_file(state, inner / "diffusion_pytorch_model.safetensors")
        return inner if kind == "folder" else inner.parent
    save_file(state, folder / "m.safetensors")
    return folder / "m.safetensors"


@pytest.mark.parametrize("naming", ["official", "diffusers"])
@pytest.mark.parametrize("kind", ["dictionary", "pth", "prefixed", "repository", "folder", "safetensors"])
@pytest.mark.parametrize("dim", [4, 8])
def test_every_source_gives_the_same_vae(tmp_path, kind, naming, dim):
    state = wan(dim)
    vae = load_wan_vae(written(kind, tmp_path, convert_vae(state, naming)))
    assert isinstance(vae, WanVAE) and vae.dim == dim and not vae.training
    assert same(vae.state_dict(), state)


def test_half_files_become_the_dtype_asked_for(tmp_path):
    path = written("safetensors", tmp_path, wan(dtype=torch.float16))
    assert {p.dtype for p in load_wan_vae(path).parameters()} == {torch.float32}
    assert {p.dtype for p in load_wan_vae(path, torch.bfloat16).parameters()} == {torch.bfloat16}


def test_a_callers_dictionary_is_not_shared():
    state = wan()
    vae = load_wan_vae(state)
    with torch.no_grad():
        vae.conv1.weight.zero_()
    assert state["conv1.weight"].abs().sum() > 0


def other(what: str) -> dict[str, torch.Tensor]:
    one = torch.ones(4, 4)
    tables = {
        "Wan 2.2": wan() | {"decoder.upsamples.0.upsamples.0.residual.2.weight": one},
        "48 channels": wan() | {"conv2.weight": torch.ones(48, 48, 1, 1, 1)},
        "LTX": {"decoder.up_blocks.0.res_blocks.0.conv1.conv.weight": one, "decoder.conv_in.conv.weight": one},
        "LTX diffusers": {"decoder.up_blocks.0.resnets.0.conv1.conv.weight": one},
        "DC-AE": {"decoder.stages.0.0.conv.weight": one, "encoder.project_in.conv.weight": one},
        "SD": {"decoder.mid.block_1.conv1.weight": one, "decoder.conv_out.weight": one, "decoder.conv_in.weight": one},
        "SD diffusers": {"decoder.conv_in.weight": one, "decoder.mid_block.resnets.0.conv1.weight": one,
                         "decoder.conv_out.weight": torch.ones(3, 4, 3, 3), "post_quant_conv.weight": torch.ones(4, 4, 1, 1)},
        "TAEHV": {"decoder.22.bias": one, "encoder.0.weight": one},
        "text encoder": {"model.layers.0.self_attn.q_proj.weight": one},
        "LoRA": {"blocks.0.attn.qkv.lora_A.weight": one},
        "DiT": {"blocks.0.attn.qkv.weight": one, "blocks.0.mlp.t_conv.weight": one},
        "empty": {},
    }
    return tables[what]


@pytest.mark.parametrize(("what", "words"), [
    ("Wan 2.2", "the Wan 2.2 VAE"), ("48 channels", "[48, 48, 1, 1, 1]"), ("LTX", "an LTX video VAE"),
    ("LTX diffusers", "an LTX video VAE"), ("DC-AE", "a DC-AE"), ("SD", "an image VAE"), ("SD diffusers", "an image VAE"),
    ("TAEHV", "a tiny preview VAE"), ("text encoder", "a text encoder"), ("LoRA", "a LoRA"), ("DiT", "a diffusion model"),
    ("empty", "an empty file"),
])
def test_other_files_are_refused_by_name(what, words):
    with pytest.raises(CheckpointError) as error:
        load_wan_vae(other(what))
    assert f"Found: {words}" in str(error.value).replace("a video VAE with weights ", "") and "wan_2.1_vae" in str(error.value)


@pytest.mark.parametrize("how", ["missing", "unexpected", "misshaped", "integers", "no width"])
@pytest.mark.parametrize("naming", ["official", "diffusers"])
def test_damaged_vaes_are_refused_with_the_tensors_name(tmp_path, how, naming):
    state = convert_vae(wan(), naming)
    key = {"official": "decoder.conv1.weight", "diffusers": "decoder.conv_in.weight"}[naming]
    if how == "missing":
        state.pop(key)
    elif how == "unexpected":
        key = "encoder.extra.weight"
        state[key] = torch.ones(2)
    elif how == "misshaped":
        state[key] = state[key].flatten(1)
    elif how == "integers":
        state[key] = state[key].to(torch.int32)
    else:
        for gone in ("decoder.head.0.gamma", "decoder.head.2.weight", "decoder.norm_out.gamma", "decoder.conv_out.weight"):
            state.pop(gone, None)
        key = {"official": "decoder.head.0.gamma", "diffusers": "decoder.norm_out.gamma"}[naming]
    path = written("safetensors", tmp_path, state)
    with pytest.raises(CheckpointError) as error:
        load_wan_vae(path)
    assert key in str(error.value) and "m.safetensors" in str(error.value)


def test_a_damaged_width_is_reported_by_the_table():
    state = wan()
    state["decoder.head.0.gamma"] = torch.ones(4, 1, 1)
    with pytest.raises(CheckpointError, match=r"decoder\.head\.0\.gamma \[4, 1, 1\] instead of \[4, 1, 1, 1\]"):
        load_wan_vae(state)
    assert shapes(wan()) == shapes(load_wan_vae(wan()).state_dict())
