"""Solvers on velocity fields whose solution is known, their order, their hooks and refusals. (Official runs: tests/golden.)"""

from __future__ import annotations

import math

import pytest
import torch

from sana_video_core.errors import SanaVideoError
from sana_video_core.sampling import schedules, solvers
from sana_video_core.sampling.guidance import Pair

SHAPE = (2, 3, 4, 2, 5)


class Cancelled(Exception):
    pass


def draw(seed: int) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


NOISE, CLEAN = draw(0), draw(1)
LEVELS = schedules.flow_dpm_sigmas(8, 3.0)
SOLVERS = {
    "flow-DPM": solvers.flow_dpm_solver, "DPM direct": solvers.dpm_solver, "Euler": solvers.flow_euler_solver,
    "UniPC": solvers.unipc_solver,
    "few-step": lambda v, x, sigmas, callback=None: solvers.few_step_solver(
        lambda y, time: v(y, time / 1000), x, schedules.few_steps(sigmas), torch.Generator().manual_seed(5), callback),
}
DETERMINISTIC = [name for name in SOLVERS if name != "few-step"]


def straight(x, sigma):
    """Velocity of the straight lines that all end in CLEAN, whatever the noise."""
    return (x - CLEAN) / sigma


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("levels", [LEVELS, schedules.flow_euler_sigmas(5, 8.0), torch.tensor([0.6, 0.3, 0.0]),
                                    torch.tensor([0.9, 0.0])], ids=["dpm", "euler", "partial", "one"])
def test_straight_lines_are_solved_exactly(name, levels):
    start = (1 - levels[0]) * CLEAN + levels[0] * NOISE
    error = (SOLVERS[name](straight, start, levels) - CLEAN).abs().max()
    assert float(error) < (2e-3 if name == "flow-DPM" else 3e-6)  # the official round trip through the noise loses digits


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_a_run_that_stops_early_is_on_the_line(name):
    levels = torch.tensor([0.9, 0.7, 0.5, 0.25])
    start = (1 - levels[0]) * CLEAN + levels[0] * NOISE
    assert torch.allclose(SOLVERS[name](straight, start, levels), 0.75 * CLEAN + 0.25 * NOISE, atol=1e-5)


def gaussian(x, sigma):
    """Exact velocity for data N(0, 0.25): v = x * (sigma - (1 - sigma) / 4) / ((1 - sigma)^2 / 4 + sigma^2)."""
    return x * (sigma - (1 - sigma) / 4) / ((1 - sigma) ** 2 / 4 + sigma**2)


def endpoint_error(name: str, steps: int) -> float:
    levels = 0.9 - torch.linspace(0, 0.6, steps + 1)  # away from both ends, so that the order shows
    x = NOISE.double()
    found = SOLVERS[name](lambda y, sigma: gaussian(y, sigma.double()), x, levels)
    scale = [math.sqrt((1 - s) ** 2 / 4 + s**2) for s in (float(levels[0]), float(levels[-1]))]
    return float((found - x * (scale[1] / scale[0])).abs().max())


@pytest.mark.parametrize(("name", "order"), [("Euler", 1), ("DPM direct", 2), ("UniPC", 2)])
def test_order_of_accuracy(name, order):
    """Halving the step divides the error by 2 to the power of the order (the first and last steps are of order one in DPM)."""
    coarse, fine = endpoint_error(name, 20), endpoint_error(name, 80)
    gain = math.log(coarse / fine, 4)
    assert gain > order - 0.35, f"{coarse:.2e} -> {fine:.2e}, order {gain:.2f}"


def test_better_solvers_are_better():
    errors = {name: endpoint_error(name, 20) for name in DETERMINISTIC}
    assert errors["UniPC"] < errors["Euler"] / 5 and errors["DPM direct"] < errors["Euler"] / 5


def test_the_official_form_and_the_direct_form_agree_up_to_rounding():
    start = LEVELS[0] * NOISE + (1 - LEVELS[0]) * CLEAN
    a, b = (solver(gaussian, start, LEVELS) for solver in (solvers.flow_dpm_solver, solvers.dpm_solver))
    assert 0 < float((a - b).abs().max()) < 1e-3


def test_a_pair_is_guided_on_the_noise_prediction():
    """Guidance of the pair equals guidance of the velocity up to rounding, and scale 1 is the positive half."""
    def pair(x, sigma):
        return Pair(gaussian(x, sigma), straight(x, sigma))

    whole = solvers.flow_dpm_solver(pair, NOISE, LEVELS, cfg=3.0)
    combined = solvers.flow_dpm_solver(lambda x, s: gaussian(x, s) + 3.0 * (straight(x, s) - gaussian(x, s)), NOISE, LEVELS)
    assert torch.allclose(whole, combined, atol=5e-3, rtol=1e-3)
    assert torch.allclose(solvers.flow_dpm_solver(pair, NOISE, LEVELS, cfg=1.0), CLEAN, atol=5e-3)


@pytest.mark.parametrize("name", SOLVERS)
def test_callback_sees_every_step_and_may_cancel(name):
    seen = []

    def callback(i, x0, x):
        seen.append(i)
        assert x0.shape == x.shape == SHAPE
        if len(seen) == 3:
            raise Cancelled

    with pytest.raises(Cancelled):
        SOLVERS[name](straight, NOISE, LEVELS, callback)
    assert seen == [0, 1, 2]
    again = []
    SOLVERS[name](straight, NOISE, LEVELS, lambda i, x0, x: again.append(i))
    assert again == list(range(8))


@pytest.mark.parametrize("name", SOLVERS)
def test_the_given_latent_is_left_alone(name):
    x = NOISE.clone()
    SOLVERS[name](straight, x, LEVELS)
    assert torch.equal(x, NOISE)


@pytest.mark.parametrize("name", SOLVERS)
def test_one_network_call_a_step(name):
    calls = []

    def velocity(x, sigma):
        calls.append(float(sigma))
        return straight(x, sigma)

    SOLVERS[name](velocity, NOISE, LEVELS)
    assert calls == pytest.approx(LEVELS[:-1].tolist())


def test_other_times_can_be_asked_with():
    asked = []
    times = torch.tensor([9.0, 8.0, 7.0])
    for solver in (solvers.flow_dpm_solver, solvers.dpm_solver, solvers.unipc_solver, solvers.flow_euler_solver):
        solver(lambda x, t: asked.append(float(t)) or torch.zeros_like(x), NOISE, torch.tensor([0.9, 0.5, 0.2, 0.0]), times=times)
    assert asked == [9.0, 8.0, 7.0] * 4
    with pytest.raises(SanaVideoError, match="one time a step"):
        solvers.dpm_solver(straight, NOISE, LEVELS, times=times)


@pytest.mark.parametrize("name", DETERMINISTIC)
@pytest.mark.parametrize("levels", [[1.0], [], [0.2, 0.8], [0.5, 0.5, 0.0], [1.5, 0.5, 0.0], [0.9, math.nan, 0.0], [0.5, -0.1]])
def test_levels_that_do_not_fall_are_refused(name, levels):
    with pytest.raises(SanaVideoError, match="noise levels"):
        SOLVERS[name](straight, NOISE, torch.tensor(levels))


@pytest.mark.parametrize("name", DETERMINISTIC)
@pytest.mark.parametrize("shift", [8.0, 12.0, 100.0])
def test_levels_of_high_shifts_are_taken_as_they_are(name, shift):
    asked, levels = [], schedules.flow_dpm_sigmas(4, shift)
    SOLVERS[name](lambda x, sigma: asked.append(float(sigma)) or straight(x, sigma), NOISE, levels)
    assert asked == levels[:-1].tolist()


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_a_first_level_of_one_works(name):
    found = SOLVERS[name](straight, NOISE, torch.tensor([1.0, 0.7, 0.0]))
    assert torch.allclose(found, CLEAN, atol=5e-3)


# ---------------------------------------------------------------------------------------------------------- image to video

FIRST = draw(7)[:, :, :1]


def test_image_euler_keeps_the_first_frame_and_solves_the_rest():
    asked = []

    def velocity(x, sigma):
        asked.append(sigma.tolist())
        assert torch.equal(x[:, :, :1], FIRST)
        return (x - CLEAN) / sigma.clamp(min=1e-6)[:, None, None]

    found = solvers.ltx_euler_solver(velocity, NOISE, schedules.flow_euler_sigmas(4, 3.0), FIRST)
    assert torch.equal(found[:, :, :1], FIRST) and torch.allclose(found[:, :, 1:], CLEAN[:, :, 1:], atol=1e-5)
    assert all(levels[0] == 0 and len(set(levels[1:])) == 1 for levels in asked)


def test_noise_on_the_condition_is_scaled_and_fresh():
    shown = []
    levels = torch.tensor([1.0, 0.5, 0.25, 0.0])

    def velocity(x, sigma):
        shown.append(x[:, :, :1] - FIRST)
        return torch.zeros_like(x)

    found = solvers.ltx_euler_solver(velocity, NOISE, levels, FIRST, condition_noise=0.1,
                                     noise=lambda i: torch.full(SHAPE, i + 1.0))
    for i, sigma in enumerate((1.0, 0.5, 0.25)):
        assert torch.allclose(shown[i], torch.full_like(FIRST, 0.1 * (i + 1) * sigma**2), atol=1e-6)
    assert torch.allclose(found[:, :, :1] - FIRST, shown[-1], atol=1e-6)  # the last replacement stays, as officially
    seeded = [solvers.ltx_euler_solver(velocity, NOISE, levels, FIRST, condition_noise=0.1,
                                       noise=torch.Generator().manual_seed(4)) for _ in range(2)]
    assert torch.equal(*seeded)
    with pytest.raises(SanaVideoError, match="source of noise"):
        solvers.ltx_euler_solver(velocity, NOISE, levels, FIRST, condition_noise=0.1)


# --------------------------------------------------------------------------------------------------------------- few steps

def test_fresh_noise_is_put_on_the_estimate():
    """With a constant velocity every latent can be written down."""
    steps = schedules.few_steps([1.0, 0.5, 0.25, 0.0])
    entered = []

    def velocity(x, time):
        entered.append(x)
        return torch.ones_like(x)

    found = solvers.few_step_solver(velocity, NOISE, steps, lambda i: draw(20 + i))
    x0 = NOISE - 1
    for i, sigma in enumerate((0.5, 0.25)):
        x = (1 - sigma) * x0 + sigma * draw(20 + i)
        assert torch.allclose(entered[i + 1], x, atol=1e-6)
        x0 = x - sigma
    assert torch.allclose(found, x0, atol=1e-6)


def test_half_precision_chain_of_the_official_run():
    """x0 takes the dtype of the velocity, the next latent that of the noise."""
    dtypes = []

    def velocity(x, time):
        dtypes.append(x.dtype)
        return torch.zeros(x.shape, dtype=torch.bfloat16)

    found = solvers.few_step_solver(velocity, NOISE, schedules.few_steps([1.0, 0.5, 0.0]), lambda i: NOISE.bfloat16())
    assert dtypes == [torch.float32, torch.bfloat16] and found.dtype == torch.bfloat16


def test_one_step_needs_no_noise_and_several_do():
    one = schedules.few_steps([1.0, 0.0])
    assert torch.allclose(solvers.few_step_solver(lambda x, t: x - CLEAN, NOISE, one, None), CLEAN, atol=1e-6)
    with pytest.raises(SanaVideoError, match="source of noise"):
        solvers.few_step_solver(lambda x, t: x, NOISE, schedules.few_steps([1.0, 0.5, 0.0]), None)
