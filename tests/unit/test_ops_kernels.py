"""The Triton kernels in Triton's interpreter on the CPU: values at awkward sizes, layouts, and nothing left unwritten."""

from __future__ import annotations

import random

import pytest
import torch
from kernelcases import CASES, close, draw, flat, poisoned_memory, scattered, wide  # noqa: F401  (a fixture)

from sana_video_core.dit.embeddings import rope_table
from sana_video_core.ops import fused, reference
from sana_video_core.ops.reference import Contribution


def same_e4m3(found, expected) -> None:
    """Equal but for what the interpreter does: it goes by float16, and loses the carry where rounding reaches the next power
    of two; on a card all bits are equal (tests/gpu)."""
    bits, right = found.view(torch.uint8).int(), expected.view(torch.uint8).int()
    assert bool(((bits == right) | (right % 8 == 0) | ((bits - right).abs() == 1)).all())
    assert (bits != right).float().mean() < 0.1


@pytest.mark.parametrize("seed", range(CASES))
def test_residuals_and_norms(seed):
    noise, batch, frames, height, width, heads, dim = draw(seed)
    tokens, channels = frames * height * width, heads * dim
    x, y, extra = (noise(batch, tokens, channels) for _ in range(3))
    x = scattered(x) if seed % 3 == 0 else x
    rows = noise(1 if seed % 4 == 0 else batch, frames if seed % 2 else 1, 6, channels)
    shift, scale, gate = rows.expand(batch, -1, -1, -1).unbind(2)[:3]
    close(fused.modulate_norm(x + 3, shift, scale), reference.modulate_norm(*wide(x + 3, shift, scale)))
    close(fused.modulate_norm(x, shift, scale.clone()), reference.modulate_norm(*wide(x, shift, scale)))
    for offset in (noise(batch, 1, channels), noise(1, 1, channels)):
        close(fused.modulate_norm(x, shift, scale, offset=offset),
              reference.modulate_norm(*wide(x, shift, scale), offset=offset.float()))
    close(fused.gated_residual(x, y, gate), reference.gated_residual(*wide(x, y, gate)))
    close(fused.gated_residual(x, y, gate, extra), reference.gated_residual(*wide(x, y, gate, extra)))
    for found, expected in zip(fused.residual_norm(x, y, shift, scale), reference.residual_norm(*wide(x, y, shift, scale))):
        close(found, expected)


@pytest.mark.parametrize("channels", [1, 2, 3, 31, 32, 33, 200])
def test_any_width(channels):
    """Powers of two, their neighbours, and the one channel that has no variance."""
    noise = draw(channels)[0]
    x, y = noise(2, 5, channels), noise(2, 5, channels)
    shift, scale = noise(2, 1, channels), noise(2, 1, channels)
    for found, expected in zip(fused.residual_norm(x, y, shift, scale), reference.residual_norm(*wide(x, y, shift, scale))):
        close(found, expected)
    weight = noise(channels) + 1
    close(fused.rms_norm(x, weight, 1e-6), reference.rms_norm(*wide(x, weight, 1e-6)))
    assert torch.equal(fused.temporal_taps(x, 5)[0], reference.temporal_taps(x, 5)[0])


@pytest.mark.parametrize("seed", range(CASES))
def test_rms_norm_of_slices(seed):
    noise, batch, frames, height, width, heads, dim = draw(seed)
    both = noise(batch, frames * height * width, 2 * heads * dim)
    weight = noise(heads * dim, scale=0.1) + 1
    for x in both.chunk(2, -1):
        close(fused.rms_norm(x, weight, 1e-6), reference.rms_norm(*wide(x, weight, 1e-6)))


@pytest.mark.parametrize("seed", range(CASES))
def test_temporal_taps(seed):
    noise, batch, frames, height, width, heads, dim = draw(seed)
    u = noise(batch, frames * height * width, heads * dim)
    u = scattered(u) if seed % 3 == 0 else u
    for tail in (None, noise(batch, 1, height * width, heads * dim), torch.randn(batch, 1, height * width, heads * dim)):
        found, expected = fused.temporal_taps(u, frames, tail), reference.temporal_taps(u, frames, tail)
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@pytest.mark.parametrize("name", ["scaled_fp8", "row_fp8"])
@pytest.mark.parametrize("seed", range(CASES))
def test_fp8(seed, name, monkeypatch):
    noise, batch, frames, height, width, heads, dim = draw(seed)
    monkeypatch.setitem(fused.TUNING, "fp8", (64, 3, 4))  # several programs at these sizes
    monkeypatch.setitem(fused.TUNING, "row_fp8", (1 + seed % 3, 8))
    ours, truth_of = getattr(fused, name), getattr(reference, name)
    made = noise(batch, frames * height * width, heads * dim, scale=10.0 ** (seed - 3))
    for x in (made, scattered(made), made.flatten(1)):
        (found, scale), (expected, truth) = ours(x), truth_of(x)
        assert torch.equal(scale, truth) and found.dtype == torch.float8_e4m3fn and found.shape == x.shape
        assert float(expected.float().abs().max()) == reference.E4M3_MAX
        same_e4m3(found, expected)


@pytest.mark.parametrize("seed", range(CASES))
def test_rows_scaled_by_what_makes_them(seed):
    """Norms against the unrounded norm: no further off than scaling alone. Taps: the same as scaling them afterwards."""
    noise, batch, frames, height, width, heads, dim = draw(seed)
    tokens, channels = frames * height * width, heads * dim
    x, y = noise(batch, tokens, channels), noise(batch, tokens, channels)
    x = scattered(x) if seed % 3 == 0 else x
    shift, scale = noise(batch, frames if seed % 2 else 1, 2, channels).unbind(2)
    total, joined = fused.residual_norm_fp8(x, y, shift, scale)
    expected, normed = reference.residual_norm(*wide(x, y, shift, scale))
    close(total, expected)
    alone = fused.modulate_norm_fp8(x, shift, scale), reference.modulate_norm(*wide(x, shift, scale))
    for rows, truth in ((joined, normed), alone):
        expected = reference.row_fp8(truth)
        assert rows.scale.shape == (batch, tokens, 1) and torch.allclose(rows.scale, expected.scale, rtol=1e-5)
        same_e4m3(rows.values, expected.values)
    for tail in (None, noise(batch, 1, height * width, channels)):
        taps, own = fused.temporal_taps_fp8(x, frames, tail)
        plain, own_too = fused.temporal_taps(x, frames, tail)
        again = fused.row_fp8(plain)
        assert torch.equal(taps.values.view(torch.uint8), again.values.view(torch.uint8))
        assert torch.equal(taps.scale, again.scale) and torch.equal(own, own_too)


@pytest.mark.parametrize("seed", range(2 * CASES))
def test_text_attention(seed, monkeypatch):
    """Rows of several lengths, with and without a norm; keys and values that are halves of one tensor."""
    noise, batch, frames, height, width, heads, dim = draw(seed)
    monkeypatch.setitem(fused.SMALLER, "text", (16, 2, 4, 2))  # several programs at these sizes
    monkeypatch.setattr(fused, "WORDS_HELD", 16)  # longer texts are torch's
    channels, words = heads * dim, random.Random(seed).choice((1, 7, 16, 40))
    q = noise(batch, frames * height * width, channels)
    q = scattered(q) if seed % 4 == 1 else q
    k, v = noise(batch, words, 2 * channels).chunk(2, -1)
    weight = noise(channels, scale=0.1) + 1
    lengths = tuple(random.Random(seed + i).randint(1, words) for i in range(batch))
    for norm in (None, (weight, 1e-6)):
        found = fused.softmax_attention(q, k, v, heads, None, lengths, norm)
        exact = None if norm is None else (weight.float(), 1e-6)
        close(found, reference.softmax_attention(*wide(q, k, v), heads, None, lengths, exact), q.dtype)


def given_calls(seed: int):
    """(operator, arguments) of everything that writes at a given scale."""
    noise, batch, frames, height, width, heads, dim = draw(seed)
    tokens, channels = frames * height * width, heads * dim
    x, y = noise(batch, tokens, channels), noise(batch, tokens, channels)
    x = scattered(x) if seed % 3 == 0 else x
    shift, scale, gate = noise(batch, frames if seed % 2 else 1, 3, channels).unbind(2)
    tail = noise(batch, 1, height * width, channels) if seed % 2 else None
    weight = noise(channels, scale=0.1) + 1
    k, v = noise(batch, 20, 2 * channels).chunk(2, -1)
    lengths = tuple(random.Random(seed + i).randint(1, 20) for i in range(batch))
    taps, bias = noise(2 * channels, 1, 3, 3, scale=0.4), noise(2 * channels) if seed % 2 else None
    table = rope_table(frames, height, width, dim)
    return [
        ("given_fp8", (x,)), ("modulate_norm_fp8", (x, shift, scale)), ("residual_norm_fp8", (x, y, shift, scale)),
        ("gated_residual_fp8", (x, y, gate)), ("temporal_taps_fp8", (x, frames, tail)),
        ("linear_attention", (noise(batch, tokens, 3 * channels), weight, weight, *table, heads)),
        ("softmax_attention", (y, k, v, heads, None, lengths, (weight, 1e-6))),
        ("gated_depthwise", (noise(batch, tokens, 2 * channels), taps, bias, (height, width)))]


@pytest.mark.parametrize("seed", range(CASES))
def test_outputs_at_a_given_scale(seed, monkeypatch):
    """In E4M3 as if scaled afterwards, and cut where they are beyond it: the scale here is for half of the largest value."""
    monkeypatch.setattr(fused, "WORDS_HELD", 16)  # longer texts are torch's
    for name, args in given_calls(seed):
        ours, truth_of = getattr(fused, name), getattr(reference, name)
        exact = [tuple(wide(*a)) if isinstance(a, tuple) and torch.is_tensor(a[0]) else a for a in wide(*args)]
        plain = exact[:1] if name == "given_fp8" else flat(getattr(reference, name.removesuffix("_fp8"))(*exact))
        given = plain[name == "residual_norm_fp8"].abs().max() / 2 / reference.E4M3_MAX
        found, expected = flat(ours(*args, given=given)), flat(truth_of(*exact, given=given))
        assert len(found) == len(expected) and any(t is given for t in found)
        for mine, right in zip(found, expected):
            if right.dtype == torch.float8_e4m3fn:
                assert mine.dtype == right.dtype and mine.shape == right.shape and not mine.float().isnan().any()
                counts = right.view(torch.uint8) % 8 != 0  # the others: see same_e4m3
                mine, right = mine.float()[counts], right.float()[counts]
                assert len(right) and float((mine - right).norm() / right.norm()) < 0.03, name
            elif right.ndim:
                close(mine.contiguous(), right, args[0].dtype)


def test_row_fp8_of_zeros_and_of_nan():
    x = torch.randn(4, 5000)
    x[1], x[2, 4999], x[3, 0] = 0, torch.nan, torch.nan
    for function in (fused.row_fp8, reference.row_fp8):
        found, scale = function(x)
        assert scale.shape == (4, 1) and scale[1] > 0 and not found[1].float().any() and scale[2:].isnan().all()
        assert scale[0].isfinite() and found[0].float().abs().max() == reference.E4M3_MAX


def test_scaled_fp8_of_zeros_and_of_nan():
    zeros, scale = fused.scaled_fp8(torch.zeros(3, 5))
    assert not zeros.float().any() and scale > 0
    for place in (0, 4999):
        x = torch.ones(5000)
        x[place] = torch.nan
        assert fused.scaled_fp8(x)[1].isnan() and reference.scaled_fp8(x)[1].isnan()


@pytest.mark.parametrize("seed", range(CASES))
def test_gated_depthwise(seed):
    noise, batch, frames, height, width, heads, dim = draw(seed)
    hidden = heads * dim + seed % 2
    x = noise(batch, frames * height * width, 2 * hidden, scale=2.0)
    kept = x.clone()
    x = scattered(x) if seed % 4 == 0 else x
    bias = noise(2 * hidden) if seed % 3 else None
    weight = noise(2 * hidden, 1, 3, 3, scale=0.4)
    found = fused.gated_depthwise(x, weight, bias, (height, width), True)
    assert torch.equal(x, kept)
    close(found, reference.gated_depthwise(*wide(x, weight, bias), (height, width)))


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
@pytest.mark.parametrize("value", [1e4, -1e4])
def test_gated_depthwise_at_the_ends_of_silu(value):
    """Huge inputs neither overflow nor become NaN; a dead input gives exactly nothing."""
    x, weight = torch.full((1, 12, 8), value), torch.full((8, 1, 3, 3), 0.01)
    found = fused.gated_depthwise(x, weight, None, (3, 4))
    close(found.float() + 1, reference.gated_depthwise(x.float(), weight.float(), None, (3, 4)) + 1)


@pytest.mark.parametrize("seed", range(CASES))
def test_linear_attention(seed, monkeypatch):
    noise, batch, frames, height, width, heads, dim = draw(seed)
    monkeypatch.setattr(fused, "PROGRAMS", 1 + seed % 3)
    monkeypatch.setattr(fused, "KEY_TOKENS", 5)
    monkeypatch.setattr(fused, "KEY_PROGRAMS", 2)
    tokens, channels = frames * height * width, heads * dim
    weights = [noise(channels, scale=0.1) + 1 for _ in range(2)]
    qkv = noise(batch, tokens, 3 * channels)
    qkv = scattered(qkv) if seed % 3 == 0 else qkv
    table = rope_table(frames, height, width, dim, start=seed)
    history = None if seed % 2 else Contribution(torch.rand(batch, heads, dim, dim), torch.rand(batch, heads, 1, dim))
    out, own = fused.linear_attention(qkv, *weights, *table, heads, history)
    expected, truth = reference.linear_attention(*wide(qkv, *weights), *table, heads, history)
    close(out, expected)
    close(own.vk, truth.vk, qkv.dtype)  # of rounded keys
    close(own.ksum, truth.ksum)


@pytest.mark.parametrize("seed", range(CASES))
def test_factors_of_keys_and_turns(seed):
    """What Hopper's own kernels of the linear attention begin with; those cannot run in the interpreter."""
    noise, batch, frames, height, width, heads, dim = draw(seed)
    tokens, channels = frames * height * width, heads * dim
    qkv, (cos, sin) = noise(batch, tokens, 3 * channels), rope_table(frames, height, width, dim, start=seed)
    factor, turns = torch.empty(batch, tokens), torch.full((tokens, dim // 2), -1, dtype=torch.int32)
    fused._kernels("kernels_attention").key_factor_kernel[(tokens, batch)](
        qkv, cos, sin, turns, factor, tokens, 1e-5, **fused._row(channels), HALF=dim // 2, HALF_BLOCK=fused._block(dim // 2),
        NATIVE=False, num_warps=1)
    keys = qkv[..., channels:2 * channels].float()
    close(factor, (keys.square().mean(-1) + 1e-5).rsqrt())
    halves = turns.view(torch.float16).view(tokens, dim // 2, 2)
    assert torch.equal(halves[..., 0], cos.half()) and torch.equal(halves[..., 1], sin.half())
