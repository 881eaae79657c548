"""What a film's threads promise: order, nothing begun before a block is on disk, failures told in the run that has them."""

from __future__ import annotations

import threading
import time

import pytest
import torch

import films
from films import digests, frames_of
from films import shoot as shoot_plainly
from sana_video_core.errors import SanaVideoError
from sana_video_core.film import Film, video
from sana_video_core.film.background import BrokenOff, Feed, in_background
from sana_video_core.film.folder import Film as Folder
from sana_video_core.film.make import _Store


def shoot(folder, **options):
    """A film as on a card."""
    return shoot_plainly(folder, overlap=True, **options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("film") / "whole"
    shoot_plainly(folder)
    return digests(folder)


def test_pieces_arrive_in_order_and_a_broken_feed_raises():
    feed, broken = Feed(), Feed()
    taken = in_background(list, feed)
    for i in range(50):
        feed.put(i)
    feed.end()
    assert taken.result(10) == list(range(50))
    failed = in_background(list, broken)
    broken.put(1)
    broken.break_off()
    with pytest.raises(BrokenOff):
        failed.result(10)


def test_a_block_is_on_disk_before_the_next_is_begun(tmp_path, monkeypatch, whole):
    """However slow the disk is."""
    folder, plain, begun = tmp_path / "f", Folder.write_block, []

    def slow(film, number, *block):
        time.sleep(0.2)
        plain(film, number, *block)

    def step(block, *_):
        if block not in begun:
            begun.append(block)
            with Film(folder, write=False) as film:
                assert film.finished() == block

    monkeypatch.setattr(Folder, "write_block", slow)
    shoot(folder, on_step=step)
    assert begun == list(range(6)) and digests(folder) == whole


@pytest.mark.parametrize("overlap", [False, True])
def test_a_block_that_fails_its_check_is_not_kept(tmp_path, monkeypatch, whole, overlap):
    """Its check is asked for after its decoding has begun; nothing of it reaches the folder, and the film goes on later."""
    folder, plain = tmp_path / "f", films.sampler

    def fail():
        raise SanaVideoError("Block 3 left values in the state that are not numbers")

    def doubtful(*args):
        sample = plain(*args)
        return lambda first, state: (b._replace(check=fail) if b.index == 2 else b for b in sample(first, state))

    with monkeypatch.context() as patch:
        patch.setattr(films, "sampler", doubtful)
        with pytest.raises(SanaVideoError, match="Block 3"):
            shoot_plainly(folder, overlap=overlap)
    with Film(folder, write=False) as film:
        assert film.finished() == 2 and not film.segment_path(2).exists()
    shoot(folder)
    assert digests(folder) == whole


@pytest.mark.parametrize("overlap", [False, True])
def test_new_latents_are_handed_over_in_order(tmp_path, overlap):
    """Those of blocks that were there before are not."""
    taken: list = []

    def stop(block, what):
        if (block, what) == (2, "sampled"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        shoot_plainly(tmp_path / "f", overlap=overlap, on_block=stop, on_latent=lambda *new: taken.append(new))
    shoot_plainly(tmp_path / "f", overlap=overlap, on_latent=lambda *new: taken.append(new))
    with Film(tmp_path / "f", write=False) as film:
        assert [block for block, _ in taken] == list(range(6))
        assert all(torch.equal(latent, film.latent(block)) for block, latent in taken)


def test_frames_are_encoded_while_the_next_block_is_sampled(tmp_path, monkeypatch, whole):
    """The encoder waits for the sampler here, which could not end if the sampler waited for the encoder."""
    plain, stepped = video.encode_fragment, [threading.Event() for _ in range(7)]
    stepped[6].set()

    def waiting(frames, start, number, *more):
        found = plain(frames, start, number, *more)
        assert stepped[number + 1].wait(60)
        return found

    heard = []
    monkeypatch.setattr(video, "encode_fragment", waiting)
    shoot(tmp_path / "f", on_step=lambda block, *_: stepped[block].set(), on_block=lambda *event: heard.append(event))
    assert digests(tmp_path / "f") == whole
    assert heard[:5] == [(0, "sampled"), (0, "decoded"), (0, "shown"), (1, "sampled"), (1, "decoded")]
    assert [block for block, what in heard if what == "shown"] == list(range(6))


@pytest.mark.parametrize("where", ["encode_fragment", "write_atomic", "append_synced"])
def test_a_failing_encoder_ends_the_run_and_loses_no_block(tmp_path, monkeypatch, whole, where):
    folder, plain, calls = tmp_path / "f", getattr(video, where), []

    def failing(*args):
        calls.append(1)
        if len(calls) == 3:
            raise SanaVideoError("no more")
        return plain(*args)

    with monkeypatch.context() as patch:
        patch.setattr(video, where, failing)
        with pytest.raises(SanaVideoError, match="no more"):
            shoot(folder)
    with Film(folder) as film:
        done = film.finished()
    shown = frames_of(folder / "film.mp4")[0]
    assert 2 <= done <= 4 and shown == list(range(len(shown))) and len(shown) in (9, 17, 25)
    shoot(folder)
    assert digests(folder) == whole


def test_a_block_that_could_not_be_stored_is_not_shown(tmp_path, monkeypatch, whole):
    folder, plain = tmp_path / "f", Folder.write_block

    def failing(film, number, *block):
        if number == 2:
            raise SanaVideoError("full")
        plain(film, number, *block)

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "write_block", failing)
        with pytest.raises(SanaVideoError, match="full"):
            shoot(folder)
    with Film(folder) as film:
        assert film.finished() == 2
    assert frames_of(folder / "film.mp4")[0] == list(range(17)) and not (folder / "block_0003.mp4").exists()
    shoot(folder)
    assert digests(folder) == whole


def test_no_thread_outlives_its_film(tmp_path):
    shoot(tmp_path / "f")

    class Cancel(BaseException):
        pass

    def cancel(block, what):
        if (block, what) == (2, "decoded"):
            raise Cancel

    with pytest.raises(Cancel):
        shoot(tmp_path / "g", on_block=cancel)
    assert not [t for t in threading.enumerate() if t.name.startswith("film ")]
    assert torch.is_grad_enabled()


def test_a_block_may_be_on_its_way_to_the_disk_while_the_next_is_sampled():
    """Where a card is faster than the disk: heard when it is there, and what went wrong is raised before the next is begun."""
    heard, taken, there = [], [], threading.Event()
    stores = _Store(lambda *event: heard.append(event), lambda *latent: taken.append(latent))
    stores.begin(0, lambda: there.wait(60) and "latent")
    stores.finish(wait=False)
    assert heard == []
    there.set()
    stores.begin(1, lambda: None)
    assert heard == [(0, "sampled")]
    stores.finish()
    assert heard == [(0, "sampled"), (1, "sampled")]

    def full():
        raise SanaVideoError("full")

    stores.begin(2, full)
    with pytest.raises(SanaVideoError, match="full"):
        stores.begin(3, lambda: None)
    stores.settle()
    assert heard == [(0, "sampled"), (1, "sampled")] and taken == [(0, "latent"), (1, None)]
