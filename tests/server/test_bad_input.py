"""Hostile and careless prompts over HTTP: one readable error each, and the next good prompt works."""

from __future__ import annotations

import json

import pytest
import tinyfiles

HUGE = 1e999  # JSON has no infinity, but Python's reader accepts this spelling


@pytest.fixture
def good(server):
    """After the test, a good prompt must still run."""
    yield server
    outcome = server.client.run(tinyfiles.prompt())
    assert outcome.ok, outcome.error


def refused(server, **changes) -> str:
    """The error of a prompt with changed inputs, wherever it was refused."""
    outcome = server.client.run(tinyfiles.prompt(**changes))
    assert outcome.ending in ("refused", "execution_error"), outcome.ending
    assert "Traceback" not in outcome.error
    return outcome.error


@pytest.mark.parametrize(("node", "inputs", "words"), [
    ("n3", {"width": 65}, "Use 64x32"),
    ("n3", {"height": 40}, "Use 64x32"),
    ("n3", {"frames": 10}, "Use 9 or 13"),
    ("n3", {"frames": 10_000}, "Use 4093"),
    ("n3", {"frames": 10_001}, "Use 4093"),
    ("n3", {"frames": 0}, "value_smaller_than_min"),
    ("n3", {"frames": -81}, "value_smaller_than_min"),
    ("n3", {"width": 10**9}, "value_bigger_than_max"),
    ("n3", {"width": "wide"}, "invalid_input_type"),
    ("n3", {"width": None}, "width"),
    ("n3", {"width": {"a": 1}}, "width"),
    ("n3", {"width": float("nan")}, "width"),
    ("n3", {"width": HUGE}, "width"),
    ("n3", {"frames": -HUGE}, "frames"),
    ("n3", {"batch_size": 0}, "value_smaller_than_min"),
    ("n3", {"batch_size": 1000}, "value_bigger_than_max"),
    ("n2", {"motion_score": -2}, "value_smaller_than_min"),
    ("n2", {"motion_score": 101}, "value_bigger_than_max"),
    ("n2", {"motion_score": float("nan")}, "motion_score"),
    ("n2", {"prompt": ""}, "The prompt is empty"),
    ("n2", {"prompt": " \n\t "}, "The prompt is empty"),
    ("n2", {"prompt": "a red ball " * 910}, "too long"),
    ("n1", {"model": "absent.safetensors"}, "value_not_in_list"),
    ("n1", {"model": "../../secret.safetensors"}, "value_not_in_list"),
    ("n1", {"precision": "fp16"}, "value_not_in_list"),
    ("n1", {"mode": 3}, "value_not_in_list"),
    ("n1", {"vae": "none"}, "There is no VAE on this wire"),
    ("n1", {"text_encoder": "none"}, "There is no CLIP on this wire"),
    ("n2", {"clip": ["1", 0]}, "return_type_mismatch"),
    ("n4", {"cfg": float("nan")}, None),
])
def test_bad_values_get_one_readable_error(good, node, inputs, words):
    if words is None:  # a value of a stock node: any end is fine, as long as there is one
        good.client.run(tinyfiles.prompt(**{node: inputs}))
        return
    assert words in refused(good, **{node: inputs})


@pytest.mark.parametrize("name", ["model", "width", "height", "frames", "batch_size"])
def test_missing_inputs_are_named(good, name):
    prompt = tinyfiles.prompt()
    del prompt["3"]["inputs"][name]
    outcome = good.client.run(prompt)
    assert outcome.ending == "refused"
    errors = outcome.data["node_errors"]["3"]["errors"]
    assert [(e["type"], e["extra_info"]["input_name"]) for e in errors] == [("required_input_missing", name)]


def test_a_model_of_another_kind_is_refused_by_name(good):
    prompt = tinyfiles.prompt()
    prompt["3"]["inputs"]["model"] = ["8", 0]
    prompt["8"] = {"class_type": "LoraLoaderModelOnly",
                   "inputs": {"model": ["1", 0], "lora_name": "absent.safetensors", "strength_model": 1.0}}
    assert "value_not_in_list" in good.client.run(prompt).error


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off", b"\x80\x02}q\x00.", b"\xff" * 4096])
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_damaged_model_files_are_refused_with_their_name(good, content, suffix):
    path = good.base / "models" / "diffusion_models" / f"damaged.{suffix}"
    path.write_bytes(content)
    try:
        good.client.get("/object_info/SanaVideoLoader")  # reads the folder again
        assert path.name in refused(good, n1={"model": path.name})
    finally:
        path.unlink()


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'{"prompt": 3}', b'{"prompt": {"1": {}}}',
                                  b'{"prompt": {"1": {"class_type": "SanaVideoLoader"}}}',
                                  b'{"prompt": {"1": {"class_type": "SanaVideoNothing", "inputs": {}}}}'])
def test_malformed_requests_leave_the_server_alive(good, body):
    status, _, _ = good.client.fetch("/prompt", body)
    assert status in (400, 500)


def test_a_prompt_of_ten_thousand_nodes_of_ours_without_links_is_refused(good):
    graph = {str(i): {"class_type": "SanaVideoEmptyLatent", "inputs": {}} for i in range(10_000)}
    status, _, body = good.client.fetch("/prompt", json.dumps({"prompt": graph}).encode())
    assert status == 400 and b"no outputs" in body.lower()


@pytest.mark.parametrize(("field", "folder", "source", "words"), [
    ("model", "diffusion_models", "vae/wan_tiny.safetensors", "Put it into models/vae"),
    ("model", "diffusion_models", "text_encoders/gemma_tiny.safetensors", "Put it into models/text_encoders"),
    ("vae", "vae", "diffusion_models/tiny.safetensors", "The VAE file"),
    ("text_encoder", "text_encoders", "vae/wan_tiny.safetensors", "swapped.safetensors"),
    ("text_encoder", "text_encoders", "diffusion_models/tiny.safetensors", "swapped.safetensors"),
])
def test_files_in_the_wrong_field_are_refused_with_where_they_belong(good, field, folder, source, words):
    path = good.base / "models" / folder / "swapped.safetensors"
    path.write_bytes((good.base / "models" / source).read_bytes())
    try:
        good.client.get("/object_info/SanaVideoLoader")
        assert words in refused(good, n1={field: path.name})
    finally:
        path.unlink()


def test_a_file_that_is_cut_short_while_it_is_in_use_is_refused_and_comes_back(good):
    path = good.base / "models" / "diffusion_models" / "copied.safetensors"
    whole = (good.base / "models" / "diffusion_models" / "tiny.safetensors").read_bytes()
    path.write_bytes(whole)
    try:
        good.client.get("/object_info/SanaVideoLoader")
        assert good.client.run(tinyfiles.prompt(n1={"model": path.name})).ok
        path.with_suffix(".part").write_bytes(whole[:-1000])
        path.with_suffix(".part").replace(path)
        assert path.name in refused(good, n1={"model": path.name})
        path.with_suffix(".part").write_bytes(whole)
        path.with_suffix(".part").replace(path)
        assert good.client.run(tinyfiles.prompt(n1={"model": path.name})).ok
    finally:
        path.unlink()
