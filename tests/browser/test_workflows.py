"""Every workflow that ships, in the real frontend, in both of its renderers: opens clean, keeps its values, runs."""

from __future__ import annotations

import io
import json
import re

import av
import pytest
from frontend import Frontend

from tools.places import ROOT
from tools.server import PACK_NAME
from tools.workflow import to_api

WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
HELP = sorted((ROOT / "web" / "docs").glob("*.md"))
KEPT = ("id", "type", "pos", "mode", "inputs", "outputs", "properties", "widgets_values", "title")


def links(workflow: dict) -> set[tuple]:
    return {tuple(link[1:]) for link in workflow["links"]}


def test_opens_without_anything_missing(front, workflow, artefacts):
    name, content = workflow
    front.load(content, name)
    front.fit()
    front.picture(artefacts / f"{name}-{'nodes2' if front.vue else 'canvas'}.jpg")
    assert front.missing_nodes() == []
    shown = front.text()
    assert "issing node" not in shown and "is missing" not in shown and "rror" not in shown


def test_keeps_links_and_widget_values(front, workflow):
    name, content = workflow
    front.load(content, name)
    exported = front.exported()["workflow"]
    assert links(exported) == links(content)
    saved, again = ({node["id"]: node for node in flow["nodes"]} for flow in (content, exported))
    assert saved.keys() == again.keys()
    for key, node in saved.items():
        for field in KEPT:
            assert again[key].get(field) == node.get(field), (node["type"], field)
    assert exported["groups"] == content["groups"]
    widgets = front.value("() => Object.fromEntries(app.graph.nodes.map(n => [n.id, (n.widgets ?? []).map(w => w.value)]))")
    for key, node in saved.items():
        stored = node.get("widgets_values", [])
        assert widgets[str(key)][:len(stored)] == stored, node["type"]  # after them come buttons and previews


def test_nothing_overlaps(front, workflow):
    front.load(workflow[1], workflow[0])
    boxes = list(front.boxes().items())
    for i, (first, (ax, ay, aw, ah)) in enumerate(boxes):
        for second, (bx, by, bw, bh) in boxes[i + 1:]:
            apart = ax + aw <= bx or bx + bw <= ax or ay + ah <= by or by + bh <= ay
            assert apart, f"{first} overlaps {second}"


def test_our_conversion_equals_the_frontends_export(front, workflow, server):
    name, content = workflow
    front.load(content, name)
    ours, theirs = to_api(content, server.client.get("/object_info")), front.exported()["output"]
    for node in theirs.values():
        if node["class_type"] == "LoadVideo":  # its player is exported as if it were an input
            assert node["inputs"].pop("video-preview") == ""
    assert ours == theirs


def test_export_is_the_same_after_saving_and_opening_again(front, workflow):
    name, content = workflow
    front.load(content, name)
    first = front.exported()
    front.load(first["workflow"], name)
    second = front.exported()
    assert second["output"] == first["output"]
    assert links(second["workflow"]) == links(content)


@pytest.mark.parametrize(("name", "size"), [("mini_t2v", (160, 96)), ("mini_long_video", (80, 48))])
def test_mini_runs_by_the_run_button(front, server, artefacts, name, size):
    content = json.loads((ROOT / "workflows" / f"{name}.json").read_text(encoding="utf-8"))
    front.load(content, name)
    front.fit()
    renderer = "nodes2" if front.vue else "canvas"
    # A file name of its own for each renderer, so that no cached result of the other one is shown.
    front.set("SaveVideo", filename_prefix=f"browser/{renderer}")
    if name == "mini_long_video":  # two of its twelve blocks, small
        front.set("SanaVideoBlockSampler", blocks=2, width=size[0], height=size[1], run_folder=renderer)
    front.press_run()
    source = front.wait_for_video(timeout=240)
    status, headers, body = server.client.fetch(source.removeprefix(server.client.url))
    assert status == 200 and headers["Content-Type"].startswith("video/")
    with av.open(io.BytesIO(body)) as file:
        stream = file.streams.video[0]
        frames = sum(1 for _ in file.decode(stream))
        assert (stream.codec_context.name, frames, stream.width, stream.height) == ("h264", 81, *size)
        assert float(stream.average_rate) == pytest.approx(16)
    front.fit()
    front.picture(artefacts / f"{name}-run-{renderer}.png")
    assert "rror" not in front.text()


def test_a_refusal_reaches_the_artist(front):
    """A wrong size must show our own sentence, with what to do, where the artist looks."""
    content = json.loads((ROOT / "workflows" / "mini_t2v.json").read_text(encoding="utf-8"))
    for node in content["nodes"]:
        if node["type"] == "SanaVideoEmptyLatent":
            node["widgets_values"][2] = 80
    front.load(content, "wrong length")
    front.press_run()
    front.page.get_by_text("View details").first.click(timeout=60_000)
    front.page.get_by_text("cannot make a clip of 80 frames").first.wait_for(timeout=20_000)
    assert "Use 77 or 81" in front.text()


def test_names_a_missing_model_with_its_link(front, workflow):
    """An artist without the files is told which one, by the links that the workflow carries."""
    name, content = workflow
    listed = [model for node in content["nodes"] for model in node["properties"].get("models", [])]
    if name.startswith("mini_"):
        assert listed == []  # the embedded models need no file
        return
    assert {model["directory"] for model in listed} == {"diffusion_models", "text_encoders", "vae"}
    # Without the note, which names the files too.
    text = json.dumps(content | {"nodes": [node for node in content["nodes"] if node["type"] != "MarkdownNote"]})
    for model in listed:
        assert model["url"].startswith("https://huggingface.co/") and model["url"].endswith(model["name"])
        text = text.replace(model["name"], "absent_" + model["name"])
    front.load(json.loads(text), "missing")
    front.page.get_by_text("View details").first.click()
    for model in listed:
        front.page.get_by_text("absent_" + model["name"]).first.wait_for(timeout=20_000)


def test_the_template_browser_lists_and_opens_ours(front, server):
    listed = server.client.get("/workflow_templates")
    assert sorted(listed[PACK_NAME]) == [path.stem for path in WORKFLOWS]
    for path in WORKFLOWS:
        for suffix, kind in ((".json", "application/json"), (".jpg", "image/jpeg")):
            status, headers, body = server.client.fetch(f"/api/workflow_templates/{PACK_NAME}/{path.stem}{suffix}")
            assert (status, headers["Content-Type"].split(";")[0]) == (200, kind)
            assert body == path.with_suffix(suffix).read_bytes()
    front.value("() => { app.graph.clear(); app.extensionManager.command.execute('Comfy.BrowseTemplates'); return 1; }")
    dialog = front.page.get_by_role("dialog")
    dialog.get_by_text(PACK_NAME, exact=True).first.click(timeout=20_000)
    dialog.get_by_text("mini_t2v").first.click(timeout=20_000)
    front.page.wait_for_function("() => app.graph.nodes.some(n => n.type === 'SanaVideoLoader')", timeout=20_000)
    # ComfyUI's own templates (0.4 GB of pictures) are left out of the test environment, and the dialog says so.
    front.problems[:] = [p for p in front.problems if not any(word in p for word in ("templates", "fuse options", "logo index"))]


def open_help(front: Frontend, node: str, title: str) -> None:
    """Select a node, press the toolbar's i, wait for the page with that title."""
    front.value("""(type) => { app.graph.clear(); const node = LiteGraph.createNode(type); app.graph.add(node);
        app.canvas.selectNode(node); return 1; }""", node)
    front.fit()
    front.page.get_by_test_id("info-button").first.click()
    front.page.locator("h1", has_text=title).first.wait_for(timeout=20_000)


@pytest.mark.parametrize("page", HELP, ids=lambda path: path.stem)
def test_node_help_shows_our_page(front, page):
    lines = page.read_text(encoding="utf-8").splitlines()
    open_help(front, page.stem, lines[0].removeprefix("# "))
    assert " ".join(lines[2].replace("`", "").split()) in " ".join(front.text().split())
    front.value("() => { app.canvas.deselectAll(); return 1; }")


@pytest.mark.parametrize("vue", [True, False], ids=["nodes2", "canvas"])
def test_chinese_texts_are_shown(server, chromium, vue):
    locale = json.loads((ROOT / "locales" / "zh" / "nodeDefs.json").read_text(encoding="utf-8"))
    page = chromium.new_page()
    shown = Frontend(page, server.client.url, vue, **{"Comfy.Locale": "zh"})
    for node, texts in locale.items():
        labels = shown.value("""(type) => { const n = LiteGraph.createNode(type);
            const shown = (entries) => (entries ?? []).map(o => o.label ?? o.localized_name ?? o.name);
            return [n.title, shown(n.inputs), shown(n.widgets), shown(n.outputs)]; }""", node)
        assert labels[0] == texts["display_name"]
        # Widgets that a choice or a seed adds have names of ComfyUI's own.
        assert {entry["name"] for entry in texts["inputs"].values()} <= {*labels[1], *labels[2]}
        assert labels[3] == [entry["name"] for entry in texts["outputs"].values()]
    open_help(shown, node, texts["display_name"])
    page.close()
    server.client.post("/settings", {"Comfy.Locale": "en"})
    assert shown.problems == []


@pytest.mark.parametrize("page", HELP, ids=lambda path: path.stem)
def test_chinese_help_says_the_same(page):
    """Not a translator's eye, but a forgotten input, file or link is seen."""
    english, chinese = (file.read_text(encoding="utf-8") for file in (page, page.with_suffix("") / "zh.md"))
    locale = json.loads((ROOT / "locales" / "zh" / "nodeDefs.json").read_text(encoding="utf-8"))
    assert chinese.splitlines()[0] == f"# {locale[page.stem]['display_name']}"
    for marks in (r"^#+ ", r"^\|", r"^ *- ", r"\*\*\w+\*\*", r"`[^`\n]+`", r"\d+"):
        found = [sorted(mark.strip() for mark in re.findall(marks, text, re.M)) for text in (english, chinese)]
        assert set(found[0]) == set(found[1]), marks
        if marks.startswith("^"):
            assert found[0] == found[1], marks
