"""One real ComfyUI server for all tests here, with tiny models in its folders and the pack as its only custom node."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import tinyfiles

from tools.environment import Environment
from tools.server import ComfyServer, prepare_base


@pytest.fixture(scope="session")
def environment(root) -> Environment:
    """The Python that runs these tests, and its ComfyUI."""
    return Environment(Path(sys.executable), Path(os.environ.get("COMFYUI_PATH", root / ".runtime" / "ComfyUI")), own=True)


@pytest.fixture(scope="session")
def started(environment, tmp_path_factory):
    base = tmp_path_factory.mktemp("base")
    prepare_base(base)
    tinyfiles.write_models(base / "models")
    with ComfyServer(environment, base, base / "server.log") as server:
        yield server


@pytest.fixture
def server(started):
    """The server, checked to be alive and idle before and after each test."""
    assert started.alive(), f"the server has ended; its log is {started.log}"
    yield started
    assert started.alive(), f"this test ended the server; its log is {started.log}"
    queue = started.client.get("/queue")
    assert not queue["queue_running"] and not queue["queue_pending"]


@pytest.fixture
def fresh(server):
    """The server with empty caches."""
    server.client.free()
    return server


@pytest.fixture
def latent_of(server):
    return lambda outcome: tinyfiles.saved_latent(server, outcome)
