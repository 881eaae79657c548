"""The embedded model's world: scenes, what is kept out of training, and the pictures."""

from __future__ import annotations

import math
import random

import pytest
import torch

from sana_video_core import SanaVideoError
from sana_video_core.mini.render import render, track
from sana_video_core.mini.world import (
    BACKGROUNDS,
    COLOURS,
    HEIGHT,
    HELD_OUT,
    LANES,
    MOTIONS,
    PERIODS,
    SHAPES,
    TRAINING,
    TRIPLES,
    WIDTH,
    Scene,
    Thing,
    is_held_out,
    random_scene,
)


def scenes(count: int, seed: int = 0, **options) -> list[Scene]:
    rng = random.Random(seed)
    return [random_scene(rng, **options) for _ in range(count)]


def test_the_held_out_combinations_are_an_eighth_and_leave_every_word_known():
    assert len(TRIPLES) == len(COLOURS) * (len(SHAPES) * len(MOTIONS) - 1) == len(HELD_OUT) + len(TRAINING)
    assert 0.11 < len(HELD_OUT) / len(TRIPLES) < 0.14
    for colour in COLOURS:
        for shape in SHAPES:
            learned = [m for c, s, m in TRAINING if (c, s) == (colour, shape)]
            assert len(learned) >= 6, (colour, shape)
    for place, words in enumerate((COLOURS, SHAPES, MOTIONS)):
        assert {t[place] for t in HELD_OUT} == set(words), "every word is also tested"


def test_training_never_shows_a_held_out_combination_and_tests_always_do():
    for scene in scenes(3000):
        assert not any(is_held_out(*a.triple) for a in scene.things)
    for scene in scenes(3000, held_out=True):
        assert any(is_held_out(*a.triple) for a in scene.things)


def test_scenes_are_drawn_from_the_seed_alone_and_vary():
    assert scenes(50, 7) == scenes(50, 7) != scenes(50, 8)
    drawn = scenes(4000)
    pairs = [s for s in drawn if len(s.things) == 2]
    assert 0.27 < len(pairs) / len(drawn) < 0.33
    assert all(a.colour != b.colour for a, b in (s.things for s in pairs))
    assert {a.triple for s in drawn for a in s.things} == set(TRAINING)
    assert {s.background for s in drawn} == set(BACKGROUNDS)
    assert all(len(s.things) == 1 for s in scenes(50, pair=False)) and all(len(s.things) == 2 for s in scenes(50, pair=True))


def test_things_stay_inside_the_picture_and_their_lane():
    for scene in scenes(600, 1):
        places = track(scene.things, 97)
        for lane, (thing, path) in enumerate(zip(scene.things, places)):
            reach = path[:, 2] * SHAPES[thing.shape][1]
            low, high = path[:, 1] - reach, path[:, 1] + reach
            top, bottom = (0, HEIGHT) if len(scene.things) == 1 else ((0, HEIGHT / 2), (HEIGHT / 2, HEIGHT))[lane]
            assert low.min() >= top and high.max() <= bottom, thing
            if thing.motion not in ("right", "left"):
                assert (path[:, 0] - reach).min() >= 0 and (path[:, 0] + reach).max() <= WIDTH, thing


@pytest.mark.parametrize("motion", [m for m in MOTIONS if m != "still"])
def test_motions_go_on_for_ever_with_their_period(motion):
    thing = Thing("red", "star", motion, phase=0.3)
    near, far = track([thing], 40)[0], track([thing], 40, start=PERIODS[motion] * 123_456)[0]
    turn = torch.tensor([WIDTH, 1e9, 1e9, math.tau], dtype=torch.float64)
    gap = torch.remainder(far - near + turn / 2, turn) - turn / 2
    assert gap.abs().max() < 1e-5
    step = torch.diff(track([thing], 200)[0], dim=0)
    step = torch.remainder(step + turn / 2, turn) - turn / 2
    assert step[:, :2].norm(dim=1).max() < 5, "slow enough for a latent of four frames"
    assert step[:, 3].abs().max() * 4 < math.pi / 5, "four frames of spinning are unambiguous even for a star"


def test_a_scene_of_unknown_words_is_refused():
    with pytest.raises(SanaVideoError, match="no such colour.*pink.*red, yellow"):
        Thing("pink", "star", "still")
    with pytest.raises(SanaVideoError, match="no such shape"):
        Thing("red", "cube", "still")
    with pytest.raises(SanaVideoError, match="no such motion"):
        Thing("red", "star", "flies")
    with pytest.raises(SanaVideoError, match="spinning circle"):
        Thing("red", "circle", "spin")
    with pytest.raises(SanaVideoError, match="one or two things"):
        Scene((Thing("red", "star", "still"),) * 3)
    with pytest.raises(SanaVideoError, match="no such background"):
        Scene((Thing("red", "star", "still"),), "pink")


def test_pictures_have_the_colours_of_the_scene():
    for colour, rgb in COLOURS.items():
        for ground, behind in BACKGROUNDS.items():
            clip = render([Scene((Thing(colour, "circle", "still"),), ground)], 2)
            assert clip.shape == (1, 2, HEIGHT, WIDTH, 3) and clip.dtype == torch.uint8
            assert tuple(clip[0, 0, 48, 80].tolist()) == rgb and tuple(clip[0, 1, 2, 2].tolist()) == behind
            assert math.dist(rgb, behind) > 130, "a thing must stand out"


@pytest.mark.parametrize(("shape", "area"), [
    ("circle", math.pi), ("square", 2 * 1.22**2), ("triangle", 0.75 * math.sqrt(3) * 1.4**2),
    ("star", 5 * 1.4 * 0.6 * math.sin(math.pi / 5)),
])
def test_shapes_have_their_area_and_stand_upright(shape, area):
    clip = render([Scene((Thing("white", shape, "still", size=16.0),))], 1)[0, 0].float().mean(-1)
    share = (clip - clip.min()) / (clip.max() - clip.min())
    assert abs(float(share.sum()) / (area * 256) - 1) < 0.01
    assert torch.allclose(share, share.flip(1), atol=0.01), "left and right are alike"
    rows = share.sum(1).nonzero()
    above, below = 48 - int(rows.min()), int(rows.max()) - 47
    assert (above > below + 3) if shape in ("triangle", "star") else above == below, "a corner, or a side, is on top"


def test_any_part_of_a_film_and_any_batch_give_the_same_frames():
    drawn = scenes(12, 3)
    film = render(drawn, 60)
    assert torch.equal(film[:, 25:45], render(drawn, 20, start=25))
    assert torch.equal(film, torch.cat([render([s], 60) for s in drawn]))
    assert torch.equal(render(drawn[:2], 3, start=1_000_000), render(drawn[:2], 5, start=999_998)[:, 2:])


def test_what_leaves_on_one_side_enters_on_the_other():
    middle, edge = (render([Scene((Thing("green", "star", "still", x=x),))], 1)[0, 0] for x in (80.0, 0.0))
    assert torch.equal(middle.roll(-80, 1), edge)
    right = Scene((Thing("green", "star", "right", x=10.0),))
    clip = render([right], 65)[0]
    assert torch.equal(clip[0], clip[64]) and torch.equal(clip[2], clip[0].roll(5, 1))


def test_other_sizes_show_the_same_scene():
    drawn = scenes(6, 4)
    small, large = render(drawn, 3), render(drawn, 3, size=(320, 192))
    assert large.shape == (6, 3, 192, 320, 3)
    reduced = torch.nn.functional.avg_pool2d(large.flatten(0, 1).permute(0, 3, 1, 2).float(), 2).permute(0, 2, 3, 1)
    assert (reduced - small.flatten(0, 1).float()).abs().mean() < 0.6


def test_nothing_to_draw():
    assert render([], 4).shape == (0, 4, HEIGHT, WIDTH, 3)
    for options in ({"frames": 0}, {"size": (8, 96)}):
        with pytest.raises(SanaVideoError, match="nothing to draw"):
            render(scenes(1), **options)


def test_lanes_are_apart():
    top, bottom = LANES
    assert bottom - top > 2 * (11 * 1.4 * 1.3), "even two pulsing stars do not touch"
