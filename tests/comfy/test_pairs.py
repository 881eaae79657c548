"""Products that take another's place (the temporal convolution for two frames at a time, outputs added within their product) in
ComfyUI's layers, which bring and change their weights themselves."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from comfygraphs import relative
from test_lowbit import load, pass_of, tiny

import inprocess as ip


@pytest.fixture
def by_pairs(world, monkeypatch):
    """A list of the calls, after ``by_pairs(True)`` as on a card."""
    operators, pairs = ip.pack_module("sana_video_core.ops").OPERATORS, ip.pack_module("sana_video_core.ops.pairs")
    calls, plain = [], {name: operators[name].backends["triton"] for name in ("time_pairs", "pair_weights", "pair_residual")}

    def switch(on: bool) -> list[str]:
        for name, (function, constraint) in plain.items():
            here = dataclasses.replace(constraint, devices=("cpu",), dtypes=(torch.float32, torch.bfloat16), triton=False)
            counted = lambda *a, n=name, **k: (calls.append(n), getattr(pairs, n)(*a, **k))[1]  # noqa: E731
            monkeypatch.setitem(operators[name].backends, "triton", (counted, here) if on else (function, constraint))
        calls.clear()
        return calls

    return switch


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
    """A list of the calls of the two operators that add within a product, after ``adding(True)`` as on a card."""
    operators = ip.pack_module("sana_video_core.ops").OPERATORS
    calls, plain = [], {name: operators[name].backends["torch-fused"] for name in ("add_product", "shifted_product")}

    def switch(on: bool) -> list[str]:
        by_pairs(True)
        for name, (function, constraint) in plain.items():
            here = dataclasses.replace(constraint, devices=("cpu",), check=None)  # also for few tokens
            counted = lambda *a, n=name, f=function: (calls.append(n), f(*a))[1]  # noqa: E731
            monkeypatch.setitem(operators[name].backends, "torch-fused", (counted, here) if on else (function, constraint))
        calls.clear()
        return calls

    return switch


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
