"""``run.py judge --film``: its measures on rendered films with planted faults, its films on tiny random models, the command."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

import minifilm
from films import frames_of
from sana_video_core.mini import evaluate, evaluate_film, film
from sana_video_core.mini.captions import wanted
from sana_video_core.mini.evaluate_film import (
    Case,
    Evaluation,
    FilmReading,
    ModelFilms,
    WorldFilms,
    bends,
    blocks_to_follow,
    draw_cases,
    window_ends,
)
from sana_video_core.mini.judge import adherence
from sana_video_core.mini.render import render
from sana_video_core.mini.world import Scene, Thing, is_held_out
from sana_video_core.sampling.plan import plan_blocks

SLIDE = Scene((Thing("red", "circle", "slide", x=70.0),), "black")
BOUNCE = Scene((Thing("green", "square", "bounce", x=50.0),), "navy")


def shot(scenes, block_frames: int = 10):
    """One film, a block a scene: ``[1, F, 96, 160, 3]``, the clock running on."""
    for scene, span in zip(scenes, plan_blocks(len(scenes), block_frames).spans()):
        start, end = span.pixels()
        yield render([scene], end - start, start=start)


def moved(scene: Scene, by: float) -> Scene:
    return replace(scene, things=tuple(replace(a, x=a.x + by) for a in scene.things))


def read(pictures, scene: Scene, blocks: int, **options) -> FilmReading:
    out = FilmReading()
    out.read(pictures, [wanted(scene)], blocks, **options)
    return out


# ---------------------------------------------------------------------------------------------------------------- windows

@pytest.mark.parametrize("blocks", [2, 3, 7, 10, 11, 19, 20, 24, 25, 400])
def test_windows_are_two_blocks_and_lie_at_the_beginning_and_at_the_end(blocks):
    early, late = window_ends(blocks)
    span = min(10, blocks // 2 * 2)
    for ends, first in ((early, 0), (late, blocks - span)):
        covered = list(itertools.chain.from_iterable((end - 1, end) for end in sorted(ends)))
        assert covered == list(range(first, first + span)), "every block of the ten once, in pairs"


def test_early_and_late_windows_are_judged_apart():
    wrong = replace(SLIDE, things=(replace(SLIDE.things[0], colour="blue"),))
    reading = read(shot([SLIDE] * 10 + [wrong] * 10), SLIDE, 20, motion=False)
    assert (adherence(reading.early), adherence(reading.late), len(reading.early), len(reading.late)) == (1, 0, 5, 5)
    assert reading.least() == 0 and not reading.border
    drifting = read(shot([SLIDE] * 18 + [wrong] * 2), SLIDE, 20, motion=False)
    assert drifting.least() == adherence(drifting.late) == 0.8


# -------------------------------------------------------------------------------------------------------------- continuity

def test_bends_are_zero_on_a_straight_way_and_tell_the_size_of_a_jump():
    way = torch.stack((torch.arange(10) * 3.0, torch.full((10,), 40.0)), -1)[:, None]
    assert float(bends(way).max()) == 0
    way[6:] += torch.tensor((3.0, 4.0))
    assert bends(way)[:, 0].tolist() == [0, 0, 0, 0, 5, 5, 0, 0]


def test_a_planted_jump_is_found_at_its_border_and_nowhere_else():
    smooth = read(shot([SLIDE] * 5), SLIDE, 5)
    jumping = read(shot([SLIDE] * 3 + [moved(SLIDE, 12)] * 2), SLIDE, 5)
    assert len(smooth.border) == len(jumping.border) == 4 and smooth.unread == jumping.unread == 0
    assert max(smooth.border) < 1 and max(smooth.inside + jumping.inside) < 1
    changed = [abs(a - b) for a, b in zip(smooth.border, jumping.border)]
    assert changed[2] == pytest.approx(12, abs=1) and max(changed[:2] + changed[3:]) < 0.1


def test_a_jump_inside_a_block_is_not_one_of_its_borders():
    blocks = list(shot([SLIDE] * 3))
    blocks[1][:, 20:] = render([moved(SLIDE, 12)], 20, start=61)
    blocks[2] = render([moved(SLIDE, 12)], 40, start=81)
    reading = read(blocks, SLIDE, 3)
    assert max(reading.border) < 1 and max(reading.inside) == pytest.approx(12, abs=1)


def test_both_things_count_and_a_way_over_the_edge_is_no_jump():
    pair = Scene((Thing("red", "star", "right", 10.0, 150.0, 23.0), Thing("white", "square", "left", 10.0, 10.0, 73.0)))
    reading = read(shot([pair] * 5), pair, 5)
    assert len(reading.border) == 8 and len(reading.inside) == 4 * 9 * 2 and max(reading.border + reading.inside) < 0.5


def test_a_border_where_nothing_is_seen_is_counted_apart():
    blocks = list(shot([SLIDE] * 4))
    for block in blocks[2:]:
        block[:] = torch.tensor((8, 8, 10), dtype=torch.uint8)
    reading = read(blocks, SLIDE, 4)
    assert (len(reading.border), reading.unread) == (1, 2) and reading.least() == 0.5


def test_the_renderers_films_are_whole_and_those_begun_afresh_are_not():
    cases = [Case("A red circle slides left and right on a black background.", SLIDE, "", BOUNCE)]
    evaluation = Evaluation(WorldFilms(cases), cases, 1)
    carried, afresh = evaluation.reading(6), evaluation.reading(6, afresh=True)
    assert carried.least() == 1 and max(carried.border) < 1 and not afresh.early
    assert max(afresh.inside) < 1 and sum(afresh.border) / len(afresh.border) > 10


# ------------------------------------------------------------------------------------------------------------ prompt switch

@pytest.mark.parametrize(("late", "expected"), [(0, 1), (1, 2), (3, 4), (4, None)])
def test_blocks_until_a_new_prompt_shows_are_counted(late, expected):
    pictures = shot(([SLIDE] * (4 + late) + [BOUNCE] * 4)[:8])
    assert blocks_to_follow(pictures, [wanted(BOUNCE)], 4) == [expected]


def test_a_new_scene_before_the_switch_does_not_count_and_films_are_told_apart():
    pictures = [torch.cat(pair) for pair in zip(shot([BOUNCE] * 3 + [SLIDE] * 3), shot([SLIDE] * 4 + [BOUNCE] * 2))]
    assert blocks_to_follow(pictures, [wanted(BOUNCE)] * 2, 3) == [None, 2]


def test_the_shares_of_films_that_follow():
    line = evaluate_film.switch_line([1, 2, None, 4])
    assert "1: 0.250, 2: 0.500, 3: 0.500, 4: 0.750" in line and "two blocks: 0.500" in line


def test_a_film_changes_to_another_held_out_prompt_that_shares_nothing_with_the_first():
    cases = draw_cases(60)
    assert cases == draw_cases(60) and [c.prompt for c in cases] == evaluate.held_out_prompts(60)[0]
    for case in cases:
        assert any(is_held_out(*a.triple) for a in case.later_scene.things)
        for a, b in itertools.product(case.scene.things, case.later_scene.things):
            assert a.colour != b.colour and a.shape != b.shape and a.motion != b.motion


# -------------------------------------------------------------------------------------------------------- films of a model

@pytest.fixture(scope="module")
def tiny() -> ModelFilms:
    model = minifilm.model()
    return ModelFilms(model, draw_cases(3), film.recipe_of(model.spec), seed=5)


def pictures(blocks) -> torch.Tensor:
    return torch.cat(list(blocks), 1).int()


def test_judged_films_are_those_of_the_film_command_and_a_batch_equals_single_ones(tiny, tmp_path):
    together = pictures(tiny.carried(range(3), 3))
    assert together.shape == (3, 9 + 8 + 8, 32, 48, 3)
    for i in range(3):
        alone = pictures(tiny.carried(range(i, i + 1), 3))
        assert (together[i:i + 1] - alone).abs().max() <= 1
        path = film.make(tiny.model, tmp_path / f"{i}", 3, tiny.cases[i].prompt, 5 + i)
        shown = torch.tensor(frames_of(path)[1][24].copy()).int()
        grey = (alone[0, 24] * torch.tensor((0.2126, 0.7152, 0.0722))).sum(-1) * 219 / 255 + 16
        assert (shown - grey).abs().mean() < 4, "but for the video's compression"
        assert (shown - grey.roll(1, 0)).abs().mean() > 8
    assert (together[0] - together[1]).abs().float().mean() > 1


def test_a_fresh_start_forgets_what_was_before_and_nothing_else(tiny):
    carried, afresh = (list(make(range(2), 3)) for make in (tiny.carried, tiny.afresh))
    assert torch.equal(carried[0], afresh[0]) and not torch.equal(carried[1], afresh[1])
    other = ModelFilms(tiny.model, tiny.cases, tiny.recipe, 1, tiny.seed)
    assert all(torch.equal(a, b) for a, b in zip(afresh, other.afresh(range(2), 3))), "no window reaches into an empty state"


def test_every_fresh_start_is_an_empty_state_at_the_blocks_own_place(tiny):
    network, text, vae = minifilm.parts()
    seen = set()

    class Watch:
        spec = network.spec

        def __call__(self, *args, state):
            seen.add((state.position, state.blocks, state.layers))
            return network(*args, state=state)

    list(ModelFilms(film.LongModel(Watch(), text, vae), tiny.cases, tiny.recipe).afresh(range(2), 3))
    assert seen == {(0, 0, ()), (3, 1, ()), (5, 2, ())}


def test_a_switched_film_is_the_first_until_the_switch(tiny):
    carried, switched = list(tiny.carried(range(3), 4)), list(tiny.switched(range(3), 2, 2))
    assert [torch.equal(a, b) for a, b in zip(carried, switched)] == [True, True, False, False]


def test_guided_films_have_two_rows_of_state_each(tiny):
    guided = ModelFilms(tiny.model, tiny.cases, film.recipe_of(tiny.model.spec, cfg=2.0), seed=5)
    for make in (guided.carried, guided.afresh):
        assert pictures(make(range(2), 2)).shape[:2] == (2, 17)


# ------------------------------------------------------------------------------------------------------------- the command

def test_the_command_on_the_renderers_films(capsys):
    assert evaluate.main(["--film", "3", "--films", "2", "--world", "--device", "cpu"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("2 films of 3 blocks") and out[-1] == "adherence: 1.000"
    assert "blocks 1-2     blocks 2-3" in out[1]
    carried, afresh = (next(line for line in out if line.startswith(name)).split() for name in ("state carried", "every block"))
    assert float(carried[2]) < 1 < 10 < float(afresh[3])
    assert any("two blocks: 1.000" in line for line in out)


def test_the_command_on_a_model_compares_steps_with_the_clip_model(monkeypatch, capsys):
    class Clips:
        def __init__(self, device):
            self.network = minifilm.parts()[0]

        def clips(self, prompts, seed):
            return [render([case.scene], 81)[0] for case in draw_cases(3) if case.prompt in prompts]

    def drawn(self, rows, blocks, *more):
        how = "carried" if not more else "switched"
        return getattr(WorldFilms(self.cases), how)(rows, blocks, *more)

    monkeypatch.setattr(evaluate_film, "MiniModel", Clips)
    monkeypatch.setattr(film, "load", lambda *args, **options: minifilm.parts())
    for name in ("carried", "afresh", "switched"):
        monkeypatch.setattr(ModelFilms, name, drawn)
    assert evaluate.main(["--film=2", "--films", "3", "--batch", "2", "--device", "cpu", "--compare-steps", "12"]) == 0
    out = capsys.readouterr().out
    assert "4 steps, CFG 1, window 2, cpu" in out
    rows = [line for line in out.splitlines() if line.startswith("steps: ")]
    assert [row.split(": ")[1].split(" (")[0][:10] for row in rows] == ["4 steps", "12 steps", "clip model"]
    assert all(row.endswith("1.000 of 3") for row in rows)


@pytest.mark.parametrize(("arguments", "words"), [
    (["--film", "1"], "--film must lie from 2"), (["--film", "10001"], "--film must lie"),
    (["--film", "4", "--films", "0"], "--films must lie"), (["--film", "4", "--batch", "0"], "--batch must lie"),
    (["--film", "4", "--compare-steps", "0"], "--compare-steps must lie"),
    (["--film", "4", "--world", "--compare-steps"], "renderer has no steps"),
    (["--film", "4", "--device", "cuda:99"], "no such device"),
])
def test_wrong_arguments_are_explained(arguments, words, capsys):
    assert evaluate.main(arguments) == 2
    assert words in capsys.readouterr().err


def test_an_abbreviated_film_option_is_not_taken_for_clips(capsys):
    for arguments, usage in ((["--fil", "4"], "run.py judge "), (["--film", "four"], "run.py judge --film")):
        with pytest.raises(SystemExit):
            evaluate.main(arguments)
        assert usage in capsys.readouterr().err
