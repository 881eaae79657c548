"""The temporal convolution for two frames at a time in ComfyUI's layers, which bring and change their weights themselves."""

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
            counted = lambda *a, n=name: (calls.append(n), getattr(pairs, n)(*a))[1]  # noqa: E731
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
