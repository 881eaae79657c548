"""What the nodes refuse, with the words that help; and what the pack shows and leaves alone."""

from __future__ import annotations

import json
import math

import pytest
import torch
from comfygraphs import graph, ksampler, sampled
from safetensors.torch import load_file, save_file

import inprocess as ip
from inprocess import node, run


@pytest.mark.parametrize(("width", "height", "frames", "words"), [
    (65, 32, 9, "Use 64x32"), (64, 40, 9, "Use 64x32"), (64, 32, 10, "Use 9 or 13"), (64, 32, 8, "Use 5 or 9"),
    (64, 32, 10_000, "Use 4093"), (64, 32, 0, "Use 1"), (float("nan"), 32, 9, "finite"), (math.inf, 32, 9, "finite"),
    (-16, 32, 9, "Use 1"), (64.5, 32, 9, "whole number"), ("wide", 32, 9, "number"), (True, 32, 9, "number"),
])
def test_latent_sizes_are_checked_by_the_node_itself(world, width, height, frames, words):
    shape = ip.pack_module("nodes.latent").latent_shape
    with pytest.raises(ValueError, match=words):
        shape(world.spec, width, height, frames, 1)


@pytest.mark.parametrize("prompt", ["", "   \n"])
def test_empty_prompt_is_refused(world, prompt):
    outcome = run(graph(prompt=prompt, n4=ksampler()))
    assert not outcome.ok and "The prompt is empty" in outcome.error


def test_overlong_prompt_is_refused_with_the_place_where_it_is_cut(world):
    outcome = run(graph(prompt="a red ball " * 1000, n4=ksampler()))
    assert not outcome.ok and "too long" in outcome.error and "no longer fits begins with" in outcome.error
    assert sampled(run(graph(n4=ksampler()))).shape == (1, 16, 3, 4, 8)


@pytest.mark.parametrize("score", [float("nan"), math.inf, -2, 1000, 3.5])
def test_motion_score_is_checked(world, score):
    encode = ip.pack_module("nodes.text").SanaVideoTextEncode.execute
    clip = run(graph(n4=ksampler())).output("1", 1)
    with pytest.raises(ValueError, match="motion_score"):
        encode(clip, "a red ball", "", score, True)


def test_missing_parts_explain_themselves_in_stock_nodes(world):
    base = graph(n1=node("SanaVideoLoader", model="tiny.safetensors", precision="auto", mode="auto", text_encoder="none",
                         vae="none"), n4=node("CLIPTextEncode", clip=("1", 1), text="x"))
    base["99"] = ksampler(positive=("4", 0), negative=("4", 0))
    base["100"] = node("SaveLatent", samples=("99", 0), filename_prefix="x")
    outcome = run(base)
    assert not outcome.ok and "There is no CLIP on this wire" in outcome.error


def test_wrong_vae_is_refused_with_both_geometries(world):
    check = ip.pack_module("nodes.common").require_vae
    fake = type("VAE", (), {"latent_channels": 48, "latent_dim": 3, "temporal_compression_decode": lambda self: 4,
                            "spacial_compression_decode": lambda self: 16})()
    with pytest.raises(ValueError, match=r"48 channels, 4x16x16.*16 channels, 4x8x8"):
        check(fake, world.spec.vae)


def test_decode_refuses_a_latent_of_other_channels(world):
    vae = run(graph(n4=ksampler())).output("1", 2)
    decode = ip.pack_module("nodes.decode").SanaVideoDecode.execute
    for shape in ((1, 128, 3, 4, 8), (1, 4, 8, 8)):
        with pytest.raises(ValueError, match="latent"):
            decode(vae=vae, samples={"samples": torch.zeros(shape)})


def test_odd_latents_and_foreign_conditioning_are_refused_before_the_first_step(world):
    odd = graph(n4=ksampler(latent_image=("60", 0)),
                n60=node("EmptyHunyuanLatentVideo", width=72, height=32, length=9, batch_size=1))
    import asyncio

    import nodes

    if "EmptyHunyuanLatentVideo" not in nodes.NODE_CLASS_MAPPINGS:
        path = ip.COMFYUI / "comfy_extras" / "nodes_hunyuan.py"
        assert asyncio.run(nodes.load_custom_node(str(path), module_parent="comfy_extras"))
    outcome = run(odd)
    assert not outcome.ok and "Use 64x32" in outcome.error
    check = ip.pack_module("nodes.native").check_conditioning
    with pytest.raises(ValueError, match="2304 channels.*64 channels"):
        check(world.spec, torch.zeros(1, 300, 2304), None)
    with pytest.raises(ValueError, match="mask"):
        check(world.spec, torch.zeros(1, 600, 64), torch.ones(1, 300))


def test_a_foreign_model_is_refused_by_name(world):
    spec_of = ip.pack_module("nodes.common").spec_of
    with pytest.raises(ValueError, match="not a SANA-Video model"):
        spec_of(type("Patcher", (), {"model": object()})())


@pytest.mark.parametrize("content", [b"", b"not a tensor file", b"\xff" * 64])
def test_damaged_parts_are_refused_and_the_next_run_works(world, content):
    import folder_paths

    for folder, name, field in (("vae", "bad.safetensors", "vae"), ("text_encoders", "bad.safetensors", "text_encoder")):
        (world.work / folder / name).write_bytes(content)
        folder_paths.filename_list_cache.clear()
        bad = graph(n4=ksampler())
        bad["1"]["inputs"][field] = name
        outcome = run(bad)
        assert not outcome.ok and "cannot be read" in outcome.error and name in outcome.error
    assert sampled(run(graph(n4=ksampler()))).shape == (1, 16, 3, 4, 8)


def test_incomplete_parts_are_refused_with_the_tensors_name(world):
    import folder_paths

    for folder, whole, victim, field in (
            ("vae", "wan_tiny.safetensors", "decoder.conv1.weight", "vae"),
            ("text_encoders", "gemma_tiny.safetensors", "model.layers.1.mlp.up_proj.weight", "text_encoder")):
        import safetensors

        path = world.work / folder / whole
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata()
        state = load_file(path)
        del state[victim]
        save_file(state, world.work / folder / "part.safetensors", metadata=metadata)
        folder_paths.filename_list_cache.clear()
        bad = graph(n4=ksampler())
        bad["1"]["inputs"][field] = "part.safetensors"
        outcome = run(bad)
        assert not outcome.ok and victim in outcome.error


def test_fp16_is_refused_with_the_reason(world):
    with pytest.raises(ValueError, match="bf16"):
        ip.pack_module("nodes.loading").refuse_fp16("fp16")


# ---------------------------------------------------------------------------------------------------------- the surface

def test_every_input_has_a_tooltip_and_every_node_a_help_page(world):
    import nodes

    ours = {k: v for k, v in nodes.NODE_CLASS_MAPPINGS.items() if k.startswith("SanaVideo")}
    assert len(ours) >= 8
    for name, cls in ours.items():
        schema = cls.GET_SCHEMA()
        assert all(i.tooltip for i in schema.inputs) and all(o.tooltip for o in schema.outputs), name
        page = (ip.PACK / "web" / "docs" / f"{name}.md").read_text()
        assert all(f"**{i.id}**" in page or f"`{i.id}`" in page for i in schema.inputs), name


@pytest.mark.parametrize("language", ["en", "zh"])
def test_locales_cover_every_text_of_the_nodes(world, language):
    import nodes

    ours = {k: v.GET_SCHEMA() for k, v in nodes.NODE_CLASS_MAPPINGS.items() if k.startswith("SanaVideo")}
    locale = json.loads((ip.PACK / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))
    assert set(locale) == set(ours)
    for name, schema in ours.items():
        entry = locale[name]
        assert entry["display_name"] and entry["description"]
        assert list(entry["inputs"]) == [i.id for i in schema.inputs]
        assert list(entry["outputs"]) == [str(n) for n in range(len(schema.outputs))]
        if language == "en":
            assert (entry["display_name"], entry["description"]) == (schema.display_name, schema.description)
            assert [e["tooltip"] for e in entry["inputs"].values()] == [i.tooltip for i in schema.inputs]


def test_loading_the_pack_changed_nothing_of_comfyui(world):
    import comfy.model_detection
    import comfy.supported_models

    assert not any("sana" in m.__name__.lower() for m in comfy.supported_models.models)
    assert comfy.model_detection.detect_unet_config.__module__ == "comfy.model_detection"
