"""Prompts to conditioning, and LoRA files of every naming, in the real ComfyUI."""

from __future__ import annotations

import json

import pytest
import torch
from comfygraphs import graph, ksampler, sampled
from safetensors.torch import load_file, save_file

import inprocess as ip
from inprocess import node, run

W = 128  # the tiny model's width


def test_text_rows_of_positive_and_negative(world):
    outcome = run(graph(n4=ksampler()))
    positive, negative = outcome.output("2")[0], outcome.output("2", 1)[0]
    assert positive[0].shape == negative[0].shape == (1, 300, 64)
    text = ip.pack_module("sana_video_core.text.encode").load_text_encoder(
        world.work / "text_encoders" / "gemma_tiny.safetensors")
    with torch.no_grad():
        ours, mask = text.positive(["a red ball"], 10, True)
        plain, plain_mask = text.negative(["a blue square"])
    assert torch.equal(positive[1]["attention_mask"], mask) and torch.equal(negative[1]["attention_mask"], plain_mask)
    assert torch.allclose(positive[0][mask.bool()], ours[mask.bool()], atol=2e-4)
    assert torch.allclose(negative[0][plain_mask.bool()], plain[plain_mask.bool()], atol=2e-4)


def stock_clip(world, kind):
    """The CLIP that ComfyUI's own loader makes of the tiny file, of the named type."""
    import comfy.sd

    state = load_file(world.work / "text_encoders" / "gemma_tiny.safetensors")
    config = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
              "num_attention_heads": 2, "num_key_value_heads": 1}
    return comfy.sd.load_text_encoder_state_dicts([state], clip_type=kind, model_options={"gemma2_2b_model_config": config})


def test_stock_pixeldit_clip_gives_the_same_conditioning(world):
    import comfy.sd

    encode = ip.pack_module("nodes.text").SanaVideoTextEncode.execute
    with torch.inference_mode():
        out = encode(stock_clip(world, comfy.sd.CLIPType.PIXELDIT), "a red ball", "a blue square", 10, True)
    ours = run(graph(n4=ksampler()))
    for slot in (0, 1):
        assert torch.allclose(out[slot][0][0], ours.output("2", slot)[0][0], atol=1e-5)


def test_stock_text_node_leaves_an_empty_negative_plain(world):
    outcome = run(graph(n50=node("CLIPTextEncode", clip=("1", 1), text="a red ball motion score: 10."),
                        n51=node("CLIPTextEncode", clip=("1", 1), text=""),
                        n4=ksampler(positive=("50", 0), negative=("51", 0))))
    same = run(graph(n4=ksampler()))
    assert sampled(outcome).shape == (1, 16, 3, 4, 8)
    assert torch.allclose(outcome.output("50")[0][0], same.output("2")[0][0], atol=1e-5)
    assert int(outcome.output("51")[0][1]["attention_mask"].sum()) == 1


def test_wrong_clip_type_is_refused_by_name(world):
    import comfy.sd

    encode = ip.pack_module("nodes.text").SanaVideoTextEncode.execute
    with pytest.raises(ValueError, match="pixeldit") as error:
        encode(stock_clip(world, comfy.sd.CLIPType.LUMINA2), "a red ball", "", 10, True)
    assert "LuminaTEModel" in str(error.value)


def test_prompt_features_have_no_side_meaning(world):
    tokens = ip.pack_module("nodes.native_text").token_rows
    clip = run(graph(n4=ksampler())).output("1", 1)
    for text in ("embedding:secret", "(a ball:1.4)", "a \\(ball\\)"):
        rows, rest = tokens(clip.tokenizer, text)
        assert rest == "" and all(isinstance(i, int) and w == 1.0 for i, w in rows["gemma2_2b"][0])


# --------------------------------------------------------------------------------------------------------------- LoRAs

def lora_file(world, name, pairs, metadata=None):
    save_file({k: v.contiguous() for k, v in pairs.items()}, world.work / "loras" / name, metadata=metadata)
    import folder_paths

    folder_paths.filename_list_cache.clear()
    return name


def pair(out, columns, seed, rank=2):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rank, columns, generator=g), torch.randn(out, rank, generator=g)


def merged(world, outcome, key):
    """The file's weight ``key`` with the patches of the model on node 20."""
    import comfy.lora

    model, weight = outcome.output("20"), world.network.state_dict()[key].clone()
    return comfy.lora.calculate_weight(model.patches.get(f"diffusion_model.{key}", []), weight, key)


def with_lora(name, strength=1.0, kind="SanaVideoLoadLora"):
    inputs = {"lora": name, "strength": strength} if kind == "SanaVideoLoadLora" else {
        "lora_name": name, "strength_model": strength}
    return graph(n20=node(kind, model=("1", 0), **inputs), n4=ksampler(model=("20", 0)))


@pytest.mark.parametrize("kind", ["SanaVideoLoadLora", "LoraLoaderModelOnly"])
@pytest.mark.parametrize("naming", ["native", "kohya"])
def test_lora_native_and_kohya_names(world, kind, naming):
    down, up = pair(3 * W, W, 1)
    names = {"native": ("diffusion_model.blocks.0.attn.qkv.lora_A.weight", "diffusion_model.blocks.0.attn.qkv.lora_B.weight"),
             "kohya": ("lora_unet_blocks_0_attn_qkv.lora_down.weight", "lora_unet_blocks_0_attn_qkv.lora_up.weight")}[naming]
    outcome = run(with_lora(lora_file(world, f"{naming}.safetensors", dict(zip(names, (down, up), strict=True))), 1.0, kind))
    before = world.network.blocks[0].attn.qkv.weight.data
    assert torch.allclose(merged(world, outcome, "blocks.0.attn.qkv.weight"), before + up @ down, atol=1e-5)
    assert (sampled(outcome) - sampled(run(graph(n4=ksampler())))).abs().max() > 1e-2


def test_lora_diffusers_names_reach_their_slices(world):
    parts, expected = {}, []
    for n, part in enumerate("qkv"):
        down, up = pair(W, W, 10 + n)
        parts |= {f"transformer.transformer_blocks.1.attn1.to_{part}.lora_A.weight": down,
                  f"transformer.transformer_blocks.1.attn1.to_{part}.lora_B.weight": up}
        expected.append(up @ down)
    down, up = pair(W, W, 20)
    parts |= {"transformer.transformer_blocks.1.attn2.to_v.lora_A.weight": down,
              "transformer.transformer_blocks.1.attn2.to_v.lora_B.weight": up}
    outcome = run(with_lora(lora_file(world, "diffusers.safetensors", parts), 0.5))
    block = world.network.blocks[1]
    wanted = block.attn.qkv.weight + 0.5 * torch.cat(expected)
    assert torch.allclose(merged(world, outcome, "blocks.1.attn.qkv.weight"), wanted, atol=1e-5)
    kv = merged(world, outcome, "blocks.1.cross_attn.kv_linear.weight")
    assert torch.allclose(kv[:W], block.cross_attn.kv_linear.weight[:W], atol=1e-6)
    assert torch.allclose(kv[W:], block.cross_attn.kv_linear.weight[W:] + 0.5 * up @ down, atol=1e-5)
    assert "not understood" not in outcome.output("20", 1)


def test_lora_of_the_temporal_convolution_lands_on_the_right_taps(world):
    g = torch.Generator().manual_seed(3)
    down, up = torch.randn(2, W, 3, 1, generator=g), torch.randn(W, 2, 1, 1, generator=g)
    name = lora_file(world, "temporal.safetensors", {"transformer.transformer_blocks.0.ff.conv_temp.lora_A.weight": down,
                                                     "transformer.transformer_blocks.0.ff.conv_temp.lora_B.weight": up})
    outcome = run(with_lora(name))
    kernel = torch.einsum("or,rckz->ock", up[..., 0, 0], down)  # [out, in, tap]
    taps = torch.cat([kernel[..., k] for k in range(3)], 1)
    before = world.network.blocks[0].mlp.t_conv.weight
    assert torch.allclose(merged(world, outcome, "blocks.0.mlp.t_conv.weight"), before + taps, atol=1e-4)


def test_lora_reports_unknown_keys_and_alpha_of_the_metadata(world):
    down, up = pair(W, W, 1)
    name = lora_file(world, "partly.safetensors", {
        "transformer.transformer_blocks.0.attn1.to_out.0.lora_A.weight": down,
        "transformer.transformer_blocks.0.attn1.to_out.0.lora_B.weight": up,
        "transformer.elsewhere.lora_A.weight": down.clone(),
    }, {"lora_adapter_metadata": json.dumps({"transformer.r": 2, "transformer.lora_alpha": 1})})
    outcome = run(with_lora(name))
    assert "1 keys not understood: transformer.elsewhere.lora_A.weight" in outcome.output("20", 1)
    before = world.network.blocks[0].attn.proj.weight
    assert torch.allclose(merged(world, outcome, "blocks.0.attn.proj.weight"), before + 0.5 * up @ down, atol=1e-5)


@pytest.mark.parametrize(("keys", "words"), [
    ({"transformer.single_blocks.0.linear1.lora_A.weight": torch.zeros(2, 32)}, "Nothing in the LoRA"),
    ({"diffusion_model.blocks.0.attn.qkv.lora_A.weight": torch.zeros(2, 48),
      "diffusion_model.blocks.0.attn.qkv.lora_B.weight": torch.zeros(96, 2)}, "another size"),
])
def test_lora_that_does_not_fit_is_refused(world, keys, words):
    outcome = run(with_lora(lora_file(world, "bad.safetensors", keys)))
    assert not outcome.ok and words in outcome.error
