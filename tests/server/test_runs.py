"""Prompts over HTTP, their events over the websocket: results, previews, progress, caching, interrupt."""

from __future__ import annotations

import threading

import tinyfiles
import torch

JPEG = b"\xff\xd8\xff"


def test_a_prompt_gives_files_and_the_events_of_a_success(fresh, latent_of):
    outcome = fresh.client.run(tinyfiles.prompt())
    assert outcome.ok, outcome.error
    kinds = [event.type for event in outcome.events]
    start, end = kinds.index("execution_start"), kinds.index("execution_success")
    assert start < kinds.index("execution_cached") < kinds.index("executing") < end
    assert {"progress", "progress_state", "executed"} <= set(kinds)
    latent = latent_of(outcome)
    assert latent.shape == (1, 16, 3, 4, 8) and torch.isfinite(latent).all() and latent.std() > 0.1
    pictures = [item for item in outcome.files() if item["filename"].endswith(".png")]
    assert len(pictures) == 9
    for item in pictures:
        assert (fresh.base / "output" / item["filename"]).read_bytes().startswith(b"\x89PNG")
    assert outcome.history["status"]["completed"] is True


def test_sampler_and_decoder_report_progress_up_to_the_end(fresh):
    outcome = fresh.client.run(tinyfiles.prompt(steps=5, frames=13))
    assert outcome.ok, outcome.error
    steps = {node: [(e.data["value"], e.data["max"]) for e in outcome.of("progress") if e.data["node"] == node] for node in "45"}
    for node, total in (("4", 5), ("5", 4)):  # 4 latent frames are decoded one by one
        values = [value for value, _ in steps[node]]  # ComfyUI leaves out steps that come within 0.1 s
        assert values == sorted(set(values)) and values[0] >= 1 and values[-1] == total
        assert {most for _, most in steps[node]} == {total}
    states = [e.data["nodes"]["4"]["value"] for e in outcome.of("progress_state") if "4" in e.data["nodes"]]
    assert states == sorted(states) and states[-1] == 5


def test_previews_are_pictures_with_metadata_of_our_latent(fresh):
    outcome = fresh.client.run(tinyfiles.prompt(steps=4, width=128, height=64), preview_method="latent2rgb")
    assert outcome.ok, outcome.error
    previews = outcome.of("preview")
    assert len(previews) >= 2 and all(event.binary_type == 4 for event in previews)
    for event in previews:
        assert event.data["node_id"] == "4" and event.data["display_node_id"] == "4"
        assert event.data["prompt_id"] == outcome.data["prompt_id"] and event.data["image_type"] == "image/jpeg"
        assert event.image.startswith(JPEG)
    assert len({event.image for event in previews}) > 1  # the picture changes while it is made


def test_an_unchanged_prompt_is_not_run_again_and_a_new_seed_runs_the_sampler_only(fresh, latent_of):
    first = fresh.client.run(tinyfiles.prompt(seed=1))
    again = fresh.client.run(tinyfiles.prompt(seed=1))
    other = fresh.client.run(tinyfiles.prompt(seed=2))
    assert first.ok and again.ok and other.ok
    assert set(again.of("execution_cached")[0].data["nodes"]) == set("1234567")
    assert set(other.of("execution_cached")[0].data["nodes"]) == {"1", "2", "3"}
    assert not torch.equal(latent_of(first), latent_of(other))


def test_the_same_seed_gives_the_same_video_after_everything_was_unloaded(fresh, latent_of):
    first = fresh.client.run(tinyfiles.prompt())
    fresh.client.free()
    second = fresh.client.run(tinyfiles.prompt())
    assert "4" not in second.of("execution_cached")[0].data["nodes"]
    assert torch.equal(latent_of(first), latent_of(second))


def test_the_official_container_gives_the_same_video_as_our_own_names(fresh, latent_of):
    ours = fresh.client.run(tinyfiles.prompt())
    official = fresh.client.run(tinyfiles.prompt(n1={"model": "tiny.pth"}))
    assert official.ok, official.error
    assert torch.equal(latent_of(ours), latent_of(official))


def test_interrupt_stops_within_a_step_and_the_next_run_is_identical(fresh, latent_of):
    def slow(seed):
        graph = tinyfiles.prompt(seed=seed, width=256, height=256, frames=33, steps=5)
        return {key: graph[key] for key in "12346"}  # without the decoder

    reference = fresh.client.run(slow(1))
    assert reference.ok, reference.error
    interrupted_at = []

    def interrupt(event):
        if event.type == "progress" and event.data["node"] == "4" and not interrupted_at:
            interrupted_at.append(event.data["value"])
            body = {"prompt_id": event.data["prompt_id"]}
            threading.Thread(target=fresh.client.post, args=("/interrupt", body)).start()

    stopped = fresh.client.run(slow(2), interrupt)
    assert stopped.ending == "execution_interrupted" and stopped.data["node_id"] == "4"
    last = max(e.data["value"] for e in stopped.of("progress") if e.data["node"] == "4")
    assert interrupted_at and last <= interrupted_at[0] + 1
    fresh.client.free()
    again = fresh.client.run(slow(1))
    assert again.ok and torch.equal(latent_of(reference), latent_of(again))


def test_interrupt_reaches_the_decoder(fresh):
    slow = {"width": 256, "height": 256, "frames": 81, "steps": 1}
    seen = []

    def interrupt(event):
        if event.type == "progress" and event.data["node"] == "5" and not seen:
            seen.append(event.data["value"])
            fresh.client.post("/interrupt", {"prompt_id": event.data["prompt_id"]})

    stopped = fresh.client.run(tinyfiles.prompt(**slow), interrupt)
    assert stopped.ending == "execution_interrupted" and stopped.data["node_id"] == "5"
    assert max(e.data["value"] for e in stopped.of("progress") if e.data["node"] == "5") < 11  # of 11 groups
    assert fresh.client.run(tinyfiles.prompt()).ok


def test_prompts_of_two_users_wait_for_each_other(fresh, latent_of):
    results = {}

    def user(seed):
        results[seed] = fresh.client.run(tinyfiles.prompt(seed=seed))

    threads = [threading.Thread(target=user, args=(seed,)) for seed in (11, 12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert results[11].ok and results[12].ok
    for seed in (11, 12):
        fresh.client.free()
        assert torch.equal(latent_of(results[seed]), latent_of(fresh.client.run(tinyfiles.prompt(seed=seed))))
