"""Low-bit weights in the real ComfyUI on the CPU: files in its formats, conversion while loading, saving, LoRAs, refusals.

What a CPU cannot show: products in mxfp8 and nvfp4, which run on expanded weights here. So do those in fp8, unless a test
makes the layers multiply in it (``precision_report.as_on_a_card``); int8 multiplies in int8.
"""

from __future__ import annotations

import json
import logging

import pytest
import torch
from comfygraphs import CLOSE, graph, ksampler, relative, sampled
from precision_report import measure
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import inprocess as ip
from inprocess import node, run

FORMATS = ("float8_e4m3fn", "int8_tensorwise", "mxfp8", "nvfp4")
PRECISIONS = ("fp8", "int8", "mxfp8", "nvfp4")
# Relative error of one weight (comfyui spec 5.2: 0.028, 0.009, 0.027, 0.096 on normal weights) and of one pass of the
# embedded model; measured: 0.022, 0.007, 0.024, 0.069 as on a card, up to 0.009 less where the weights are expanded.
WEIGHT_ERROR = {"float8_e4m3fn": 0.029, "int8_tensorwise": 0.012, "mxfp8": 0.029, "nvfp4": 0.100}
PASS_ERROR = {"fp8": 0.03, "int8": 0.012, "mxfp8": 0.03, "nvfp4": 0.09}
SAME = 1e-5  # equal weights at other places in memory: matrix products of a CPU then round differently
LAYERS = ("attn.qkv", "attn.proj", "cross_attn.q_linear", "cross_attn.proj", "mlp.inverted_conv.conv", "mlp.point_conv.conv",
          "mlp.t_conv")


def load(name, precision="auto"):
    return ip.pack_module("nodes.loading").load_diffusion(str(name), precision)


def tiny(world):
    return world.work / "diffusion_models" / "tiny.safetensors"


def quantised(patcher):
    """{layer: module} of the layers that ComfyUI holds in few bits."""
    network = patcher.model.diffusion_model
    return {name: m for name, m in network.named_modules() if getattr(m, "quant_format", None) is not None}


def pass_of(patcher, seed=0, **options):
    """The network's answer to fixed inputs."""
    import comfy.model_management as management

    management.load_models_gpu([patcher])
    network = patcher.model.diffusion_model
    g = torch.Generator().manual_seed(seed)
    latent, text = torch.randn(1, 16, 3, 4, 8, generator=g), torch.randn(1, 20, 64, generator=g)
    with torch.inference_mode():
        return network(latent, torch.tensor([400.0]), text, **options)


def same_weights(one, other):
    """True when all tensors of two loaded models, scales and marks too, have the same bits."""
    a, b = (patcher.model.diffusion_model.state_dict() for patcher in (one, other))
    return a.keys() == b.keys() and all(
        t.dtype == b[key].dtype and torch.equal(t.reshape(-1).view(torch.uint8), b[key].reshape(-1).view(torch.uint8))
        for key, t in a.items())


def core_file(world, form, name, how="tensors", layers=LAYERS, prefix="", **options):
    """The tiny model with layers of both blocks packed by ComfyUI's writer, marked as core marks them; its path."""
    from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor

    state, marks = load_file(tiny(world)), {}
    for layer in [f"blocks.{i}.{part}" for i in (0, 1) for part in layers]:
        kind = {} if form == "mxfp8" else {"scale": "recalculate"}
        packed = QuantizedTensor.from_float(state.pop(f"{layer}.weight"), QUANT_ALGOS[form]["comfy_tensor_layout"], **kind)
        state |= packed.state_dict(f"{layer}.weight")
        marks[layer] = {"format": form} | options
    metadata = {}
    if how == "tensors":
        state |= {f"{k}.comfy_quant": torch.tensor(list(json.dumps(v).encode()), dtype=torch.uint8) for k, v in marks.items()}
    else:
        layers = {prefix + key: value for key, value in marks.items()}
        metadata["_quantization_metadata"] = json.dumps({"format_version": "1.0", "layers": layers})
    path = world.work / "diffusion_models" / f"{name}.safetensors"
    save_file({prefix + key: t.contiguous() for key, t in state.items()}, path, metadata=metadata)
    import folder_paths

    folder_paths.filename_list_cache.clear()
    return path


# ----------------------------------------------------------------------------------------------- files in core's formats

@pytest.mark.parametrize("form", FORMATS)
def test_a_file_in_cores_format_loads_into_its_own_layers(world, form):
    patcher = load(core_file(world, form, f"core_{form}"))
    found, exact = quantised(patcher), world.network.state_dict()
    assert set(found) == {f"blocks.{i}.{layer}" for i in (0, 1) for layer in LAYERS}
    for name, module in found.items():
        assert module.quant_format == form and tuple(module.weight.shape) == tuple(exact[f"{name}.weight"].shape)
        assert 0 < relative(module.weight.dequantize(), exact[f"{name}.weight"]) < WEIGHT_ERROR[form], name
    kept = {name: p for name, p in patcher.model.diffusion_model.named_parameters() if not hasattr(p, "_qdata")}
    assert len(kept) == len(exact) - 14 and all(torch.equal(p, exact[name]) for name, p in kept.items())
    error = relative(pass_of(patcher), pass_of(load(tiny(world))))
    assert 0 < error < 4 * WEIGHT_ERROR[form], error
    latent = sampled(run(graph(model=f"core_{form}.safetensors", n4=ksampler())))
    assert relative(latent, sampled(run(graph(n4=ksampler())))) < 12 * WEIGHT_ERROR[form]


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
def test_marks_in_the_header_do_what_marks_beside_the_weights_do(world, prefix):
    beside, listed = (load(core_file(world, "nvfp4", f"marks_{how}", how, prefix=prefix)) for how in ("tensors", "header"))
    assert set(quantised(beside)) == set(quantised(listed)) != set()
    assert torch.equal(pass_of(beside), pass_of(listed))


def test_options_of_a_mark_reach_the_layer(world):
    patcher = load(core_file(world, "float8_e4m3fn", "wide", full_precision_matrix_mult=True))
    assert all(m._full_precision_mm_config is True for m in quantised(patcher).values())
    path = core_file(world, "float8_e4m3fn", "scaled")
    state = load_file(path) | {"blocks.0.attn.qkv.input_scale": torch.tensor(0.25)}
    save_file(state, path)
    assert float(quantised(load(path))["blocks.0.attn.qkv"].input_scale) == 0.25


@pytest.mark.parametrize("form", FORMATS)
def test_weights_that_are_assigned_as_dynamic_vram_does_are_the_same(world, form):
    patcher = load(core_file(world, form, "assigned"))
    before = pass_of(patcher)
    network = patcher.model.diffusion_model
    state = {key: t.clone() for key, t in network.state_dict().items()}
    missing, unexpected = network.load_state_dict(state, strict=False, assign=True)
    assert not missing and not unexpected
    assert relative(pass_of(patcher), before) < SAME


def test_fp8_weights_without_scales_are_taken_as_numbers(world):
    """Plain casts, as older tools wrote them: no marks, so they are weights like any other, also to quantise."""
    state = {key: t.to(torch.float8_e4m3fn) if t.ndim == 2 else t for key, t in load_file(tiny(world)).items()}
    path = world.work / "diffusion_models" / "cast.safetensors"
    save_file(state, path)
    exact = load(tiny(world))
    for precision in ("auto", "fp8", "int8"):
        assert relative(pass_of(load(path, precision)), pass_of(exact)) < 0.2


def test_older_scaled_fp8_files_load_as_todays(world):
    path = core_file(world, "float8_e4m3fn", "today", "header")
    old = {key.replace(".weight_scale", ".scale_weight"): t for key, t in load_file(path).items()}
    save_file(old | {"scaled_fp8": torch.zeros(1, dtype=torch.float8_e4m3fn)}, path.with_name("older.safetensors"))
    assert torch.equal(pass_of(load(path)), pass_of(load(path.with_name("older.safetensors"))))


@pytest.mark.parametrize(("form", "lost", "words"), [
    ("float8_e4m3fn", "blocks.0.attn.qkv.weight_scale", ["1 missing", "blocks.0.attn.qkv.weight_scale"]),
    ("nvfp4", "blocks.1.mlp.t_conv.weight_scale_2", ["1 missing", "blocks.1.mlp.t_conv.weight_scale_2"]),
    ("mxfp8", "blocks.1.mlp.point_conv.conv.weight", ["1 missing", "blocks.1.mlp.point_conv.conv.weight"]),
    ("mxfp8", "blocks.0.attn.proj.bias", ["1 missing", "blocks.0.attn.proj.bias"]),
    ("int8_tensorwise", "blocks.0.attn.qkv.comfy_quant", ["1 unexpected", "blocks.0.attn.qkv.weight_scale"]),
])
def test_a_missing_part_is_named(world, form, lost, words):
    path = core_file(world, form, "part")
    state = load_file(path)
    del state[lost]
    save_file(state, path)
    outcome = run(graph(model="part.safetensors", n4=ksampler()))
    assert not outcome.ok and all(word in outcome.error for word in ["part.safetensors", *words]), outcome.error


@pytest.mark.parametrize(("extra", "words"), [
    ({"blocks.0.attn.qkv.pre_quant_scale": torch.ones(128)}, "blocks.0.attn.qkv.pre_quant_scale"),
    ({"blocks.0.attn.kv.weight_scale": torch.ones(())}, "blocks.0.attn.kv.weight_scale"),
    ({"blocks.0.attn.q_norm.comfy_quant": torch.tensor(list(b'{"format": "nvfp4"}'), dtype=torch.uint8)},
     "blocks.0.attn.q_norm (quantised)"),
    ({"blocks.0.attn.qkv.weight_scale": torch.ones(384)}, "blocks.0.attn.qkv.weight_scale [384] instead of []"),
    ({"blocks.0.attn.qkv.comfy_quant": torch.tensor(list(b'{"format": "svdquant"}'), dtype=torch.uint8)}, "svdquant"),
])
def test_an_unexpected_part_is_named(world, extra, words):
    path = core_file(world, "float8_e4m3fn", "more")
    save_file(load_file(path) | extra, path)
    outcome = run(graph(model="more.safetensors", n4=ksampler()))
    assert not outcome.ok and words in outcome.error, outcome.error


# ------------------------------------------------------------------------------------------------ quantised while loading

@pytest.fixture(scope="module")
def made(world):
    """{precision: the tiny model quantised while loading}."""
    return {precision: load(tiny(world), precision) for precision in PRECISIONS}


def bound(weight, form):
    """The largest error that each value of ``weight`` may have, from the formats' definitions alone.

    E4M3 has 3 bits behind the point (half a step is a 16th of the value) and steps of 2^-9 below 2^-6; E2M1's widest step is
    2, of a largest value of 6. A rotated int8 row is bounded by its norm.
    """
    w, rows = weight.abs(), weight.shape[0]
    if form == "float8_e4m3fn":
        return torch.maximum(w / 16, w.amax() / 448 * 2 ** -10) * 1.001
    if form == "mxfp8":  # the scale is a power of two, at most twice what is needed
        blocks = torch.nn.functional.pad(w, (0, -w.shape[1] % 32)).reshape(rows, -1, 32)
        floor = (blocks.amax(-1, keepdim=True) / 448 * 2 * 2 ** -10).expand(-1, -1, 32).reshape(rows, -1)
        return torch.maximum(w / 16, floor[:, :w.shape[1]]) * 1.001
    if form == "nvfp4":  # the block's scale is itself an E4M3 number
        blocks = w.reshape(rows, -1, 16).amax(-1, keepdim=True) / 6 * (1 + 1 / 16)
        return (blocks.expand(-1, -1, 16).reshape(rows, -1) + w / 16) * 1.001
    return None


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_weight_lies_within_the_formats_rounding(world, made, precision):
    exact, marks = world.network.state_dict(), ip.pack_module("sana_video_core.quant.policy").plan(world.spec, precision)
    found = quantised(made[precision])
    assert {name: m.quant_format for name, m in found.items()} == {layer: mark.format for layer, mark in marks.items()}
    for name, module in found.items():
        weight, stored = exact[f"{name}.weight"], module.weight.dequantize()
        assert 0 < relative(stored, weight) < WEIGHT_ERROR[module.quant_format], name
        limit = bound(weight, module.quant_format)
        if limit is not None:
            assert bool(((stored - weight).abs() <= limit).all()), name
        else:  # rotated back, an error spreads over its group; a row's norm is kept by the rotation
            steps = module.weight._params.scale[:, 0] / 2 * weight.shape[1] ** 0.5
            assert bool(((stored - weight).norm(dim=1) <= steps * 1.001).all()), name


@pytest.mark.parametrize("precision", PRECISIONS)
def test_sensitive_parts_stay_as_they_are(world, made, precision):
    exact = world.network.state_dict()
    kept = {name: p for name, p in made[precision].model.diffusion_model.named_parameters() if not hasattr(p, "_qdata")}
    assert {name for name in exact if ".attn" not in name and ".mlp." not in name and ".cross_attn." not in name} <= set(kept)
    assert {"blocks.0.cross_attn.kv_linear.weight", "blocks.1.mlp.depth_conv.conv.weight", "blocks.0.attn.q_norm.weight",
            "blocks.1.scale_shift_table", "blocks.0.attn.proj.bias"} <= set(kept)
    assert all(torch.equal(p, exact[name]) for name, p in kept.items())


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_precision_runs_in_a_graph_and_stays_close(world, precision, caplog):
    with caplog.at_level(logging.INFO):
        latent = sampled(run(graph(precision=precision, n4=ksampler())))
    assert relative(latent, sampled(run(graph(n4=ksampler())))) < {"nvfp4": 0.8}.get(precision, 0.3)
    assert "14 layers in " in caplog.text or precision == "nvfp4"
    assert ("smaller, not faster" in caplog.text) == (precision != "int8")


def test_what_kitchen_packs_here_is_what_a_file_would_hold(world, made):
    """Per-tensor fp8 weights made at load have the bits and the scale of core's own writer."""
    from_file, here = quantised(load(core_file(world, "float8_e4m3fn", "writer"))), quantised(made["fp8"])
    for name, module in here.items():
        assert torch.equal(module.weight._qdata.view(torch.uint8), from_file[name].weight._qdata.view(torch.uint8)), name
        assert torch.equal(module.weight._params.scale, from_file[name].weight._params.scale), name


def test_layers_of_zeros_and_values_that_are_not_finite(world):
    state = load_file(tiny(world))
    state["blocks.0.mlp.t_conv.weight"].zero_()
    path = world.work / "diffusion_models" / "odd.safetensors"
    save_file(state, path)
    for precision in PRECISIONS:
        patcher = load(path, precision)
        assert quantised(patcher)["blocks.0.mlp.t_conv"].weight.dequantize().count_nonzero() == 0
        assert torch.isfinite(pass_of(patcher)).all()
    state["blocks.0.attn.proj.weight"][3, 4] = torch.inf
    save_file(state, path)
    with pytest.raises(ValueError, match=r"cannot be quantised.*blocks\.0\.attn\.proj\.weight"):
        load(path, "fp8")


def test_conversion_shows_its_progress_and_ends_on_cancel(world, monkeypatch):
    import comfy.model_management as management
    import comfy.utils

    seen = []

    def hook(value, total, preview, node_id=None):
        seen.append((value, total))
        management.interrupt_current_processing()

    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", hook)
    with pytest.raises(management.InterruptProcessingException):
        load(tiny(world), "fp8")
    assert seen == [(1, 14)]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_error_of_the_embedded_model(world, precision):
    """The figures of ``precision_report.py``, on random text."""
    g = torch.Generator().manual_seed(0)
    path = ip.pack_module("sana_video_core.mini").files()["transformer"]
    rows, whole = measure(precision, path, torch.randn(1, 60, 128, generator=g), torch.ones(1, 60))
    assert len(rows) == 70 and all(0 < row.error < WEIGHT_ERROR[row.format] for row in rows)
    assert len(whole) == (1 if precision == "int8" else 2)
    assert all(0 < figure < PASS_ERROR[precision] for figure in whole.values()), whole
    assert sum(row.after for row in rows) < 0.52 * sum(row.before for row in rows)


# --------------------------------------------------------------------------------------------- saving, LoRAs, fingerprints

@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_saved_quantised_model_loads_again_bit_for_bit(world, precision):
    prefix = f"saved_{precision}"
    outcome = run(graph(precision=precision, n4=ksampler(), n40=node("ModelSave", model=("1", 0), filename_prefix=prefix)))
    assert outcome.ok, outcome.error
    saved, = (world.work / "output").glob(f"{prefix}_*.safetensors")
    (world.work / "diffusion_models" / f"{prefix}.safetensors").write_bytes(saved.read_bytes())
    import folder_paths

    folder_paths.filename_list_cache.clear()
    for again in ("auto", precision):  # the file is taken as it is, not quantised once more
        reloaded = run(graph(model=f"{prefix}.safetensors", precision=again, n4=ksampler()))
        assert same_weights(outcome.output("1"), reloaded.output("1"))
        assert relative(sampled(outcome), sampled(reloaded)) < SAME
        print_of = ip.pack_module("nodes.long").model_print
        assert print_of(outcome.output("1")) == print_of(reloaded.output("1"))
    with safe_open(saved, "pt") as file:
        assert sum(key.endswith(".comfy_quant") for key in file.keys()) == 14


def lora(world):
    g = torch.Generator().manual_seed(1)
    sizes = {"attn.qkv": (384, 128), "mlp.t_conv": (128, 384), "mlp.point_conv.conv": (128, 48),
             "cross_attn.kv_linear": (256, 128)}
    state = {}
    for layer, (rows, columns) in sizes.items():
        state[f"diffusion_model.blocks.0.{layer}.lora_A.weight"] = torch.randn(2, columns, generator=g) * 0.2
        state[f"diffusion_model.blocks.0.{layer}.lora_B.weight"] = torch.randn(rows, 2, generator=g) * 0.2
    state["transformer.transformer_blocks.1.attn1.to_k.lora_A.weight"] = torch.randn(2, 128, generator=g) * 0.2
    state["transformer.transformer_blocks.1.attn1.to_k.lora_B.weight"] = torch.randn(128, 2, generator=g) * 0.2
    save_file(state, world.work / "loras" / "lowbit.safetensors")
    import folder_paths

    folder_paths.filename_list_cache.clear()
    return "lowbit.safetensors"


def with_lora(world, precision):
    return graph(precision=precision, n20=node("SanaVideoLoadLora", model=("1", 0), lora=lora(world), strength=1.0),
                 n4=ksampler(model=("20", 0)))


def merged(world, patcher, key):
    """The exact weight ``key`` with the patches of a model."""
    import comfy.lora

    return comfy.lora.calculate_weight(patcher.patches[f"diffusion_model.{key}"], world.network.state_dict()[key].clone(), key)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_lora_changes_a_quantised_model_as_it_changes_the_exact_one(world, precision):
    """Core adds the LoRA to the expanded weight and packs the sum again, with stochastic rounding."""
    outcome = run(with_lora(world, precision))
    assert outcome.ok and "5 weights changed" in outcome.output("20", 1) and "not understood" not in outcome.output("20", 1)
    plain, exact = load(tiny(world)), run(with_lora(world, "auto")).output("20")
    changed = outcome.output("20")
    before, with_it, low = pass_of(plain), pass_of(exact), pass_of(changed)
    assert relative(with_it, before) > 0.2  # the LoRA shows
    assert relative(low, with_it) < {"nvfp4": 0.3, "int8": 0.05}.get(precision, 0.1)
    layer = quantised(changed)["blocks.0.attn.qkv"]
    wanted = merged(world, changed, "blocks.0.attn.qkv.weight")
    assert relative(layer.weight.dequantize(), wanted) < 2 * WEIGHT_ERROR[layer.quant_format]
    assert relative(wanted, world.network.blocks[0].attn.qkv.weight.detach()) > 4 * WEIGHT_ERROR[layer.quant_format]
    changed.detach()
    assert same_weights(changed, load(tiny(world), precision))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_lora_on_offloaded_weights_is_added_on_the_way(world, precision):
    """With too little memory core keeps the packed weight and adds the LoRA to the expanded one in every call."""
    changed = run(with_lora(world, precision)).output("20")
    exact = pass_of(run(with_lora(world, "auto")).output("20"))
    pass_of(load(tiny(world)))  # another model takes the place, so that this one is unpatched
    changed.detach()
    changed.load(torch.device("cpu"), lowvram_model_memory=64)
    network = changed.model.diffusion_model
    assert len(network.blocks[0].attn.qkv.weight_function) == 1
    g = torch.Generator().manual_seed(0)
    latent, text = torch.randn(1, 16, 3, 4, 8, generator=g), torch.randn(1, 20, 64, generator=g)
    with torch.inference_mode():
        low = network(latent, torch.tensor([400.0]), text)
    assert relative(low, exact) < {"nvfp4": 0.3, "int8": 0.05}.get(precision, 0.1)


def test_a_saved_lora_on_a_quantised_model_stays(world):
    flow = with_lora(world, "fp8") | {"40": node("ModelSave", model=("20", 0), filename_prefix="baked")}
    outcome = run(flow)
    assert outcome.ok, outcome.error
    baked = load(next((world.work / "output").glob("baked_*.safetensors")))
    assert same_weights(baked, outcome.output("20"))
    assert relative(pass_of(baked), pass_of(outcome.output("20"))) < SAME


def test_fingerprints_tell_the_precisions_apart(world, made):
    print_of, prints = ip.pack_module("nodes.long").model_print, {}
    for precision, patcher in {**made, "bf16": load(tiny(world), "bf16"), "fp32": load(tiny(world), "fp32")}.items():
        prints[precision] = print_of(patcher)
        assert print_of(load(tiny(world), precision)) == prints[precision]
    assert len(set(prints.values())) == 6


def test_a_fingerprint_sees_the_scales_and_not_the_loras(world, made):
    long = ip.pack_module("nodes.long")
    patcher, other = load(tiny(world), "fp8"), load(tiny(world), "fp8")
    params = quantised(other)["blocks.1.attn.proj"].weight._params
    params.scale.mul_(2)
    assert long.model_print(other) != long.model_print(patcher) == long.model_print(made["fp8"])
    outcome = run(with_lora(world, "fp8"))
    assert outcome.output("20").backup and long.model_print(outcome.output("20")) == long.model_print(patcher)
    assert long.patches_print(outcome.output("20")) != long.patches_print(patcher) == ""


def test_fingerprints_of_unquantised_models_are_those_of_cores_own_list(world):
    """Saved states and films name them, so they must not change."""
    long, patcher = ip.pack_module("nodes.long"), load(tiny(world))
    listed = [(key, patches[0][0]) for key, patches in patcher.get_key_patches("diffusion_model.").items()]
    assert long.model_print(patcher) == long.weights_print(listed)


def test_a_state_belongs_to_the_precision_that_made_it(world):
    def sampler(model, **more):
        return node("SanaVideoBlockSampler", model=(model, 0), positive=("2", 0), blocks=1, seed=1, block_frames=2, width=64,
                    height=32, **more)

    def loader(precision):
        return node("SanaVideoLoader", model="tiny.safetensors", precision=precision, mode="long",
                    text_encoder="gemma_tiny.safetensors", vae="wan_tiny.safetensors")

    text = graph()["2"]
    flow = {"1": loader("fp8"), "7": loader("bf16"), "2": text, "4": sampler("1"), "5": sampler("1", state=("4", 1)),
            "99": node("SaveLatent", samples=("5", 0), filename_prefix="x")}
    outcome = run(flow)
    assert outcome.ok, outcome.error
    assert torch.isfinite(outcome.output("5")["samples"]).all() and outcome.output("5", 1).blocks == 2
    mixed = run(flow | {"5": sampler("7", state=("4", 1))})
    assert not mixed.ok and "weights differs" in mixed.error


def test_torch_compile_takes_a_quantised_model(world):
    one_block = {key: t for key, t in load_file(tiny(world)).items() if not key.startswith("blocks.1.")}
    save_file(one_block, world.work / "diffusion_models" / "one_block.safetensors")
    import folder_paths

    folder_paths.filename_list_cache.clear()
    flow = {"model": "one_block.safetensors", "precision": "fp8"}
    plain = sampled(run(graph(**flow, n4=ksampler(steps=1))))
    outcome = run(graph(**flow, n20=node("TorchCompileModel", model=("1", 0), backend="inductor"),
                        n4=ksampler(steps=1, model=("20", 0))))
    assert relative(sampled(outcome), plain) < CLOSE


# ------------------------------------------------------------------------------------------------------------- refusals

def test_a_format_that_comfyui_lacks_is_refused_with_what_to_choose(world, monkeypatch):
    import comfy.quant_ops

    path = core_file(world, "mxfp8", "lacking")
    monkeypatch.delitem(comfy.quant_ops.QUANT_ALGOS, "mxfp8")
    for model, precision, what in (("tiny.safetensors", "nvfp4", "Precision 'nvfp4'"), (path.name, "auto", path.name)):
        outcome = run(graph(model=model, precision=precision, n4=ksampler()))
        assert not outcome.ok and what in outcome.error and "does not know the format mxfp8" in outcome.error
        assert "Choose the unquantised model in precision fp8 or int8 or bf16" in outcome.error
    assert run(graph(precision="fp8", n4=ksampler())).ok


@pytest.mark.parametrize(("fault", "words"), [
    (RuntimeError("no kernel"), "RuntimeError: no kernel"), (None, "gives wrong numbers here"),
])
def test_a_format_that_does_not_work_is_refused_with_the_reason(world, monkeypatch, fault, words):
    import comfy.quant_ops as quant

    layout = quant.get_layout_class("TensorCoreFP8E4M3Layout")
    plain = layout.dequantize

    def dequantize(qdata, params):
        if fault:
            raise fault
        return plain(qdata, params) * 2

    monkeypatch.setattr(layout, "dequantize", dequantize)
    outcome = run(graph(precision="fp8", n4=ksampler()))
    assert not outcome.ok and "Precision 'fp8' cannot be used here" in outcome.error and words in outcome.error
    assert "int8 or mxfp8 or nvfp4 or bf16" in outcome.error


def test_without_comfy_kitchen_the_reason_is_said(world, monkeypatch):
    import comfy.quant_ops

    monkeypatch.setattr(comfy.quant_ops, "_CK_AVAILABLE", False)
    outcome = run(graph(precision="int8", n4=ksampler()))
    assert not outcome.ok and "comfy-kitchen is not installed" in outcome.error and "precision bf16" in outcome.error


@pytest.mark.parametrize(("form", "precision", "ok"), [
    ("nvfp4", "fp8", False), ("float8_e4m3fn", "nvfp4", False), ("mxfp8", "nvfp4", True), ("int8_tensorwise", "int8", True),
])
def test_a_quantised_file_is_not_quantised_again(world, form, precision, ok):
    core_file(world, form, "again_low")
    outcome = run(graph(model="again_low.safetensors", precision=precision, n4=ksampler()))
    assert outcome.ok == ok, outcome.error
    assert ok or ("is quantised already" in outcome.error and form in outcome.error and "'auto'" in outcome.error)
