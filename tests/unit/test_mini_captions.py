"""Sentences about scenes and back, the example prompts, and the tokenizer made from them."""

from __future__ import annotations

import random
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sana_video_core import SanaVideoError
from sana_video_core.mini import PROMPTS
from sana_video_core.mini.captions import PAIRED, PHRASES, SINGLE, WantedThing, caption, known_words, parse, wanted
from sana_video_core.mini.tokenizer import PIECES, train_tokenizer
from sana_video_core.mini.world import BACKGROUNDS, COLOURS, MOTIONS, SHAPES, Scene, Thing, is_held_out, random_scene
from sana_video_core.text.encode import BOS, Tokenizer
from sana_video_core.text.gemma import MINI_CONFIG
from sana_video_core.text.prompts import INSTRUCTION, positive_text


def facts(prompt: str) -> list[tuple]:
    return [(t.colour, t.shape, t.motion) for t in parse(prompt).things]


def test_every_caption_reads_back_as_its_scene():
    rng = random.Random(11)
    for i in range(3000):
        scene = random_scene(rng, held_out=bool(i % 2))
        text = caption(scene, rng)
        said, meant = parse(text), wanted(scene)
        assert [(t.colour, t.shape, t.motion) for t in said.things] == [a.triple for a in scene.things], text
        assert all(t.place in (None, m.place) for t, m in zip(said.things, meant.things)), text
        assert said.background == (scene.background if "background" in text else None), text


def test_captions_use_all_templates_and_phrases_and_are_sentences():
    rng = random.Random(12)
    texts = [caption(random_scene(rng), rng) for _ in range(2000)]
    assert all(text[0] in "AO" and text.endswith(".") and "  " not in text and ".." not in text for text in texts)
    for phrase in (p for group in PHRASES.values() for p in group):
        assert sum(phrase in text for text in texts) > 10, phrase
    silent = [t for t in texts if "background" not in t]
    assert 0.1 < len(silent) / len(texts) < 0.2
    for template in (*SINGLE, *PAIRED):
        opening = template.split("{")[0] + "|" + template.split("}")[-1]
        start, end = opening.split("|")
        assert any(t.startswith(start) and t.endswith(end) for t in texts), template


def test_the_plain_caption_is_the_first_of_all():
    scene = Scene((Thing("red", "circle", "bounce"),), "black")
    assert caption(scene, random.Random(0), plain=True) == "A red circle bounces up and down on a black background."
    pair = Scene((Thing("red", "star", "spin"), Thing("white", "square", "slide")), "navy")
    assert caption(pair, random.Random(0), plain=True) == (
        "A red star spins above a white square that slides left and right, on a navy background.")


@pytest.mark.parametrize(("prompt", "expected"), [
    ("a blue star spins and a white square slides left and right", [("blue", "star", "spin"), ("white", "square", "slide")]),
    ("A SPINNING blue   star!", [("blue", "star", "spin")]),
    ("a bouncing red circle above a still green square", [("red", "circle", "bounce"), ("green", "square", "still")]),
    ("the white triangle is moving to the left", [("white", "triangle", "left")]),
    ("a red circle moves from left to right", [("red", "circle", "right")]),
    ("a blue square moves left", [("blue", "square", "left")]),
    ("a purple triangle circles around", [("purple", "triangle", "orbit")]),
    ("a green circle that goes in a circle", [("green", "circle", "orbit")]),
    ("a green triangle doesn't move", [("green", "triangle", "still")]),
    ("a small red ball jumps", [("red", "circle", "bounce")]),
    ("violet star, pulsing", [("purple", "star", "pulse")]),
    ("a star moves back and forth", [(None, "star", "slide")]),
    ("red circle", [("red", "circle", None)]),
    ("A white star gets bigger and smaller. motion score: 10.", [("white", "star", "pulse")]),
    ("a yellow square bounces left and right", [("yellow", "square", "slide")]),
])
def test_sentences_that_a_person_would_type(prompt, expected):
    assert facts(prompt) == expected


@pytest.mark.parametrize(("prompt", "places"), [
    ("a red circle spins above a blue star".replace("spins", "pulses"), ("above", "below")),
    ("a red circle below a blue star", ("below", "above")),
    ("a red circle pulses and below it a blue star spins", ("above", "below")),
    ("a red circle pulses, above it a blue star spins", ("below", "above")),
    ("at the top a red circle, at the bottom a blue star", ("above", "below")),
    ("at the bottom a red circle, at the top a blue star", ("below", "above")),
    ("a red circle at the top pulses, a blue star at the bottom spins", ("above", "below")),
    ("the lower red circle pulses, the upper blue star spins", ("below", "above")),
    ("a red circle and a blue star", (None, None)),
])
def test_places(prompt, places):
    assert tuple(t.place for t in parse(prompt).things) == places
    assert [t.shape for t in parse(prompt).things] == ["circle", "star"]


@pytest.mark.parametrize(("prompt", "ground"), [
    ("a red star on a black background", "black"), ("on a gray backdrop a red star", "grey"),
    ("a red star, background: navy", "navy"), ("a red star on dark blue background", "navy"), ("a red star", None),
])
def test_backgrounds(prompt, ground):
    assert parse(prompt).background == ground


@pytest.mark.parametrize(("prompt", "complaint"), [
    ("", "names no shape"), ("a cat", "knows no cat"), ("an orange circle spins", "knows no orange circle"),
    ("two red circles", "one thing or two"), ("a red star, a blue star and a white star", "one thing or two"),
    ("a red star spins and bounces up and down", "two things at once"), ("a red star on a pink background", "pink background"),
    ("black star on grey", "knows no black star"), ("\x00\ufffd", "names no shape"),
])
def test_what_the_world_does_not_have_is_refused_with_the_known_words(prompt, complaint):
    with pytest.raises(SanaVideoError, match=complaint) as e:
        parse(prompt)
    assert known_words() in str(e.value)


@given(st.text(max_size=300))
def test_any_text_is_read_or_refused(text):
    try:
        assert all(isinstance(t, WantedThing) for t in parse(text).things)
    except SanaVideoError as e:
        assert "Expected: colours red" in str(e)


def test_long_prompts_are_read_quickly():
    began = time.monotonic()
    for filler in ("a red and big ", "moves ", "red , ", "on a black background "):
        try:
            parse(filler * (10_000 // len(filler)) + "a red star spins")
        except SanaVideoError as e:
            assert "two things" in str(e) or "one thing" in str(e)
    assert time.monotonic() - began < 5


def test_the_example_prompts_are_varied_and_never_shown_in_training():
    assert len(set(PROMPTS)) == 16
    read = [parse(p) for p in PROMPTS]
    assert all(any(is_held_out(t.colour, t.shape, t.motion) for t in w.things) for w in read)
    for name, words in (("colour", COLOURS), ("shape", SHAPES), ("motion", MOTIONS)):
        assert {getattr(t, name) for w in read for t in w.things} == set(words)
    assert {w.background for w in read} == set(BACKGROUNDS)
    assert 4 <= sum(len(w.things) == 2 for w in read) <= 8


@pytest.fixture(scope="module")
def model() -> bytes:
    return train_tokenizer()


@pytest.fixture(scope="module")
def pieces(model):
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_proto=model)


def test_the_tokenizer_is_the_same_every_time_and_fits_the_encoder(model, pieces):
    assert model == train_tokenizer()
    assert pieces.vocab_size() == PIECES == MINI_CONFIG.vocab_size
    assert (pieces.pad_id(), pieces.eos_id(), pieces.bos_id(), pieces.unk_id()) == (0, 1, 2, 3) and pieces.bos_id() == BOS


def test_every_word_of_the_world_is_one_token(model):
    tokens = Tokenizer(model)
    words = {w for group in PHRASES.values() for phrase in group for w in phrase.split()}
    words |= {*COLOURS, *SHAPES, *BACKGROUNDS, "background", "above", "below", "top", "bottom", "and", "motion", "score"}
    assert {w: len(tokens(w)) for w in words if len(tokens(w)) != 2} == {}
    assert len({tokens(w)[1] for w in words}) == len(words)


def test_captions_are_short_and_texts_fit(model):
    tokens, rng = Tokenizer(model), random.Random(5)
    assert max(len(tokens(caption(random_scene(rng), rng))) for _ in range(300)) < 40
    assert 100 < len(tokens(INSTRUCTION)) < len(tokens(positive_text(PROMPTS[0], 10)))


@given(text=st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="\u2581\x00"), max_size=80))
def test_any_text_survives_the_tokenizer(pieces, text):
    ids = pieces.encode(text)
    assert 3 not in ids and pieces.decode(ids).split(" ") == [w for w in text.split(" ") if w] or not text.strip(" ")
