"""Every shipped workflow of clips, turned into a prompt and executed: the 480p ones on the tiny checkpoint in the official
container, the embedded one on the embedded model. Those of long video: ``test_long_workflows.py``."""

from __future__ import annotations

import json
from pathlib import Path

import av
import longprompts as lp
import pytest
import tinyfiles

from tools.workflow import to_api

WORKFLOWS = sorted((Path(__file__).parents[2] / "workflows").glob("*.json"))
CLIPS = [path for path in WORKFLOWS if path.stem not in lp.LONG]
SIZES = {"width": 64, "height": 32, "frames": 9, "steps": 2, "prompt": "a red ball", "negative_prompt": "a blue square"}


def prompt_of(server, path: Path) -> dict:
    """The workflow as a prompt, as the frontend would queue it."""
    return to_api(json.loads(path.read_text(encoding="utf-8")), server.client.get("/object_info"))


def shrink(prompt: dict) -> dict:
    """The same graph on the tiny files, at a size that a CPU makes in a second."""
    for node in prompt.values():
        inputs = node["inputs"]
        inputs.update({name: value for name, value in SIZES.items() if name in inputs and not isinstance(inputs[name], list)})
        if node["class_type"] == "SanaVideoLoader":
            inputs.update(model="tiny.pth", text_encoder="gemma_tiny.safetensors", vae="wan_tiny.safetensors")
        if node["class_type"] == "LoadImage":
            inputs["image"] = "first.png"
    return prompt


@pytest.fixture(scope="module")
def first_picture(started):
    from PIL import Image

    Image.new("RGB", (100, 60), (200, 30, 30)).save(started.base / "input" / "first.png")


def video_of(server, outcome) -> tuple[str, int, tuple[int, int], float]:
    """(codec, frames, size, frames a second) of the mp4 that the prompt saved."""
    file = next(item for item in outcome.files() if item["filename"].endswith(".mp4"))
    with av.open(str(server.base / "output" / file["subfolder"] / file["filename"])) as container:
        stream = container.streams.video[0]
        frames = sum(1 for _ in container.decode(stream))
        return stream.codec_context.name, frames, (stream.width, stream.height), float(stream.average_rate)


@pytest.mark.parametrize("path", [p for p in CLIPS if "mini" not in p.stem], ids=lambda p: p.stem)
def test_480p_workflows_run_on_an_official_checkpoint(server, first_picture, path):
    outcome = server.client.run(shrink(prompt_of(server, path)))
    assert outcome.ok, outcome.error
    codec, frames, size, rate = video_of(server, outcome)
    assert (codec, frames, size, rate) == ("h264", 9, (64, 32), 16.0)


@pytest.mark.parametrize("path", [p for p in CLIPS if "mini" in p.stem], ids=lambda p: p.stem)
def test_embedded_workflows_run_as_they_are_but_for_the_steps(server, path):
    prompt = prompt_of(server, path)
    for node in prompt.values():
        if "steps" in node["inputs"]:
            node["inputs"]["steps"] = 2
    outcome = server.client.run(prompt)
    assert outcome.ok, outcome.error
    codec, frames, size, rate = video_of(server, outcome)
    assert codec == "h264" and frames >= 80 and size[0] >= 160 and rate == 16.0


def test_the_workflows_ask_for_the_files_that_the_readme_names(server, root):
    readme = (root / "README.md").read_text(encoding="utf-8")
    for path in WORKFLOWS:
        for node in prompt_of(server, path).values():
            if node["class_type"] == "SanaVideoLoader":
                for name in ("model", "text_encoder", "vae"):
                    value = node["inputs"][name]
                    assert value in ("none", "embedded mini", "embedded mini long") or value in readme, f"{path.stem}: {value}"


def test_a_full_size_prompt_of_the_480p_workflow_reaches_the_sampler(server):
    """Everything before the sampler runs at 832x480x81 with the tiny files; then it is stopped."""
    path = next(p for p in WORKFLOWS if p.stem == "t2v_480p")
    prompt = shrink(prompt_of(server, path))
    for node in prompt.values():
        if node["class_type"] == "SanaVideoEmptyLatent":
            node["inputs"].update(width=832, height=480, frames=81)

    def stop(event):
        if event.type == "executing" and event.data.get("node") and prompt[event.data["node"]]["class_type"] == "KSampler":
            server.client.post("/interrupt", {"prompt_id": event.data["prompt_id"]})

    outcome = server.client.run(prompt, stop)
    assert outcome.ending == "execution_interrupted", outcome.error
    assert prompt[outcome.data["node_id"]]["class_type"] == "KSampler"
    assert server.client.run(tinyfiles.prompt()).ok
