"""Input scales that 'Load SANA-Video' gives an fp8 model itself, in ComfyUI on the CPU that passes for a card.

The CPU expands fp8 weights and rounds no inputs, so scales change no picture here. What they cost where a device multiplies in
fp8: ``precision_report.py fp8 --own``.
"""

from __future__ import annotations

import itertools
import logging

import pytest
import torch
from comfygraphs import graph, ksampler, relative, sampled
from precision_report import as_on_a_card, velocities
from safetensors.torch import load_file, save_file
from test_calibrate import calibrated_graph, scales
from test_lowbit import core_file, load, quantised, same_weights, tiny

import inprocess as ip
from inprocess import node, run


@pytest.fixture
def card(world, monkeypatch):
    """This device says that it multiplies in fp8. The models that made the run of their own are listed."""
    calibrate, made = ip.pack_module("nodes.calibrate"), []
    monkeypatch.setattr(calibrate, "multiplies_in", lambda name, device: True)
    monkeypatch.setattr(calibrate, "own_run", lambda patcher, f=calibrate.own_run: (made.append(patcher), f(patcher)))
    return made


def scaled(path, precision="fp8", mode="auto"):
    return ip.pack_module("nodes.calibrate").load_scaled(str(path), precision, mode)


def plain_latent(world):
    """The latent of the fp8 model without scales."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ip.pack_module("nodes.calibrate"), "multiplies_in", lambda name, device: False)
        return sampled(run(graph(precision="fp8", n4=ksampler())))


def test_the_loader_gives_every_layer_a_scale_where_the_card_multiplies(world, card, caplog):
    with caplog.at_level(logging.INFO):
        outcome = run(graph(precision="fp8", n4=ksampler()))
    latent, patcher = sampled(outcome), outcome.output("1")
    found = scales(patcher)
    assert set(found) == set(quantised(patcher)) and len(found) == 14 and len(card) == 1
    assert all(2.0 ** round(torch.tensor(s).log2().item()) == s for s in found.values())
    assert not any(m._full_precision_mm_config for m in quantised(patcher).values())
    assert "14 of 14 fp8 layers" in caplog.text
    assert torch.equal(latent, plain_latent(world))


def test_the_same_scales_each_time_and_nobodys_random_numbers(world, card):
    torch.manual_seed(1)
    first = scaled(tiny(world))
    torch.manual_seed(2)
    second = scaled(tiny(world))
    before = torch.get_rng_state()
    ip.pack_module("nodes.calibrate").own_run(second)
    assert torch.equal(torch.get_rng_state(), before)
    assert scales(second) == scales(first) != {} and len(card) == 3


def test_a_cpu_gets_none(world, monkeypatch):
    monkeypatch.setattr(ip.pack_module("nodes.calibrate"), "own_run", lambda patcher: pytest.fail("a run for nothing"))
    patcher = run(graph(precision="fp8", n4=ksampler())).output("1")
    assert quantised(patcher) and not scales(patcher)


@pytest.mark.parametrize("precision", ["auto", "bf16", "int8", "mxfp8"])
def test_other_precisions_get_none(world, card, precision):
    patcher = scaled(tiny(world), precision)
    assert not card and not scales(patcher)
    assert patcher.cached_patcher_init[0] is ip.pack_module("nodes.loading").load_diffusion


@pytest.mark.parametrize("precision", ["auto", "fp8"])
def test_a_file_keeps_the_scales_it_has_and_those_it_lacks(world, card, precision):
    path = core_file(world, "float8_e4m3fn", "own_scale")
    save_file(load_file(path) | {"blocks.0.attn.qkv.input_scale": torch.tensor(0.375)}, path)
    assert scales(scaled(path, precision)) == {"blocks.0.attn.qkv": 0.375} and not card


@pytest.mark.parametrize(("error", "words"), [(torch.OutOfMemoryError("no room"), "not enough memory"),
                                              (RuntimeError("no such kernel"), "RuntimeError: no such kernel")])
def test_a_run_that_fails_leaves_the_plain_model_and_a_warning(world, card, monkeypatch, caplog, error, words):
    network, calls = ip.pack_module("nodes.long").Network, []

    def fails(self, *arguments, f=network.__call__):
        calls.append(1)
        if len(calls) == 3:
            raise error
        return f(self, *arguments)

    monkeypatch.setattr(network, "__call__", fails)
    outcome = run(graph(precision="fp8", n4=ksampler()))
    latent, patcher = sampled(outcome), outcome.output("1")
    warning, = (r.getMessage() for r in caplog.records if r.levelno == logging.WARNING and "input scales" in r.getMessage())
    assert words in warning and "'SANA-Video Calibrate FP8'" in warning and len(calls) == 3
    assert not scales(patcher) and not any(m._forward_pre_hooks for m in quantised(patcher).values())
    assert patcher.cached_patcher_init[0] is ip.pack_module("nodes.loading").load_diffusion
    assert torch.equal(latent, plain_latent(world))


def test_cancel_is_felt_within_a_step(world, card, monkeypatch):
    import comfy.model_management as management

    network, calls = ip.pack_module("nodes.long").Network, []

    def cancelled(self, *arguments, f=network.__call__):
        calls.append(1)
        if len(calls) == 2:
            management.interrupt_current_processing()
        return f(self, *arguments)

    monkeypatch.setattr(network, "__call__", cancelled)
    with pytest.raises(management.InterruptProcessingException):
        scaled(tiny(world))
    assert len(calls) == 2 and not management.processing_interrupted()


def test_a_saved_file_and_comfyuis_next_load_have_the_scales_without_a_run(world, card):
    save = node("ModelSave", model=("1", 0), filename_prefix="scaled")
    outcome = run(graph(precision="fp8", n4=ksampler(), n40=save))
    assert outcome.ok, outcome.error
    patcher = outcome.output("1")
    again, arguments = patcher.cached_patcher_init
    saved, = (world.work / "output").glob("scaled_*.safetensors")
    others = [again(*arguments), again(*arguments, disable_dynamic=True), scaled(saved, "auto"), scaled(saved, "fp8")]
    for other in others:
        assert scales(other) == scales(patcher) != {} and same_weights(other, patcher)
    assert len(card) == 1


def test_films_and_states_do_not_ask_which_card_it_was(world, card):
    """A card gives scales and another one none: the weights are the same."""
    print_of = ip.pack_module("nodes.long").model_print
    patcher, plain = scaled(tiny(world)), load(tiny(world), "fp8")
    assert scales(patcher) and not scales(plain)
    assert print_of(patcher) == print_of(plain) != print_of(load(tiny(world), "int8"))


def test_the_node_that_calibrates_starts_from_plain_layers(world, card, monkeypatch):
    calibrate, before = ip.pack_module("nodes.calibrate"), []
    monkeypatch.setattr(calibrate, "short_run", lambda patcher, *rest, f=calibrate.short_run: (
        before.append((patcher, scales(patcher))), f(patcher, *rest)))
    monkeypatch.setattr(calibrate, "own_run", lambda patcher, f=calibrate.own_run: (
        f(patcher), patcher.model.diffusion_model(torch.randn(1, 16, 1, 2, 2) * 1e4, torch.tensor([1.0]), torch.ones(1, 1, 64))))
    outcome = run(calibrated_graph())
    assert outcome.ok, outcome.error
    given, made = outcome.output("1"), outcome.output("5")
    assert len(before) == 1 and before[0][0].model is made.model is not given.model and before[0][1] == {}
    assert len(scales(made)) == 14 and scales(given) and scales(made) != scales(given)
    assert calibrate.plain_fp8(made) == calibrate.plain_fp8(given) == (str(tiny(world)), "fp8", "auto")


def specs():
    from sana_video_core.specs import SPECS

    return [spec for spec in SPECS.values() if not spec.hybrid]


@pytest.mark.parametrize("spec", specs(), ids=lambda spec: spec.name)
def test_the_run_is_a_clip_of_half_the_size_by_eulers_rule(world, monkeypatch, spec):
    """With a network that always points to the same clip, every latent lies on the line from the noise to that clip."""
    seen, clean = [], {}

    class Network:
        def __init__(self, patcher, shape):
            clean["clip"] = torch.randn(shape, generator=torch.Generator().manual_seed(7))

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def __call__(self, latent, timestep, caption, mask=None):
            assert mask is None and caption.shape == (1, 16, spec.caption_channels) and timestep.shape == (1,)
            seen.append((float(timestep) / 1000, latent))
            return (latent - clean["clip"]) / timestep * 1000

    import comfy.utils

    shown = []
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", lambda value, total, *_, **__: shown.append((value, total)))
    monkeypatch.setattr(ip.pack_module("nodes.long"), "Network", Network)
    patcher = type("Patcher", (), {"model": type("Model", (), {"spec": spec}), "load_device": "cpu"})
    ip.pack_module("nodes.calibrate").own_run(patcher)
    noise = seen[0][1]
    frames, height, width = noise.shape[2:]
    assert noise.shape[:2] == (1, spec.channels) and abs(float(noise.std()) - 1) < 0.05
    assert (frames - 1) * spec.vae.stride[0] + 1 == 17
    for points, size, stride, patch in zip((width, height), spec.size, spec.vae.stride[:0:-1], spec.patch[:0:-1]):
        assert points % patch == 0 and 0.45 * size <= points * stride <= size / 2
    assert shown[0] == (1, len(seen)) and shown[-1] == (len(seen), len(seen))  # those between may come too soon to be sent
    levels = [sigma for sigma, _ in seen]
    assert len(seen) == min(8, spec.steps) and levels[0] == 1 and all(a > b > 0 for a, b in itertools.pairwise(levels))
    for sigma, latent in seen:
        assert relative(latent, sigma * noise + (1 - sigma) * clean["clip"]) < 1e-4


@pytest.mark.parametrize(("part", "mode"), [("transformer", "clip"), ("long", "long")])
def test_scales_of_the_embedded_models_hold_for_clips(world, card, part, mode):
    """Of another size, noise and text: twice what goes into a layer fits, and a quarter of a typical channel keeps its bits."""
    core, layers = ip.pack_module("sana_video_core.quant.calibrate"), ip.pack_module("nodes.fp8_layers")
    patcher = scaled(ip.pack_module("sana_video_core.mini").files()[part], mode=mode)
    found, text = scales(patcher), torch.randn(1, 60, 128, generator=torch.Generator().manual_seed(3))
    assert len(found) == 70
    with core.watched(layers.fp8_layers_of(patcher.model.diffusion_model)) as seen, as_on_a_card(patcher.model) as many:
        velocities(patcher, text, torch.ones(1, 60))
    assert many == 70
    for name, scale in found.items():
        assert core.HEADROOM * float(seen[name].largest.max()) <= 448 * scale, name
        assert seen[name].typical() / 4 >= 2.0**-6 * scale, name
