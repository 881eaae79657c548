"""The demo's look at a finished video: windows of long ones, what it says, what it returns."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from sana_video_core.film.video import encode_fragment
from sana_video_core.mini.render import render
from sana_video_core.mini.world import Scene, Thing
from tools import demo, inspect_video

RED, BLUE = (Scene((Thing(colour, "circle", "bounce"),)) for colour in ("red", "blue"))
PROMPT = "A red circle bounces up and down on a black background."


def video(path, *parts):
    """An mp4 of (scene, frames) parts, the clock running on."""
    frames, start = [], 0
    for scene, count in parts:
        frames.append(render([scene], count, start=start)[0])
        start += count
    path.write_bytes(b"".join(encode_fragment(frames, 0, 0, Fraction(16))[:2]))
    return path


@pytest.mark.parametrize(("frames", "sizes"), [
    (30, [30]), (80, [80]), (81, [81]), (119, [119]), (120, [80, 40]), (200, [80, 80, 40]), (481, [80] * 5 + [81]), (0, []),
])
def test_windows_follow_each_other_and_a_short_rest_belongs_to_the_last(frames, sizes):
    found = list(inspect_video.windows(iter(torch.arange(frames)), 80, 40))
    assert [len(w) for w in found] == sizes
    assert torch.equal(torch.cat([torch.zeros(0, dtype=torch.int64), *found]), torch.arange(frames))


def test_a_clip_is_judged_as_a_whole(tmp_path, capsys):
    clip = video(tmp_path / "a.mp4", (RED, 81))
    assert inspect_video.main(clip, PROMPT, 80) == 0
    out = capsys.readouterr().out
    assert "file: h264, 81 frames of 160x96, 16 a second" in out
    assert "judge: agrees with the prompt; it saw: red circle bounce\n" in out
    assert inspect_video.main(clip, PROMPT.replace("red", "green"), 80) == 1
    assert "judge: does not agree with the prompt; it saw: red circle bounce (wrong colour)" in capsys.readouterr().out


def test_a_film_is_judged_window_by_window_and_told_where_it_goes_wrong(tmp_path, capsys):
    assert inspect_video.main(video(tmp_path / "a.mp4", (RED, 241)), PROMPT, 240) == 0
    assert "judge: agrees with the prompt in 3 of 3 windows; it saw: red circle bounce" in capsys.readouterr().out
    assert inspect_video.main(video(tmp_path / "b.mp4", (RED, 160), (BLUE, 81)), PROMPT, 240) == 1
    out = capsys.readouterr().out
    assert "judge: does not agree with the prompt in 2 of 3 windows" in out
    assert out.endswith("  10-15 s: blue circle bounce (wrong colour)\n") and out.count("\n") == 3


def test_one_wrong_window_in_ten_is_let_pass(capsys):
    class Verdict:
        readings, reasons = (), ("x",)

        def __init__(self, ok):
            self.ok = ok

    for wrong, status in ((0, 0), (1, 0), (2, 1)):
        verdicts = [Verdict(i >= wrong) for i in range(10)]
        assert inspect_video.report(verdicts, [5.0 * i for i in range(11)]) == status
    assert "  5-10 s: nothing (x)" in capsys.readouterr().out


@pytest.mark.parametrize(("frames", "prompt", "words"), [
    (60, PROMPT, "expected h264 and at least 80 frames"), (20, PROMPT, "judge: The clip is too short"),
    (81, "A fox runs.", "judge: The embedded model knows no"),
])
def test_what_cannot_be_judged_is_a_failure(tmp_path, capsys, frames, prompt, words):
    assert inspect_video.main(video(tmp_path / "a.mp4", (RED, frames)), prompt, 80) == 1
    assert words in capsys.readouterr().out


def test_the_demos_workflows_are_there():
    assert demo.SHOWN in (demo.CLIP, demo.FILM)
    assert demo.SHOWN.path.is_file() and demo.FILM.frames >= 30 * 16
