"""What every test shares: the core, imported by its place on disk.

The repository's root never enters ``sys.path``: our ``nodes/`` would hide ComfyUI's ``nodes.py`` there.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path[:] = [entry for entry in sys.path if Path(entry or os.curdir).resolve() != ROOT.resolve()]


def import_package(name: str, folder: Path):
    """The package in ``folder`` under ``name``, without touching ``sys.path``."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, folder / "__init__.py", submodule_search_locations=[str(folder)])
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


if sys.platform != "linux":  # Triton's interpreter comes with Triton, which PyPI has for Linux alone
    collect_ignore = ["unit/test_ops_frames.py", "unit/test_ops_kernels.py", "unit/test_ops_library.py"]

import_package("sana_video_core", ROOT / "sana_video_core")
import_package("tools", ROOT / "tools")


def pytest_configure(config):
    """Without a GPU Triton's kernels run in its interpreter, which must be asked for before Triton is first imported."""
    if config.option.markexpr == "not gpu":
        os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's folder."""
    return ROOT


@pytest.fixture(scope="session")
def comfyui_path(root) -> Path:
    """ComfyUI's folder: COMFYUI_PATH, else the one that run.py unpacked."""
    return Path(os.environ.get("COMFYUI_PATH", root / ".runtime" / "ComfyUI"))
