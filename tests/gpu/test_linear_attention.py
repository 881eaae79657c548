"""Hopper's own kernels of the linear attention on a CUDA device against float64 truth (``-m gpu``)."""

from __future__ import annotations

import random

import pytest
import torch
from kernelcases import flat
from test_operators import CASES, DRAWS, REPEATS, TOLERANCE, draw, half_of_largest, noise, poison, relative, wide

from sana_video_core import ops
from sana_video_core.dit.embeddings import rope_table
from sana_video_core.ops import linear_fused, reference

pytestmark = pytest.mark.gpu
WIDTHS = ((2, 80), (4, 96), (20, 112), (2, 128))  # heads, head channels: each is built once


def call(seed: int):
    """Arguments of a case; every fifth reads a slice of something wider, every other goes on from a history."""
    pick = random.Random(seed)
    g, batch, frames, height, width, _, _ = draw(seed)
    heads, dim = pick.choice(WIDTHS)
    tokens, channels = frames * height * width, heads * dim
    qkv = noise(g, batch, tokens, 3 * channels + 16)[..., 16:] if seed % 5 == 0 else noise(g, batch, tokens, 3 * channels)
    weights = [noise(g, channels, scale=0.1) + (1 if seed % 3 else -1) for _ in range(2)]
    sums = (torch.rand(batch, heads, *shape, generator=g, device="cuda") for shape in ((dim, dim), (1, dim)))
    table = rope_table(frames, height, width, dim, start=seed, device="cuda")
    return qkv * (10.0 ** (seed % 4 - 2)), *weights, *table, heads, None if seed % 2 else ops.Contribution(*sums)


@pytest.mark.parametrize("case", range(CASES))
def test_linear_attention(case):
    for seed in range(case * DRAWS, (case + 1) * DRAWS):
        args = call(seed)
        poison(args[0])
        found, own = linear_fused.linear_attention(*args)
        (truth, sums), (plain, _) = reference.linear_attention(*wide(args)), reference.linear_attention(*args)
        assert found.shape == truth.shape and bool(torch.isfinite(found).all())
        assert relative(found, truth) <= TOLERANCE * max(relative(plain, truth), 1e-3)
        assert relative(own.vk, sums.vk) < 4e-3 and relative(own.ksum, sums.ksum) < 1e-5


@pytest.mark.parametrize("case", range(CASES))
def test_outputs_at_a_given_scale(case):
    """As close to float64 as scaling the rounded output; the scale cuts what is beyond half of the largest value. 125 shapes."""
    for seed in range(case * DRAWS, (case + 1) * DRAWS, 4):
        args = call(seed)
        truth = reference.linear_attention(*wide(args))[0]
        given = half_of_largest(truth)
        poison(args[0])
        found, plain = (of.linear_attention(*args, given=given)[0] for of in (linear_fused, reference))
        right = truth.clamp(-given * reference.E4M3_MAX, given * reference.E4M3_MAX)
        ours, theirs = ((r.values.double() * given - right).norm() for r in (found, plain))
        assert found.scale is given and float(ours) <= 1.05 * float(theirs) + 1e-6 * float(right.norm())


def test_rows_of_a_batch_do_not_meet():
    qkv, *others = call(4)
    two = torch.cat((qkv[:1], torch.full_like(qkv[:1], float("nan"))))
    history = ops.Contribution(*(t[:1].expand(2, -1, -1, -1).contiguous() for t in others[-1]))
    found, own = linear_fused.linear_attention(two, *others[:-1], history)
    alone, sums = linear_fused.linear_attention(qkv[:1], *others[:-1], ops.Contribution(*(t[:1] for t in history)))
    assert torch.equal(found[:1], alone) and torch.equal(own.vk[:1], sums.vk) and bool(found[1].isnan().all())


def test_a_call_repeats_bit_for_bit():
    for args, options in ((call(8), {}), (call(9), {"given": torch.tensor(0.01, device="cuda")})):
        expected = flat(linear_fused.linear_attention(*args, **options))
        for _ in range(REPEATS):
            again = flat(linear_fused.linear_attention(*args, **options))
            assert all(torch.equal(a, b) for a, b in zip(again, expected))


def test_hopper_takes_it_and_says_why_not():
    qkv, weight = torch.zeros(1, 60, 3 * 224, device="cuda").bfloat16(), torch.ones(224, device="cuda").bfloat16()
    table = rope_table(1, 6, 10, 112, device="cuda")
    name, _, reasons = ops.linear_attention.choose(qkv, weight, weight, *table, 2)
    assert name == "gluon" if torch.cuda.get_device_capability()[0] == 9 else "capability 9" in reasons["gluon"]
    assert ops.linear_attention.choose(qkv, weight, weight, *rope_table(1, 6, 10, 32, device="cuda"), 7)[0] == "triton"
