"""The prompt schedule: grammar, places of errors, and which block follows which part."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sana_video_core.errors import SanaVideoError
from sana_video_core.sampling.plan import plan_blocks
from sana_video_core.sampling.schedule_text import Part, ScheduleError, cue_of, parse_schedule, scores_of


def test_seconds():
    text = "[0-5s] a fox runs; motion 20\n[5s-12.5] it stops; motion 20 -> 5; seed 3\n\n[0:12.5-] it sleeps  # the end\n"
    assert parse_schedule(text) == (
        Part("s", 0, 5, "a fox runs", (20, 20), None, 1), Part("s", 5, 12.5, "it stops", (20, 5), 3, 2),
        Part("s", 12.5, math.inf, "it sleeps", None, None, 4))


def test_blocks():
    text = "# a film\n[block 1] a fox; seed 1\n[Block 2-4] a bear\n[blocks 5-] a whale; Motion 3.5 to 8\n"
    assert parse_schedule(text) == (
        Part("block", 0, 1, "a fox", None, 1, 2), Part("block", 1, 4, "a bear", None, None, 3),
        Part("block", 4, math.inf, "a whale", (3.5, 8), None, 4))


def test_prompts_of_several_lines_and_escapes():
    parts = parse_schedule("[0-2s]\n  a fox \\; red,\n\trunning \\#1; motion 4")
    assert parts[0].prompt == "a fox ; red, running #1" and parts[0].motion == (4, 4)


def test_windows_line_ends():
    assert [p.prompt for p in parse_schedule("[0-1s] a\r\n[1-2s] b\r\n")] == ["a", "b"]


@pytest.mark.parametrize(("text", "line", "column", "words"), [
    ("", 1, 1, "empty"),
    ("# nothing", 1, 1, "only comments"),
    ("a fox", 1, 1, "time in brackets"),
    ("\n  a fox", 2, 3, "time in brackets"),
    ("[0-5s a fox", 1, 1, "not closed"),
    ("[0-5s] ", 1, 7, "no prompt"),
    ("[0-5s]", 1, 1, "no prompt"),
    ("[0-5s] ; motion 3", 1, 7, "no prompt"),
    ("[0-5s] a fox\n[6-7s] a bear", 2, 1, "leaves a gap"),
    ("[0-5s] a fox\n [4-7s] a bear", 2, 2, "overlaps"),
    ("[1-5s] a fox", 1, 1, "does not begin at the beginning"),
    ("[block 2] a fox", 1, 1, "does not begin at the beginning"),
    ("[0-] a fox\n[5-6s] a bear", 2, 1, "overlaps"),
    ("[0-5s] a fox\n[block 3] a bear", 2, 1, "mixed"),
    ("[5-5s] a fox", 1, 1, "ends before it begins"),
    ("[block 4-2] a fox", 1, 1, "ends before it begins"),
    ("[0-five] a fox", 1, 4, "no time"),
    ("[0-1:75] a fox", 1, 4, "no time"),
    ("[0-1e9s] a fox", 1, 4, "no time"),
    ("[0-9999999s] a fox", 1, 4, "too late"),
    ("[-1-5s] a fox", 1, 2, "no time"),
    ("[3s] a fox", 1, 2, "start and an end"),
    ("[block] a fox", 1, 2, "start and an end"),
    ("[block 0] a fox", 1, 8, "no block number"),
    ("[block 1-x] a fox", 1, 10, "no block number"),
    ("[block 99999] a fox", 1, 8, "no block number"),
    ("[0-5s] a fox; speed 3", 1, 15, "not known"),
    ("[0-5s] a fox;\n  zoom in", 2, 3, "not known"),
    ("[0-5s] a fox; motion", 1, 15, "motion score"),
    ("[0-5s] a fox; motion fast", 1, 15, "motion score"),
    ("[0-5s] a fox; motion 101", 1, 15, "too high"),
    ("[0-5s] a fox; motion 3; motion 4", 1, 25, "twice"),
    ("[0-5s] a fox; seed -1", 1, 15, "seed"),
    ("[0-5s] a fox; seed 18446744073709551616", 1, 15, "seed"),
])
def test_errors_name_the_place(text, line, column, words):
    with pytest.raises(ScheduleError, match=words) as error:
        parse_schedule(text)
    assert (error.value.line, error.value.column) == (line, column)
    assert f"line {line}, column {column}" in str(error.value)


def test_endless_texts_are_refused():
    for text in ("[0-5s] " + "a" * 300_000, "\n" * 3000 + "[0-5s] a"):
        with pytest.raises(ScheduleError, match="too long"):
            parse_schedule(text)


def test_a_block_follows_the_part_that_its_middle_lies_in():
    parts = parse_schedule("[0-5s] one\n[5-10s] two\n[10s-] three")
    spans = plan_blocks(6).spans()  # 0, 2.56, 5.06, 7.56, 10.06, 12.56 s
    assert [cue_of(parts, s, 16).prompt for s in spans] == ["one", "one", "two", "two", "three", "three"]
    late = plan_blocks(2, index=4, start=41).spans()  # absolute times, also in a continued film
    assert [cue_of(parts, s, 16).prompt for s in late] == ["three", "three"]


def test_motion_curve_over_blocks():
    parts = parse_schedule("[block 1-5] a; motion 10 -> 30\n[block 6] b\n[block 7-] c; motion 4 -> 9")
    cues = [cue_of(parts, s, 16) for s in plan_blocks(8).spans()]
    assert [c.motion for c in cues] == [10, 15, 20, 25, 30, None, 4, 4]
    assert {c.motion for c in cues[:5]} <= set(scores_of(parts[0], 10)) and scores_of(parts[1], 12) == (12,)
    assert scores_of(Part("s", 0, 1, "x", (3, 1)), 0) == (3, 2, 1)


def test_motion_curve_over_seconds():
    parts = parse_schedule("[0-10s] a; motion 0 -> 40")
    motions = [cue_of(parts, s, 16).motion for s in plan_blocks(4).spans()]
    assert motions == sorted(motions) and motions[0] == 5 and motions[-1] == 35


def test_a_film_longer_than_its_schedule_is_refused():
    for text in ("[0-5s] a", "[block 1-2] a"):
        with pytest.raises(SanaVideoError, match="longer than its prompt schedule"):
            cue_of(parse_schedule(text), plan_blocks(4).spans()[3], 16)


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="[]0159-;#\\ sblock:.mtionseed\n\r>→é\x00a", max_size=60))
def test_any_text_is_a_schedule_or_one_clear_error(text):
    try:
        parts = parse_schedule(text)
    except ScheduleError as error:
        assert 1 <= error.line <= text.count("\n") + 1 and error.column >= 1
    else:
        assert parts[0].start == 0 and all(a.end == b.start for a, b in zip(parts, parts[1:], strict=False))
        assert all(p.prompt for p in parts)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 50), st.integers(0, 100), st.integers(0, 100)), min_size=1, max_size=8))
def test_what_is_written_is_read(rows):
    start, lines, expected = 0, [], []
    for i, (length, first, last) in enumerate(rows):
        lines.append(f"[{start / 4}-{(start + length) / 4}s] prompt {i}; motion {first} -> {last}")
        expected.append(Part("s", start / 4, (start + length) / 4, f"prompt {i}", (first, last), None, i + 1))
        start += length
    assert parse_schedule("\n".join(lines)) == tuple(expected)
