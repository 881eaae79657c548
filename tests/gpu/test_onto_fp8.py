"""Products in E4M3 that are added onto the tokens, on a CUDA device against float64 truth (``-m gpu``)."""

from __future__ import annotations

import random

import pytest
import torch
from test_operators import CASES, DRAWS, REPEATS, TOLERANCE, draw, noise, poison, relative, wide

from sana_video_core import ops
from sana_video_core.ops import onto_fp8, onto_fused, reference

pytestmark = pytest.mark.gpu
# Channels, inner width, a scale a row, a bias, a gate, something more to add, an answer in E4M3, taps in time; each is built once
FORMS = [(2240, 2240, False, True, True, False, True, False), (2240, 2240, True, True, False, False, False, False),
         (2240, 6720, True, False, True, True, False, False), (2240, 2240, False, False, True, True, False, True),
         (16, 16, False, True, False, False, True, False), (272, 144, True, False, False, False, False, False),
         (400, 80, False, False, True, False, True, True), (144, 336, False, False, True, True, False, True)]


def call(seed: int, form: tuple):
    """(arguments, options) of a case; the tokens lie between NaN."""
    channels, inner, by_row, bias, gate, extra, given, taps = form
    g, batch, frames, height, width, _, _ = draw(seed)
    tokens, size = frames * height * width, height * width
    guarded = torch.full((batch * tokens * channels + 2048,), float("nan"), device="cuda", dtype=torch.bfloat16)
    x = guarded[1024:-1024].view(batch, tokens, channels)
    x.copy_(noise(g, batch, tokens, channels))
    if taps:
        tail = noise(g, batch, 1, size, inner) if seed % 2 else None
        y = onto_fused.framed_fp8(noise(g, batch, tokens, inner), frames, tail, given=torch.tensor(1 / 64, device="cuda"))
    else:
        y = noise(g, batch, tokens, inner)
        y = reference.row_fp8(y) if by_row else reference.given_fp8(y, torch.tensor(1 / 64, device="cuda"))
    weight = ops.Rows(*reference.scaled_fp8(noise(g, channels, inner * (3 if taps else 1), scale=inner**-0.5)))
    rows = 1 if seed % 3 == 0 else batch
    options = {"frames": frames if taps else 0, "given": torch.tensor(1 / 64, device="cuda") if given else None}
    return guarded, (x, y, weight, noise(g, channels) if bias else None, noise(g, rows, 1, channels) if gate else None,
                     noise(g, batch, tokens, channels) if extra else None), options


def plainly(x, y, weight, bias, gate, extra, *, frames, given):
    """By torch's product with a scale a row and passes over the tokens, as without the kernel."""
    values, scale = y.values.view(torch.uint8), y.scale
    if frames:
        wide = values.unflatten(0, (len(x), frames + 2, -1))
        values = torch.cat((wide[:, :-2], wide[:, 1:-1], wide[:, 2:]), -1)
    values = values.reshape(x.shape[0] * x.shape[1], -1).view(torch.float8_e4m3fn)
    product = torch._scaled_mm(values, weight.values.t(), scale.reshape(-1, 1).expand(len(values), 1).contiguous(),
                               weight.scale.expand(1, len(weight.values)).contiguous(), bias=bias, out_dtype=torch.bfloat16,
                               use_fast_accum=True).view(x.shape)
    gate = torch.ones_like(x[:1, :1]) if gate is None else gate.expand(len(x), -1, -1)
    total = reference.gated_residual(x, product, gate, extra)
    return total, None if given is None else reference.given_fp8(total, given).values


@pytest.mark.parametrize("case", range(CASES))
def test_products_added_to_the_tokens(case):
    for seed in range(case * DRAWS, (case + 1) * DRAWS):
        guarded, args, options = call(seed, FORMS[random.Random(seed).randrange(len(FORMS))])
        x, given = args[0], options["given"]
        exact = onto_fp8.add_product_fp8(*wide(args), frames=options["frames"])  # the Rows stay as they are
        plain, plain_fp8 = plainly(*args, **options)
        poison(x)
        found = onto_fused.add_product_fp8(*args, **options)
        assert bool(torch.isfinite(x).all()) and bool(guarded[:1024].isnan().all()) and bool(guarded[-1024:].isnan().all())
        assert relative(x, exact) <= TOLERANCE * max(relative(plain, exact), 1e-3)
        if given is None:
            assert found is x
        else:
            right = exact.clamp(-448 * given, 448 * given)
            ours, theirs = ((values.double() * given - right).norm() for values in (found.values, plain_fp8))
            assert found.scale is given and bool(torch.isfinite(found.values.float()).all())
            assert float(ours) <= 1.05 * float(theirs)


@pytest.mark.parametrize("form", FORMS[:4])
def test_a_sum_repeats_bit_for_bit(form):
    guarded, (x, *others), options = call(7, form)
    before, first = x.clone(), None
    for _ in range(REPEATS):
        x.copy_(before)
        found = onto_fused.add_product_fp8(x, *others, **options)
        found = (x.clone(), found.values.view(torch.uint8).clone() if options["given"] is not None else x)
        first = first or found
        assert all(torch.equal(a, b) for a, b in zip(found, first))


def test_hopper_takes_it_and_says_why_not():
    x = torch.zeros(2, 32760, 2240, device="cuda").bfloat16()
    like = ops.Rows(x, x)
    name, _, reasons = ops.add_product_fp8.choose(x, like, like)
    assert name == "gluon" if torch.cuda.get_device_capability()[0] == 9 else "capability 9" in reasons["gluon"]
    assert ops.add_product_fp8.choose(x[:1, :1000].contiguous(), like, like)[0] == "reference"


@pytest.mark.parametrize("case", range(CASES))
def test_frames_are_framed(case):
    for seed in range(case * DRAWS, (case + 1) * DRAWS):
        g, batch, frames, height, width, heads, dim = draw(seed)
        u = noise(g, batch, frames * height * width, heads * dim)
        u = u.transpose(1, 2).contiguous().transpose(1, 2) if seed % 5 == 0 else u
        tail, given = noise(g, batch, 1, height * width, heads * dim) if seed % 2 else None, u.abs().max().float() / 300
        poison(u)
        found, expected = (of.framed_fp8(u, frames, tail, given=given).values for of in (onto_fused, onto_fp8))
        assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))
