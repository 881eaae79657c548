"""fp8 layers that scale their inputs, multiplying in E4M3 on the CPU."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from comfygraphs import relative
from kernelcases import as_on_a_card
from test_lowbit import SAME, load, quantised, tiny

import inprocess as ip


def fp8_layer(world, **changes):
    """A layer of the tiny model in fp8 that multiplies in it, as on a card."""
    layer = quantised(load(tiny(world), "fp8"))["blocks.0.attn.proj"]
    layer._full_precision_mm = False
    for name, value in changes.items():
        setattr(layer, name, value)
    return layer


def test_fp8_inputs_beyond_the_range_of_the_format_are_not_cut(world):
    layer = fp8_layer(world)
    x = torch.randn(2, 5, 128, generator=torch.Generator().manual_seed(3)) * 1e5
    with torch.inference_mode():
        found = layer(x)
        exact = torch.nn.functional.linear(x, layer.weight.dequantize(), layer.bias)
        assert found.shape == (2, 5, 128) and 0 < relative(found, exact) < 0.04
        layer.input_scale = torch.nn.Parameter(torch.tensor(1.0), requires_grad=False)  # core's way: cut at 448
        assert relative(layer(x), exact) > 0.5


@pytest.mark.parametrize("compiled", [False, True])
def test_a_scale_for_every_row(world, monkeypatch, compiled):
    """Rows of very different size keep their own precision, which one scale for all of them would take."""
    layer = fp8_layer(world).to(torch.bfloat16)
    x = torch.randn(2, 5, 128, generator=torch.Generator().manual_seed(3)).bfloat16()
    x *= torch.tensor([1e-6, 1e-3, 1.0, 1e3, 1e5]).bfloat16()[:, None]
    exact = torch.nn.functional.linear(x.float(), layer.weight.dequantize().float()) + layer.bias.float()
    run = torch.compile(layer, backend="eager") if compiled else layer
    with torch.inference_mode():
        together = layer(x)
        monkeypatch.setattr(ip.pack_module("nodes.fp8_layers"), "multiplies_rows", lambda device: True)
        apart = run(x)
    assert apart.shape == (2, 5, 128) and apart.dtype == torch.bfloat16
    assert all(relative(apart[:, row], exact[:, row]) < 0.05 for row in range(5))
    assert relative(together[:, 2], exact[:, 2]) > 0.05


def test_scales_of_columns_are_kept_with_the_weight(world, monkeypatch):
    layers = ip.pack_module("nodes.fp8_layers")
    monkeypatch.setattr(layers, "multiplies_rows", lambda device: True)
    layer, made = fp8_layer(world).to(torch.bfloat16), []
    monkeypatch.setattr(layers, "columns", lambda *a, f=layers.columns: (made.append(1), f(*a))[1])
    x = torch.randn(2, 5, 128, generator=torch.Generator().manual_seed(3)).bfloat16()
    with torch.inference_mode():
        first = layer(x)
        assert torch.equal(layer(x), first) and made == [1]
        layer.input_scale = torch.nn.Parameter(torch.tensor(2.0**-5), requires_grad=False)
        given = layer(layers.ops.given_fp8(x, layer.input_scale_of(x)))
        assert len(made) == 2 and 0 < relative(given, first) < 0.1
        del layer.input_scale
        weight = layer.weight.dequantize()
        layer.set_weight(2 * weight, seed=0)  # as a patched model's; with another scale
        assert relative(layer(x) - layer.bias, 2 * (first - layer.bias)) < 0.05 and len(made) == 3
    gone = weakref.ref(layer)
    del layer
    gc.collect()
    assert gone() is None


def test_rows_that_come_scaled(world, monkeypatch):
    """What makes the rows has scaled them: the same product, for the layers and inputs that take it."""
    layers = ip.pack_module("nodes.fp8_layers")
    layer = fp8_layer(world).to(torch.bfloat16)
    x = torch.randn(2, 5, 128, generator=torch.Generator().manual_seed(3)).bfloat16()
    assert not layer.takes_rows(x)  # a CPU
    monkeypatch.setattr(layers, "multiplies_rows", lambda device: True)
    assert layer.takes_rows(x) and not layer.takes_rows(x.float())
    assert not fp8_layer(world, _full_precision_mm=True).takes_rows(x)
    with torch.inference_mode():
        assert torch.equal(layer(layers.ops.row_fp8(x)), layer(x))


def test_the_network_hands_over_scaled_rows(world, monkeypatch):
    """A whole network in fp8 whose norms and taps are scaled where they are made, against scaling in the layers."""
    import comfy.model_management

    patcher = load(tiny(world), "fp8")
    comfy.model_management.load_models_gpu([patcher])
    network = patcher.model.diffusion_model.to(torch.bfloat16)
    for module in network.modules():
        if getattr(module, "quant_format", None):
            module._full_precision_mm = False
    network.compute_dtype = torch.bfloat16
    spec, layers = network.spec, ip.pack_module("nodes.fp8_layers")
    noise = torch.Generator().manual_seed(5)
    latent = torch.randn(2, spec.channels, 3, 4, 6, generator=noise).bfloat16()
    caption = torch.randn(2, 9, spec.caption_channels, generator=noise).bfloat16()
    monkeypatch.setattr(layers, "multiplies_rows", lambda device: True)
    calls = []
    for name in ("modulate_norm_fp8", "residual_norm_fp8", "temporal_taps_fp8"):
        op = layers.ops.OPERATORS[name]
        monkeypatch.setattr(op, "reference", lambda *a, n=name, f=op.reference, **k: (calls.append(n), f(*a, **k))[1])
    with torch.inference_mode():
        found = network(latent, torch.tensor([500.0, 500.0]), caption)
        inside = ip.pack_module("sana_video_core.dit.layers")
        with monkeypatch.context() as patch:
            patch.setattr(inside, "FFN_PASS_BYTES", 1)  # a frame at a time
            assert torch.equal(network(latent, torch.tensor([500.0, 500.0]), caption), found)
        del calls[3 * spec.depth:]
        monkeypatch.setattr(inside, "takes_rows", lambda linear, x: False)
        expected = network(latent, torch.tensor([500.0, 500.0]), caption)
    assert sorted(calls) == sorted(["modulate_norm_fp8", "residual_norm_fp8", "temporal_taps_fp8"] * spec.depth)
    assert torch.equal(found, expected)


def network_in_fp8(world, calibrated: bool):
    """The tiny network in bfloat16 and fp8 that multiplies in it, with gates and biases that matter."""
    import comfy.model_management

    patcher = load(tiny(world), "fp8")
    comfy.model_management.load_models_gpu([patcher])
    network = patcher.model.diffusion_model.to(torch.bfloat16)
    network.compute_dtype = torch.bfloat16
    noise = torch.Generator().manual_seed(6)
    for module in network.modules():
        if getattr(module, "quant_format", None):
            module._full_precision_mm = False
            if calibrated:
                module.input_scale = torch.nn.Parameter(torch.tensor(2.0**-5), requires_grad=False)
            if module.bias is not None:
                module.bias.copy_(torch.randn(module.bias.shape, generator=noise))
        if hasattr(module, "scale_shift_table"):
            module.scale_shift_table.copy_(torch.randn(module.scale_shift_table.shape, generator=noise))
    return network


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize(("frames", "batch"), [(1, 1), (3, 2), (4, 1)])
def test_products_that_are_added_to_the_tokens(world, monkeypatch, calibrated, frames, batch):
    """A clip, a block with a history, and its state: the same as passes of their own, and nobody's tokens are overwritten."""
    layers = ip.pack_module("nodes.fp8_layers")
    monkeypatch.setattr(layers, "multiplies_rows", lambda device: True)
    with torch.inference_mode():
        network, noise = network_in_fp8(world, calibrated), torch.Generator().manual_seed(5)
        spec, core = network.spec, ip.pack_module("sana_video_core.dit.model").SanaVideoTransformer
        latent = torch.randn(batch, spec.channels, frames, 4, 6, generator=noise).bfloat16()
        before = torch.randn(batch, spec.channels, 2, 4, 6, generator=noise).bfloat16()
        caption = torch.randn(batch, 9, spec.caption_channels, generator=noise).bfloat16()
        times, calls, mask = torch.full((batch,), 500.0), [], torch.arange(9) < torch.tensor([[5], [8]])[:batch]

        def results():
            _, state = core.commit(network, before, caption)
            v, after = core.commit(network, latent, caption, state=state)
            one = core.forward(network, latent[:1].expand_as(latent), times, caption, mask)  # one row up to the texts
            return [core.forward(network, latent, times, caption), v, one, *(t for layer in after.layers for t in layer)]

        def counted(*args, **options):
            calls.append((options["frames"], options["given"] is not None))
            return layers.ops.onto_fp8.add_product_fp8(*args, **options)

        expected = results()
        as_on_a_card(monkeypatch, layers.ops.OPERATORS, "gluon", {"add_product_fp8": counted}, check=None)
        found = results()
        for module in network.modules():  # with the same weights, products in bfloat16
            module._full_precision_mm = True
        for mine, plain, exact in zip(found, expected, results(), strict=True):
            mine, plain = relative(mine.float(), exact.float()), relative(plain.float(), exact.float())
            assert mine <= 1.4 * plain < 0.12  # single values of so small a model fall to one side or the other
        for module in network.modules():
            module._full_precision_mm = False
        assert len(calls) == 4 * 3 * spec.depth and calls[:3] == [(0, calibrated), (0, False), (2 * calibrated, False)]
        kept, count = [], len(calls)
        core.forward(network, latent, times, caption, on_block=lambda i, call, x: (kept.append((x, x.clone())), call(x))[1])
        assert all(torch.equal(*pair) for pair in kept) and len(calls) == count + 3 * spec.depth
        network.blocks[0].attn.proj.register_forward_hook(lambda *a: None)  # somebody looks at what it gives
        core.forward(network, latent, times, caption)
        assert len(calls) == count + (2 * spec.depth - 1) * 3


def test_a_device_without_such_products_is_found_out():
    layers = ip.pack_module("nodes.fp8_layers")
    assert layers.multiplies_rows(torch.device("cpu")) is False  # it has them, and they are slow
    x = torch.randn(16, 32).to(torch.float8_e4m3fn)
    found = layers.row_product(x, torch.arange(16.0)[:, None], x, torch.full((1, 16), 0.5), None, torch.bfloat16)
    assert relative(found, torch.arange(16.0)[:, None] * 0.5 * (x.float() @ x.float().T)) < 0.01


def test_who_gets_a_scaled_input(world):
    takes = ip.pack_module("nodes.fp8_layers").takes_scaled_input
    x = torch.randn(3, 128)
    assert takes(fp8_layer(world), x)
    scale = torch.nn.Parameter(torch.tensor(1.0), requires_grad=False)
    for changes in ({"input_scale": scale}, {"pre_quant_scale": scale}, {"_full_precision_mm": True}, {"quant_format": "mxfp8"},
                    {"weight_function": [abs]}, {"bias_function": [abs]}, {"comfy_force_cast_weights": True}):
        assert not takes(fp8_layer(world, **changes), x), changes
    assert not takes(fp8_layer(world), x.requires_grad_())
    layers = ip.pack_module("nodes.fp8_layers")
    x = x.detach()
    finished = layers.quantised(*layers.ops.scaled_fp8(x), "TensorCoreFP8E4M3Layout", x.dtype)
    assert not takes(fp8_layer(world), finished)
    assert layers.with_scaled_inputs(torch.nn) is torch.nn


def test_torch_compile_takes_scaled_inputs(world):
    layer = fp8_layer(world)
    x = torch.randn(2, 5, 128, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        assert relative(torch.compile(layer, backend="eager")(x), layer(x)) < SAME


def test_the_network_hands_over_rows_at_a_calibrated_scale(world, monkeypatch):
    """A whole network whose layers have input scales: each operator writes in E4M3 what core's layers would make of its
    output (a power of two: core rounds others to bfloat16)."""
    import comfy.model_management

    patcher = load(tiny(world), "fp8")
    comfy.model_management.load_models_gpu([patcher])
    network = patcher.model.diffusion_model.to(torch.bfloat16)
    layers, calls = ip.pack_module("nodes.fp8_layers"), []
    for module in network.modules():
        if getattr(module, "quant_format", None):
            module._full_precision_mm = False
            module.input_scale = torch.nn.Parameter(torch.tensor(2.0**-6), requires_grad=False)
            monkeypatch.setattr(module, "forward", lambda x, f=module.forward: (calls.append(type(x)), f(x))[1])
    network.compute_dtype = torch.bfloat16
    spec, inside = network.spec, ip.pack_module("sana_video_core.dit.layers")
    noise = torch.Generator().manual_seed(5)
    latent = torch.randn(2, spec.channels, 3, 4, 6, generator=noise).bfloat16()
    caption = torch.randn(2, 9, spec.caption_channels, generator=noise).bfloat16()
    with torch.inference_mode():
        found = network(latent, torch.tensor([500.0, 500.0]), caption)
        assert calls == [layers.ops.Rows] * 7 * spec.depth  # every matrix of every block
        with monkeypatch.context() as patch:
            patch.setattr(inside, "FFN_PASS_BYTES", 1)  # a frame at a time
            assert torch.equal(network(latent, torch.tensor([500.0, 500.0]), caption), found)
        monkeypatch.setattr(inside, "takes_rows", lambda linear, x: False)
        expected = network(latent, torch.tensor([500.0, 500.0]), caption)
    assert torch.equal(found, expected)
