"""Products that take another's place (the temporal convolution for two frames at a time, outputs added within their product) in
ComfyUI's layers, which bring and change their weights themselves."""

from __future__ import annotations

import pytest
import torch
from comfygraphs import relative
from kernelcases import as_on_a_card
from test_lowbit import load, pass_of, tiny

import inprocess as ip


def switcher(monkeypatch, backend: str, names: tuple[str, ...], **changes):
    """``switch(on)`` has the CPU pass for a card with those operators, or not, and gives a list of their calls from then on."""
    operators, calls = ip.pack_module("sana_video_core.ops").OPERATORS, []
    plain = {name: operators[name].backends[backend] for name in names}

    def counted(name: str):
        # Triton's own need its interpreter: their references stand for them
        function = operators[name].reference if backend == "triton" else plain[name][0]
        return lambda *a, **k: (calls.append(name), function(*a, **k))[1]

    def switch(on: bool) -> list[str]:
        for name in names:
            monkeypatch.setitem(operators[name].backends, backend, plain[name])
        if on:
            as_on_a_card(monkeypatch, operators, backend, {name: counted(name) for name in names}, **changes)
        calls.clear()
        return calls

    return switch


@pytest.fixture
def by_pairs(world, monkeypatch):
    return switcher(monkeypatch, "triton", ("time_pairs", "pair_weights", "pair_residual"))


@pytest.mark.parametrize("how", ["as loaded", "cast on use", "cast, LoRA on use", "offloaded dtype"])
def test_the_network_gives_the_same_either_way(world, by_pairs, how):
    patcher = load(tiny(world))
    network = patcher.model.diffusion_model
    for block in network.blocks:
        layer = block.mlp.t_conv
        layer.comfy_cast_weights = how != "as loaded"
        layer.weight_function = [lambda w: 3 * w] if "LoRA" in how else []
        if "dtype" in how:
            layer.weight.data = layer.weight.data.to(torch.float64)
    found = []
    for on in (False, True):
        calls = by_pairs(on)
        found.append(pass_of(patcher))
        assert len(calls) == (0 if not on or "dtype" in how else 3 * world.spec.depth)
    assert relative(found[1], found[0]) < 1e-5


@pytest.mark.parametrize("precision", ["fp8", "int8", "nvfp4"])
def test_quantised_layers_keep_their_three_neighbours(world, by_pairs, precision):
    patcher, calls = load(tiny(world), precision), by_pairs(True)
    assert bool(torch.isfinite(pass_of(patcher)).all()) and not calls


@pytest.fixture
def adding(by_pairs, monkeypatch):
    """Both operators that add within a product, on top of the pairs; also for few tokens."""
    by_pairs(True)
    return switcher(monkeypatch, "torch-fused", ("add_product", "shifted_product"), check=None)


@pytest.mark.parametrize("how", ["as loaded", "cast on use", "cast, LoRA on use", "offloaded dtype"])
def test_outputs_are_added_either_way(world, adding, how):
    """Weights and biases as ComfyUI brings them; a layer that it must convert keeps the whole block's plain way."""
    patcher = load(tiny(world))
    network = patcher.model.diffusion_model
    generator = torch.Generator().manual_seed(3)
    for block in network.blocks:
        for layer in (block.attn.proj, block.cross_attn.q_linear, block.cross_attn.proj):
            layer.bias.data = torch.randn(layer.bias.shape, generator=generator).to(layer.bias.dtype)
            layer.comfy_cast_weights = how != "as loaded"
            layer.weight_function = [lambda w: 3 * w] if "LoRA" in how else []
            layer.bias_function = [lambda b: b + 1] if "LoRA" in how else []
        if "dtype" in how:
            block.cross_attn.proj.weight.data = block.cross_attn.proj.weight.data.to(torch.float64)
    found = []
    for on in (False, True):
        calls = adding(on)
        found.append(pass_of(patcher))
        assert len(calls) == (0 if not on or "dtype" in how else 3 * world.spec.depth)
    assert relative(found[1], found[0]) < 1e-5


def test_a_block_replacement_may_keep_what_it_saw(world, adding):
    """ComfyUI's 'double_block' replacements hand tokens on and may keep them: none is overwritten then, by no block."""
    patcher, kept = load(tiny(world)), []
    calls = adding(True)
    expected = pass_of(patcher)

    def keep(arguments, extra):
        out = extra["original_block"](arguments)
        kept.extend((t, t.clone()) for t in (arguments["img"], out["img"]))
        return out

    seen = patcher.clone()
    seen.set_model_patch_replace(keep, "dit", "double_block", 0)
    found = pass_of(seen, transformer_options=seen.model_options["transformer_options"])
    assert torch.equal(found, expected) and kept and len(calls) == 2 * 3 * world.spec.depth
    assert all(torch.equal(now, then) for now, then in kept)
