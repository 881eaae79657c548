"""The operators inside torch.compile: their declared shapes are the real ones, and a compiled network keeps them."""

from __future__ import annotations

import collections
import dataclasses

import pytest
import torch
from kernelcases import flat

from longvideo import tiny_model
from sana_video_core import ops
from sana_video_core.dit import SanaVideoTransformer, layers
from sana_video_core.dit.embeddings import rope_table
from sana_video_core.ops import library, reference

BATCH, GRID, HEADS, DIM = 2, (2, 2, 3), 2, 4
TOKENS, WIDTH = 12, 8
CHECKS = ("test_schema", "test_faketensor")
pytestmark = pytest.mark.filterwarnings("ignore:Dynamo detected a call to a .functools.lru_cache:UserWarning")


def noise(*shape) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


def arguments() -> dict[str, list[tuple]]:
    """For every operator, calls in the form of the reference."""
    x, y = noise(BATCH, TOKENS, WIDTH), noise(BATCH, TOKENS, WIDTH).flip(1)
    shift, scale, gate = noise(BATCH, GRID[0], 3, WIDTH).unbind(2)
    qkv, weight, table = noise(BATCH, TOKENS, 3 * WIDTH), noise(WIDTH), rope_table(*GRID, DIM)
    k, v = noise(BATCH, 5, 2 * WIDTH).chunk(2, -1)
    history = ops.Contribution(noise(BATCH, HEADS, DIM, DIM), noise(BATCH, HEADS, 1, DIM).abs())
    return {
        "modulate_norm": [(x, shift, scale)], "gated_residual": [(x, y, gate), (x, y, gate, x)],
        "residual_norm": [(x, y, shift, scale)], "rms_norm": [(x, weight, 1e-6), (qkv[..., :WIDTH], weight, 1e-6)],
        "linear_attention": [(qkv, weight, weight, *table, HEADS), (qkv, weight, weight, *table, HEADS, history)],
        "gated_depthwise": [(x, noise(WIDTH, 1, 3, 3), bias, GRID[1:]) for bias in (None, weight)],
        "temporal_taps": [(x, GRID[0]), (x, GRID[0], noise(BATCH, 1, 6, WIDTH))], "row_fp8": [(x,), (x.transpose(1, 2),)],
        "scaled_fp8": [(x,), (x.transpose(1, 2),)],
        "softmax_attention": [(x, k, v, HEADS, None, (3, 5)), (x, k, v, HEADS, None, (4, 2), (weight, 1e-6))],
        "modulate_norm_fp8": [(x, shift, scale)], "residual_norm_fp8": [(x, y, shift, scale)],
        "temporal_taps_fp8": [(x, GRID[0]), (x, GRID[0], noise(BATCH, 1, 6, WIDTH))],
    }


@pytest.mark.parametrize("name", [f.__name__ for f in library.COMPILED])
def test_compiled_form_equals_the_reference_and_declares_what_it_gives(name, monkeypatch):
    """torch's own check of an operator: inputs left alone, fake results of the same shape, dtype and layout as real ones."""
    op, checked = getattr(library, f"_{name}"), []

    def call(*args):
        checked.append(torch.library.opcheck(op, args, test_utils=CHECKS))
        return op(*args)

    monkeypatch.setattr(library, f"_{name}", call)
    for args in arguments()[name]:
        found, expected = flat(getattr(library, name)(*args)), flat(getattr(reference, name)(*args))
        assert len(found) == len(expected) and checked.pop() == dict.fromkeys(CHECKS, "SUCCESS")
        for a, b in zip(found, expected):
            rough = a.dtype == torch.float8_e4m3fn  # which the interpreter rounds in its own way (test_ops_kernels.py)
            assert a.shape == b.shape and a.dtype == b.dtype
            assert torch.allclose(a.float(), b.float(), rtol=0.5 if rough else 1e-5, atol=1e-5)


def network() -> tuple[SanaVideoTransformer, tuple]:
    return tiny_model(depth=1), (noise(1, 4, 2, 4, 4), torch.tensor([500.0]), noise(1, 7, 8))


def graph_of(model, args) -> tuple[torch.Tensor, collections.Counter]:
    """The compiled network's result and the operators of this package in its one graph."""
    seen: collections.Counter = collections.Counter()

    def backend(module, inputs):
        seen.update(str(n.target).split(".")[1] for n in module.graph.nodes if library.NAMESPACE in str(n.target))
        return module

    torch._dynamo.reset()
    with torch.inference_mode():
        return torch.compile(model, backend=backend, fullgraph=True)(*args), seen


def test_a_compiled_network_keeps_the_kernels_where_they_can_run(monkeypatch):
    for op in ops.OPERATORS.values():
        for name, (function, constraint) in op.backends.items():
            if name == "triton":  # the interpreter runs them here
                here = dataclasses.replace(constraint, devices=("cpu",), dtypes=(torch.float32,))
                monkeypatch.setitem(op.backends, name, (function, here))
    model, args = network()
    with ops.force("reference"):
        expected, none = graph_of(model, args)
    found, seen = graph_of(model, args)
    assert not none and torch.allclose(found, expected, atol=1e-5)
    assert seen == {"modulate_norm": 2, "gated_residual": 2, "residual_norm": 1, "rms_norm": 2, "linear_attention": 1,
                    "gated_depthwise": 1, "temporal_taps": 1}


@pytest.mark.parametrize("in_pieces", [False, True])
def test_a_compiled_network_without_a_card_is_the_reference(in_pieces, monkeypatch):
    model, args = network()
    if in_pieces:
        monkeypatch.setattr(layers, "FFN_PASS_BYTES", 1)
    found, seen = graph_of(model, args)
    with torch.inference_mode():
        assert not seen and torch.allclose(found, model(*args), atol=1e-6)
