"""Hopper's own kernel of the text attention on a CUDA device against float64 truth (``-m gpu``)."""

from __future__ import annotations

import random

import pytest
import torch
from test_operators import CASES, DRAWS, REPEATS, TOLERANCE, draw, half_of_largest, noise, poison, relative, wide

from sana_video_core import ops
from sana_video_core.ops import reference, softmax_fused

pytestmark = pytest.mark.gpu
WIDTHS = ((1, 80), (3, 96), (20, 112), (2, 128))  # heads, head channels
WORDS = (5, 64, 128, 300)  # text tokens of a call, of which any number is valid: each form is built for some


def call(seed: int):
    """Arguments of a case: keys and values that are halves of one tensor, queries that stand for all rows or lie scattered."""
    pick = random.Random(seed)
    g, batch, frames, height, width, _, _ = draw(seed)
    heads, dim = pick.choice(WIDTHS)
    tokens, channels, words = frames * height * width, heads * dim, pick.choice(WORDS)
    k, v = noise(g, batch, words, 2 * channels).chunk(2, -1)
    q = noise(g, batch, tokens, channels)
    q = q[:1].expand(batch, -1, -1) if seed % 7 == 0 else q.transpose(1, 2).contiguous().transpose(1, 2) if seed % 5 == 0 else q
    norm = None if seed % 3 == 0 else (noise(g, channels, scale=0.1) + 1, 1e-6)
    return q, k, v, heads, None, tuple(pick.randint(1, words) for _ in range(batch)), norm


@pytest.mark.parametrize("case", range(CASES))
def test_text_attention(case):
    for seed in range(case * DRAWS, (case + 1) * DRAWS):
        args = call(seed)
        poison(args[0])
        found, expected = softmax_fused.softmax_attention(*args), reference.softmax_attention(*wide(args))
        assert found.shape == expected.shape and bool(torch.isfinite(found).all())
        assert relative(found, expected) <= TOLERANCE * max(relative(reference.softmax_attention(*args), expected), 1e-3)


@pytest.mark.parametrize("case", range(CASES))
def test_outputs_at_a_given_scale(case):
    """As close to float64 as scaling the rounded output; the scale cuts what is beyond half of the largest value. 125 shapes."""
    for seed in range(case * DRAWS, (case + 1) * DRAWS, 4):
        args = call(seed)
        truth = reference.softmax_attention(*wide(args))
        given = half_of_largest(truth)
        poison(args[0])
        found, plain = (of.softmax_attention(*args, given=given) for of in (softmax_fused, reference))
        right = truth.clamp(-given * reference.E4M3_MAX, given * reference.E4M3_MAX)
        ours, theirs = ((r.values.double() * given - right).norm() for r in (found, plain))
        assert found.scale is given and float(ours) <= 1.05 * float(theirs) + 1e-6 * float(right.norm())


@pytest.mark.parametrize("dim", [80, 112])
def test_heads_and_tokens_do_not_meet(dim):
    """A tile of queries is wider than a head: what is beyond it, another head's or token's, may be no number at all."""
    g = torch.Generator("cuda").manual_seed(0)
    q, k, v = noise(g, 1, 200, 3 * dim), noise(g, 1, 90, 3 * dim), noise(g, 1, 90, 3 * dim)
    expected = softmax_fused.softmax_attention(q, k, v, 3, None, (77,))
    q[:, :, dim:2 * dim] = float("nan")
    q[:, 100] = float("inf")
    found = softmax_fused.softmax_attention(q, k, v, 3, None, (77,))
    for rows in (slice(0, 100), slice(101, 200)):
        for head in (0, 2):
            columns = slice(head * dim, (head + 1) * dim)
            assert torch.equal(found[:, rows, columns], expected[:, rows, columns])


def test_a_call_repeats_bit_for_bit():
    """Every form: one, two and several pieces of text."""
    g = torch.Generator("cuda").manual_seed(1)
    for words in (40, 120, 300):
        q, k, v = noise(g, 1, 5000, 2240), noise(g, 1, 300, 2240), noise(g, 1, 300, 2240)
        args = q, k, v, 20, None, (words,), (noise(g, 2240, scale=0.1) + 1, 1e-6)
        expected = softmax_fused.softmax_attention(*args)
        assert all(torch.equal(softmax_fused.softmax_attention(*args), expected) for _ in range(REPEATS))


def test_hopper_takes_it_and_says_why_not():
    q, k = torch.zeros(1, 60, 224, device="cuda").bfloat16(), torch.zeros(1, 400, 224, device="cuda").bfloat16()
    name, _, reasons = ops.softmax_attention.choose(q, k, k, 2, None, (300,))
    assert name == "gluon" if torch.cuda.get_device_capability()[0] == 9 else "capability 9" in reasons["gluon"]
    assert ops.softmax_attention.choose(q, k, k, 2, None, (400,))[0] == "torch-fused"
