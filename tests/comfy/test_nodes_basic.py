"""The nodes inside the real ComfyUI, in process, on tiny random models: graphs, parity, standard nodes, bad input."""

from __future__ import annotations

import itertools
import json
import math

import inprocess as ip
import pytest
import torch
from inprocess import node, run
from safetensors.torch import load_file, save_file

STEPS = 3
CLOSE = 3e-4  # three guided steps of a random network amplify the rounding of another batch size


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """ComfyUI with the pack loaded and tiny files in its folders; the value is the network's spec."""
    work = tmp_path_factory.mktemp("comfy")
    ip.start(work)
    core = ip.pack_module("sana_video_core")
    spec = ip.tiny_spec(core)
    network = ip.pack_module("sana_video_core.dit").SanaVideoTransformer(spec)
    generator = torch.Generator().manual_seed(5)
    for parameter in network.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    save_file(network.state_dict(), work / "diffusion_models" / "tiny.safetensors")
    ip.tiny_vae(work / "vae" / "wan_tiny.safetensors")
    ip.tiny_gemma(work / "text_encoders" / "gemma_tiny.safetensors")
    import folder_paths

    folder_paths.filename_list_cache.clear()
    world = type("World", (), {})()
    world.work, world.spec, world.network = work, spec, network.eval()
    return world


def graph(model="tiny.safetensors", precision="auto", prompt="a red ball", width=64, height=32, frames=9, **extra):
    """Nodes 1-3 (loader, text, latent) and the given further nodes; SaveLatent makes node 4 run."""
    base = {
        "1": node("SanaVideoLoader", model=model, precision=precision, mode="auto", text_encoder="gemma_tiny.safetensors",
                  vae="wan_tiny.safetensors"),
        "2": node("SanaVideoTextEncode", clip=("1", 1), prompt=prompt, negative_prompt="a blue square", motion_score=10,
                  instruction=True),
        "3": node("SanaVideoEmptyLatent", model=("1", 0), width=width, height=height, frames=frames, batch_size=1),
    }
    base.update({key.lstrip("n"): value for key, value in extra.items()})
    base["99"] = node("SaveLatent", samples=("4", 0), filename_prefix="x")
    return base


def ksampler(**changes):
    """A KSampler on nodes 1-3."""
    inputs = {"model": ("1", 0), "seed": 1, "steps": STEPS, "cfg": 4.0, "sampler_name": "euler", "scheduler": "simple",
              "positive": ("2", 0), "negative": ("2", 1), "latent_image": ("3", 0), "denoise": 1.0}
    return node("KSampler", **(inputs | changes))


def sampled(outcome):
    """The latent of node 4 of a run that must have worked."""
    assert outcome.ok, outcome.error
    latent = outcome.output("4")["samples"]
    assert torch.isfinite(latent).all()
    return latent


def by_hand(world, positive, negative, sigmas, cfg, noise, step):
    """A plain loop over the core's network in the normalised space; ``step(x, v, sigma, after)`` gives the next x."""
    mean, std = (torch.tensor(v).view(1, 16, 1, 1, 1) for v in (
        ip.pack_module("sana_video_core.vae.wan").WAN21_MEAN, ip.pack_module("sana_video_core.vae.wan").WAN21_STD))
    x = noise
    with torch.no_grad():
        for sigma, after in itertools.pairwise(sigmas):
            time = sigma.expand(1) * 1000
            v = [world.network(x, time, c[0][0], c[0][1]["attention_mask"]) for c in (negative, positive)]
            x = step(x, v[0] + cfg * (v[1] - v[0]), sigma, after)
    return x * std + mean


def relative(a, b):
    return float((a - b).norm() / b.norm())


# ---------------------------------------------------------------------------------------------------- graphs that work

@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "uni_pc", "res_multistep"])
def test_ksampler_runs_with_stock_samplers(world, sampler):
    latent = sampled(run(graph(n4=ksampler(sampler_name=sampler))))
    assert latent.shape == (1, 16, 3, 4, 8) and latent.std() > 0.1


def test_ksampler_equals_a_plain_euler_loop(world):
    outcome = run(graph(n4=ksampler()))
    import comfy.sample
    import comfy.samplers

    noise = comfy.sample.prepare_noise(torch.zeros(1, 16, 3, 4, 8), 1)
    model = outcome.output("1")
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", STEPS)
    assert float(sigmas[0]) == 1.0
    expected = by_hand(world, outcome.output("2"), outcome.output("2", 1), sigmas, 4.0, noise,
                       lambda x, v, s, t: x + (t - s) * v)
    assert relative(sampled(outcome), expected) < CLOSE


def advanced(solver, schedule, cfg=4.0, steps=STEPS):
    return {
        "n10": node("SanaVideoSampler", solver=solver),
        "n11": node("SanaVideoSigmas", model=("1", 0), schedule=schedule, steps=steps, denoise=1.0),
        "n12": node("RandomNoise", noise_seed=1),
        "n13": node("CFGGuider", model=("1", 0), positive=("2", 0), negative=("2", 1), cfg=cfg),
        "n4": node("SamplerCustomAdvanced", noise=("12", 0), guider=("13", 0), sampler=("10", 0), sigmas=("11", 0),
                   latent_image=("3", 0)),
    }


def test_flow_dpm_equals_the_formulas_of_the_paper_code(world):
    outcome = run(graph(**advanced("flow-DPM", "flow-DPM", steps=5)))
    sigmas = outcome.output("11")
    assert len(sigmas) == 6 and math.isclose(float(sigmas[0]), 0.9998749, abs_tol=1e-6) and sigmas[-1] == 0
    import comfy.sample

    noise = comfy.sample.prepare_noise(torch.zeros(1, 16, 3, 4, 8), 1)
    memory = {}

    def step(x, v, s, t):
        x0 = x - s * v
        lam = torch.log(1 - s) - torch.log(s)
        if t == 0:
            return x0
        h = torch.log(1 - t) - torch.log(t) - lam
        phi = torch.expm1(-h)
        out = (t / s) * x - (1 - t) * phi * x0
        if memory:
            out = out - 0.5 * (1 - t) * phi * (x0 - memory["x0"]) * h / (lam - memory["lam"])
        memory.update(x0=x0, lam=lam)
        return out

    expected = by_hand(world, outcome.output("2"), outcome.output("2", 1), sigmas.double().float(), 4.0, noise, step)
    assert relative(sampled(outcome), expected) < 1e-3  # float32 round trip through the noise prediction, model spec 3.6


def test_longsana_preset_has_four_levels_and_runs_at_cfg_1(world):
    outcome = run(graph(**advanced("few-step re-noise", "LongSANA 4 steps", cfg=1.0)))
    assert torch.allclose(outcome.output("11"), torch.tensor([1.0, 0.96, 0.889, 0.727, 0.0]))
    assert sampled(outcome).std() > 0.1
    assert torch.equal(sampled(outcome), sampled(run(graph(**advanced("few-step re-noise", "LongSANA 4 steps", cfg=1.0)))))


def test_decode_equals_core_decode_and_reaches_a_video_file(world):
    outcome = run(graph(
        frames=13, n4=ksampler(), n5=node("SanaVideoDecode", samples=("4", 0), vae=("1", 2)),
        n6=node("VAEDecode", samples=("4", 0), vae=("1", 2)),
        n7=node("VAEDecodeTiled", samples=("4", 0), vae=("1", 2), tile_size=512, overlap=64, temporal_size=64,
                temporal_overlap=8),
        n8=node("CreateVideo", images=("5", 0), fps=16.0),
        n9=node("SaveVideo", video=("8", 0), filename_prefix="clip", format="mp4", codec="h264"),
        n14=node("PreviewImage", images=("6", 0)), n15=node("PreviewImage", images=("7", 0))))
    assert outcome.ok, outcome.error
    ours = outcome.output("5")
    assert ours.shape == (13, 32, 64, 3) and float(ours.min()) >= 0 and float(ours.max()) <= 1
    assert torch.equal(ours, outcome.output("6"))
    assert list((world.work / "output").glob("clip*.mp4"))


def test_decode_keeps_batches_apart(world):
    outcome = run(graph(n3=node("SanaVideoEmptyLatent", model=("1", 0), width=64, height=32, frames=5, batch_size=2),
                        n4=ksampler(), n5=node("SanaVideoDecode", samples=("4", 0), vae=("1", 2)),
                        n6=node("VAEDecode", samples=("4", 0), vae=("1", 2)),
                        n14=node("PreviewImage", images=("5", 0)), n15=node("PreviewImage", images=("6", 0))))
    assert outcome.ok, outcome.error
    assert outcome.output("5").shape == (10, 32, 64, 3)
    assert torch.allclose(outcome.output("5"), outcome.output("6"), atol=1e-5)


def test_first_frame_is_kept_and_seen_as_clean(world):
    outcome = run(graph(
        n30=node("EmptyImage", width=100, height=80, batch_size=1, color=0xFF2010),
        n31=node("SanaVideoFirstFrame", latent=("3", 0), vae=("1", 2), image=("30", 0), fit="crop"),
        n4=ksampler(latent_image=("31", 0))))
    latent, given = sampled(outcome), outcome.output("31")
    assert torch.allclose(latent[:, :, 0], given["samples"][:, :, 0], atol=1e-5)
    assert outcome.output("3")["samples"].count_nonzero() == 0  # the input latent was not written to
    import comfy.sample
    import comfy.samplers

    noise = comfy.sample.prepare_noise(given["samples"], 1)
    model = outcome.output("1")
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", STEPS)
    clean = model.model.process_latent_in(given["samples"])
    x, (positive, negative) = noise.clone(), (outcome.output("2"), outcome.output("2", 1))
    with torch.no_grad():
        for sigma, after in itertools.pairwise(sigmas):
            x[:, :, 0] = clean[:, :, 0]
            times = torch.tensor([[0.0, 1000 * sigma, 1000 * sigma]])
            v = [world.network(x, times, c[0][0], c[0][1]["attention_mask"]) for c in (negative, positive)]
            x = x + (after - sigma) * (v[0] + 4 * (v[1] - v[0]))
    expected = model.model.process_latent_out(x)
    assert relative(latent[:, :, 1:], expected[:, :, 1:]) < CLOSE


def test_a_mask_inside_a_frame_still_inpaints(world):
    import comfy.sample

    outcome = run(graph(n4=ksampler()))
    model, latent = outcome.output("1"), sampled(outcome)
    mask = torch.ones(1, 1, 3, 4, 8)
    mask[..., :4] = 0
    with torch.inference_mode():
        out = comfy.sample.sample(model, torch.randn(latent.shape), STEPS, 1.0, "euler", "simple", outcome.output("2"),
                                  outcome.output("2", 1), latent, noise_mask=mask, seed=3)
    assert torch.allclose(out[..., :4], latent[..., :4], atol=1e-4)
    assert (out[..., 4:] - latent[..., 4:]).abs().max() > 0.1


@pytest.mark.parametrize(("kind", "inputs"), [
    ("ModelSamplingSD3", {"shift": 3.0}),
    ("EasyCache", {"reuse_threshold": 1.0, "start_percent": 0.0, "end_percent": 1.0, "verbose": False}),
    ("SkipLayerGuidanceDiT", {"double_layers": "1", "single_layers": "", "scale": 3.0, "start_percent": 0.0,
                              "end_percent": 1.0, "rescaling_scale": 0.0}),
])
def test_standard_model_nodes_have_an_effect(world, kind, inputs):
    plain = sampled(run(graph(n4=ksampler(steps=6))))
    changed = sampled(run(graph(n20=node(kind, model=("1", 0), **inputs), n4=ksampler(steps=6, model=("20", 0)))))
    assert (changed - plain).abs().max() > 1e-3


def test_torch_compile_model_gives_the_same_video(world):
    plain = sampled(run(graph(n4=ksampler())))
    outcome = run(graph(n20=node("TorchCompileModel", model=("1", 0), backend="inductor"), n4=ksampler(model=("20", 0))))
    assert relative(sampled(outcome), plain) < CLOSE


def test_previews_come_from_the_latent_format(world):
    import comfy.cli_args
    import latent_preview

    outcome = run(graph(n4=ksampler()))
    model = outcome.output("1")
    old = comfy.cli_args.args.preview_method
    comfy.cli_args.args.preview_method = latent_preview.LatentPreviewMethod.Latent2RGB
    try:
        previewer = latent_preview.get_previewer(model.load_device, model.model.latent_format)
    finally:
        comfy.cli_args.args.preview_method = old
    kind, image, _ = previewer.decode_latent_to_preview_image("JPEG", outcome.output("3")["samples"])
    assert kind == "JPEG" and image.size == (8, 4)


def test_model_save_and_reload_gives_the_same_video(world):
    outcome = run(graph(n4=ksampler(), n40=node("ModelSave", model=("1", 0), filename_prefix="saved")))
    saved = next((world.work / "output").glob("saved*.safetensors"))
    (world.work / "diffusion_models" / "again.safetensors").write_bytes(saved.read_bytes())
    import folder_paths

    folder_paths.filename_list_cache.clear()
    assert torch.equal(sampled(outcome), sampled(run(graph(model="again.safetensors", n4=ksampler()))))


def test_precision_bf16_stores_half_and_stays_close(world):
    full, half = run(graph(n4=ksampler())), run(graph(precision="bf16", n4=ksampler()))
    assert half.output("1").model_dtype() == torch.bfloat16
    assert relative(sampled(half), sampled(full)) < 0.2


# ------------------------------------------------------------------------------------------------------------- prompts

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
    down, up = pair(96, 32, 1)
    names = {"native": ("diffusion_model.blocks.0.attn.qkv.lora_A.weight", "diffusion_model.blocks.0.attn.qkv.lora_B.weight"),
             "kohya": ("lora_unet_blocks_0_attn_qkv.lora_down.weight", "lora_unet_blocks_0_attn_qkv.lora_up.weight")}[naming]
    outcome = run(with_lora(lora_file(world, f"{naming}.safetensors", dict(zip(names, (down, up), strict=True))), 1.0, kind))
    before = world.network.blocks[0].attn.qkv.weight.data
    assert torch.allclose(merged(world, outcome, "blocks.0.attn.qkv.weight"), before + up @ down, atol=1e-5)
    assert (sampled(outcome) - sampled(run(graph(n4=ksampler())))).abs().max() > 1e-2


def test_lora_diffusers_names_reach_their_slices(world):
    parts, expected = {}, []
    for n, part in enumerate("qkv"):
        down, up = pair(32, 32, 10 + n)
        parts |= {f"transformer.transformer_blocks.1.attn1.to_{part}.lora_A.weight": down,
                  f"transformer.transformer_blocks.1.attn1.to_{part}.lora_B.weight": up}
        expected.append(up @ down)
    down, up = pair(32, 32, 20)
    parts |= {"transformer.transformer_blocks.1.attn2.to_v.lora_A.weight": down,
              "transformer.transformer_blocks.1.attn2.to_v.lora_B.weight": up}
    outcome = run(with_lora(lora_file(world, "diffusers.safetensors", parts), 0.5))
    block = world.network.blocks[1]
    assert torch.allclose(merged(world, outcome, "blocks.1.attn.qkv.weight"), block.attn.qkv.weight + 0.5 * torch.cat(expected), atol=1e-5)
    kv = merged(world, outcome, "blocks.1.cross_attn.kv_linear.weight")
    assert torch.allclose(kv[:32], block.cross_attn.kv_linear.weight[:32], atol=1e-6)
    assert torch.allclose(kv[32:], block.cross_attn.kv_linear.weight[32:] + 0.5 * up @ down, atol=1e-5)
    assert "not understood" not in outcome.output("20", 1)


def test_lora_of_the_temporal_convolution_lands_on_the_right_taps(world):
    g = torch.Generator().manual_seed(3)
    down, up = torch.randn(2, 32, 3, 1, generator=g), torch.randn(32, 2, 1, 1, generator=g)
    name = lora_file(world, "temporal.safetensors", {"transformer.transformer_blocks.0.ff.conv_temp.lora_A.weight": down,
                                                     "transformer.transformer_blocks.0.ff.conv_temp.lora_B.weight": up})
    outcome = run(with_lora(name))
    kernel = torch.einsum("or,rckz->ock", up[..., 0, 0], down)  # [out, in, tap]
    taps = torch.cat([kernel[..., k] for k in range(3)], 1)
    assert torch.allclose(merged(world, outcome, "blocks.0.mlp.t_conv.weight"), world.network.blocks[0].mlp.t_conv.weight + taps, atol=1e-4)


def test_lora_reports_unknown_keys_and_alpha_of_the_metadata(world):
    down, up = pair(32, 32, 1)
    name = lora_file(world, "partly.safetensors", {
        "transformer.transformer_blocks.0.attn1.to_out.0.lora_A.weight": down,
        "transformer.transformer_blocks.0.attn1.to_out.0.lora_B.weight": up,
        "transformer.elsewhere.lora_A.weight": down.clone()}, {"lora_adapter_metadata": json.dumps({"transformer.r": 2, "transformer.lora_alpha": 1})})
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


# ------------------------------------------------------------------------------------------------- interrupt and caches

def test_interrupt_stops_within_a_step_and_the_next_run_is_identical(world):
    import comfy.model_management as management

    before = sampled(run(graph(n4=ksampler(steps=6))))
    dit = ip.pack_module("nodes.native").SanaVideoDiT
    calls, forward = [], dit._forward

    def counting(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            management.interrupt_current_processing()
        return forward(self, *args, **kwargs)

    dit._forward = counting
    try:
        outcome = run(graph(n4=ksampler(steps=6)))
    finally:
        dit._forward = forward
    assert not outcome.ok and len(calls) <= 3
    assert any(event == "execution_interrupted" for event, _ in outcome.events)
    assert torch.equal(before, sampled(run(graph(n4=ksampler(steps=6)))))


def test_decode_can_be_interrupted(world):
    import comfy.model_management as management

    outcome = run(graph(n4=ksampler()))
    decode = ip.pack_module("nodes.decode").SanaVideoDecode
    management.interrupt_current_processing()
    with pytest.raises(management.InterruptProcessingException), torch.inference_mode():
        decode.execute(outcome.output("4"), outcome.output("1", 2))


def test_nodes_leave_their_inputs_alone(world):
    outcome = run(graph(n4=ksampler(), n5=node("SanaVideoDecode", samples=("4", 0), vae=("1", 2)),
                        n14=node("PreviewImage", images=("5", 0))))
    latent = sampled(outcome).clone()
    with torch.inference_mode():
        ip.pack_module("nodes.decode").SanaVideoDecode.execute(outcome.output("4"), outcome.output("1", 2))
    assert torch.equal(latent, sampled(outcome))


# ----------------------------------------------------------------------------------------------------------- bad input

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
            decode({"samples": torch.zeros(shape)}, vae)


def test_odd_latents_and_foreign_conditioning_are_refused_before_the_first_step(world):
    odd = graph(n4=ksampler(latent_image=("60", 0)),
                n60=node("EmptyHunyuanLatentVideo", width=72, height=32, length=9, batch_size=1))
    import asyncio

    import nodes

    if "EmptyHunyuanLatentVideo" not in nodes.NODE_CLASS_MAPPINGS:
        assert asyncio.run(nodes.load_custom_node(str(ip.COMFYUI / "comfy_extras" / "nodes_hunyuan.py"), module_parent="comfy_extras"))
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
