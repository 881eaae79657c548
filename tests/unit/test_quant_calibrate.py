"""What is seen of the inputs of layers, and the scales that come of it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from sana_video_core.ops import reference
from sana_video_core.quant.calibrate import HEADROOM, ROOM, SPREAD, watched
from sana_video_core.quant.formats import E4M3_MAX


def seen_of(*inputs):
    layer = nn.Linear(8, 4)
    layer.register_forward_hook(lambda *a: None)
    with watched({"layer": layer}) as seen, torch.no_grad():
        for x in inputs:
            layer(x)
    with torch.no_grad():
        layer(inputs[0] * 1e6)  # nobody looks any more
    return seen["layer"]


def test_the_largest_of_all_inputs_and_the_mean_over_them():
    first, second = torch.randn(3, 5, 8), 4 * torch.randn(2, 8)
    seen = seen_of(first, second)
    together = torch.cat((first.flatten(0, 1), second))
    assert seen.rows == 17 and torch.equal(seen.largest, together.abs().amax(0))
    assert torch.allclose(seen.squares, together.square().sum(0))
    expected = together.abs().max() / together.square().mean(0).sqrt().median()
    assert seen.spread() == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("size", [1e-6, 0.3, 7.0, 448.0, 3e4])
def test_a_scale_is_a_power_of_two_with_room_above_what_is_typical(size):
    x = torch.full((4, 8), size)
    x[1, 2] = -SPREAD * size
    scale = seen_of(x).scale()
    assert math.log2(scale) == round(math.log2(scale))
    assert HEADROOM * SPREAD * size <= scale * E4M3_MAX * (1 + 1e-6) and scale * E4M3_MAX < 2 * ROOM * size * (1 + 1e-6)
    values = reference.given_fp8(HEADROOM * x, torch.tensor(scale)).values.float() * scale
    assert float(values[1, 2]) == pytest.approx(-HEADROOM * SPREAD * size, rel=2**-4)


def test_a_larger_value_in_one_run_changes_no_scale():
    x = torch.randn(64, 8)
    scale = seen_of(x).scale()
    x[5, 3] = 50.0
    assert seen_of(x).scale() == scale


def test_rows_count_as_what_they_stand_for():
    class Takes(nn.Module):
        def forward(self, rows):
            return rows

    layer, x = Takes(), torch.randn(6, 8) * torch.tensor([1.0, 10, 100, 1000, 1, 1])[:, None]
    with watched({"layer": layer}) as seen:
        layer(reference.row_fp8(x))
    assert float(seen["layer"].largest.max()) == pytest.approx(float(x.abs().max()), rel=1e-5)


def test_one_large_channel_spreads_although_it_is_large_everywhere():
    x = torch.randn(100, 8)
    x[:, 3] *= 1e5
    assert seen_of(x).spread() > SPREAD > seen_of(torch.randn(100, 8)).spread()


def test_inputs_of_zeros_or_nan_get_no_scale():
    for x in (torch.zeros(3, 8), torch.full((3, 8), torch.nan), torch.full((3, 8), torch.inf)):
        seen = seen_of(x)
        assert not seen.spread() <= SPREAD and math.isnan(seen.scale())


def test_values_far_below_the_largest_keep_their_bits():
    """What ROOM promises: a fourteenth of a typical channel's size still has an error of a sixteenth at most."""
    x = torch.ones(64, 8)
    x[0], x[1, 0] = 1 / 14, SPREAD
    scale = torch.tensor(seen_of(x).scale())
    back = reference.given_fp8(x, scale).values.float() * scale
    assert float((back / x - 1).abs().max()) <= 2**-4
