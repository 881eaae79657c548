"""``run.py film``: making, stopping, resuming, lengthening and editing a film of the embedded model; its arguments."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import minifilm
from films import digests, frames_of
from sana_video_core import mini
from sana_video_core.errors import SanaVideoError, StateError
from sana_video_core.film import Film
from sana_video_core.mini import PROMPTS, WINDOW, film
from sana_video_core.sampling.blocks import Recipe, sample_blocks
from sana_video_core.sampling.plan import plan_blocks
from sana_video_core.sampling.schedules import LONGSANA_TIMES

SCHEDULE = "[block 1-2] A red star spins on a black background.\n[block 3-] A blue circle pulses on a black background; motion 20"


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    """The command finds the tiny model in place of the shipped weights."""
    monkeypatch.setattr(film, "load", lambda *args, **options: minifilm.parts())


def run(folder, blocks=3, *more) -> int:
    return film.main(["--blocks", str(blocks), "--dir", str(folder), "--device", "cpu", *map(str, more)])


def plan_of(folder):
    with Film(folder, write=False) as made:
        return made.plan


def sampled_in(monkeypatch) -> list[int]:
    """Blocks that are sampled from here on."""
    seen: list[int] = []
    monkeypatch.setattr(film.Progress, "step", lambda self, block, *rest: seen.append(block))
    return seen


# ------------------------------------------------------------------------------------------------------- making, resuming

def test_the_film_holds_the_blocks_of_the_sampler_with_the_window_of_the_training(tmp_path, capsys):
    assert run(tmp_path / "f", 4, "--seed", 5, "--prompt", PROMPTS[3]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[-1] == f"video: {tmp_path / 'f' / 'film.mp4'}" and f"prompt: {PROMPTS[3]}" in out
    assert [line for line in out if line.startswith("  block")][-1] == "  block 4 of 4: the video shows 2.1 s"
    model = minifilm.model()
    blocks = list(sample_blocks(
        model.network, plan_blocks(4, 2), model.condition([PROMPTS[3]]), spec=model.spec, size=(4, 6),
        recipe=Recipe.few_step(shift=3.0), seed=5, window=WINDOW))
    with Film(tmp_path / "f", write=False) as made:
        assert made.plan.settings.window == WINDOW
        assert all(torch.equal(made.latent(i), block.latent) for i, block in enumerate(blocks))
    assert frames_of(tmp_path / "f" / "film.mp4")[0] == list(range(33))


@pytest.mark.parametrize(("block", "step"), [(0, 0), (1, 2), (2, 3)])
def test_ctrl_c_leaves_the_finished_blocks_and_the_same_command_goes_on(tmp_path, monkeypatch, capsys, block, step):
    assert run(tmp_path / "whole") == 0

    def interrupt(self, at, now, *rest):
        if (at, now) == (block, step):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(film.Progress, "step", interrupt)
        assert run(tmp_path / "f") == 130
    assert f"stopped; {block} blocks are finished" in capsys.readouterr().err
    with Film(tmp_path / "f", write=False) as made:
        assert made.finished() == block
    if block:
        assert frames_of(tmp_path / "f" / "film.mp4")[0] == list(range(9 + 8 * (block - 1)))
    seen = sampled_in(monkeypatch)
    assert run(tmp_path / "f") == 0
    assert sorted(set(seen)) == list(range(block, 3)) and digests(tmp_path / "f") == digests(tmp_path / "whole")


def test_a_killed_film_resumes_to_the_same_bytes(tmp_path, monkeypatch):
    arguments = ["--blocks", "3", "--dir", str(tmp_path / "f"), "--device", "cpu"]
    victim = subprocess.run([sys.executable, minifilm.__file__, "2", "1", *arguments], capture_output=True, text=True)
    assert victim.returncode == 9 and "block 2 of 3" in victim.stdout, victim.stderr
    seen = sampled_in(monkeypatch)
    assert film.main(arguments) == 0 and set(seen) == {2}
    assert run(tmp_path / "whole") == 0
    assert digests(tmp_path / "f") == digests(tmp_path / "whole")


def test_a_finished_film_is_only_named(tmp_path, monkeypatch, capsys):
    run(tmp_path / "f")
    before, seen = digests(tmp_path / "f"), sampled_in(monkeypatch)
    capsys.readouterr()
    assert run(tmp_path / "f") == 0 and not seen and digests(tmp_path / "f") == before
    assert "3 of 3 blocks are finished" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------- what is not given, and changes

def test_what_is_not_given_is_what_the_film_was_made_with(tmp_path, monkeypatch):
    run(tmp_path / "f", 2, "--prompt", PROMPTS[5], "--seed", 7, "--steps", 2, "--cfg", 2, "--window", 1)
    seen = sampled_in(monkeypatch)
    assert run(tmp_path / "f", 4) == 0 and set(seen) == {2, 3}
    plan = plan_of(tmp_path / "f")
    assert {(b.prompt, b.seed) for b in plan.blocks} == {(PROMPTS[5], 7)}
    assert plan.settings.window == 1 and plan.settings.recipe["cfg"] == 2 and len(plan.settings.recipe["steps"]) == 2


def test_a_new_film_without_a_prompt_shows_the_first_example(tmp_path):
    run(tmp_path / "f", 1)
    block, = plan_of(tmp_path / "f").blocks
    assert (block.prompt, block.seed, block.motion) == (PROMPTS[0], 0, minifilm.SPEC.motion_score)


def test_a_schedule_gives_every_block_its_prompt_motion_and_seed(tmp_path, monkeypatch):
    text = SCHEDULE.replace("[block 3-]", "[block 3] A white star spins; seed 3\n[block 4-]")
    run(tmp_path / "f", 4, "--prompt", text, "--seed", 8)
    assert [(b.prompt.split()[1], b.motion, b.seed) for b in plan_of(tmp_path / "f").blocks] == [
        ("red", 10, 8), ("red", 10, 8), ("white", 10, 3), ("blue", 20, 8)]
    seen = sampled_in(monkeypatch)
    run(tmp_path / "f", 4, "--prompt", text)
    run(tmp_path / "f", 4)
    assert not seen, "the seeds of the film are kept, with the schedule and without it"


def test_seconds_in_a_schedule_are_those_of_the_video(tmp_path):
    text = "[0-1s] A red star spins on a black background.\n[1s-] A blue star spins on a black background."
    run(tmp_path / "f", 4, "--prompt", text)  # blocks of 9, 8, 8, 8 frames at 16 a second
    assert [b.prompt.split()[1] for b in plan_of(tmp_path / "f").blocks] == ["red", "red", "blue", "blue"]


def test_another_prompt_is_an_edit_from_the_first_changed_block_on(tmp_path, monkeypatch):
    run(tmp_path / "f", 4, "--prompt", SCHEDULE)
    run(tmp_path / "whole", 4, "--prompt", SCHEDULE.replace("blue circle", "green circle"))
    seen = sampled_in(monkeypatch)
    run(tmp_path / "f", 4, "--prompt", SCHEDULE.replace("blue circle", "green circle"))
    assert set(seen) == {2, 3} and digests(tmp_path / "f") == digests(tmp_path / "whole")


def test_another_seed_is_another_film(tmp_path, monkeypatch):
    run(tmp_path / "f", 2)
    seen = sampled_in(monkeypatch)
    run(tmp_path / "f", 2, "--seed", 1)
    assert set(seen) == {0, 1} and {b.seed for b in plan_of(tmp_path / "f").blocks} == {1}


@pytest.mark.parametrize("option", [("--window", 3), ("--steps", 3), ("--cfg", 3)])
def test_other_settings_are_refused_and_change_nothing(tmp_path, capsys, option):
    run(tmp_path / "f", 2)
    before = digests(tmp_path / "f")
    assert run(tmp_path / "f", 2, *option) == 2
    assert "holds another film" in capsys.readouterr().err and digests(tmp_path / "f") == before


def test_other_weights_are_another_film(tmp_path):
    model = minifilm.model()
    film.make(model, tmp_path / "f", 1)
    before = film.weights_print(model.network)
    changed = minifilm.SanaVideoTransformer(minifilm.SPEC).eval()
    changed.load_state_dict(model.network.state_dict())
    with torch.no_grad():
        changed.final_layer.linear.bias[0] += 1e-6
    assert film.weights_print(changed) != before == film.weights_print(model.network)
    with pytest.raises(StateError, match="model differs"):
        film.make(film.LongModel(changed, model.text, model.vae), tmp_path / "f", 1)


def test_a_word_that_the_world_lacks_is_noted_but_not_refused(tmp_path, capsys):
    assert run(tmp_path / "f", 1, "--prompt", "A fox runs through snow.") == 0
    assert "note: The embedded model knows no fox" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------------------- recipes

def test_recipes_by_the_number_of_steps():
    spec = minifilm.SPEC
    assert film.recipe_of(spec) == film.recipe_of(spec, 4) == Recipe.few_step(None, 1.0, shift=3.0)
    for steps in (1, 2, 3, 8):
        recipe = film.recipe_of(spec, steps, 2.0)
        assert recipe.count == steps and recipe.steps[0].time == 1000 and recipe.steps[-1].after == 0 and recipe.cfg == 2
    halves = [step.time for step in film.recipe_of(spec, 8).steps][::2]
    assert halves == pytest.approx(LONGSANA_TIMES, abs=0.5), "eight steps pass through the four that were trained"
    many = film.recipe_of(spec, 20)
    assert (many.solver, many.count, many.steps) == ("flow-DPM", 20, ())


# --------------------------------------------------------------------------------------------------------------- arguments

@pytest.mark.parametrize(("arguments", "words"), [
    (["--blocks", "0"], "1 to 10000"), (["--blocks", "10001"], "1 to 10000"), (["--seed", "-1"], "--seed must lie"),
    (["--steps", "0"], "--steps must lie"), (["--cfg", "nan"], "--cfg must lie"), (["--window", "-1"], "--window must lie"),
    (["--device", "teapot"], "no such device"), (["--device", "cuda:99"], "no such device"),
    (["--prompt", " "], "prompt is empty"), (["--prompt", "[0-5s] A red star spins."], "longer than its prompt schedule"),
    (["--prompt", "[0-5] "], "has no prompt"),
])
def test_wrong_arguments_are_explained_and_leave_no_folder(tmp_path, capsys, arguments, words):
    base = [] if "--blocks" in arguments else ["--blocks", "30"]
    assert film.main([*base, "--dir", str(tmp_path / "f"), *arguments]) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "f").exists()


@pytest.mark.parametrize("arguments", [["--dir", "x"], ["--blocks", "2"], ["--blocks", "many", "--dir", "x"]])
def test_missing_arguments_show_the_usage(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        film.main(arguments)
    assert ended.value.code == 2 and "usage: run.py film" in capsys.readouterr().err


def test_a_file_in_the_folders_place_and_missing_weights_are_explained(tmp_path, monkeypatch, capsys):
    (tmp_path / "f").write_text("x")
    assert run(tmp_path / "f") == 2 and "not a folder" in capsys.readouterr().err
    monkeypatch.setattr(mini, "FOLDER", tmp_path)
    monkeypatch.setattr(film, "load", mini.load)
    assert run(tmp_path / "g") == 2 and mini.LONG in capsys.readouterr().err and not (tmp_path / "g").exists()


def test_a_film_in_use_is_refused(tmp_path, capsys):
    run(tmp_path / "f", 1)
    with Film(tmp_path / "f"):
        assert run(tmp_path / "f", 2) == 2
    assert "in use by another run" in capsys.readouterr().err


def test_an_empty_range_is_an_error_of_ours():
    film.in_range("x", None, 0, 1)
    with pytest.raises(SanaVideoError, match="--x must lie from 0 to 1"):
        film.in_range("x", 2, 0, 1)
