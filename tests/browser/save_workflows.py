"""Build the workflows of the gallery in the real frontend and save what it exports: ``save_workflows.py [NAME ...]``.

Writes ``workflows/NAME.json`` and, as the thumbnail, a picture of the graph (``workflows/NAME.jpg``) unless one is there
already. For developers; needs what the browser tests need.
"""

from __future__ import annotations

import json
import sys
import tempfile
import uuid
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))  # for ``tools``; ComfyUI runs in another process, so its nodes.py is not hidden

from frontend import FLAGS, SIZE, Frontend, placeholder_models  # noqa: E402
from gallery import COLOURS, Column  # noqa: E402
from gallery import WORKFLOWS as CLIPS  # noqa: E402
from gallery_long import WORKFLOWS as LONG  # noqa: E402
from playwright.sync_api import sync_playwright  # noqa: E402

from tools import browser, environment  # noqa: E402
from tools.server import ComfyServer  # noqa: E402

WORKFLOWS = CLIPS | LONG
WORKFLOW_FOLDER = ROOT / "workflows"
VERSION = "0.1.0"
GAP, COLUMN_GAP, FRAME = 50, 90, 24  # graph units: between nodes, between columns, between a group's edge and its nodes
TITLE = 30  # height of a node's title bar, above its position

BUILD = """(graph) => {
    app.graph.clear();
    const made = {};
    for (const item of graph.items) {
        const node = LiteGraph.createNode(item.type);
        if (!node) throw new Error('no node ' + item.type);
        if (item.title) node.title = item.title;
        app.graph.add(node);
        made[item.key] = node;
        for (const [name, value] of Object.entries(item.widgets)) {
            const widget = node.widgets.find(w => w.name === name) ?? (name === '' ? node.widgets[0] : null);
            if (!widget) throw new Error(item.type + ' has no widget ' + name);
            widget.value = value;
            widget.callback?.(value);
        }
        node.properties['Node name for S&R'] = item.type;
        node.properties.cnr_id = item.type.startsWith('SanaVideo') ? graph.pack : 'comfy-core';
        if (item.type.startsWith('SanaVideo')) node.properties.ver = graph.version;
        if (item.files.length)
            node.properties.models = item.files.map(([name, directory, url]) => ({name, url, directory}));
    }
    for (const item of graph.items)
        for (const [input, [source, output]] of Object.entries(item.links)) {
            const from = made[source], to = made[item.key];
            const out = from.outputs.findIndex(o => o.name === output), into = to.inputs.findIndex(i => i.name === input);
            if (out < 0 || into < 0) throw new Error(`no link ${source}.${output} -> ${item.key}.${input}`);
            from.connect(out, to, into);
        }
    return Object.fromEntries(graph.items.map(i => [i.key, Number(made[i.key].id)]));
}"""

SIZES = """(sizes) => { for (const [id, size] of sizes) {
    const node = app.graph.getNodeById(id), least = node.computeSize();
    node.setSize([Math.max(size[0], least[0]), Math.max(size[1], least[1])]); } return 1; }"""

PLACE = """(plan) => {
    for (const [id, x, y] of plan.nodes) app.graph.getNodeById(id).pos = [x, y];
    for (const [title, bounds, color] of plan.groups) {
        const group = new LiteGraph.LGraphGroup(title);
        group.color = color;
        app.graph.add(group);
        group.pos = bounds.slice(0, 2); group.size = bounds.slice(2);
    }
    app.graph.id = plan.id;
    return 1;
}"""


def build(front: Frontend, name: str, columns: tuple[Column, ...]) -> dict:
    """The workflow as the frontend exports it, laid out by the sizes that the nodes have in Nodes 2.0 (the larger ones)."""
    items = [asdict(item) for column in columns for item in column.items]
    ids = front.value(BUILD, {"items": items, "pack": "sana-video", "version": VERSION})
    front.page.wait_for_timeout(700)
    front.value(SIZES, [[ids[item["key"]], item["size"]] for item in items])
    front.page.wait_for_timeout(700)
    drawn = {int(key.split()[0]): box for key, box in front.boxes().items()}
    nodes, frames, x, lowest = [], [], 0.0, 0.0
    for column in columns:
        y, width = 0.0, max(drawn[ids[item.key]][2] for item in column.items)
        for item in column.items:
            nodes.append([ids[item.key], round(x), round(y)])
            y += drawn[ids[item.key]][3] + GAP
        frames.append((column.title, x - FRAME, width + 2 * FRAME))
        x, lowest = x + width + COLUMN_GAP, max(lowest, y - GAP - TITLE + FRAME)
    top = -TITLE - FRAME - 30  # all frames end at the same height, which leaves room for previews and the video
    groups = [[title, [round(left), top, round(width), round(lowest - top)], COLOURS[number % len(COLOURS)]]
              for number, (title, left, width) in enumerate(frames)]
    plan = {"nodes": nodes, "groups": groups, "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"sana-video/{name}"))}
    front.value(PLACE, plan)
    front.page.wait_for_timeout(700)
    front.fit()
    return front.exported()["workflow"]


def main(names: list[str]) -> None:
    WORKFLOW_FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as play:
        base = Path(folder) / "base"
        placeholder_models(base)
        with ComfyServer(environment.ensure(), base, Path(folder) / "log") as server:
            context = play.chromium.launch_persistent_context(Path(folder) / "profile", executable_path=browser.ensure(),
                                                              args=FLAGS, viewport=SIZE)
            for name in names:
                front = Frontend(context.new_page(), server.client.url, vue=True)
                workflow = build(front, name, WORKFLOWS[name]())
                (WORKFLOW_FOLDER / f"{name}.json").write_text(json.dumps(workflow, indent=1, ensure_ascii=False) + "\n",
                                                              encoding="utf-8")
                thumbnail = WORKFLOW_FOLDER / f"{name}.jpg"
                if not thumbnail.exists():
                    front.graph_picture(thumbnail)
                print(f"{name}: {len(workflow['nodes'])} nodes", *front.problems, sep="\n  ")
                front.page.close()
            context.close()


if __name__ == "__main__":
    main(sys.argv[1:] or list(WORKFLOWS))
