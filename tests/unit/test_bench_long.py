"""The benchmarks of long video in their small form: they check first, they see what they are there to see, they refuse."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace

import benches
import pytest
import torch

from sana_video_core import mini
from sana_video_core.film import Film, FilmBlock, FilmPlan, FilmSettings, FilmVideo, WanStream
from sana_video_core.sampling.blocks import sample_blocks
from sana_video_core.sampling.plan import pixel_frames
from sana_video_core.state import tensors
from sana_video_core.vae.loading import load_wan_vae

harness, long, memory = (benches.module(name) for name in ("harness", "long", "memory"))
longsana, wan_decode, prepare = (benches.module(name) for name in ("longsana", "wan_decode", "prepare"))
mini_film_cpu, film_server, session = (benches.module(name) for name in ("mini_film_cpu", "film_server", "session"))


def rows(report) -> dict:
    assert report.checks and all(check["green"] for check in report.checks)
    return {row["name"]: row for row in report.rows}


@pytest.fixture(scope="module")
def small():
    """The small random network for long video."""
    with torch.inference_mode():
        return long.Long(long.TINY, "cpu")


# ---------------------------------------------------------------------------------------------------------------- peers

@pytest.mark.parametrize("window", [0, 1])
def test_blocks_without_a_carried_state_are_the_same_to_the_bit(small, window):
    options = {"spec": small.spec, "size": small.size.latent, "recipe": small.recipe, "seed": long.SEED, "device": "cpu",
               "window": window}
    with torch.inference_mode():
        ours = [block.latent for block in sample_blocks(small.model, small.plan(3), small.condition, **options)]
        again = [block.latent for block in long.recomputed_blocks(small.model, small.plan(3), small.condition, **options)]
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))


def test_cache_list_gives_the_state_of_the_running_sums_and_keeps_every_block(small):
    listed = long.ListModel(small.model)
    with torch.inference_mode():
        theirs = [b.state for b in small.sample(3, listed, recompute=False, keep_undo=False)][-1]
        ours = [b.state for b in small.sample(3, recompute=False, keep_undo=False)][-1]
    assert all(torch.equal(a, b) for a, b in zip(tensors(ours), tensors(theirs), strict=True))
    assert (ours.position, ours.blocks) == (theirs.position, theirs.blocks) and len(listed.kept) == 3


# --------------------------------------------------------------------------------------------------------------- memory

def test_memory_is_the_same_at_every_boundary_and_the_list_grows(tmp_path, monkeypatch):
    monkeypatch.setenv("OUT", str(tmp_path))
    found = rows(memory.run(tiny=True, blocks=6))
    state = found["longsana_state"]
    assert state["bytes_with_undo"] == state["bytes_with_undo_after_block_2"] > 2 * state["bytes"]
    asked = found["longsana_memory_requested"]
    assert asked["min_bytes"] == asked["max_bytes"] > asked["block_1_bytes"]
    assert found["longsana_memory_growth_cache_list"]["value"] * 2**20 == state["bytes"]
    assert not list(tmp_path.iterdir())  # a small run is no figure


def test_memory_that_grows_turns_the_check_red(monkeypatch):
    kept, plain = [], long.Long.sample

    def sample(self, blocks, model=None, **options):
        for block in plain(self, blocks, model, **options):
            if model is None:
                kept.append(block.state)
            yield block

    monkeypatch.setattr(long.Long, "sample", sample)
    report = harness.Report("memory")
    with pytest.raises(harness.BenchError, match="largest minus smallest"):
        memory.run(tiny=True, blocks=6, steps=1, report=report)
    assert not report.rows


def test_state_of_the_full_model_fits_its_limits():
    """causal spec 3.3, with the sums of the keys in float32: worked out, not measured."""
    spec, (height, width) = long.FULL.spec, long.FULL.latent
    tail = height // 2 * (width // 2) * spec.width * 2
    sums = spec.linear_heads * spec.linear_head_dim * (spec.linear_head_dim + 1) * 4
    plain = spec.depth * (tail + sums) / 2**20
    clean = spec.channels * long.FULL.base * height * width * 4 / 2**20
    assert 152 < plain < long.FULL.state_mib and 2 * plain + clean < long.FULL.undo_mib


# ------------------------------------------------------------------------------------------------------------- longsana

def test_network_alone_is_timed_beside_its_peers():
    found = rows(longsana.run(True, "dit", harness.Report("longsana"), blocks=4))
    main = found["longsana_dit_fps"]
    assert main["pixel_frames"] == pixel_frames(4 * 2 + 1)
    assert main["value"] * main["seconds"] == pytest.approx(main["pixel_frames"], rel=1e-3)
    assert main["ratio_vs_reference"] > 0 and main["ratio_vs_recompute_block_4"] > 0
    assert found["longsana_block"]["low"] <= found["longsana_block"]["value"] <= found["longsana_block"]["high"]


def test_wrong_history_turns_the_check_red(monkeypatch):
    plain = long.Long.recompute

    def forgetful(self, plan, earlier=()):
        return plain(self, plan, [torch.zeros_like(t) for t in earlier])

    monkeypatch.setattr(long.Long, "recompute", forgetful)
    report = harness.Report("longsana")
    with pytest.raises(harness.BenchError, match="a state made anew"):
        longsana.run(True, "dit", report, blocks=3)
    assert not report.rows


def test_film_from_noise_to_mp4_is_timed_and_its_parts_add_up():
    found = rows(longsana.run(True, "file", harness.Report("longsana_file"), blocks=4))
    main = found["longsana_file_fps"]
    parts = sum(main[f"{name}_s"] for name in ("sample", "decode", "wait_for_file"))
    assert parts == pytest.approx(main["seconds"], abs=0.01) and main["wait_for_file_s"] > 0
    assert main["value"] * main["seconds"] == pytest.approx(main["pixel_frames"], rel=1e-3)
    assert 0 < found["longsana_file_first_block"]["value"] < main["seconds"]


# ----------------------------------------------------------------------------------------------------------- wan_decode

def other_way(state, dim, dtype, device):
    """The core's own decode of the whole clip at once, in the place of the peer: another way to the same function."""
    vae = load_wan_vae(state, dtype, device)
    return lambda latent: vae.decode_parallel(latent.to(dtype)).clamp(-1, 1)


def test_decode_is_timed_whole_and_streamed_beside_its_peer():
    found = rows(wan_decode.run(True, peer=other_way))
    for name in ("", "_streamed", "_fp32", "_fp32_streamed"):
        row = found[f"wan_vae_decode_81f{name}"]
        peer = found["wan_vae_decode_81f_diffusers_bf16"]["value"]
        assert row["ratio_vs_diffusers_bf16"] == pytest.approx(peer / row["value"], rel=1e-3)


def test_decode_with_other_weights_than_the_peer_gives_no_times():
    def wrong(state, dim, dtype, device):
        return other_way(state | {"conv2.weight": state["conv2.weight"] * 1.01}, dim, dtype, device)

    report = harness.Report("wan_decode")
    with pytest.raises(harness.BenchError, match="red"):
        wan_decode.run(True, report, peer=wrong)
    assert not report.rows


def test_decode_without_its_peer_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(harness.BenchError, match="needs diffusers"):
        wan_decode.run(True)


def test_random_decoder_has_low_contrast(monkeypatch):
    state = prepare.vae_state(tiny=True)
    with torch.inference_mode():
        picture = load_wan_vae(state).decode(torch.randn(1, 16, 2, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert 0.01 < float(picture.std()) < 0.2 and float(picture.abs().max()) < 1


def test_only_the_wanted_layout_is_written(tmp_path):
    prepare.write_all(tmp_path, tiny=True, wanted={film_server.LAYOUT})
    there = {name for name, path in prepare.layouts(tmp_path).items() if path.exists()}
    assert there == {film_server.LAYOUT} and (tmp_path / "models" / "vae" / prepare.VAE).is_file()


# -------------------------------------------------------------------------------------------------------- mini_film_cpu

def test_small_film_on_the_cpu():
    before = torch.get_num_threads()
    found = rows(mini_film_cpu.run(tiny=True))
    assert found["mini_film_cpu"]["value"] > 0 and found["mini_film_cpu_recompute"]["value"] > 0
    assert found["mini_film_cpu"]["times_real_time"] == pytest.approx(
        found["mini_film_cpu"]["film_s"] / found["mini_film_cpu"]["value"], rel=1e-3)
    assert torch.get_num_threads() == before


def test_film_without_the_embedded_long_model_is_refused(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(mini, "FOLDER", tmp_path / "weights")
    monkeypatch.setenv("OUT", str(tmp_path))
    assert mini_film_cpu.main([]) == 1
    assert mini.LONG in capsys.readouterr().err and not list(tmp_path.glob("*.json"))


# ---------------------------------------------------------------------------------------------------------- film_server

@pytest.fixture(scope="module")
def film(tmp_path_factory):
    """(looks, blocks) of a watcher at a film whose file grew by one block between two looks, and its path."""
    blocks = 3
    settings = FilmSettings("tiny", "", (4, 4), {})
    plan = FilmPlan(settings, tuple(FilmBlock(n, 0, "") for n in (3, 2, 2)))
    generator = torch.Generator().manual_seed(0)
    with Film(tmp_path_factory.mktemp("film")) as folder, torch.no_grad():
        folder.use_plan(plan)
        video = FilmVideo(folder, WanStream(load_wan_vae(prepare.vae_state(tiny=True))))
        watcher = film_server.Watcher(video.path)
        watcher.look()
        for block in range(blocks):
            folder.write_block(block, torch.randn(1, 16, plan.blocks[block].frames, 4, 4, generator=generator), None)
            video.begin(block)
            watcher.look()
            watcher.look()
        video.complete()
        whole = film_server.played(video.path)
    return watcher, whole


def result(looks, whole, blocks=3):
    return film_server.Result(blocks, 0.0, 1.0, {}, (0.0, 0.0), 0.0, 0.0, list(looks), [], whole, None, [])


def test_watcher_plays_every_length_of_a_growing_film(film):
    watcher, whole = film
    assert [look.frames for look in watcher.looks] == film_server.boundaries(3, tiny=True) == [9, 17, 25]
    assert [look.shown for look in watcher.looks] == [9, 8, 8] and not watcher.faults
    assert whole == (25, 32, 32, "h264")


def test_length_that_never_played_turns_the_check_red(film):
    watcher, whole = film
    report = harness.Report("x")
    good = (25, 64, 64, "h264")
    film_server.check_film(report, "30s", result(watcher.looks, good), tiny=True)
    for looks in (watcher.looks[1:], [replace(watcher.looks[0], shown=3), *watcher.looks[1:]]):
        with pytest.raises(harness.BenchError, match="did not play"):
            film_server.check_film(harness.Report("x"), "30s", result(looks, good), tiny=True)
    with pytest.raises(harness.BenchError, match="should play as"):
        film_server.check_film(harness.Report("x"), "30s", result(watcher.looks, whole), tiny=True)


def test_watcher_waits_at_half_a_file_and_goes_on(film, tmp_path):
    watcher, _ = film
    data, path = watcher.path.read_bytes(), tmp_path / "film.mp4"
    other = film_server.Watcher(path)
    path.write_bytes(data[:40])
    other.look()
    other.look()
    assert other.faults and not other.looks
    path.write_bytes(data)
    other.look()
    other.look()
    assert [look.frames for look in other.looks] == [25]


def test_host_memory_is_that_of_the_process():
    watch = film_server.HostMemory(os.getpid())
    watch.sample()
    held = bytearray(b"x" * (96 << 20))
    watch.sample()
    start, end = watch.samples[0][0], watch.samples[1][0]
    resident, private = watch.peak_gib(start, end)
    assert resident * 2**30 - watch.samples[0][1] > 90 << 20 and resident >= private and len(held)
    assert watch.peak_gib(end + 1, end + 2) == (0.0, 0.0)


# -------------------------------------------------------------------------------------------------------------- session

def test_session_knows_every_part_and_its_limit(tmp_path, monkeypatch):
    assert set(session.PARTS) < set(benches.module("cli").BENCHMARKS) and all(0 < s <= 400 for s in session.PARTS.values())
    ran = []
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(session, "run_part", lambda name, limit, *rest: ran.append((name, limit)) or ("ok", 1.0))
    assert session.main(["--tiny", "--parts=memory,longsana"]) == 0 and session.main([]) == 0
    assert ran == [*((n, session.LONG[n]) for n in ("memory", "longsana")), *session.CLIP.items()]


def test_session_gives_the_model_folder_only_to_parts_that_want_it(tmp_path, monkeypatch):
    script = tmp_path / "run.py"
    script.write_text("import json, sys\nprint(json.dumps(sys.argv[1:]))\n", encoding="utf-8")
    monkeypatch.setattr(session, "ROOT", tmp_path)
    for name, expected in (("memory", ["--tiny"]), ("film_server", [str(tmp_path), "--tiny"])):
        with (tmp_path / "log").open("w", encoding="utf-8") as log:
            assert session.run_part(name, 30, tmp_path, ["--tiny"], log)[0] == "ok"
        assert json.loads((tmp_path / "log").read_text(encoding="utf-8"))[3:] == expected
