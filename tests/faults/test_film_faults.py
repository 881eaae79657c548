"""Films under fire: kill -9 at random moments, and every file operation failing once. The film that comes out is the same."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from faults import Fault, failing, watched
from films import digests, frames_of, shoot
from sana_video_core.errors import SanaVideoError
from sana_video_core.film import Film, video
from sana_video_core.state.atomic import SYSTEM

KILLS = int(os.environ.get("SANA_VIDEO_KILLS", "5"))  # 50 for a release
FAULT_STRIDE = int(os.environ.get("SANA_VIDEO_FAULT_STRIDE", "23"))  # 1 for a release: every single call
VICTIM = Path(__file__).parents[1] / "helpers" / "film_victim.py"


def test_kill_9_at_random_moments(tmp_path):
    run = subprocess.run([sys.executable, str(VICTIM), str(tmp_path), str(KILLS), "11"], capture_output=True, text=True,
                         env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=1200)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    whole, *results = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(results) == KILLS and whole["sampled"] == list(range(6))
    for result in results:
        assert result["killed"][0], result
        assert result["files"] == whole["files"], result["moments"]
        assert result["sampled"] == list(range(result["done"], 6)), "a finished block was sampled again"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(digests of the undisturbed film, number of file operations it takes)."""
    folder = tmp_path_factory.mktemp("whole") / "f"
    with watched(Fault(0, None)) as fault:
        shoot(folder)
    return digests(folder), fault.count


@pytest.mark.parametrize(("number", "words"), [
    (errno.ENOSPC, "disk is full"), (errno.EIO, "input/output error"), (errno.EACCES, "not allowed"), (errno.EROFS, "read-only"),
])
def test_every_file_operation_failing_once(tmp_path, whole, number, words):
    files, calls = whole
    first = [errno.ENOSPC, errno.EIO, errno.EACCES, errno.EROFS].index(number) * 2 + 1
    told = 0
    for nth in range(first, calls + 1, FAULT_STRIDE):
        folder = tmp_path / f"f{nth}"
        with failing(nth, number) as fault:
            try:
                shoot(folder, overlap=bool(nth // FAULT_STRIDE % 2))
            except SanaVideoError as error:
                told += 1
                assert words in str(error) and "File" not in str(error).split(".")[0]
        assert fault.struck
        if (folder / "film.json").exists():
            with Film(folder) as film:
                done = film.finished()
                assert all(film.latent(i).isfinite().all() for i in range(done))
            assert not list(folder.glob(".*.part"))
        sampled: set[int] = set()
        shoot(folder, on_step=lambda block, *rest, seen=sampled: seen.add(block))
        assert digests(folder) == files, nth
        assert len(sampled) <= 6
    assert told > 0.8 * len(range(first, calls + 1, FAULT_STRIDE))


@pytest.mark.parametrize("overlap", [False, True])
def test_a_full_disk_leaves_a_playable_film(tmp_path, overlap):
    folder = tmp_path / "f"
    blocks = []

    def look(block, what):
        blocks.append((block, what))
        if (block, what) == (2, "shown"):
            def full(*args):
                raise OSError(errno.ENOSPC, "full")

            SYSTEM.write = full

    try:
        with pytest.raises(SanaVideoError, match="disk is full.*finished blocks are kept"):
            shoot(folder, on_block=look, overlap=overlap)
    finally:
        del SYSTEM.write
    assert frames_of(folder / "film.mp4")[0] == list(range(25))
    with Film(folder) as film:
        assert film.finished() == 3


def test_a_read_only_folder_says_so(tmp_path):
    def refuse(*args):
        raise OSError(errno.EROFS, "read-only")

    SYSTEM.mkdir = refuse
    try:
        with pytest.raises(SanaVideoError, match="read-only.*Choose a folder"):
            Film(tmp_path / "f")
    finally:
        del SYSTEM.mkdir


@pytest.mark.parametrize("overlap", [False, True])
def test_an_interrupt_while_decoding_loses_no_block(tmp_path, whole, overlap):
    class Interrupt(BaseException):
        pass

    folder = tmp_path / "f"
    plain, seen = video._bytes, []

    def interrupted(frames):
        seen.append(1)
        if len(seen) == 6:
            raise Interrupt
        return plain(frames)

    video._bytes = interrupted
    try:
        with pytest.raises(Interrupt):
            shoot(folder, overlap=overlap)
    finally:
        video._bytes = plain
    with Film(folder) as film:
        assert film.finished() == 3  # the block that was being decoded had been stored before
    shoot(folder)
    assert digests(folder) == whole[0]
