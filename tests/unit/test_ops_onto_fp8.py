"""Products in E4M3 that are added onto the tokens: the reference, what the kernel is asked for, and framed frames."""

from __future__ import annotations

import pytest
import torch
from kernelcases import CASES, draw, poisoned_memory, scattered  # noqa: F401 (a fixture)

from sana_video_core import ops
from sana_video_core.ops import onto_fp8, onto_fused, reference


@pytest.mark.parametrize("seed", range(2 * CASES))
def test_the_reference_is_the_sum(seed):
    noise, batch, frames, height, width, heads, dim = draw(seed)
    tokens, channels, inner = frames * height * width, heads * dim, 3 + seed
    x, extra, bias, gate = (noise(*s).float() for s in (
        (batch, tokens, channels), (batch, tokens, channels), (channels,), (batch, 1, channels)))
    y, weight = reference.row_fp8(noise(batch, tokens, inner)), ops.Rows(*reference.scaled_fp8(noise(channels, inner)))
    if seed % 2:  # as a layer hands them on
        y = ops.Rows(y.values.flatten(0, 1), y.scale.flatten(0, 1))
    exact = (y.values.float() * y.scale).view(batch, tokens, inner) @ (weight.values.float() * weight.scale).t()
    for bias_, gate_, extra_ in ((bias, gate, extra), (bias, None, None), (None, gate[:1], None)):
        goal = x.clone()
        total = exact + (0 if bias_ is None else bias_) + (0 if extra_ is None else extra_)
        expected = x + (1 if gate_ is None else gate_) * total
        found = onto_fp8.add_product_fp8(goal, y, weight, bias_, gate_, extra_)
        assert found is goal
        torch.testing.assert_close(found, expected)
        given, goal = expected.abs().max() / 100, x.clone()
        found = onto_fp8.add_product_fp8(goal, y, weight, bias_, gate_, extra_, given=given)
        torch.testing.assert_close(goal, expected)
        assert found.scale is given and torch.equal(found.values.float(), reference.given_fp8(goal, given).values.float())


@pytest.mark.parametrize("seed", range(CASES))
def test_framed_rows_are_multiplied_with_their_neighbours_in_time(seed):
    noise, batch, frames, height, width, heads, dim = draw(seed)
    size, channels, given = height * width, heads * dim, torch.tensor(1 / 64)
    u, x = noise(batch, frames * size, channels).float(), noise(batch, frames * size, channels).float()
    weight, gate = ops.Rows(*reference.scaled_fp8(noise(channels, 3 * channels))), noise(batch, 1, channels).float()
    for tail in (None, noise(batch, 1, size, channels).float()):
        taps, _ = reference.temporal_taps_fp8(u, frames, tail, given=given)
        expected = onto_fp8.add_product_fp8(x.clone(), taps, weight, None, gate, u)
        framed = onto_fp8.framed_fp8(u, frames, tail, given=given)
        assert framed.values.shape == (batch * (frames + 2) * size, channels)
        assert torch.equal(onto_fp8.add_product_fp8(x.clone(), framed, weight, None, gate, u, frames=frames), expected)


@pytest.mark.parametrize("seed", range(2 * CASES))
def test_frames_are_framed_in_one_pass(seed, poisoned_memory):  # noqa: F811
    """In Triton's interpreter, which loses what a rounding carries over; such values are left out."""
    noise, batch, frames, height, width, heads, dim = draw(seed)
    u = noise(batch, frames * height * width, heads * dim)
    u = scattered(u) if seed % 3 == 0 else u
    for tail in (None, noise(batch, 1, height * width, heads * dim)):
        given = torch.tensor(float(u.abs().max()) / 200)  # the largest values are cut
        found = onto_fused.framed_fp8(u, frames, tail, given=given)
        expected = onto_fp8.framed_fp8(u, frames, tail, given=given)
        assert found.scale is given and found.values.shape == expected.values.shape
        counts = expected.values.view(torch.uint8) % 8 != 0
        mine, right = found.values.float(), expected.values.float()
        assert float((mine == right)[counts].float().mean()) > 0.9
        wide = mine.unflatten(0, (batch, frames + 2, -1))
        assert not wide[:, -1].any() and not mine.isnan().any() and bool(wide[:, 0].any()) == (tail is not None)


def test_what_the_kernel_is_not_asked_for():
    x, y = torch.zeros(2, 16384, 2240).bfloat16(), torch.zeros(2, 16384, 2240)
    like, gate = ops.Rows(y, y), x[:, :1]
    refused = onto_fused.refuses
    assert refused(x, like, like, None, gate) is None and refused(x, like, like) is None
    assert "one gate" in refused(x, like, like, None, gate.expand(-1, 4, -1))
    assert "no room" in refused(x, like, like, None, gate, x, given=torch.tensor(1.0))
    assert "contiguous" in refused(x.transpose(0, 1), like, like)
    assert "multiples of 16" in refused(x, ops.Rows(y[..., :-1], y), like)
    assert "multiples of 16" in refused(x[..., :24].contiguous(), like, like)
    assert "here are 72" in refused(x[:, :512].contiguous(), like, like)
    assert "one dtype" in refused(x, like, like, None, gate.float())
    assert ops.add_product_fp8.choose(x, like, like)[0] == "reference"  # a CPU
