"""Guidance, the bridge to the network, starting noise, and whole clips without ComfyUI."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from longvideo import caption, tiny_model, tiny_spec
from sana_video_core.errors import SanaVideoError
from sana_video_core.sampling.clip import CLIP_SOLVERS, clip_shape, sample_clip
from sana_video_core.sampling.guidance import (
    Caption,
    Pair,
    caption_batch,
    guided,
    network_times,
    network_velocity,
    pair_velocity,
    with_first_frame,
)
from sana_video_core.sampling.noise import clip_noise, noise_streams, seeds_of

SPEC = replace(tiny_spec(), causal=False, size=(48, 32), frames=9, steps=4, cfg=3.0, flow_shift=3.0)
POSITIVE, NEGATIVE = Caption(*caption(1)), Caption(*caption(2))


def distance(a, b):
    return float((a - b).norm() / b.norm())


# ---------------------------------------------------------------------------------------------------------------- guidance

def test_guidance_is_float32_and_linear():
    negative, positive = torch.full((2,), 1.0).bfloat16(), torch.full((2,), 1.5).bfloat16()
    assert guided(negative, positive, 6.0).tolist() == [4.0, 4.0] and guided(negative, positive, 6.0).dtype == torch.float32
    assert guided(negative, positive, 1.0).tolist() == [1.5, 1.5] and guided(negative, positive, 0.0).tolist() == [1.0, 1.0]


def test_levels_become_times_of_the_batch():
    assert network_times(torch.tensor(0.889), 3).tolist() == pytest.approx([889.0] * 3, rel=1e-6)
    assert network_times(torch.tensor([0.0, 0.5]), 2).tolist() == [[0.0, 500.0]] * 2
    assert network_times(torch.tensor(889.0), 1, 1).tolist() == [889.0]


@pytest.mark.parametrize("masked", [True, False])
def test_one_batch_and_two_calls_agree(masked):
    negative, positive = (c if masked else Caption(c.embedding) for c in (NEGATIVE, POSITIVE))
    x, sigma = clip_noise((2, 4, 3, 4, 6), 5), torch.tensor(0.7)
    together, apart = (pair_velocity(tiny_model(), positive, negative, one_batch=one)(x, sigma) for one in (True, False))
    assert isinstance(together, Pair)
    assert distance(together.positive, apart.positive) < 1e-5 and distance(together.negative, apart.negative) < 1e-5
    assert distance(together.positive, together.negative) > 1e-3


def test_captions_of_different_length_and_a_single_mask():
    short, x, sigma = Caption(*caption(3, tokens=2)), clip_noise((1, 4, 2, 4, 6), 5), torch.tensor(0.4)
    pair = pair_velocity(tiny_model(), POSITIVE, short)(x, sigma)
    alone = network_velocity(tiny_model(), short)(x, sigma)
    assert distance(pair.negative, alone) < 1e-5
    half = pair_velocity(tiny_model(), POSITIVE, Caption(NEGATIVE.embedding))(x, sigma)
    full = pair_velocity(tiny_model(), POSITIVE, NEGATIVE)(x, sigma)
    assert distance(half.negative, full.negative) < 1e-5


def test_cfg_of_one_or_no_negative_is_one_plain_call():
    calls = []

    def model(x, times, embedding, mask):
        calls.append(x.shape[0])
        return x

    x = torch.zeros(2, 4, 1, 2, 2)
    network_velocity(model, POSITIVE, NEGATIVE, 1.0)(x, torch.tensor(0.5))
    network_velocity(model, POSITIVE, None, 6.0)(x, torch.tensor(0.5))
    network_velocity(model, POSITIVE, NEGATIVE, 6.0)(x, torch.tensor(0.5))
    network_velocity(model, POSITIVE, NEGATIVE, 6.0, one_batch=False)(x, torch.tensor(0.5))
    assert calls == [2, 2, 4, 2, 2]


def test_one_caption_serves_a_batch_and_others_must_fit():
    assert caption_batch(POSITIVE, 3).embedding.shape[0] == 3 and caption_batch(POSITIVE, 3).mask.shape[0] == 3
    with pytest.raises(SanaVideoError, match="1 or 3"):
        caption_batch(Caption(*caption(1, batch=2)), 3)


def test_first_frame_is_shown_at_level_zero():
    first, rest = torch.ones(1, 4, 1, 2, 2), torch.zeros(1, 4, 2, 2, 2)

    def velocity(x, sigma):
        assert x.shape[2] == 3 and bool((x[:, :, 0] == 1).all()) and sigma.tolist() == [0, 0.5, 0.5]
        return Pair(x, x + 1)

    pair = with_first_frame(velocity, first)(rest, torch.tensor(0.5))
    assert isinstance(pair, Pair) and pair.positive.shape == rest.shape


# ------------------------------------------------------------------------------------------------------------------- noise

def test_noise_of_a_seed_is_that_of_torch_and_independent_of_neighbours():
    shape = (1, 4, 2, 3, 5)
    expected = torch.randn(shape, generator=torch.Generator().manual_seed(9))
    assert torch.equal(clip_noise(shape, 9), expected)
    assert torch.equal(clip_noise((3, *shape[1:]), (1, 9, 7))[1:2], expected)
    assert torch.equal(clip_noise((3, *shape[1:]), 8)[1:2], expected)  # 8, 9, 10
    draw = noise_streams(shape, 9)
    assert torch.equal(draw(0), expected) and not torch.equal(draw(1), expected)


@pytest.mark.parametrize("seed", [(1, 2), (1, 2, -3), (1, 2, 1.5), -4])
def test_impossible_seeds_are_refused(seed):
    with pytest.raises(SanaVideoError, match="seeds"):
        seeds_of(seed, 3)


# ------------------------------------------------------------------------------------------------------------------- clips

@pytest.mark.parametrize("solver", CLIP_SOLVERS)
def test_a_batch_equals_single_runs(solver):
    captions = [Caption(*caption(i)) for i in (1, 5, 9)]
    together = Caption(*(torch.cat(parts) for parts in zip(*captions)))
    seeds = (11, 4, 4)
    batch = sample_clip(tiny_model(), together, NEGATIVE, SPEC, seed=seeds, solver=solver)
    assert batch.shape == (3, 4, 3, 4, 6) and batch.dtype == torch.float32 and bool(torch.isfinite(batch).all())
    for i, (one, seed) in enumerate(zip(captions, seeds)):
        alone = sample_clip(tiny_model(), one, NEGATIVE, SPEC, seed=seed, solver=solver)
        assert distance(batch[i:i + 1], alone) < (2e-3 if solver == "flow-DPM" else 2e-5)
    assert distance(batch[1], batch[2]) > 1e-3  # same seed, another text


@pytest.mark.parametrize("solver", CLIP_SOLVERS)
def test_clips_repeat_exactly_and_depend_on_the_seed(solver):
    run = [sample_clip(tiny_model(), POSITIVE, NEGATIVE, SPEC, seed=s, solver=solver) for s in (1, 1, 2)]
    assert torch.equal(run[0], run[1]) and distance(run[0], run[2]) > 1e-2


@pytest.mark.parametrize("solver", CLIP_SOLVERS)
def test_first_frame_stays(solver):
    first, seen = clip_noise((1, 4, 1, 4, 6), 77), []
    found = sample_clip(tiny_model(), POSITIVE, NEGATIVE, SPEC, first_frame=first, solver=solver, steps=3,
                        callback=lambda i, x0, x: seen.append((i, x0.shape[2], torch.equal(x[:, :, :1], first))))
    assert torch.equal(found[:, :, :1], first) and found.shape[2] == 3 and seen == [(i, 3, True) for i in range(3)]
    plain = sample_clip(tiny_model(), POSITIVE, NEGATIVE, SPEC, solver=solver, steps=3)
    assert distance(found[:, :, 1:], plain[:, :, 1:]) > 1e-4


def test_image_to_video_is_the_official_euler():
    from sana_video_core.sampling import schedules, solvers

    first = clip_noise((1, 4, 1, 4, 6), 77)
    found = sample_clip(tiny_model(), POSITIVE, NEGATIVE, SPEC, first_frame=first, solver="flow Euler", seed=3)
    expected = solvers.ltx_euler_solver(network_velocity(tiny_model(), POSITIVE, NEGATIVE, 3.0), clip_noise((1, 4, 3, 4, 6), 3),
                                        schedules.flow_euler_sigmas(4, 3.0), first)
    assert distance(found, expected) < 1e-6


def test_a_single_frame_clip_is_an_image():
    assert sample_clip(tiny_model(), POSITIVE, NEGATIVE, SPEC, frames=1).shape == (1, 4, 1, 4, 6)
    first = clip_noise((1, 4, 1, 4, 6), 1)
    assert torch.equal(sample_clip(tiny_model(), POSITIVE, NEGATIVE, SPEC, frames=1, first_frame=first), first)


def test_defaults_come_from_the_spec():
    seen = []
    sample_clip(tiny_model(), POSITIVE, NEGATIVE, SPEC, callback=lambda i, x0, x: seen.append(x.shape))
    assert len(seen) == SPEC.steps and clip_shape(SPEC, 2) == (2, 4, 3, 4, 6)


def test_cancel_ends_the_run_and_the_next_is_the_same():
    expected = sample_clip(tiny_model(), POSITIVE, NEGATIVE, SPEC, seed=1)

    def cancel(i, x0, x):
        if i == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample_clip(tiny_model(), POSITIVE, NEGATIVE, SPEC, seed=1, callback=cancel)
    assert torch.equal(sample_clip(tiny_model(), POSITIVE, NEGATIVE, SPEC, seed=1), expected)


@pytest.mark.parametrize(("changes", "word"), [
    ({"cfg": 2.0, "negative": None}, "negative caption"), ({"solver": "magic"}, "Unknown solver"), ({"steps": 0}, "one step"),
    ({"size": (50, 32)}, "Use 48x32"), ({"frames": 10}, "Use 9 or 13"),
    ({"first_frame": torch.zeros(1, 4, 1, 4, 4)}, "first frame"), ({"seed": (1, 2)}, "seeds"), ({"shift": -1.0}, "flow shift"),
])
def test_what_cannot_be_sampled_is_refused(changes, word):
    options = {"negative": NEGATIVE, **changes}
    with pytest.raises(SanaVideoError, match=word):
        sample_clip(tiny_model(), POSITIVE, options.pop("negative"), SPEC, **options)
