"""Films: resume, edit, regenerate, fork, states made again, the growing video, the lock, damaged folders."""

from __future__ import annotations

import json
import os
import shutil
from fractions import Fraction

import numpy as np
import pytest
import torch

from films import LENGTHS, RECIPE, TEXTS, condition, digests, frames_of, plan, replayer, sampler, shoot
from longvideo import GRID, same_state, tiny_model, tiny_spec, tiny_vae
from sana_video_core.errors import SanaVideoError, StateError
from sana_video_core.film import Film, FilmPlan, FilmVideo, WanStream, make_film
from sana_video_core.film.video import boxes, encode_fragment, to_uint8
from sana_video_core.sampling.blocks import sample_blocks
from sana_video_core.sampling.plan import BlockPlan
from sana_video_core.state import RecurrentState
from sana_video_core.vae.wan import WanCache


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The finished film, never changed by a test."""
    folder = tmp_path_factory.mktemp("film") / "whole"
    shoot(folder)
    return folder


@pytest.fixture
def copy(whole, tmp_path):
    """A copy of the finished film."""
    shutil.copytree(whole, tmp_path / "copy")
    return tmp_path / "copy"


def partly(folder, blocks, **options):
    """Run until ``blocks`` blocks are finished, then cancel in the middle of the next."""
    class Stop(BaseException):
        pass

    def hook(block, step, steps, x0):
        if (block, step) == (blocks, 1):
            raise Stop

    with pytest.raises(Stop):
        shoot(folder, on_step=hook, **options)


def latents(folder):
    with Film(folder, write=False) as film:
        return [film.latent(i) for i in range(film.finished())]


def straight(texts=TEXTS, seed=7, lengths=LENGTHS, **options):
    """The same blocks by the sampler alone."""
    return list(sample_blocks(tiny_model(), BlockPlan(tuple(lengths)), lambda i: condition(texts[i]), spec=tiny_spec(), size=GRID,
                              recipe=RECIPE, seed=seed, model_print="weights", **options))


# ------------------------------------------------------------------------------------------------------ making, resuming

def test_film_holds_the_samplers_blocks_and_states(whole):
    blocks = straight()
    with Film(whole, write=False) as film:
        assert film.finished() == 6
        for i, block in enumerate(blocks):
            assert torch.equal(film.latent(i), block.latent)
            assert same_state(film.state_after(i), block.state)


@pytest.mark.parametrize("blocks", range(6))
def test_a_cancelled_film_resumes_to_the_same_bits(whole, tmp_path, blocks):
    partly(tmp_path / "f", blocks)
    with Film(tmp_path / "f", write=False) as film:
        assert film.finished() == blocks
    steps = []
    shoot(tmp_path / "f", on_step=lambda block, step, *rest: steps.append(block))
    assert min(steps) == blocks and digests(tmp_path / "f") == digests(whole)


def test_a_finished_film_is_not_touched_again(copy, whole):
    times = {p.name: p.stat().st_mtime_ns for p in copy.iterdir()}
    state = shoot(copy, on_step=lambda *a: pytest.fail("sampled again"))
    assert {p.name: p.stat().st_mtime_ns for p in copy.iterdir() if p.name != "film.lock"} == {
        k: v for k, v in times.items() if k != "film.lock"}
    assert same_state(state, straight()[-1].state)


def test_a_film_can_be_extended(whole, tmp_path):
    shoot(tmp_path / "f", plan(LENGTHS[:4], TEXTS[:4]))
    assert frames_of(tmp_path / "f" / "film.mp4")[0] == list(range(29))
    shoot(tmp_path / "f")
    assert digests(tmp_path / "f") == digests(whole)


def test_film_from_a_saved_state(tmp_path):
    blocks = straight()
    state = blocks[2].state
    made = shoot(tmp_path / "f", plan(LENGTHS[3:], TEXTS[3:], start="print", index=3, position=7), TEXTS[3:], start=state)
    assert same_state(made, blocks[-1].state)
    assert all(torch.equal(a, b.latent) for a, b in zip(latents(tmp_path / "f"), blocks[3:], strict=True))
    with Film(tmp_path / "f", write=False) as film:
        assert same_state(film.state_after(-1), state)
        for i in range(3):
            assert same_state(film.state_after(i), blocks[3 + i].state)
    assert len(frames_of(tmp_path / "f" / "film.mp4")[0]) == 4 * 5  # no first frame of one pixel frame in mid-video


@pytest.mark.parametrize("window", [1, 2])
def test_windowed_film_resumes(tmp_path, window):
    shoot(tmp_path / "a", plan(window=window))
    partly(tmp_path / "b", 3, film_plan=plan(window=window))
    shoot(tmp_path / "b", plan(window=window))
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    assert all(torch.equal(a, b.latent) for a, b in zip(latents(tmp_path / "a"), straight(window=window), strict=True))


# ------------------------------------------------------------------------------------------------------------- editing

@pytest.mark.parametrize("block", range(6))
def test_editing_a_seed_samples_from_there(copy, whole, block):
    sampled = []
    shoot(copy, plan(seeds={block: 99}), on_step=lambda b, *rest: sampled.append(b))
    assert sorted(set(sampled)) == list(range(block, 6))
    old, new = digests(whole), digests(copy)
    for i in range(6):
        for kind in ("safetensors", "mp4"):
            name = f"block_{i + 1:04d}.{kind}"
            assert (old[name] == new[name]) == (i < block)
    expected = straight(seed=lambda i: 99 if i == block else 7)
    assert all(torch.equal(a, b.latent) for a, b in zip(latents(copy), expected, strict=True))
    shoot(copy)
    assert digests(copy) == digests(whole)


def test_editing_a_prompt_samples_from_there_with_the_recomputed_state(copy):
    texts = (0, 0, 1, 3, 3, 3)
    shoot(copy, plan(texts=texts), texts)
    assert all(torch.equal(a, b.latent) for a, b in zip(latents(copy), straight(texts), strict=True))


def test_an_edit_taken_back_before_sampling_costs_nothing(copy, whole):
    with Film(copy) as film:
        assert film.use_plan(plan(seeds={2: 99})) == 2
        assert film.use_plan(plan()) == 6
    assert digests(copy) == digests(whole)


def test_regenerate_from_a_block(copy, whole):
    with Film(copy) as film:
        film.regenerate(3)
        assert film.finished() == 3
    shoot(copy)
    assert digests(copy) == digests(whole)
    with Film(copy) as film:
        film.regenerate(4, seed=5)
        assert film.plan.blocks[4].seed == 5 and film.finished() == 4
        with pytest.raises(SanaVideoError, match="no such block"):
            film.regenerate(6)


def test_forks_share_the_beginning_and_go_their_own_ways(whole, tmp_path):
    before = digests(whole)
    with Film(whole, write=False) as film:
        for name in ("a", "b"):
            film.fork(tmp_path / name, 3)
    shoot(tmp_path / "a")
    shoot(tmp_path / "b", plan(seeds={3: 1, 4: 2}))
    assert digests(tmp_path / "a") == before == digests(whole)
    assert latents(tmp_path / "b")[3].ne(latents(whole)[3]).any()
    assert os.stat(tmp_path / "b" / "block_0001.safetensors").st_ino == os.stat(whole / "block_0001.safetensors").st_ino


def test_impossible_forks(whole, tmp_path):
    with Film(whole, write=False) as film:
        for block in (0, 7, -1):
            with pytest.raises(SanaVideoError, match="forked"):
                film.fork(tmp_path / "x", block)
        (tmp_path / "y").mkdir()
        (tmp_path / "y" / "something").write_text("x")
        with pytest.raises(StateError, match="not empty"):
            film.fork(tmp_path / "y", 2)


# --------------------------------------------------------------------------------------------- states made again from latents

def test_states_can_be_left_out_and_made_again(whole, tmp_path):
    with Film(tmp_path / "f") as film:
        film.use_plan(plan())
        make_film(film, sampler(film), None, keep_states=False)
        kept = [film.has_state(i) for i in range(6)]
        assert kept == [False, False, False, False, True, True]
    assert all(torch.equal(a, b) for a, b in zip(latents(tmp_path / "f"), latents(whole), strict=True))
    texts = (0, 0, 1, 1, 3, 3)
    with Film(tmp_path / "f") as film:
        film.use_plan(plan(texts=texts))
        with pytest.raises(StateError, match="was not kept"):
            make_film(film, sampler(film, texts))
        made = make_film(film, sampler(film, texts), replay=replayer(film, texts), keep_states=False)
    blocks = straight(texts)
    assert same_state(made, blocks[-1].state)
    assert all(torch.equal(a, b.latent) for a, b in zip(latents(tmp_path / "f"), blocks, strict=True))


# -------------------------------------------------------------------------------------------------------------- the video

def test_video_is_the_decoded_film(whole):
    blocks = straight()
    pixels = tiny_vae().decode(torch.cat([b.latent for b in blocks], 2))
    numbers, pictures = frames_of(whole / "film.mp4")
    assert numbers == list(range(45)) == list(range(pixels.shape[2]))
    for i, picture in enumerate(pictures):
        rgb = to_uint8(pixels[0, :, i].movedim(0, -1)).numpy() / 255
        luma = 16 + 219 * (rgb @ (0.2126, 0.7152, 0.0722))  # BT.709, video range
        assert np.abs(picture - luma).mean() < 4


def test_video_plays_after_each_block(tmp_path):
    seen = []

    def look(block, what):
        if what == "shown":
            numbers, _ = frames_of(tmp_path / "f" / "film.mp4")
            seen.append(len(numbers))
            assert numbers == list(range(len(numbers)))

    shoot(tmp_path / "f", on_block=look)
    assert seen == [9, 17, 25, 29, 37, 45]


def test_each_fragment_plays_alone(whole):
    for i, n in enumerate((9, 8, 8, 4, 8, 8)):
        assert len(frames_of(whole / f"block_{i + 1:04d}.mp4")[0]) == n


def test_complete_video_is_an_ordinary_mp4(whole):
    kinds = [kind for kind, _, _ in boxes((whole / "film.mp4").read_bytes())]
    assert "moof" not in kinds and kinds.index("moov") < kinds.index("mdat")


def test_video_can_be_made_afterwards_and_again(whole, tmp_path):
    shoot(tmp_path / "f", video=False)
    assert not (tmp_path / "f" / "film.mp4").exists()
    shoot(tmp_path / "f")
    assert digests(tmp_path / "f") == digests(whole)
    for name in ("film.mp4", "block_0003.mp4", "block_0006.mp4"):
        (tmp_path / "f" / name).unlink()
        shoot(tmp_path / "f")
        assert digests(tmp_path / "f") == digests(whole)
    (tmp_path / "f" / "block_0002.mp4").write_bytes((whole / "block_0002.mp4").read_bytes()[:-5])
    shoot(tmp_path / "f")
    assert digests(tmp_path / "f") == digests(whole)


def test_another_vae_or_frame_rate_makes_another_video(copy, whole):
    with Film(copy) as film:
        FilmVideo(film, WanStream(tiny_vae(), "vae")).open()
        other = FilmVideo(film, WanStream(tiny_vae(), "another"), 24)
        assert other.open() == 0 and other.catch_up() == 6
    assert digests(copy)["block_0001.safetensors"] == digests(whole)["block_0001.safetensors"]
    assert digests(copy)["film.mp4"] != digests(whole)["film.mp4"]


def test_decoder_memory_is_rebuilt_exactly():
    vae = tiny_vae()
    z = torch.randn(1, 4, 45, *GRID, generator=torch.Generator().manual_seed(1))
    full = vae.decode(z)
    stream = WanStream(vae)
    stream.start(z[:, :, :43])
    pieces = torch.cat(list(stream.decode(z[:, :, 43:])))
    assert torch.equal(pieces, to_uint8(full[0, :, -8:].movedim(0, -1)))
    cache = WanCache()
    assert torch.equal(torch.cat(list(vae.decode_stream(z, cache)), 2), full)


def test_the_same_pixels_always_give_the_same_bytes(whole):
    """With a decoder at work in between, memory that the encoder is given holds something else every time."""
    stream, made = WanStream(tiny_vae()), set()
    with Film(whole, write=False) as film:
        before, latent = film.latents_before(5, stream.memory), film.latent(5)
    stream.start(before)
    pixels = list(stream.decode(latent))

    def while_decoding():
        stream.start(before)
        yield from (known for _, known in zip(stream.decode(latent), pixels, strict=True))

    for _ in range(60):
        made.add(encode_fragment(while_decoding(), 21, 5, Fraction(16)))
    assert len(made) == 1


def test_fragments_need_frames():
    with pytest.raises(SanaVideoError, match="without frames"):
        encode_fragment([], 0, 0, Fraction(16))


# ------------------------------------------------------------------------------------------------------ bad folders, lock

def test_two_runs_cannot_share_a_folder(copy):
    with Film(copy), pytest.raises(StateError, match="in use by another run"):
        Film(copy)
    with Film(copy) as film:
        assert film.finished() == 6


def test_reading_needs_no_lock(copy):
    with Film(copy), Film(copy, write=False) as reader:
        assert reader.finished() == 6


@pytest.mark.parametrize(("settings", "field"), [
    ({"window": 2}, "window"), ({"recompute": False}, "recompute"), ({"precision": "parity"}, "precision"),
    ({"start": "x"}, "start"),
])
def test_other_settings_do_not_overwrite_a_film(copy, whole, settings, field):
    with Film(copy) as film, pytest.raises(StateError, match=f"another film: {field}"):
        film.use_plan(plan(**settings))
    assert digests(copy) == digests(whole)


def test_a_resolution_change_in_mid_film_is_refused(copy, whole):
    from dataclasses import replace

    with Film(copy) as film, pytest.raises(StateError, match="size differs"):
        film.use_plan(replace(plan(), settings=replace(plan().settings, size=(8, 8))))
    assert digests(copy) == digests(whole)


def test_a_damaged_block_is_named_and_nothing_is_lost(copy, whole):
    path = copy / "block_0006.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(StateError, match=r"block_0006.*damaged"):
        shoot(copy)
    path.write_bytes(data[:-10])
    with pytest.raises(StateError, match=r"block_0006.*damaged"):
        shoot(copy)
    path.unlink()
    shoot(copy)
    assert digests(copy) == digests(whole)


def test_a_block_in_another_blocks_place_is_noticed(copy):
    shutil.copy(copy / "block_0002.safetensors", copy / "block_0003.safetensors")
    with Film(copy, write=False) as film:
        assert film.finished() == 2
        with pytest.raises(StateError, match="not that block"):
            film.latent(2)


@pytest.mark.parametrize("change", [
    lambda d: d.update(kind="x"), lambda d: d.update(format=9), lambda d: d.pop("settings"), lambda d: d.update(blocks=[]),
    lambda d: d["blocks"][0].update(frames=0), lambda d: d["blocks"][0].update(frames=2.5), lambda d: d["blocks"][1].pop("seed"),
    lambda d: d["blocks"][1].update(color="red"), lambda d: d["settings"].update(size=[4]), lambda d: d.update(hash="md5"),
    lambda d: d["settings"].update(spec=5), lambda d: d["settings"].update(window=-1),
    lambda d: d.update(blocks=d["blocks"] * 2000), lambda d: d["blocks"][0].update(seed="1"),
])
def test_a_film_json_that_makes_no_sense(copy, change):
    data = json.loads((copy / "film.json").read_text())
    change(data)
    (copy / "film.json").write_text(json.dumps(data))
    with pytest.raises(StateError), Film(copy) as film:
        film.finished()
    (copy / "film.json").write_text("{")
    with pytest.raises(StateError, match="film.json"):
        Film(copy)


def test_plan_round_trip():
    p = plan(seeds={1: 2**63 - 1})
    assert FilmPlan.from_json(p.to_json()) == p and FilmPlan.from_json(p.to_json()).contracts == p.contracts


def test_contracts_form_a_chain():
    base = plan().contracts
    for block in range(6):
        for changed in (plan(seeds={block: 1}), plan().edit(block, caption="x"), plan().edit(block, patches="lora")):
            assert [a == b for a, b in zip(base, changed.contracts, strict=True)] == [i < block for i in range(6)]
    assert plan().edit(2, prompt="only for people", motion=3).contracts == base
    assert plan(window=1).contracts[0] != base[0]


def test_the_folder_must_be_a_folder(tmp_path):
    (tmp_path / "f").write_text("x")
    with pytest.raises(StateError, match="not a folder"):
        Film(tmp_path / "f")
    with pytest.raises(StateError, match="holds no film"), Film(tmp_path / "g") as film:
        film.finished()


def test_empty_and_huge_films_are_refused(tmp_path):
    with Film(tmp_path / "f") as film:
        for lengths in ((), (2,) * 10_001):
            with pytest.raises(SanaVideoError):
                film.use_plan(plan(lengths, (0,) * len(lengths)))
    assert not (tmp_path / "f" / "film.json").exists()


def test_keeping_the_state_of_a_film_as_a_file(whole, tmp_path):
    with Film(whole, write=False) as film:
        state = film.state_after(2)
    state.save(tmp_path / "s.safetensors")
    loaded = RecurrentState.load(tmp_path / "s.safetensors", tiny_spec())
    rest = shoot(tmp_path / "f", plan(LENGTHS[3:], TEXTS[3:], start="p", index=3, position=7), TEXTS[3:], start=loaded)
    assert same_state(rest, straight()[-1].state)
