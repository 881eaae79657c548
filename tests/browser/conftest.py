"""One real server and one browser for all browser tests; each test runs in both renderers."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import frontend
import pytest
from playwright.sync_api import sync_playwright

from tools import browser
from tools.environment import Environment
from tools.places import COMFYUI, ROOT
from tools.server import ComfyServer

WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
RENDERERS = {"nodes2": True, "canvas": False}


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """The real ComfyUI with this pack alone and empty files where the 480p workflows name theirs."""
    base = tmp_path_factory.mktemp("browser")
    frontend.placeholder_models(base)
    comfyui = Path(os.environ.get("COMFYUI_PATH", COMFYUI))
    with ComfyServer(Environment(Path(sys.executable), comfyui, own=False), base, base / "server.log") as running:
        yield running


@pytest.fixture(scope="module")  # not the session: Playwright's event loop would run on under every later test
def chromium(tmp_path_factory):
    with sync_playwright() as play:
        context = play.chromium.launch_persistent_context(
            tmp_path_factory.mktemp("profile"), executable_path=browser.ensure(), args=frontend.FLAGS, viewport=frontend.SIZE)
        yield context
        context.close()


@pytest.fixture(scope="module", params=RENDERERS)
def opened(request, server, chromium):
    """A ComfyUI page in each of the two renderers; loading a page takes longer than most tests."""
    page = chromium.new_page()
    yield frontend.Frontend(page, server.client.url, vue=RENDERERS[request.param])
    page.close()


@pytest.fixture
def front(opened):
    """The page of the renderer in turn; on the way out: no page error and no console error since the test began."""
    opened.problems.clear()
    yield opened
    assert opened.problems == []


@pytest.fixture(params=WORKFLOWS, ids=lambda path: path.stem)
def workflow(request):
    """(name, content) of each workflow that ships."""
    return request.param.stem, json.loads(request.param.read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def artefacts() -> Path:
    """Where screenshots stay after the run."""
    folder = ROOT / "out" / "browser"
    folder.mkdir(parents=True, exist_ok=True)
    return folder
