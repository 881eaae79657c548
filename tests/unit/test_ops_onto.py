"""Outputs added within their layer's product: the same as adding them afterwards, and nobody's tokens are overwritten."""

from __future__ import annotations

import copy

import pytest
import torch
from kernelcases import CASES, as_on_a_card, draw, tamper
from torch import nn

from longvideo import caption, latent, tiny_model
from sana_video_core import ops
from sana_video_core.dit import layers
from sana_video_core.ops import fused_torch, onto, pairs


def arguments(seed: int):
    """(x, y, weight, bias, gate) of a case in float64."""
    noise, batch, frames, height, width, heads, dim = draw(seed)
    tokens, channels, inner = frames * height * width, heads * dim, 3 + seed
    given = (noise(batch, tokens, channels), noise(batch, tokens, inner), noise(channels, inner), noise(channels),
             noise(batch, 1, channels))
    return tuple(t.double() for t in given)


def plain(x, y, weight, bias, gate):
    return x + gate * nn.functional.linear(y, weight, bias)


@pytest.mark.parametrize("seed", range(2 * CASES))
@pytest.mark.parametrize("of", [onto, fused_torch], ids=["reference", "fused"])
def test_it_is_the_sum(seed, of):
    x, y, weight, bias, gate = arguments(seed)
    y = y.transpose(1, 2).contiguous().transpose(1, 2) if seed % 3 == 0 else y
    for g, scale in ((gate, gate), (gate[:1], gate[:1].expand_as(gate)), (None, torch.ones_like(gate))):
        goal = x.clone()
        found = of.add_product(goal, y, weight, g)
        assert found.data_ptr() == goal.data_ptr()
        torch.testing.assert_close(found, plain(x, y, weight, None, scale))
    into = torch.randn(5, x.shape[-1], dtype=x.dtype)
    for offset, its_bias in ((gate, torch.randn(5, dtype=x.dtype)), (gate, None), (gate[:1], None)):
        found = of.shifted_product(x, offset, into, its_bias)
        torch.testing.assert_close(found, nn.functional.linear(x + offset, into, its_bias))


@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_adds_its_output(bias):
    for seed in range(CASES):
        x, y, weight, b, gate = (t.float() for t in arguments(seed))
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias).requires_grad_(False)
        layer.weight.copy_(weight)
        if bias:
            layer.bias.copy_(b)
        for g in (gate, None):
            goal = x.clone()
            offset = layers.add_onto(layer, goal, y, g)
            expected = plain(x, y, weight, b if bias else None, 1 if g is None else g)
            assert type(goal) is torch.Tensor and (offset is None) == (not bias)
            if bias:
                assert offset.shape[1:] == (1, x.shape[-1]) and offset.data_ptr() != layer.bias.data_ptr()
                again = layers.add_onto(layer, x.clone(), y, None, offset)
                torch.testing.assert_close(again, offset + b)
                reader = nn.Linear(x.shape[-1], 4).requires_grad_(False)
                seen = reader(ops.Shifted.of(goal, offset))
                assert type(seen) is torch.Tensor
                torch.testing.assert_close(seen, reader(expected), rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(goal + (offset if bias else 0), expected, rtol=1e-4, atol=1e-4)


def test_a_card_says_what_it_does_not_add():
    x, y, weight, _, gate = arguments(3)
    assert "as many as channels" in fused_torch.worth_adding(x[:, :1], y[:, :1], weight, gate)
    many = x.repeat(1, 40, 1)
    assert many.shape[1] >= len(weight) and fused_torch.worth_adding(many, many, weight, gate) is None
    assert "one gate" in fused_torch.worth_adding(many, many, weight, gate.expand(-1, 2, -1))


@pytest.fixture
def on_the_cpu(monkeypatch):
    """As if the CPU were a card with these operators, and few tokens worth it; a list of the calls."""
    calls = []

    def counted(*args):
        calls.append(1)
        return fused_torch.add_product(*args)

    as_on_a_card(monkeypatch, ops.OPERATORS, "triton", {name: getattr(pairs, name) for name in (
        "time_pairs", "pair_weights", "pair_residual")})
    as_on_a_card(monkeypatch, ops.OPERATORS, "torch-fused", {"shifted_product": None})
    as_on_a_card(monkeypatch, ops.OPERATORS, "torch-fused", {"add_product": counted}, check=one_gate)
    return calls


def one_gate(x, y, weight, gate=None) -> str | None:
    return "a gate a frame" if gate is not None and gate.shape[1] > 1 else None


def awake(seed: int = 5):
    """A small network whose attentions have biases and gates that matter."""
    model = copy.deepcopy(tiny_model()).requires_grad_(False)  # it is shared
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for block in model.blocks:
            for part in (block.attn.proj.bias, block.cross_attn.proj.bias, block.cross_attn.q_linear.bias):
                part.copy_(torch.randn(part.shape, generator=generator))
            block.scale_shift_table.copy_(torch.randn(block.scale_shift_table.shape, generator=generator))
    return model


@pytest.mark.parametrize(("frames", "batch"), [(2, 2), (3, 1), (4, 2), (5, 1)])
def test_a_network_gives_the_same_either_way(frames, batch, on_the_cpu):
    """Clips and blocks with a history, one time for all frames (and one a frame, which keeps the plain way), and the state."""
    model, x, (y, mask) = awake(), latent(frames, batch=batch), caption(0, batch=batch)
    times, found = torch.linspace(100, 900, batch * frames).view(batch, frames), []
    for backend in ("reference", None):
        with ops.force(backend, "add_product"), torch.no_grad():
            _, state = model.commit(latent(3, 7, batch), y, mask)
            after = model.absorb(x, y, mask, state=state)
            found.append([model(x, times[:, 0], y, mask), *(t for layer in after.layers for t in layer)])
            before = len(on_the_cpu)
            found[-1].append(model(x, times, y, mask, state=state))
            assert len(on_the_cpu) == before  # a gate a frame
            found[-1].append(model(x[:1].expand_as(x), times[:1, 0].expand(batch), y, mask))  # one row up to the texts
        assert bool(on_the_cpu) == (backend is None)
    assert all(float((a - b).norm() / a.norm()) < 1e-5 for a, b in zip(*found, strict=True))


def test_tokens_that_a_hook_may_keep_are_left_as_they_were(on_the_cpu):
    model, x, (y, mask), kept = awake(), latent(3), caption(0), []

    def keep(index, call, tokens):
        out = call(tokens)
        kept.append((tokens, before[index], out, out.clone()))
        return out

    before = []
    args = x, torch.full((1,), 500.0), y, mask
    with torch.no_grad():
        expected = model(*args, on_block=lambda i, call, t: before.append(t.clone()) or call(t))
        found = model(*args, on_block=keep)
        spent = model(*args, on_block=lambda i, call, t: call(t, True))
        assert torch.equal(model(*args), expected)
        for block in model.blocks:  # torch's own hooks
            block.register_forward_pre_hook(lambda _, given: kept.append(2 * (given[0], given[0].clone())))
        assert torch.equal(model(*args), expected) and len(kept) == 2 * len(model.blocks)
    assert all(torch.equal(tokens, was) and torch.equal(out, gave) for tokens, was, out, gave in kept)
    assert torch.equal(found, expected) and torch.equal(spent, expected) and on_the_cpu


def test_gradients_keep_the_plain_way(on_the_cpu):
    """Also where only a text has them: a value that was changed in its place has none."""
    model, (y, mask) = awake(), caption(0)
    y = y.clone().requires_grad_()
    model(latent(3), torch.full((1,), 500.0), y, mask).square().sum().backward()
    assert bool(y.grad.abs().sum() > 0) and not on_the_cpu


@pytest.mark.parametrize("what", ["hook", "forward", "dtype", "force"])
@pytest.mark.parametrize("where", ["attn.proj", "cross_attn.q_linear", "cross_attn.proj", "mlp.t_conv", "attn", "cross_attn"])
def test_layers_that_others_have_changed_keep_the_plain_way(what, where, on_the_cpu):
    block = awake().blocks[0]
    layer, width = block.get_submodule(where), block.attn.proj.in_features
    x, gate = torch.zeros(1, 4 * width, width), torch.zeros(1, 1, width)

    def adds(frames: int = 4) -> bool:
        with torch.no_grad():
            return block._adds_onto(x, gate, frames, None)

    assert adds() and not adds(1) and not block._adds_onto(x, gate, 4, None)
    tamper(layer, what)
    with ops.force("reference" if what == "force" else None):
        assert not adds()
