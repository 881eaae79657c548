"""Which model is it: from shapes, from what the file says, from the user's choice; other models are refused by name."""

from __future__ import annotations

import json
import logging
from dataclasses import replace

import pytest
import torch
from checkpoints import BASE, diffusers_config, diffusers_folder, meta_state, random_state, shapes, small_spec
from safetensors.torch import save_file

from sana_video_core import SPECS
from sana_video_core.checkpoint import (
    as_mode,
    convert,
    detect_spec,
    load_transformer,
    read_state_dict,
    save_transformer,
    spec_from_text,
    spec_to_text,
)
from sana_video_core.checkpoint.keys import naming_of
from sana_video_core.errors import CheckpointError, SanaVideoError

SMALL = small_spec()
LONG = SPECS["longsana-2b-480p"]


@pytest.mark.parametrize("naming", ["original", "diffusers", "native"])
@pytest.mark.parametrize("name", ["sana-video-2b-480p", "sana-video-2b-720p", "sana-video-mini"])
def test_public_models_are_known_by_their_shapes_alone(name, naming):
    state = shapes(meta_state(SPECS[name], naming))
    assert detect_spec(state, path=f"/models/anything.{naming}.safetensors") is SPECS[name]


@pytest.mark.parametrize(("said", "expected"), [
    ({}, False),
    ({"container": "pth:generator"}, True),
    ({"container": "pth:state_dict"}, False),
    ({"metadata": {"sana_video_spec": spec_to_text(LONG)}}, True),
    ({"metadata": {"diffusers_config": json.dumps(diffusers_config(BASE, "SanaVideoCausalTransformer3DModel"))}}, True),
    ({"metadata": {"diffusers_config": json.dumps(diffusers_config(BASE))}}, False),
    ({"path": "/x/SANA_Video_2B_480p_LongLive.pth"}, True),
    ({"path": "/x/LongSANA_2B_480p_ode.pt"}, True),
    ({"path": "/x/longsana.safetensors"}, True),
    ({"path": "/x/sana_480p_self_forcing.safetensors"}, True),
    ({"path": "/longsana/SANA_Video_2B_480p.pth"}, False),
    ({"path": "/x/my_model_decoder_mode.safetensors"}, False),
    ({"path": "/x/longsana.safetensors", "hint": "clip"}, False),
    ({"container": "pth:generator", "hint": "clip"}, False),
    ({"hint": "long"}, True),
    ({"metadata": {"sana_video_spec": spec_to_text(LONG)}, "hint": "clip"}, False),
    # what the file says beats its name
    ({"metadata": {"diffusers_config": json.dumps(diffusers_config(BASE))}, "path": "longsana.safetensors"}, False),
    ({"metadata": {"sana_video_spec": spec_to_text(BASE)}, "container": "pth:generator"}, False),
])
def test_clip_or_long_is_told_in_the_order_of_trust(said, expected):
    spec = detect_spec(shapes(meta_state(BASE)), **said)
    assert spec == (LONG if expected else BASE)


def test_the_log_says_when_only_the_name_decided(caplog):
    with caplog.at_level(logging.INFO):
        detect_spec(shapes(meta_state(BASE)), path="LongSANA_2B_480p_ode.pt")
    assert "by the file's NAME" in caplog.text and "LongSANA_2B_480p_ode.pt" in caplog.text


def test_a_720p_model_is_no_longsana_whatever_its_name():
    assert detect_spec(shapes(meta_state(SPECS["sana-video-2b-720p"])), path="longlive.pth").causal is False


def test_modes_of_known_and_unknown_rows():
    assert as_mode(BASE, True) is LONG and as_mode(LONG, False) is BASE
    assert as_mode(SPECS["sana-video-mini"], True) is SPECS["sana-video-mini-long"]
    long = as_mode(SMALL, True)
    assert (long.causal, long.name, long.cfg, long.steps) == (True, "small-long", 1.0, 4)
    assert as_mode(long, False).name == "small" and as_mode(SMALL, False) is SMALL
    with pytest.raises(SanaVideoError, match="Unknown mode"):
        detect_spec(shapes(meta_state(BASE)), hint="loop")


@pytest.mark.parametrize("naming", ["original", "diffusers", "native"])
def test_unknown_sizes_need_to_be_told_their_heads(naming):
    state = shapes(meta_state(SMALL, naming))
    with pytest.raises(CheckpointError, match="heads are not known.*width 24.*sana_video_spec"):
        detect_spec(state, path="x.safetensors")
    assert detect_spec(state, metadata={"sana_video_spec": spec_to_text(SMALL)}) == SMALL
    told = detect_spec(state, metadata={"diffusers_config": json.dumps(diffusers_config(SMALL))})
    assert replace(told, name=SMALL.name) == SMALL


@pytest.mark.parametrize("naming", ["original", "diffusers", "native"])
def test_another_depth_of_a_public_width_has_that_widths_heads(naming):
    spec = replace(BASE, name="sana-video-3x2240", depth=3)
    assert detect_spec(shapes(meta_state(spec, naming))) == spec


def test_unknown_channels_and_patches_come_from_the_patch_embedding():
    spec = replace(SMALL, channels=4, patch=(1, 1, 2))
    config = {"diffusers_config": json.dumps(diffusers_config(spec))}
    told = detect_spec(shapes(meta_state(spec)), metadata=config)
    assert (told.channels, told.patch, told.vae.channels) == (4, (1, 1, 2), 4)
    with pytest.raises(CheckpointError, match="8 values a patch"):  # a matrix does not tell how the 8 are made up
        detect_spec(shapes(meta_state(spec, "native")), metadata=config)


@pytest.mark.parametrize("wrong", [{"attention_head_dim": 8}, {"num_cross_attention_heads": 5}, {"num_attention_heads": "2"},
                                   {"attention_head_dim": 3, "num_attention_heads": 8}])
def test_a_config_of_another_model_is_refused(wrong):
    config = diffusers_config(SMALL) | wrong
    with pytest.raises(CheckpointError, match="does not belong"):
        detect_spec(shapes(meta_state(SMALL)), metadata={"diffusers_config": json.dumps(config)})


def test_packed_caption_layers_do_not_hide_the_row():
    state = shapes(meta_state(BASE, "native"))
    state["y_embedder.y_proj.fc1.weight"] = (2240, 1152)
    state["blocks.0.attn.qkv.weight"] = (6720, 1120)
    assert detect_spec(state) is BASE


def test_one_damaged_entry_does_not_mislead_the_detection():
    state = meta_state(BASE)
    for key in ("attention_y_norm.weight", "blocks.3.mlp.depth_conv.conv.bias", "x_embedder.proj.weight"):
        broken = shapes(state) | {key: (7, 5)}
        assert detect_spec(broken) is BASE
        with pytest.raises(CheckpointError, match=key):
            convert(state | {key: torch.empty(7, 5, device="meta")}, BASE)


def test_causal_diffusers_folder_is_longsana(tmp_path):
    spec = small_spec()
    folder = diffusers_folder(tmp_path / "r", spec, random_state(spec, "diffusers"),
                              class_name="SanaVideoCausalTransformer3DModel")
    assert load_transformer(folder).spec.causal and not load_transformer(folder, hint="clip").spec.causal


def test_generator_container_is_longsana(tmp_path):
    state = {f"model.{k}": v for k, v in random_state(SMALL).items()}
    torch.save({"generator": state}, tmp_path / "m.pt")
    read, source = read_state_dict(tmp_path / "m.pt")
    assert source.container == "pth:generator"
    config = {"diffusers_config": json.dumps({k: v for k, v in diffusers_config(SMALL).items() if k != "_class_name"})}
    assert detect_spec(shapes(read), metadata=config, container=source.container).causal


# --------------------------------------------------------------------------------------------------- descriptions

def test_descriptions_survive_the_round_trip_and_later_tables():
    for spec in (*SPECS.values(), SMALL, replace(SMALL, vae=replace(BASE.vae, channels=7), channels=7)):
        assert spec_from_text(spec_to_text(spec)) == spec
    newer = json.loads(spec_to_text(SMALL)) | {"field_of_tomorrow": 1}
    assert spec_from_text(json.dumps(newer)) == SMALL


@pytest.mark.parametrize(("change", "words"), [
    ({"format": 2}, "unknown format"), ({"depth": 0}, "size of 0"), ({"depth": 10**9}, "depth"), ({"width": "24"}, "width"),
    ({"width": 24.0}, "width"), ({"linear_head_dim": 7}, "multiple of head dim 7"), ({"causal": 1}, "causal"),
    ({"patch": [1, 2]}, "patch"), ({"patch": [1, 2, -2]}, "patch"), ({"patch": 2}, "patch"), ({"flow_shift": -1}, "flow_shift"),
    ({"flow_shift": True}, "flow_shift"), ({"name": "x" * 300}, "name"), ({"name": 3}, "name"), ({"vae": None}, "without a VAE"),
    ({"vae": {"name": "x"}}, "without 'channels'"), ({"cross_heads": 0}, "size of 0"),
])
def test_wrong_descriptions_are_refused_by_field(change, words):
    text = json.dumps(json.loads(spec_to_text(SMALL)) | change)
    with pytest.raises(CheckpointError) as error:
        spec_from_text(text, "m.safetensors")
    assert words in str(error.value) and "m.safetensors" in str(error.value)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"format": 1, "format": 1}', '{"format": NaN}', "{}"])
def test_descriptions_that_are_no_table_are_refused(text):
    with pytest.raises(CheckpointError):
        spec_from_text(text, "m.safetensors")


def test_a_description_that_does_not_fit_the_tensors_is_refused_by_name(tmp_path):
    save_file(random_state(SMALL), tmp_path / "m.safetensors", {"sana_video_spec": spec_to_text(replace(SMALL, depth=3))})
    with pytest.raises(CheckpointError, match=r"20 missing \(blocks\.2\."):
        load_transformer(tmp_path / "m.safetensors")


# -------------------------------------------------------------------------------------------------- other models

def names(*keys, shape=(4, 4)):
    return dict.fromkeys(keys, shape)


def image_sana():
    state = {k: v for k, v in shapes(meta_state(SMALL)).items() if "t_conv" not in k}
    return state | {"x_embedder.proj.weight": (24, 16, 2, 2)}


def image_sana_diffusers():
    state = {k: v for k, v in shapes(meta_state(SMALL, "diffusers")).items() if "conv_temp" not in k}
    return {k.replace("patch_embedding.", "patch_embed.proj."): v for k, v in state.items()}


FOREIGN = {
    "an empty file": {},
    "the SANA image model": image_sana(),
    "the SANA image model (diffusers)": image_sana_diffusers(),
    "SANA-Video 2.0": shapes(meta_state(SMALL)) | names("attn_res.attn_proj.weight", "blocks.0.attn.beta_proj.weight"),
    "SANA-Streaming or SANA-WM": shapes(meta_state(SMALL)) | names("blocks.0.attn.A_log", "blocks.0.attn.beta_proj.weight"),
    "the Wan video model": names("patch_embedding.weight", "head.head.weight", "blocks.0.self_attn.q.weight"),
    "the Wan video model (diffusers)": names("condition_embedder.time_embedder.linear_1.weight", "blocks.0.attn1.to_q.weight"),
    "the LTX video model": names("adaln_single.linear.weight", "patchify_proj.weight", "transformer_blocks.0.attn1.to_q.weight"),
    "PixArt": names("t_block.1.weight", "blocks.0.mlp.fc1.weight", "x_embedder.proj.weight"),
    "PixArt (diffusers)": names("adaln_single.linear.weight", "pos_embed.proj.weight"),
    "a Flux-like image model": names("double_blocks.0.img_attn.qkv.weight"),
    "a Stable Diffusion UNet": names("input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"),
    "a Wan VAE": names("decoder.middle.0.residual.0.gamma", "conv1.weight"),
    "a VAE": names("decoder.conv_in.weight", "encoder.conv_in.weight"),
    "a text encoder": names("model.layers.0.self_attn.q_proj.weight", "model.embed_tokens.weight"),
    "a LoRA": names("transformer.transformer_blocks.0.attn1.to_q.lora_A.weight"),
    "a Nunchaku / SVDQuant file": names("transformer_blocks.0.attn1.to_q.qweight", "transformer_blocks.0.attn1.to_q.lora_down"),
    "weights quantised by bitsandbytes": names("transformer_blocks.0.attn1.to_q.weight.absmax"),
}


@pytest.mark.parametrize("what", FOREIGN)
def test_other_models_are_refused_by_name_with_an_advice(what):
    with pytest.raises(CheckpointError) as error:
        detect_spec(FOREIGN[what], path="/models/file.safetensors")
    text = str(error.value)
    assert f"Found: {what}" in text and "file.safetensors" in text
    assert any(word in text for word in ("Choose a SANA-Video 2B", "models/loras", "Download or copy"))


def test_a_family_that_nobody_knows_shows_its_first_names():
    with pytest.raises(CheckpointError, match="2 tensors such as a.weight, b.weight"):
        detect_spec(names("b.weight", "a.weight"), path="x.safetensors")


def test_a_2_0_description_is_refused():
    text = spec_to_text(SPECS["sana-video-2.0-5b-720p"])
    with pytest.raises(CheckpointError, match="cannot run yet"):
        detect_spec(shapes(meta_state(SMALL)), metadata={"sana_video_spec": text})


def test_other_models_are_refused_even_when_a_spec_is_given(tmp_path):
    save_file({"model.layers.0.self_attn.q_proj.weight": torch.ones(4, 4)}, tmp_path / "gemma.safetensors")
    with pytest.raises(CheckpointError, match="a text encoder"):
        load_transformer(tmp_path / "gemma.safetensors", SMALL)


def test_naming_goes_by_the_majority():
    assert naming_of(meta_state(SMALL)) == "original" and naming_of(meta_state(SMALL, "diffusers")) == "diffusers"
    assert naming_of({}) == "original"


def test_saved_longsana_stays_longsana(tmp_path):
    path = save_transformer(random_state(SMALL), as_mode(SMALL, True), tmp_path / "m.safetensors")
    assert load_transformer(path).spec == as_mode(SMALL, True)
