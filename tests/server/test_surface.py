"""What the server tells the world about the pack: node definitions, help, languages, templates, browser files."""

from __future__ import annotations

import difflib
import json
import os
import re
from pathlib import Path

import pytest

from tools.server import PACK_NAME

SNAPSHOT = Path(__file__).with_name("object_info.json")
FILE_CHOICES = {("SanaVideoLoader", name) for name in ("model", "text_encoder", "vae")} | {
    ("SanaVideoLoadLora", "lora"), ("SanaVideoStateLoad", "file")}
TEXTS = ("tooltip", "placeholder")  # may be improved at any time; types, order and defaults may not


def contract(name: str, info: dict) -> dict:
    """The part of a node's definition that saved workflows depend on."""
    inputs = {}
    for group, names in info["input_order"].items():
        for key in names:
            kind, *options = info["input"][group][key]
            options = {k: v for k, v in (options[0] if options else {}).items() if k not in TEXTS}
            if (name, key) in FILE_CHOICES:
                options["options"] = "(files)"
            inputs[key] = {"group": group, "type": kind, "options": options}
    fields = ("display_name", "category", "output", "output_name", "output_is_list", "output_node", "deprecated", "experimental")
    return {"inputs": inputs, **{field: info.get(field) for field in fields}}


def test_node_definitions_are_those_of_the_snapshot(server):
    """To accept a change on purpose: run this test once with SANA_VIDEO_UPDATE_SNAPSHOT=1 and look at the diff."""
    info = server.client.get("/object_info")
    now = {name: contract(name, info[name]) for name in info if name.startswith("SanaVideo")}
    text = json.dumps(now, indent=1, ensure_ascii=False) + "\n"
    if os.environ.get("SANA_VIDEO_UPDATE_SNAPSHOT") == "1":
        SNAPSHOT.write_text(text, encoding="utf-8")
    then = SNAPSHOT.read_text(encoding="utf-8")
    diff = "\n".join(difflib.unified_diff(then.splitlines(), text.splitlines(), "snapshot", "server", lineterm=""))
    assert not diff, f"node definitions changed; saved workflows may break:\n{diff}"


def test_every_node_of_the_pack_is_ours_and_says_so(server):
    info = server.client.get("/object_info")
    ours = {name: node for name, node in info.items() if node["python_module"] == f"custom_nodes.{PACK_NAME}"}
    assert len(ours) >= 8 and all(name.startswith("SanaVideo") for name in ours)
    assert all(node["category"].startswith("SANA-Video") and node["description"] for node in ours.values())
    assert re.search(r"[\d.]+ seconds: .*" + PACK_NAME, server.import_report())


def test_file_lists_show_the_model_folders(server):
    inputs = server.client.get("/object_info/SanaVideoLoader")["SanaVideoLoader"]["input"]["required"]
    assert {"tiny.safetensors", "tiny.pth"} <= set(inputs["model"][1]["options"])
    assert inputs["vae"][1]["options"][0] == "none" and "wan_tiny.safetensors" in inputs["vae"][1]["options"]
    assert "gemma_tiny.safetensors" in inputs["text_encoder"][1]["options"]


def test_help_pages_are_served(server, root):
    names = [name for name in server.client.get("/object_info") if name.startswith("SanaVideo")]
    for name in names:
        status, _, body = server.client.fetch(f"/extensions/{PACK_NAME}/docs/{name}.md")
        assert status == 200 and body == (root / "web" / "docs" / f"{name}.md").read_bytes(), name


def test_locales_are_served(server, root):
    served = server.client.get("/i18n")
    for language in ("en", "zh"):
        ours = json.loads((root / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))
        assert ours.items() <= served[language]["nodeDefs"].items()


def test_browser_files_are_served_with_the_right_type(server, root):
    listed = server.client.get("/extensions")
    for path in (root / "web").rglob("*.js"):
        address = f"/extensions/{PACK_NAME}/{path.relative_to(root / 'web').as_posix()}"
        assert address in listed
        status, headers, body = server.client.fetch(address)
        assert status == 200 and "javascript" in headers["Content-Type"] and body == path.read_bytes()


def test_workflow_templates_are_listed_and_have_thumbnails(server, root):
    names = sorted(path.stem for path in (root / "workflows").glob("*.json"))
    assert len(names) >= 3
    assert sorted(server.client.get("/workflow_templates")[PACK_NAME]) == names
    for name in names:
        status, _, body = server.client.fetch(f"/api/workflow_templates/{PACK_NAME}/{name}.json")
        assert status == 200 and json.loads(body)["nodes"]
        status, headers, body = server.client.fetch(f"/api/workflow_templates/{PACK_NAME}/{name}.jpg")
        assert status == 200 and headers["Content-Type"] == "image/jpeg" and body[:3] == b"\xff\xd8\xff" and len(body) < 300_000


@pytest.mark.parametrize("path", ["/extensions/sana_video/../run.py", "/extensions/sana_video/%2e%2e/run.py"])
def test_nothing_but_the_web_folder_is_served(server, path):
    assert server.client.fetch(path)[0] in (403, 404)
