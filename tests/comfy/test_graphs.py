"""Graphs in the real ComfyUI, in process: samplers, solvers, decode, first frame, standard model nodes."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from comfygraphs import CLOSE, STEPS, advanced, by_hand, graph, ksampler, relative, sampled

import inprocess as ip
from inprocess import node, run
from sana_video_core.specs import SPECS


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


def test_flow_dpm_equals_the_formulas_of_the_paper_code(world):
    outcome = run(graph(**advanced("flow-DPM", "flow-DPM", steps=5)))
    sigmas = outcome.output("11")
    shift = SPECS["sana-video-mini"].flow_shift
    first = shift * 0.999 / (1 + (shift - 1) * 0.999)
    assert len(sigmas) == 6 and math.isclose(float(sigmas[0]), first, abs_tol=1e-6) and sigmas[-1] == 0
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


@pytest.mark.parametrize("backend", [None, "reference"])
def test_decode_equals_core_decode_and_reaches_a_video_file(world, backend):
    with ip.pack_module("sana_video_core.ops").force(backend):
        outcome = _decoded_three_ways()
    assert outcome.ok, outcome.error
    ours, core = outcome.output("5"), outcome.output("6")
    assert ours.shape == (13, 32, 64, 3) and float(ours.min()) >= 0 and float(ours.max()) <= 1
    assert torch.allclose(ours, core, atol=1e-5) and (backend is None or torch.equal(ours, core))
    assert list((world.work / "output").glob("clip*.mp4"))


def _decoded_three_ways():
    return run(graph(
        frames=13, n4=ksampler(), n5=node("SanaVideoDecode", samples=("4", 0), vae=("1", 2)),
        n6=node("VAEDecode", samples=("4", 0), vae=("1", 2)),
        n7=node("VAEDecodeTiled", samples=("4", 0), vae=("1", 2), tile_size=512, overlap=64, temporal_size=64,
                temporal_overlap=8),
        n8=node("CreateVideo", images=("5", 0), fps=16.0),
        n9=node("SaveVideo", video=("8", 0), filename_prefix="clip", format="mp4", codec="h264"),
        n14=node("PreviewImage", images=("6", 0)), n15=node("PreviewImage", images=("7", 0))))


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
    ("ModelSamplingSD3", {"shift": 8.0}),
    ("EasyCache", {"reuse_threshold": 1.0, "start_percent": 0.0, "end_percent": 1.0, "verbose": False}),
    ("SkipLayerGuidanceDiT", {"double_layers": "1", "single_layers": "", "scale": 3.0, "start_percent": 0.0,
                              "end_percent": 1.0, "rescaling_scale": 0.0}),
])
def test_standard_model_nodes_have_an_effect(world, kind, inputs):
    plain = sampled(run(graph(n4=ksampler(steps=6))))
    changed = sampled(run(graph(n20=node(kind, model=("1", 0), **inputs), n4=ksampler(steps=6, model=("20", 0)))))
    assert (changed - plain).abs().max() > 1e-3


def test_a_wrapper_that_writes_into_its_input_leaves_the_latent_alone(world):
    """As EasyCache does: in float32 nothing between the sampler and the network makes a copy."""
    import comfy.patcher_extension as extension

    outcome = run(graph(precision="fp32", n4=ksampler()))
    model, (text, options) = outcome.output("1"), outcome.output("2")[0]
    wrappers: dict = {}
    extension.add_wrapper_with_key(extension.WrappersMP.DIFFUSION_MODEL, "test", lambda _, x, *rest, **more: x.mul_(0), wrappers)
    x = torch.randn(sampled(outcome).shape)
    before, sigma = x.clone(), torch.tensor([0.5])
    with torch.inference_mode():
        denoised = model.model.apply_model(x, sigma, c_crossattn=text, attention_mask=options["attention_mask"],
                                           transformer_options=wrappers)
    assert torch.equal(x, before) and torch.equal(denoised, before)


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
    outcome = run(graph(n4=ksampler(), n40=node("ModelSave", model=("1", 0), filename_prefix="whole")))
    saved, = (world.work / "output").glob("whole_*.safetensors")
    (world.work / "diffusion_models" / "again.safetensors").write_bytes(saved.read_bytes())
    import folder_paths

    folder_paths.filename_list_cache.clear()
    assert torch.equal(sampled(outcome), sampled(run(graph(model="again.safetensors", n4=ksampler()))))


def test_precision_bf16_stores_half_and_stays_close(world):
    full, half = run(graph(n4=ksampler())), run(graph(precision="bf16", n4=ksampler()))
    assert half.output("1").model_dtype() == torch.bfloat16
    assert relative(sampled(half), sampled(full)) < 0.2


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
        decode.execute(vae=outcome.output("1", 2), samples=outcome.output("4"))


def test_nodes_leave_their_inputs_alone(world):
    outcome = run(graph(n4=ksampler(), n5=node("SanaVideoDecode", samples=("4", 0), vae=("1", 2)),
                        n14=node("PreviewImage", images=("5", 0))))
    latent = sampled(outcome).clone()
    with torch.inference_mode():
        ip.pack_module("nodes.decode").SanaVideoDecode.execute(vae=outcome.output("1", 2), samples=outcome.output("4"))
    assert torch.equal(latent, sampled(outcome))
