"""API prompts of long video on the tiny files of ``tinyfiles.py``, and the shipped workflows cut down to them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import inprocess as ip
from tools.workflow import to_api

FOLDER = Path(__file__).parents[2] / "workflows"
LONG = ("continue_any_clip", "continue_saved_state", "fork_three_continuations", "long_video_chain", "long_video_minute",
        "mini_long_video", "prompt_travel")
# Blocks of 3, 2, 2 ... latent frames take as many seconds as the real ones (11, 10, 10 ...) at a fifth of the frame rate.
WORDS = ("a red ball", "the blue square", "green grass", "a red square")  # the tiny tokenizer makes many tokens of other texts
TINY = {"width": 64, "height": 32, "block_frames": 2, "fps": 3.2}


def shipped(client, name: str) -> dict:
    """The workflow as the frontend would queue it."""
    return to_api(json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8")), client.get("/object_info"))


def shrunk(client, name: str, film: str) -> dict:
    """The same graph on the tiny files, with every block but of few frames; run folders get ``film`` in front."""
    prompt = shipped(client, name)
    for node in prompt.values():
        inputs, kind = node["inputs"], node["class_type"]
        inputs.update({key: value for key, value in TINY.items() if isinstance(inputs.get(key), (int, float)) and inputs[key]})
        if kind == "SanaVideoLoader":
            inputs.update(model="tiny.pth", text_encoder="gemma_tiny.safetensors", vae="wan_tiny.safetensors")
        if kind in ("SanaVideoBlockSampler", "SanaVideoKVStateCarry"):
            names = [key for key in ("run_folder", "name") if inputs.get(key) and isinstance(inputs[key], str)]
            inputs.update({key: f"{film}/{inputs[key]}" for key in names})
        if kind == "SanaVideoBlockSampler":
            inputs["block_frames"] = TINY["block_frames"]
        if kind == "SanaVideoTextEncode":
            inputs["prompt"] = WORDS[len(inputs["prompt"]) % len(WORDS)]
        if kind == "SanaVideoPromptSchedule":
            head, *parts = inputs["text"].splitlines()
            inputs["text"] = "\n".join([head, *(re.sub(r"(?<=\] )[^;]+", w, part) for w, part in zip(WORDS, parts, strict=True))])
    return prompt


def only(prompt: dict, kind: str, title: str = "") -> str:
    """Id of the node of that class whose title contains ``title``."""
    found = [key for key, node in prompt.items() if node["class_type"] == kind and title in node["_meta"]["title"]]
    assert len(found) == 1, (kind, title, found)
    return found[0]


def graph(**more: dict) -> dict:
    """Loader 1 in long mode and text 2, and the given nodes: ``n4=sampler()``."""
    base = {
        "1": ip.node("SanaVideoLoader", model="tiny.pth", precision="auto", mode="long", text_encoder="gemma_tiny.safetensors",
                     vae="wan_tiny.safetensors"),
        "2": ip.node("SanaVideoTextEncode", clip=("1", 1), prompt="a red ball", negative_prompt="", motion_score=10,
                     instruction=True),
    }
    return base | {key.removeprefix("n"): node for key, node in more.items()}


def sampler(**changes) -> dict:
    """A block sampler on nodes 1 and 2: blocks of 3, 2, 2 ... latent frames."""
    inputs = {"model": ("1", 0), "positive": ("2", 0), "blocks": 1, "seed": 1, "width": 64, "height": 32, "block_frames": 2}
    return ip.node("SanaVideoBlockSampler", **(inputs | changes))


def save_latent(source: str) -> dict:
    return ip.node("SaveLatent", samples=(source, 0), filename_prefix="long")


def save_state(source: str, name: str = "state") -> dict:
    return ip.node("SanaVideoStateSave", state=(source, 1), name=name)


def state_file(outcome, key: str) -> str:
    """The name of the file that the 'Save State' node ``key`` wrote."""
    return outcome.history["outputs"][key]["text"][0].splitlines()[0]


def executed(outcome) -> set[str]:
    """Ids of the nodes that ran."""
    return {event.data["node"] for event in outcome.of("executing") if event.data.get("node")}


def cached(outcome) -> set[str]:
    """Ids of the nodes whose results were taken from the cache."""
    return set(outcome.of("execution_cached")[0].data["nodes"])
