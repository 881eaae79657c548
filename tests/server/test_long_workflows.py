"""The shipped workflows of long video, turned into prompts and executed: those of LongSANA on the tiny checkpoint in the
official container, the embedded one on the embedded model."""

from __future__ import annotations

import json

import av
import longprompts as lp
import pytest

from sana_video_core import mini
from sana_video_core.sampling.plan import plan_blocks
from sana_video_core.specs import SPECS

SIZE, RATE = (64, 32), 3.2
BLOCK = lp.TINY["block_frames"]


def frames_of(blocks: int, begins: bool = True) -> int:
    """Pixel frames of a video of tiny blocks; one that goes on has no single first frame."""
    return 4 * BLOCK * blocks + (1 if begins else 0)


def videos(server, outcome) -> dict[str, tuple[int, tuple[int, int], float]]:
    """{name without its number: (frames, size, frames a second)} of all mp4 files that the prompt saved."""
    found = {}
    for item in outcome.files():
        if item["filename"].endswith(".mp4") and item.get("type", "output") == "output":
            with av.open(str(server.base / "output" / item["subfolder"] / item["filename"])) as container:
                stream = container.streams.video[0]
                frames = sum(1 for _ in container.decode(stream))
                found[item["filename"].rsplit("_", 2)[0]] = (frames, (stream.width, stream.height), float(stream.average_rate))
    return found


def film(server, name: str) -> dict:
    """film.json of a run folder, once all its blocks are there."""
    folder = server.base / "output" / "sana_video" / name
    plan = json.loads((folder / "film.json").read_text(encoding="utf-8"))
    blocks = {f"block_{i:04d}.{kind}" for i in range(1, len(plan["blocks"]) + 1) for kind in ("mp4", "safetensors")}
    assert {path.name for path in folder.iterdir()} - {"film.lock"} == blocks | {"film.json", "film.mp4"}
    return plan


def run(server, prompt: dict):
    outcome = server.client.run(prompt)
    assert outcome.ok, outcome.error
    return outcome


def test_every_workflow_of_long_video_is_run_here():
    assert sorted(p.stem for p in lp.FOLDER.glob("*.json") if "SanaVideoBlockSampler" in p.read_text("utf-8")) == sorted(lp.LONG)


def test_a_minute_is_a_minute_and_a_film(server):
    shipped = lp.shipped(server.client, "long_video_minute")
    asked = shipped[lp.only(shipped, "SanaVideoBlockSampler")]["inputs"]
    plan = plan_blocks(asked["blocks"], SPECS["longsana-2b-480p"].block_frames)
    assert plan.spans()[-1].pixels()[1] / 16 >= 60 and (asked["width"], asked["height"]) == SPECS["longsana-2b-480p"].size
    prompt = lp.shrunk(server.client, "long_video_minute", "minute")
    sampler = lp.only(prompt, "SanaVideoBlockSampler")
    prompt[sampler]["inputs"]["blocks"] = 6
    outcome = run(server, prompt)
    assert videos(server, outcome) == {"sana_video_minute": (frames_of(6), SIZE, RATE)}
    assert len(film(server, "minute/long_video_minute")["blocks"]) == 6
    prompt[sampler]["inputs"]["blocks"] = 7
    longer = run(server, prompt)
    assert {e.data["max"] for e in longer.of("progress") if e.data["node"] == sampler} == {4}  # one block of four steps
    assert videos(server, longer) == {"sana_video_minute": (frames_of(7), SIZE, RATE)}


def test_the_chain_is_one_video_and_its_state_can_be_continued(server):
    chain = lp.shrunk(server.client, "long_video_chain", "chain")
    outcome = run(server, chain)
    assert videos(server, outcome) == {"sana_video_chain": (frames_of(6), SIZE, RATE)}
    saved = lp.state_file(outcome, lp.only(chain, "SanaVideoStateSave"))
    assert saved.startswith("long_video_chain_")
    prompt = lp.shrunk(server.client, "continue_saved_state", "continued")
    loads = prompt[lp.only(prompt, "SanaVideoStateLoad")]["inputs"]
    assert loads["file"] == "long_video_chain_00001.safetensors"  # the first file that the chain writes
    loads["file"] = saved
    outcome = run(server, prompt)
    assert videos(server, outcome) == {"sana_video_continued": (frames_of(4, begins=False), SIZE, RATE)}
    summary = outcome.history["outputs"][lp.only(prompt, "PreviewAny")]["text"][0]
    assert "6 blocks" in summary
    assert lp.state_file(outcome, lp.only(prompt, "SanaVideoStateSave")).startswith("continued_")


def test_three_endings_of_one_beginning(server):
    prompt = lp.shrunk(server.client, "fork_three_continuations", "fork")
    outcome = run(server, prompt)
    expected = {f"sana_video_ending_{letter}": (frames_of(4, begins=False), SIZE, RATE) for letter in "abc"}
    assert videos(server, outcome) == {"sana_video_beginning": (frames_of(4), SIZE, RATE)} | expected
    folder = server.base / "output" / "sana_video" / "fork"
    for number in range(1, 5):  # the fork has a beginning of its own
        name = f"block_{number:04d}.safetensors"
        assert (folder / "fork_kept_beginning" / name).read_bytes() == (folder / "fork_beginning" / name).read_bytes()
    starts = {(folder / f"fork_ending_{letter}" / "start.safetensors").read_bytes() for letter in "abc"}
    firsts = {(folder / f"fork_ending_{letter}" / "block_0001.safetensors").read_bytes() for letter in "abc"}
    assert len(starts) == 1 and len(firsts) == 3
    other = json.loads(json.dumps(prompt))
    sampler = lp.only(prompt, "SanaVideoBlockSampler", "ending B")
    other[sampler]["inputs"]["seed"] += 1
    again = run(server, other)
    samplers = {key for key, node in prompt.items() if node["class_type"] == "SanaVideoBlockSampler"}
    assert lp.executed(again) & samplers == {sampler}


def test_prompts_travel_and_the_motion_score_glides(server):
    prompt = lp.shrunk(server.client, "prompt_travel", "travel")
    outcome = run(server, prompt)
    assert videos(server, outcome) == {"sana_video_travel": (frames_of(8), SIZE, RATE)}
    blocks = film(server, "travel/prompt_travel")["blocks"]
    assert [b["prompt"] for b in blocks] == [words for words in lp.WORDS for _ in range(2)]
    scores = [b["motion"] for b in blocks]
    assert 5 < scores[0] < scores[1] < 12 < scores[2] < scores[3] < 24 > scores[4] > scores[5] > 8 == scores[6] == scores[7]
    assert len({b["caption"] for b in blocks}) == 7
    summary = outcome.history["outputs"][lp.only(prompt, "PreviewAny")]["text"][0]
    assert summary.splitlines()[1] == "5-10s: the blue square (motion 12 to 24)"


@pytest.fixture
def clip(server):
    """Puts a clip into ComfyUI's input folder: a square that moves, of so many frames."""
    def make(name: str, frames: int, colour: tuple[int, int, int]) -> str:
        import numpy as np

        with av.open(str(server.base / "input" / name), "w") as container:
            stream = container.add_stream("libx264", rate=16)
            stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
            for number in range(frames):
                picture = np.zeros((64, 96, 3), np.uint8)
                picture[20:40, number:number + 20] = colour
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode())
        return name

    return make


def test_any_clip_is_continued_and_joined(server, clip):
    results = []
    for name, frames, read in (("short.mp4", 17, 17), ("odd.mp4", 23, 21)):  # the VAE takes 1 + 4k frames
        prompt = lp.shrunk(server.client, "continue_any_clip", "clip")
        prompt[lp.only(prompt, "LoadVideo")]["inputs"]["file"] = clip(name, frames, (220, 60, 30))
        prompt["99"] = lp.save_latent(lp.only(prompt, "LatentConcat"))
        outcome = run(server, prompt)
        assert videos(server, outcome) == {"sana_video_clip": (read + frames_of(2, begins=False), SIZE, RATE)}
        results.append(outcome)
    assert lp.shipped(server.client, "continue_any_clip")[lp.only(prompt, "ImageFromBatch")]["inputs"]["length"] == 81


def test_embedded_long_video_is_half_a_minute(server):
    """As it ships, but for two blocks at half the size."""
    prompt = lp.shipped(server.client, "mini_long_video")
    sampler, spec = prompt[lp.only(prompt, "SanaVideoBlockSampler")]["inputs"], SPECS["sana-video-mini-long"]
    plan = plan_blocks(sampler["blocks"], spec.block_frames)
    assert plan.lengths == (11, *[10] * 11) and plan.spans()[-1].pixels()[1] / spec.fps >= 30
    assert (sampler["width"], sampler["height"]) == spec.size and sampler["cfg"] == spec.cfg
    assert sampler["window"] == mini.WINDOW and sampler["solver"] == "few-step re-noise"
    loader = prompt[lp.only(prompt, "SanaVideoLoader")]["inputs"]
    assert loader["model"] == "embedded mini long"
    sampler.update(blocks=2, width=80, height=48)
    outcome = run(server, prompt)
    assert videos(server, outcome) == {"sana_video_mini_long": (81, (80, 48), 16.0)}
    assert len(film(server, "mini_long_video")["blocks"]) == 2


def test_the_loader_lists_both_embedded_models(server):
    models = server.client.get("/object_info/SanaVideoLoader")["SanaVideoLoader"]["input"]["required"]["model"][1]["options"]
    assert models[0] == "embedded mini"
    assert "embedded mini long" in models
