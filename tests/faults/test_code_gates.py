"""No code path of the pack runs code out of data: checked on the syntax trees of every module."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PICKLERS = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "jsonpickle"}
RUNNERS = {"eval", "exec", "compile", "__import__"}
SOURCES = sorted([ROOT / "__init__.py", *(p for top in ("nodes", "sana_video_core") for p in (ROOT / top).rglob("*.py"))])


def findings(source: str) -> list[str]:
    """What a module does that it must not: each with its line."""
    found = []
    for node in ast.walk(ast.parse(source)):
        line = getattr(node, "lineno", 0)
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            found += [f"{line}: imports {name}" for name in names if name.split(".")[0] in PICKLERS]
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            found.append(f"{line}: bare except")
        if not isinstance(node, ast.Call):
            continue
        name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
        keywords = {k.arg: k.value for k in node.keywords}
        if isinstance(node.func, ast.Name) and name in RUNNERS:
            found.append(f"{line}: calls {name}")
        if name in ("Unpickler", "loads") and getattr(getattr(node.func, "value", None), "id", "json") != "json":
            found.append(f"{line}: calls {name}")
        if "weights_only" in keywords and getattr(keywords["weights_only"], "value", None) is not True:
            found.append(f"{line}: weights_only is not True")
        is_torch_load = name == "load" and getattr(getattr(node.func, "value", None), "id", "") == "torch"
        if is_torch_load and "weights_only" not in keywords:
            found.append(f"{line}: torch.load without weights_only=True")
        if "allow_pickle" in keywords and getattr(keywords["allow_pickle"], "value", None) is not False:
            found.append(f"{line}: allow_pickle")
        if "safe_load" in keywords and getattr(keywords["safe_load"], "value", None) is not True:
            found.append(f"{line}: safe_load is not True")
        if name == "add_safe_globals":
            found.append(f"{line}: widens torch's allow list")
    return found


def test_the_gate_covers_the_pack():
    names = {p.relative_to(ROOT).as_posix() for p in SOURCES}
    assert {"__init__.py", "nodes/loading.py", "sana_video_core/checkpoint/pth.py", "sana_video_core/vae/loading.py"} <= names


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_no_module_runs_code_out_of_data(path):
    assert findings(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("bad", [
    "import pickle", "from pickle import loads", "import torch.x, dill", "eval('1')", "exec(x)", "compile(x, '', 'exec')",
    "__import__('os')", "torch.load(p)", "torch.load(p, weights_only=False)", "torch.load(p, weights_only=flag)",
    "np.load(p, allow_pickle=True)", "comfy.utils.load_torch_file(p, safe_load=False)", "yaml_like.loads(x)",
    "torch.serialization.add_safe_globals([X])", "try:\n    f()\nexcept:\n    pass",
])
def test_the_gate_sees_what_it_is_for(bad):
    assert findings(bad)


@pytest.mark.parametrize("good", ["json.loads(x)", "torch.load(p, weights_only=True)", "re.compile(x)", "torch.compile(m)",
                                  "model.eval()", "import pickletools", "np.load(p, allow_pickle=False)"])
def test_the_gate_lets_pass_what_is_harmless(good):
    assert not findings(good)
