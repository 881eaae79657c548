"""ComfyUI's real frontend in headless Chromium: open it in one of its two renderers, load a workflow, read what an artist sees.

``Frontend.problems`` collects page errors and console errors; what a clean install prints by itself is left out (comfyui
spec 1.6). Not covered: starting the server (``conftest.py``).
"""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--autoplay-policy=no-user-gesture-required"]
SIZE = {"width": 1600, "height": 900}
# The frontend loads a graph of its own at the end of its start; what is loaded before that would be replaced.
READY = "() => window.app?.graph && window.app.extensionManager?.workflow?.activeWorkflow && !app.extensionManager.spinner"
# What a clean install prints too: optional files that are asked for, notes of the frontend about itself, and its questions to
# the model hub and the registry, which the server's content policy forbids when API nodes are off.
ABSENT = ("user.css", "/userdata?dir=", "comfy.templates.json", "/docs/", "favicon")
NOISE = ("is deprecated", "graph accessed before initialization", "Content Security Policy")


# The names in our workflows. Only the names matter to the browser; the files stay empty and are never run.
PLACEHOLDERS = ("models/diffusion_models/SANA_Video_2B_480p.pth", "models/diffusion_models/SANA_Video_2B_480p_LongLive.pth",
                "models/text_encoders/gemma_2_2b_it_elm_bf16.safetensors", "models/vae/wan_2.1_vae.safetensors",
                "output/sana_video_states/long_video_chain_00001.safetensors")


def placeholder_models(base: Path) -> None:
    """Empty files under the names that the 480p workflows use; a picture and a clip that the browser can show."""
    import av
    import numpy as np
    from PIL import Image

    for name in PLACEHOLDERS:
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).touch()
    (base / "input").mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (832, 480), (70, 110, 150)).save(base / "input" / "example.png")
    with av.open(str(base / "input" / "clip.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=16)
        stream.width, stream.height, stream.pix_fmt = 416, 240, "yuv420p"
        for number in range(17):
            picture = np.full((240, 416, 3), (70, 110, 150), np.uint8)
            picture[80:160, 10 * number:10 * number + 80] = (230, 180, 90)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def post(url: str, body: dict) -> None:
    """POST ``body`` as JSON."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        answer.read()


class Frontend:
    """One browser page on a running server. ``vue`` chooses the renderer: Nodes 2.0, or the canvas."""

    def __init__(self, page, url: str, vue: bool, **settings):
        self.page, self.url, self.vue = page, url, vue
        self.problems: list[str] = []
        page.on("pageerror", lambda error: self.problems.append(f"page error: {error}"))
        page.on("console", self._console)
        post(f"{url}/api/settings", {
            "Comfy.TutorialCompleted": True, "Comfy.InstalledVersion": "1.47.12", "Comfy.VueNodes.Enabled": vue,
            "Comfy.Minimap.Visible": False, "Comfy.RightSidePanel.IsOpen": False, "Comfy.Workflow.Persist": False,
            "Comfy.Execution.PreviewMethod": "latent2rgb", "Comfy.Locale": "en", **settings})
        page.goto(url)
        page.wait_for_function(READY, timeout=90_000)

    def _console(self, message) -> None:
        absent = "404" in message.text and any(name in message.location.get("url", "") for name in ABSENT)
        if message.type == "error" and not absent and not any(noise in message.text for noise in NOISE):
            self.problems.append(f"console: {message.text[:400]} ({message.location.get('url', '')})")

    def value(self, expression: str, argument=None):
        """What a JavaScript function returns; through JSON, because undefined fields would come out as null."""
        text = self.page.evaluate(f"async (argument) => JSON.stringify(await ({expression})(argument))", argument)
        return None if text is None else json.loads(text)

    def load(self, workflow: dict, name: str = "workflow") -> None:
        """Load a UI workflow as if the artist had opened the file, and wait until it is drawn."""
        self.value("async (a) => { await app.loadGraphData(a[0], true, true, a[1]); return 1; }", [workflow, name])
        self.page.wait_for_function("(n) => app.graph.nodes.length === n", arg=len(workflow["nodes"]), timeout=30_000)
        if self.vue:
            self.page.wait_for_function("(n) => document.querySelectorAll('[data-node-id]').length >= n",
                                        arg=len(workflow["nodes"]), timeout=30_000)
        self.page.wait_for_timeout(500)

    def text(self) -> str:
        """Everything that can be read on the page."""
        return self.page.evaluate("() => document.body.innerText")

    def exported(self) -> dict:
        """``{"output": API prompt, "workflow": UI workflow}`` of the loaded graph, as the frontend writes it."""
        return self.value("async () => await app.graphToPrompt()")

    def missing_nodes(self) -> list[str]:
        """Types of nodes that the server does not know."""
        return self.value("() => app.graph.nodes.filter(n => n.has_errors || !LiteGraph.registered_node_types[n.type])"
                          ".map(n => n.type)")

    def boxes(self) -> dict[str, list[float]]:
        """``[x, y, width, height]`` in graph units of every node as drawn, title bar included."""
        if not self.vue:
            return self.value("() => Object.fromEntries(app.graph.nodes.map(n => [n.id + ' ' + n.type, "
                              "Array.from(n.getBounding())]))")
        return self.value("""() => Object.fromEntries(app.graph.nodes.map(n => {
            const scale = app.canvas.ds.scale, box = document.querySelector(`[data-node-id="${n.id}"]`).getBoundingClientRect();
            return [n.id + ' ' + n.type, [n.pos[0], n.pos[1] - 30, box.width / scale, box.height / scale]]; }))""")

    def fit(self) -> None:
        """Zoom so that the whole graph is seen."""
        self.value("() => { app.extensionManager.command.execute('Comfy.Canvas.FitView'); return 1; }")
        self.page.wait_for_timeout(900)

    def picture(self, path: Path, quality: int = 85) -> None:
        """Screenshot as JPEG or PNG, by the file's ending."""
        kind = "png" if path.suffix == ".png" else "jpeg"
        self.page.screenshot(path=str(path), type=kind, **({"quality": quality} if kind == "jpeg" else {}))

    def graph_picture(self, path: Path, width: int = 960) -> None:
        """JPEG of the graph alone: everything around the canvas hidden, cut to the graph's proportions."""
        style = self.page.add_style_tag(content="body > *:not(#vue-app) { display: none } ")
        box = self.value("""() => {
            const b = app.graph.nodes.reduce((a, n) => { const [x, y, w, h] = n.getBounding();
                return [Math.min(a[0], x), Math.min(a[1], y), Math.max(a[2], x + w), Math.max(a[3], y + h)]; },
                [1e9, 1e9, -1e9, -1e9]);
            const ds = app.canvas.ds, r = app.canvas.canvas.getBoundingClientRect();
            const at = (x, y) => [(x + ds.offset[0]) * ds.scale + r.left, (y + ds.offset[1]) * ds.scale + r.top];
            const [x0, y0] = at(b[0] - 45, b[1] - 75), [x1, y1] = at(b[2] + 45, b[3] + 45);
            return {x: x0, y: y0, width: x1 - x0, height: y1 - y0}; }""")
        self.page.screenshot(path=str(path), type="jpeg", quality=88, clip=box)
        style.evaluate("(node) => node.remove()")

    def set(self, kind: str, **values) -> None:
        """Put values into the widgets of all nodes of a type."""
        self.value("""([kind, values]) => { for (const node of app.graph.nodes.filter(n => n.type === kind))
            for (const [name, value] of Object.entries(values)) node.widgets.find(w => w.name === name).value = value;
            return 1; }""", [kind, values])

    def press_run(self) -> None:
        """Click the Run button, as the artist does."""
        self.page.get_by_test_id("queue-button").first.click()

    def wait_for_video(self, timeout: float) -> str:
        """Address of the video that the player of a node shows, once it can be played."""
        self.page.wait_for_function("() => [...document.querySelectorAll('video')].some(v => v.readyState >= 1 && v.videoWidth)",
                                    timeout=timeout * 1000)
        return self.value("() => [...document.querySelectorAll('video')].find(v => v.videoWidth).currentSrc")
