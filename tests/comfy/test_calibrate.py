"""'SANA-Video Calibrate FP8' in ComfyUI on the CPU: what it gives, keeps, refuses, and that a saved file says the same."""

from __future__ import annotations

import pytest
import torch
from comfygraphs import graph, ksampler, sampled
from test_lowbit import load, quantised, same_weights, tiny

import inprocess as ip
from inprocess import node, run


def calibrated_graph(precision="fp8", **changes):
    given = {"model": ("1", 0), "positive": ("2", 0), "latent": ("3", 0), "steps": 2} | changes
    return graph(precision=precision, n4=ksampler(model=("5", 0)), n5=node("SanaVideoCalibrate", **given))


def scales(patcher) -> dict[str, float]:
    return {name: float(m.input_scale) for name, m in quantised(patcher).items() if getattr(m, "input_scale", None) is not None}


def test_a_short_run_gives_every_layer_a_scale_and_leaves_the_given_model_alone(world):
    outcome = run(calibrated_graph())
    latent = sampled(outcome)
    patcher, report, given = outcome.output("5"), outcome.output("5", 1), outcome.output("1")
    found = scales(patcher)
    assert set(found) == set(quantised(patcher)) and len(found) == 14 and "14 of 14" in report
    assert all(2.0 ** round(torch.tensor(s).log2().item()) == s for s in found.values())
    assert not any(m._full_precision_mm_config for m in quantised(patcher).values())
    assert not scales(given) and given.model is not patcher.model
    # a CPU expands fp8 weights and does not round inputs: the scales change nothing there
    assert torch.equal(latent, sampled(run(graph(precision="fp8", n4=ksampler()))))


def test_scales_hold_what_the_run_showed(world):
    """On a card that multiplies in E4M3 inputs twice as large as those of the same run would not be cut."""
    calibrate = ip.pack_module("nodes.calibrate")
    core = ip.pack_module("sana_video_core.quant.calibrate")
    layers, x = ip.pack_module("nodes.fp8_layers"), torch.randn(1, 16, 3, 4, 6, generator=torch.Generator().manual_seed(3))
    text = torch.randn(1, 9, 64, generator=torch.Generator().manual_seed(4))

    def look(patcher):
        with torch.inference_mode():
            patcher.model.diffusion_model(x, torch.tensor([400.0]), text)

    patcher, _ = calibrate.calibrated((str(tiny(world)), "fp8", "auto"), look)
    with core.watched(layers.fp8_layers_of(patcher.model.diffusion_model)) as seen:
        look(patcher)
    for name, scale in scales(patcher).items():
        assert core.HEADROOM * float(seen[name].largest.max()) <= 448 * scale
        assert core.ROOM * seen[name].typical() <= 448 * scale * 1.001 < 2 * core.ROOM * seen[name].typical() * 1.002


def test_comfyui_can_load_it_again_and_a_saved_file_says_the_same(world):
    prompt = calibrated_graph() | {"40": node("ModelSave", model=("5", 0), filename_prefix="calibrated")}
    outcome = run(prompt)
    assert outcome.ok, outcome.error
    patcher = outcome.output("5")
    again, arguments = patcher.cached_patcher_init
    for dynamic in (False, True):
        other = again(*arguments, disable_dynamic=dynamic)
        assert scales(other) == scales(patcher) and same_weights(other, patcher)
    saved, = (world.work / "output").glob("calibrated_*.safetensors")
    reloaded = load(saved)
    assert scales(reloaded) == scales(patcher) and same_weights(reloaded, patcher)
    assert not any(m._full_precision_mm_config for m in quantised(reloaded).values())
    plain_fp8 = ip.pack_module("nodes.calibrate").plain_fp8
    assert plain_fp8(patcher) == plain_fp8(outcome.output("1"))  # it may be calibrated once more


@pytest.mark.parametrize(("precision", "words"), [("bf16", "nothing to calibrate"), ("int8", "nothing to calibrate")])
def test_models_without_fp8_are_refused(world, precision, words):
    outcome = run(calibrated_graph(precision))
    assert not outcome.ok and words in outcome.error and "precision 'fp8'" in outcome.error


def test_loras_and_models_of_others_are_refused(world):
    plain_fp8, error = ip.pack_module("nodes.calibrate").plain_fp8, ip.pack_module("sana_video_core.errors").SanaVideoError
    patcher = load(tiny(world), "fp8")
    assert plain_fp8(patcher) == patcher.cached_patcher_init[1]
    foreign = patcher.clone()
    foreign.cached_patcher_init = None
    with pytest.raises(error, match="which file"):
        plain_fp8(foreign)
    key = "diffusion_model.blocks.0.attn.proj.weight"
    patcher.add_patches({key: ("diff", (torch.zeros(128, 128),))})
    with pytest.raises(error, match="without LoRAs"):
        plain_fp8(patcher)


def test_inputs_that_are_no_numbers_give_no_scales(world):
    """Neither now nor when ComfyUI loads the model again."""
    x, text = torch.full((1, 16, 3, 4, 6), torch.nan), torch.randn(1, 9, 64)

    def look(patcher):
        with torch.inference_mode():
            patcher.model.diffusion_model(x, torch.tensor([400.0]), text)

    patcher, report = ip.pack_module("nodes.calibrate").calibrated((str(tiny(world)), "fp8", "auto"), look)
    again, arguments = patcher.cached_patcher_init
    assert not scales(patcher) and not scales(again(*arguments)) and "0 of 14" in report


def test_a_layer_whose_inputs_spread_too_far_keeps_its_form(world, monkeypatch):
    core = ip.pack_module("sana_video_core.quant.calibrate")
    monkeypatch.setattr(core.Seen, "spread", lambda self: 1e5 if len(self.largest) == 48 else 3.0)  # the layers behind the gate
    outcome = run(calibrated_graph())
    patcher, report = outcome.output("5"), outcome.output("5", 1)
    assert len(scales(patcher)) == 12 and "12 of 14" in report and "point_conv" in report
