"""Noise levels: ends, order, special values, the table of LongSANA, refusals. (Exact values: tests/golden.)"""

from __future__ import annotations

import math

import pytest
import torch

from sana_video_core.errors import SanaVideoError
from sana_video_core.sampling import schedules as s
from sana_video_core.train.timesteps import MonotoneTimes, logit_normal_times

WITH_SHIFT = [s.flow_dpm_sigmas, s.flow_euler_sigmas, s.diffusers_dpm_sigmas, s.unipc_sigmas]


@pytest.mark.parametrize("function", WITH_SHIFT)
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 50, 200])
@pytest.mark.parametrize("shift", [1.0, 3.0, 8.0, 12.0])
def test_levels_fall_from_near_one_to_zero(function, steps, shift):
    levels = function(steps, shift)
    assert levels.dtype == torch.float32 and levels.shape == (steps + 1,)
    assert 0.99 < float(levels[0]) <= 1 and float(levels[-1]) == 0
    assert bool((levels[1:] < levels[:-1]).all())


@pytest.mark.parametrize("steps", [1, 2, 5, 20, 49])
def test_linear_quadratic_levels(steps):
    levels = s.linear_quadratic_sigmas(steps)
    assert levels.shape == (steps + 1,) and float(levels[-1]) == 0 and bool((levels[1:] < levels[:-1]).all())
    assert float(levels[0]) == pytest.approx(0.999)


def test_published_times_of_twenty_steps():
    assert s.whole_times(s.flow_dpm_sigmas(20, 8.0)).tolist() == [
        999, 993, 986, 978, 969, 959, 948, 936, 922, 907, 888, 867, 841, 811, 773, 727, 666, 585, 470, 296]
    assert s.diffusers_dpm_times(20, 8.0).tolist() == s.whole_times(s.flow_dpm_sigmas(20, 8.0)).tolist()


def test_euler_shifts_its_last_level_twice_and_dpm_once():
    euler, dpm = s.flow_euler_sigmas(20, 8.0), s.flow_dpm_sigmas(20, 8.0)
    assert float(euler[0]) == 1 and float(euler[-2]) == pytest.approx(s.shifted(s.shifted(0.001, 8.0), 8.0), rel=1e-5)
    assert float(dpm[0]) == pytest.approx(s.shifted(0.999, 8.0), rel=1e-6) and float(dpm[-2]) == pytest.approx(0.296, abs=1e-3)


def test_a_shift_of_one_changes_nothing_and_the_ends_stay():
    values = torch.linspace(0, 1, 11)
    assert torch.equal(s.shifted(values, 1.0), values)
    bent = s.shifted(values, 8.0)
    assert float(bent[0]) == 0 and float(bent[-1]) == 1 and bool((bent[1:-1] > values[1:-1]).all())


@pytest.mark.parametrize("function", WITH_SHIFT)
@pytest.mark.parametrize(("steps", "shift", "word"), [
    (0, 8.0, "at least one step"), (-3, 8.0, "at least one step"), (2.5, 8.0, "at least one step"), (True, 8.0, "at least one"),
    (5, 0.0, "flow shift"), (5, -1.0, "flow shift"), (5, math.inf, "flow shift"), (5, math.nan, "flow shift"),
])
def test_impossible_schedules_are_refused(function, steps, shift, word):
    with pytest.raises(SanaVideoError, match=word):
        function(steps, shift)


def test_levels_of_longsana_come_from_the_table():
    exact, half = s.longsana_steps(), s.longsana_steps(time_dtype=torch.bfloat16)
    assert [step.time for step in exact] == [1000, 960, 889, 727] and [step.time for step in half] == [1000, 960, 888, 728]
    assert [step.after for step in exact] == [step.after for step in half] and exact[-1].after == 0
    assert exact[2].sigma == pytest.approx(0.8891532) and half[2].sigma == pytest.approx(0.8879598)
    assert s.longsana_steps((1000, 960, 889, 727, 0)) == exact  # a trailing zero is no step


@pytest.mark.parametrize("times", [(), (0,), (500, 600), (700, 700)])
def test_impossible_step_lists_are_refused(times):
    with pytest.raises(SanaVideoError, match="step list"):
        s.longsana_steps(times)


def test_few_steps_of_levels():
    steps = s.few_steps([1.0, 0.5, 0.0])
    assert steps == (s.FewStep(1000.0, 1.0, 0.5), s.FewStep(500.0, 0.5, 0.0))
    assert [round(step.sigma, 7) for step in s.dmd_steps()] == [0.9998332, 0.9471688, 0.8568977, 0.6663702]
    for wrong in ([1.0], [1.0, 0.5], [0.5, 0.8, 0.0], [1.0, 1.0, 0.0]):
        with pytest.raises(SanaVideoError, match="fall and end with 0"):
            s.few_steps(wrong)


def test_table_takes_the_nearest_entry():
    table = s.LevelTable(7.0)
    assert (table.index(1000), table.index(0), table.index(5000)) == (0, 999, 0)
    for time in (37.0, 512.5, 999.4):
        i = table.index(time)
        near = (table.times - time).abs()
        assert near[i] == near.min()
    assert float(table.weights.min()) == 0 and float(table.weights.mean()) == pytest.approx(1, abs=1e-5)


# -------------------------------------------------------------------------------------------------------- times in training

def test_monotone_times_rise_and_keep_their_anchor():
    sampler, g = MonotoneTimes(24, 1000), torch.Generator().manual_seed(0)
    base, anchor = torch.randint(0, 1000, (500,), generator=g), torch.randint(0, 24, (500,), generator=g)
    times = sampler.sample(base, anchor, generator=g)
    assert times.shape == (500, 24) and bool((times[:, 1:] >= times[:, :-1]).all())
    assert torch.equal(times.gather(1, anchor[:, None])[:, 0], base) and int(times.min()) >= 0 and int(times.max()) <= 999


@pytest.mark.parametrize("anchor", [0, 1, 2])
def test_monotone_times_are_uniform_over_all_rising_completions(anchor):
    """With three blocks and five times every completion can be counted by hand."""
    base, count = 2, 30000
    sampler = MonotoneTimes(3, 5)
    times = sampler.sample(torch.full((count,), base), torch.full((count,), anchor), generator=torch.Generator().manual_seed(1))
    allowed = [(a, b, c) for a in range(5) for b in range(a, 5) for c in range(b, 5) if (a, b, c)[anchor] == base]
    found = dict.fromkeys(allowed, 0)
    for row in times.tolist():
        found[tuple(row)] += 1
    share = 1 / len(allowed)
    assert all(abs(n / count - share) < 5 * (share / count) ** 0.5 for n in found.values())


def test_monotone_times_at_the_ends_and_bad_input():
    sampler = MonotoneTimes(4, 10)
    last = torch.full((3,), 3)
    assert sampler.sample(torch.zeros(3, dtype=torch.int64), last).sum() == 0
    assert (sampler.sample(torch.full((3,), 9), torch.zeros(3, dtype=torch.int64)) == 9).all()
    assert MonotoneTimes(1, 10).sample(torch.tensor([4])).tolist() == [[4]]
    with pytest.raises(SanaVideoError, match="outside the table"):
        sampler.sample(torch.tensor([10]))
    with pytest.raises(SanaVideoError, match="1 or more"):
        MonotoneTimes(0)


def test_logit_normal_times_stay_in_the_table():
    g = torch.Generator().manual_seed(0)
    times = logit_normal_times(20000, generator=g)
    assert times.dtype == torch.int64 and 0 <= int(times.min()) and int(times.max()) <= 999
    assert float(times.double().mean()) == pytest.approx(499.5, abs=6)
    assert int(logit_normal_times(100, mean=40.0, generator=g).min()) == 999
