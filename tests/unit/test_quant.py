"""Low-bit policies, the formats' tensors, marks and strict checks of quantised files, the error table. No ComfyUI here."""

from __future__ import annotations

import json
import math

import pytest
import torch
from checkpoints import meta_state, random_state, small_spec

from sana_video_core import SPECS
from sana_video_core.checkpoint import convert
from sana_video_core.checkpoint.keys import key_table
from sana_video_core.errors import CheckpointError, SanaVideoError
from sana_video_core.quant.files import check_layers, read_marks
from sana_video_core.quant.formats import FORMATS, mark_tensor, rotation, tensor_scale
from sana_video_core.quant.policy import EARLY, KEPT, POLICIES, Mark, formats_of, plan
from sana_video_core.quant.report import LayerError, relative_error, table

MODELS = ["sana-video-2b-480p", "sana-video-2b-720p", "longsana-2b-480p", "sana-video-mini"]


def linear_layers(spec):
    return {key.removesuffix(".weight") for key, entry in key_table(spec).items()
            if key.endswith(".weight") and len(entry.native) == 2}


# --------------------------------------------------------------------------------------------------------------- policy

@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("precision", POLICIES)
def test_every_matrix_is_either_planned_or_kept_for_a_reason(precision, name):
    spec = SPECS[name]
    marks = plan(spec, precision)
    kept = {layer for layer in linear_layers(spec) if any(layer == k or layer.endswith(f".{k}") for k in KEPT)}
    assert set(marks) | kept == linear_layers(spec) and not set(marks) & kept
    assert len(marks) == 7 * spec.depth and {m.format for m in marks.values()} == formats_of(precision) <= set(FORMATS)


def test_the_four_bit_policy_keeps_the_first_feed_forward_layers_and_the_values_in_eight_bits():
    marks = plan(SPECS["sana-video-2b-480p"], "nvfp4")
    four = {layer for layer, mark in marks.items() if mark.format == "nvfp4"}
    ffn = ("mlp.inverted_conv.conv", "mlp.point_conv.conv", "mlp.t_conv")
    assert EARLY * 20 == 6
    assert four == {f"blocks.{i}.{layer}" for i in range(6, 20) for layer in ffn} | {
        f"blocks.{i}.cross_attn.proj" for i in range(20)}
    assert {mark.format for layer, mark in marks.items() if layer not in four} == {"mxfp8"}


def test_fp8_multiplies_in_eight_bits_but_for_the_layer_that_reads_the_residual_stream():
    marks = plan(SPECS["sana-video-2b-480p"], "fp8")
    slow = {layer.split(".", 2)[2] for layer, mark in marks.items() if mark.options}
    assert slow == {"cross_attn.q_linear"}
    assert all(m.options == {"full_precision_matrix_mult": True} for m in marks.values() if m.options)


@pytest.mark.parametrize(("hidden", "group"), [(384, 64), (48, 16), (36, 4), (39, None)])
def test_rotation_gets_the_largest_group_that_divides_the_inputs(hidden, group):
    spec = small_spec(width=128, linear_head_dim=32, ffn_hidden=hidden)
    mark = plan(spec, "int8")["blocks.0.mlp.point_conv.conv"]
    assert mark.options.get("convrot_groupsize") == group and rotation(mark) == (group or 0)
    assert plan(SPECS["sana-video-2b-480p"], "int8")["blocks.0.attn.qkv"].options == {"convrot": True, "convrot_groupsize": 64}


def test_planning_does_not_change_the_policy_and_unknown_names_are_refused():
    before = repr(POLICIES)
    plan(SPECS["sana-video-mini"], "int8")["blocks.0.attn.qkv"].options["convrot"] = False
    assert repr(POLICIES) == before
    with pytest.raises(SanaVideoError, match="fp8, int8, mxfp8, nvfp4"):
        plan(SPECS["sana-video-mini"], "fp6")


def test_share_of_the_weights_that_the_policies_cover():
    spec = SPECS["sana-video-2b-480p"]
    state = meta_state(spec, "native")
    planned = sum(state[f"{layer}.weight"].numel() for layer in plan(spec, "fp8"))
    assert planned / sum(t.numel() for t in state.values()) == pytest.approx(0.88, abs=0.005)


# -------------------------------------------------------------------------------------------------------------- formats

def part(name, suffix):
    return next(p for p in FORMATS[name] if p.suffix == suffix)


@pytest.mark.parametrize(("name", "suffix", "matrix", "shape"), [  # the table of performance spec 3
    ("nvfp4", ".weight", (2240, 2240), (2240, 1120)), ("nvfp4", ".weight_scale", (2240, 2240), (2304, 140)),
    ("nvfp4", ".weight", (6720, 2240), (6720, 1120)), ("nvfp4", ".weight_scale", (6720, 2240), (6784, 140)),
    ("nvfp4", ".weight_scale", (13440, 2240), (13440, 140)), ("nvfp4", ".weight_scale", (2240, 6720), (2304, 420)),
    ("nvfp4", ".weight_scale", (2240, 2304), (2304, 144)), ("mxfp8", ".weight_scale", (2240, 2240), (2304, 72)),
    ("mxfp8", ".weight", (2240, 6720), (2240, 6720)), ("mxfp8", ".weight", (20, 48), (32, 64)),
    ("float8_e4m3fn", ".weight_scale", (9, 9), ()), ("int8_tensorwise", ".weight_scale", (9, 5), (9, 1)),
])
def test_shapes_of_the_formats(name, suffix, matrix, shape):
    assert part(name, suffix).shapes(*matrix)[0] == shape


def test_tensor_scale_maps_the_largest_value_to_the_formats_largest():
    weight = torch.tensor([[0.5, -3.0], [1.0, 2.0]])
    assert float(tensor_scale(weight, "float8_e4m3fn")) == pytest.approx(3 / 448)
    assert float(tensor_scale(weight, "nvfp4")) == pytest.approx(3 / 2688)
    assert tensor_scale(torch.zeros(2, 2), "nvfp4") == 1 and tensor_scale(weight.bfloat16(), "nvfp4").dtype == torch.float32


# ---------------------------------------------------------------------------------------------------- marks and checks

SPEC = small_spec()
QKV, UP, TIME = "blocks.0.attn.qkv", "blocks.1.mlp.inverted_conv.conv", "blocks.1.mlp.t_conv"


def quantised_state(marks):
    """A native state whose marked layers have zeros of the right shapes, and scales of 1."""
    state = convert(random_state(SPEC), SPEC)
    for layer, mark in marks.items():
        rows, columns = key_table(SPEC)[f"{layer}.weight"].native
        for p in FORMATS[mark.format]:
            if p.needed:
                fill = torch.ones if p.suffix != ".weight" else torch.zeros
                state[layer + p.suffix] = fill(p.shapes(rows, columns)[0]).to(p.dtypes[0])
        state[f"{layer}.comfy_quant"] = mark_tensor(mark)
    return state


@pytest.fixture
def marks():
    return {QKV: Mark("float8_e4m3fn", {"full_precision_matrix_mult": True}), UP: Mark("nvfp4", {}), TIME: Mark("mxfp8", {})}


def header(marks, prefix=""):
    layers = {prefix + layer: {"format": mark.format} | mark.options for layer, mark in marks.items()}
    return {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}


def test_marks_are_read_from_tensors_and_from_the_header(marks):
    state = quantised_state(marks)
    assert read_marks(state, {}) == marks
    bare = {key: t for key, t in state.items() if not key.endswith(".comfy_quant")}
    assert read_marks(bare, {}) == {}
    for prefix in ("", "model.diffusion_model.", "diffusion_model."):
        assert read_marks(bare, header(marks, prefix)) == marks == read_marks(state, header(marks, prefix))
    check_layers(state, marks, SPEC)


@pytest.mark.parametrize(("tensor", "words"), [
    (torch.zeros(4), "a short row of bytes"), (torch.zeros(5000, dtype=torch.uint8), "a short row of bytes"),
    (torch.tensor(list(b"{"), dtype=torch.uint8), "not valid JSON"), (torch.tensor(list(b"[]"), dtype=torch.uint8), "damaged"),
    (torch.tensor(list(b'{"format": "int3"}'), dtype=torch.uint8), "int3"),
    (torch.tensor(list(b'{"convrot": true}'), dtype=torch.uint8), "None"),
    (torch.tensor(list(b'{"format": "nvfp4", "full_precision_matrix_mult": 1}'), dtype=torch.uint8), "unknown way"),
    (torch.tensor(list(b'{"format": "int8_tensorwise", "convrot": true, "convrot_groupsize": 0}'), dtype=torch.uint8),
     "unknown way"),
])
def test_marks_that_cannot_be_read_are_refused(marks, tensor, words):
    with pytest.raises(CheckpointError, match=words):
        read_marks(quantised_state(marks) | {f"{QKV}.comfy_quant": tensor}, {}, "file")


@pytest.mark.parametrize("text", ["[]", "{", '{"layers": [1]}', '{"layers": {"blocks.0.attn.qkv": "fp8"}}'])
def test_header_lists_that_cannot_be_read_are_refused(marks, text):
    with pytest.raises(CheckpointError):
        read_marks(quantised_state(marks), {"_quantization_metadata": text}, "file")


def test_two_descriptions_that_differ_are_refused(marks):
    with pytest.raises(CheckpointError, match="two descriptions"):
        read_marks(quantised_state(marks), header(marks | {QKV: Mark("float8_e5m2", {})}))



@pytest.mark.parametrize(("change", "words"), [
    (lambda s: s.pop(f"{QKV}.weight"), ["1 missing", f"{QKV}.weight"]),
    (lambda s: s.pop(f"{QKV}.weight_scale"), ["1 missing", f"{QKV}.weight_scale"]),
    (lambda s: [s.pop(f"{UP}.weight_scale_2"), s.pop(f"{TIME}.weight_scale")],
     ["2 missing", f"{UP}.weight_scale_2", f"{TIME}.weight_scale"]),
    (lambda s: s.update({f"{QKV}.weight_scale_2": torch.ones(())}), ["1 unexpected", f"{QKV}.weight_scale_2"]),
    (lambda s: s.update({f"{QKV}.pre_quant_scale": torch.ones(24)}), ["1 unexpected", f"{QKV}.pre_quant_scale"]),
    (lambda s: s.update({f"{UP}.weight_scale": s[f"{UP}.weight_scale"][:72, :2].clone()}),
     ["1 of another shape", f"{UP}.weight_scale [72, 2] instead of [128, 4]"]),
    (lambda s: s.update({f"{QKV}.weight": s[f"{QKV}.weight"].bfloat16()}),
     ["1 of a wrong dtype", f"{QKV}.weight bfloat16 instead of float8_e4m3fn"]),
    (lambda s: s.update({f"{QKV}.weight_scale": torch.tensor(math.nan)}), ["1 not a scale", f"{QKV}.weight_scale"]),
    (lambda s: s.update({f"{QKV}.weight_scale": torch.tensor(-1.0)}), ["1 not a scale", f"{QKV}.weight_scale"]),
])
def test_what_does_not_fit_is_named(marks, change, words):
    state = quantised_state(marks)
    change(state)
    with pytest.raises(CheckpointError) as error:
        check_layers(state, marks, SPEC, "file.safetensors")
    assert all(word in str(error.value) for word in ["file.safetensors", *words]), str(error.value)


@pytest.mark.parametrize("layer", ["blocks.0.attn.q_norm", "blocks.0.mlp.depth_conv.conv", "blocks.9.attn.qkv", "nowhere"])
def test_only_matrices_can_be_quantised(marks, layer):
    with pytest.raises(CheckpointError, match=rf"1 unexpected \({layer.replace('.', chr(92) + '.')} \(quantised\)\)"):
        check_layers(quantised_state(marks), marks | {layer: Mark("float8_e4m3fn", {})}, SPEC)


def test_int8_scales_are_one_or_a_column_and_rotation_must_fit():
    marks = {QKV: Mark("int8_tensorwise", {"convrot": True, "convrot_groupsize": 4})}
    state = quantised_state(marks)
    for scale in (torch.ones(72, 1), torch.ones(()), torch.ones(1)):
        check_layers(state | {f"{QKV}.weight_scale": scale}, marks, SPEC)
    with pytest.raises(CheckpointError, match="of another shape"):
        check_layers(state | {f"{QKV}.weight_scale": torch.ones(72)}, marks, SPEC)
    with pytest.raises(CheckpointError, match="groups of 16 for 24 inputs"):
        check_layers(state, {QKV: Mark("int8_tensorwise", {"params": {"convrot": True, "convrot_groupsize": 16}})}, SPEC)


def test_quantised_convolutions_of_one_number_a_weight_become_matrices():
    """Such files can come from tools that quantise the official layout; per-tensor scales do not care about it."""
    state = random_state(SPEC)
    original = {key: (t * 50).to(torch.float8_e4m3fn) if key in (f"{UP}.weight", f"{TIME}.weight") else t
                for key, t in state.items()}
    marks = {layer: Mark("float8_e4m3fn", {}) for layer in (UP, TIME)}
    original |= {f"{layer}.weight_scale": torch.tensor(0.02) for layer in marks}
    check_layers(original, marks, SPEC)
    native, exact = convert(original, SPEC, quantised=marks), convert(state, SPEC)
    for layer in marks:
        assert native[f"{layer}.weight"].dtype == torch.float8_e4m3fn
        assert relative_error(native[f"{layer}.weight"].float() * 0.02, exact[f"{layer}.weight"]) < 0.04
    packed = original | {f"{TIME}.weight": torch.zeros(24, 24, 3, 1, dtype=torch.uint8)}
    with pytest.raises(CheckpointError, match="of another shape"):
        check_layers(packed, marks | {TIME: Mark("nvfp4", {})}, SPEC)


# --------------------------------------------------------------------------------------------------------------- report

def test_relative_error():
    exact = torch.tensor([3.0, 4.0])
    assert relative_error(exact, exact) == 0 and relative_error(exact + torch.tensor([0.0, 0.5]), exact) == pytest.approx(0.1)
    assert relative_error(torch.tensor([0.0, 2.0]), torch.zeros(2)) == 2


def test_the_table_sums_up_over_blocks_or_lists_every_layer():
    rows = [LayerError("blocks.0.attn.qkv", "nvfp4", 0.1, 2_000_000, 500_000),
            LayerError("blocks.1.attn.qkv", "nvfp4", 0.3, 2_000_000, 500_000),
            LayerError("blocks.1.attn.proj", "mxfp8", 0.02, 1_000_000, 500_000)]
    short = table(rows, {"whole": 0.05}).splitlines()
    assert short[1].split() == ["attn.qkv", "nvfp4", "2", "0.2000", "0.3000"] and short[2].startswith("attn.proj ")
    assert short[3] == "these 3 layers: 1.50 MB instead of 5.00 MB in 16 bits" and short[4] == "whole: 0.0500" and len(short) == 5
    every = table(rows, {}, every=True).splitlines()
    assert [line.split()[0] for line in every[1:4]] == [row.layer for row in rows]
