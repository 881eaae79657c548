"""Static gates over the repository: who imports whom, sizes, what would ship, and that the documents agree with the code."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:  # pytest itself brings the reader there
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
MAX_LINES, MAX_FUNCTION = 520, 60
COMFY = {"comfy", "comfy_api", "comfy_api_nodes", "comfy_config", "comfy_execution", "comfy_extras", "execution", "folder_paths",
         "latent_preview", "node_helpers", "nodes", "server", "app", "utils"}
# ComfyUI modules that import on a machine without a GPU and without --cpu (all others only inside functions).
HARMLESS = {"comfy_api.latest", "comfy_execution.graph_utils", "folder_paths", "comfy.cli_args", "comfy.utils",
            "comfy.latent_formats", "comfy.conds", "comfy.patcher_extension"}
THIRD_PARTY = {"torch", "safetensors", "einops", "numpy", "PIL", "av", "sentencepiece", "filelock"}
OPTIONAL = {"triton", "blake3"}
NETWORK = {"urllib", "requests", "http", "socket", "aiohttp", "httpx", "huggingface_hub", "ftplib", "smtplib", "websockets"}
PROCESS = {"subprocess", "pty", "ctypes", "pip", "ensurepip", "venv"}
UNPICKLING = {"pickle", "marshal", "dill", "joblib", "shelve", "cloudpickle"}
CALLS = {"eval", "exec", "compile", "__import__", "breakpoint", "input"}
METHODS = {("os", "system"), ("os", "popen"), ("os", "putenv"), ("os", "execv"), ("shutil", "rmtree"), ("sys", "exit"),
           ("torch.hub", "load"), ("os", "_exit")}


WORKFLOWS = ("mini_t2v", "t2v_480p", "t2v_480p_official_sampler", "i2v_480p", "mini_long_video", "long_video_minute",
             "long_video_chain", "continue_saved_state", "fork_three_continuations", "prompt_travel", "continue_any_clip")


@cache
def project_files() -> tuple[Path, ...]:
    """What git tracks or would track, relative to the root."""
    listing = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode == 0:
        names = [name for name in listing.stdout.split("\0") if name]
    else:  # an unpacked archive without git
        hidden = (".git", ".runtime", ".pytest_cache", ".ruff_cache", ".hypothesis", "out", "__pycache__")
        names = [str(p.relative_to(ROOT)) for p in ROOT.rglob("*") if p.is_file()
                 and not set(hidden) & set(p.relative_to(ROOT).parts)]
    return tuple(sorted(Path(name) for name in names if (ROOT / name).is_file()))


@cache
def ignored_by_registry() -> tuple[str, ...]:
    lines = (ROOT / ".comfyignore").read_text(encoding="utf-8").splitlines()
    return tuple(line.strip() for line in lines if line.strip() and not line.startswith("#"))


def shipped() -> list[Path]:
    """Project files minus .comfyignore, as ``comfy node pack`` would take them."""
    def left_out(path: Path) -> bool:
        name = path.as_posix()
        return any(name == rule or (rule.endswith("/") and name.startswith(rule)) for rule in ignored_by_registry())

    return [path for path in project_files() if not left_out(path)]


def python_files(paths) -> list[Path]:
    return [path for path in paths if path.suffix == ".py"]


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"), str(path))


def absolute_imports(node: ast.AST) -> set[str]:
    """Names of the modules that the import statements under ``node`` ask for (relative imports left out)."""
    found = set()
    for item in ast.walk(node):
        if isinstance(item, ast.Import):
            found |= {alias.name for alias in item.names}
        elif isinstance(item, ast.ImportFrom) and item.level == 0:
            found |= {item.module} | {f"{item.module}.{alias.name}" for alias in item.names}
    return found


def relative_imports(node: ast.AST, package: tuple[str, ...]) -> set[str]:
    """Dotted names, from the repository's root, of what relative imports under ``node`` may reach."""
    found = set()
    for item in ast.walk(node):
        if isinstance(item, ast.ImportFrom) and item.level:
            base = package[:len(package) - item.level + 1]
            stem = ".".join((*base, *(item.module or "").split("."))).strip(".")
            found |= {stem} | {f"{stem}.{alias.name}" for alias in item.names}
    return found


def package_of(path: Path) -> tuple[str, ...]:
    return path.parent.parts


def top_level(path: Path) -> ast.Module:
    """The module without its functions' bodies and ``if TYPE_CHECKING`` blocks: what runs when it is imported."""
    class Strip(ast.NodeTransformer):
        def visit_FunctionDef(self, node):
            node.body = [ast.Pass()]
            return node

        visit_AsyncFunctionDef = visit_FunctionDef

        def visit_If(self, node):
            return None if "TYPE_CHECKING" in ast.dump(node.test) else self.generic_visit(node)

    return Strip().visit(ast.parse((ROOT / path).read_text(encoding="utf-8")))


def roots(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


CORE = python_files(p for p in project_files() if p.parts[0] == "sana_video_core")
NODES = python_files(p for p in project_files() if p.parts[0] == "nodes")
EVERYTHING = python_files(project_files())


# ------------------------------------------------------------------------------------------------------ who knows whom

def test_core_knows_torch_and_itself():
    for path in CORE:
        foreign = roots(absolute_imports(tree_of(path))) - set(sys.stdlib_module_names) - THIRD_PARTY - OPTIONAL
        assert not foreign, f"{path} imports {sorted(foreign)}"
        inner = relative_imports(tree_of(path), package_of(path))
        assert all(name.startswith("sana_video_core") for name in inner), f"{path} reaches out of the core: {sorted(inner)}"


def test_core_rooms_know_only_what_the_design_allows():
    forbidden = {"ops": {"dit", "vae", "text", "sampling", "checkpoint", "mini", "train", "film"},
                 "state": {"dit", "vae", "text", "sampling", "checkpoint", "mini", "train", "film"},
                 "dit": {"vae", "text", "sampling", "checkpoint", "mini", "train", "film"},
                 "vae": {"dit", "text", "sampling", "mini", "train", "film"},
                 "text": {"dit", "vae", "sampling", "mini", "train", "film"},
                 "sampling": {"dit", "vae", "text", "checkpoint", "mini", "train", "film"},
                 "film": {"dit", "text", "mini", "train"},
                 "quant": {"dit", "vae", "text", "sampling", "mini", "train", "film"}}
    for path in CORE:
        room = path.parts[1] if len(path.parts) > 2 else ""
        reached = {name.split(".")[1] for name in relative_imports(tree_of(path), package_of(path)) if name.count(".")}
        bad = (reached - {room}) & forbidden.get(room, {"train"} - {room})
        assert not bad, f"{path} knows {sorted(bad)}"


def test_nodes_know_core_and_comfyui():
    for path in NODES:
        foreign = roots(absolute_imports(tree_of(path))) - set(sys.stdlib_module_names) - THIRD_PARTY - COMFY
        assert not foreign, f"{path} imports {sorted(foreign)}"


def test_importing_the_pack_touches_only_harmless_comfyui_modules():
    """Follows the imports that run at load time, from the entry point on."""
    todo, seen = [Path("__init__.py"), Path("nodes/__init__.py")], set()
    while todo:
        path = todo.pop()
        if path in seen:
            continue
        seen.add(path)
        loaded = top_level(path)
        asked = {name for name in absolute_imports(loaded) if name.split(".")[0] in COMFY}
        bad = {name for name in asked if not any(name == ok or name.startswith(ok + ".") for ok in HARMLESS)
               and not any(ok.startswith(name + ".") for ok in HARMLESS)}
        assert not bad, f"{path} imports {sorted(bad)} when ComfyUI loads the pack; import it inside the function"
        for name in relative_imports(loaded, package_of(path)):
            for candidate in (Path(*name.split(".")).with_suffix(".py"), Path(*name.split("."), "__init__.py")):
                if (ROOT / candidate).is_file():
                    todo.append(candidate)
    assert Path("nodes/loader.py") in seen and Path("sana_video_core/specs.py") in seen


# ---------------------------------------------------------------------------------------------------------------- sizes

def test_files_and_functions_stay_readable():
    long = []
    for path in EVERYTHING:
        lines = len((ROOT / path).read_text(encoding="utf-8").splitlines())
        long += [f"{path} has {lines} lines"] if lines > MAX_LINES else []
        for item in ast.walk(tree_of(path)):
            # define_schema is a table of inputs, as long as the node has inputs
            if isinstance(item, (ast.FunctionDef, ast.AsyncFunctionDef)) and item.name != "define_schema":
                size = item.end_lineno - item.lineno + 1
                long += [f"{path}:{item.lineno} {item.name} has {size} lines"] if size > MAX_FUNCTION else []
    assert not long, "split these:\n" + "\n".join(long)


def test_ruff_finds_nothing():
    result = subprocess.run([sys.executable, "-m", "ruff", "check", "--no-cache", "."], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_no_conflict_marks_and_no_half_finished_notes():
    words = re.compile(r"\b(TO" r"DO|FIX" r"ME|XX" r"X|raise NotImplemented\w+)\b|^(<{7}|>{7}) ", re.MULTILINE)
    for path in project_files():
        if path.suffix in (".py", ".js", ".mjs", ".md", ".toml", ".yml"):
            found = words.search((ROOT / path).read_text(encoding="utf-8"))
            assert not found, f"{path}: {found.group()}"


def test_no_test_is_skipped():
    for path in EVERYTHING:
        if path.parts[0] == "tests" and path.name != "test_repository.py":
            text = (ROOT / path).read_text(encoding="utf-8")
            assert not re.search(r"pytest\.skip|mark\.skip|importorskip|mark\.xfail|unittest\.skip", text), path


# ----------------------------------------------------------------------------------------------------- what would ship

def test_shipped_files_are_the_ones_that_comfyui_loads():
    tops = {path.parts[0] for path in shipped()}
    assert {"__init__.py", "nodes", "sana_video_core", "web", "locales", "workflows", "pyproject.toml", "requirements.txt",
            "LICENSE", "README.md"} <= tops
    assert not tops & {"tests", "tools", "bench", "run.py", ".ci", ".github"}
    size = sum((ROOT / path).stat().st_size for path in shipped())
    assert size < 25e6, f"{size / 1e6:.1f} MB would ship"
    assert sum((ROOT / p).stat().st_size for p in shipped() if p.suffix == ".safetensors") <= 22e6


def test_registry_rules_are_plain_names():
    for rule in ignored_by_registry():
        assert not set(rule) & set("*?[]!"), f"{rule}: the packer and this test would read it differently"
        assert (ROOT / rule).exists() or rule == "bench/", rule


def violations(tree: ast.AST) -> list[str]:
    """What the registry's scanner, or common sense, would flag in one shipped Python file."""
    found = [f"imports {name}" for name in roots(absolute_imports(tree)) & (NETWORK | PROCESS | UNPICKLING)]
    for item in ast.walk(tree):
        if isinstance(item, ast.Call):
            called = ast.unparse(item.func)
            keywords = {k.arg: ast.unparse(k.value) for k in item.keywords}
            owner, _, method = called.rpartition(".")
            if called in CALLS or (owner, method) in METHODS:
                found.append(f"line {item.lineno}: calls {called}")
            if called == "torch.load" and keywords.get("weights_only") != "True":
                found.append(f"line {item.lineno}: torch.load without weights_only=True")
            if called.startswith("os.environ.") and method != "get":
                found.append(f"line {item.lineno}: {called} changes the environment")
        if isinstance(item, (ast.Assign, ast.Delete, ast.AugAssign)):
            targets = item.targets if not isinstance(item, ast.AugAssign) else [item.target]
            if any("os.environ" in ast.unparse(target) for target in targets):
                found.append(f"line {item.lineno}: changes os.environ")
        if isinstance(item, ast.ExceptHandler) and (item.type is None or ast.unparse(item.type) == "BaseException"):
            found.append(f"line {item.lineno}: an except clause that would swallow an interrupt")
    return found


def test_shipped_python_is_clean():
    flagged = {str(path): found for path in python_files(shipped()) if (found := violations(tree_of(path)))}
    assert not flagged


@pytest.mark.parametrize("code", [
    "eval('1')", "import urllib.request", "from subprocess import run", "import os\nos.environ['A'] = '1'", "import pickle",
    "import os\nos.environ.update(a='1')", "import torch\ntorch.load('x')", "import torch\ntorch.load('x', weights_only=False)",
    "try:\n  pass\nexcept:\n  pass", "import os\nos.system('ls')", "__import__('os')",
])
def test_the_gate_itself_sees_each_kind(code):
    assert violations(ast.parse(code))


FLAGGED_JS = re.compile(r"\beval\s*\(|new Function\b|document\.write|\bwindow\.\w+\s*=[^=]|https?://|/scripts/ui|extensions/core")


def test_shipped_browser_code_is_clean():
    assert FLAGGED_JS.search("eval ('x')") and FLAGGED_JS.search("window.a = 1") and not FLAGGED_JS.search("window.a == 1")
    for path in shipped():
        if path.suffix in (".js", ".mjs", ".css", ".html"):
            found = FLAGGED_JS.search((ROOT / path).read_text(encoding="utf-8"))
            assert not found, f"{path}: {found.group()}"


def test_only_python_web_and_data_files_ship():
    allowed = {".py", ".js", ".mjs", ".css", ".json", ".jpg", ".png", ".webp", ".md", ".toml", ".txt", ".safetensors", ""}
    assert {path.suffix for path in shipped()} <= allowed


# ------------------------------------------------------------------------------------------------------------ packaging

def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_pyproject_fits_the_registry():
    data = project()
    name, comfy = data["project"]["name"], data["tool"]["comfy"]
    assert "comfyui" not in name.lower() and len(name) < 100
    assert re.fullmatch(r"\d+\.\d+\.\d+", data["project"]["version"])
    assert data["project"]["dependencies"] == []
    assert data["project"]["license"] == {"file": "LICENSE"} and data["project"]["requires-python"] == ">=3.10"
    assert re.fullmatch(r">=\d+\.\d+\.\d+", comfy["requires-comfyui"]) and comfy["PublisherId"] and comfy["DisplayName"]
    assert "web" not in comfy  # WEB_DIRECTORY in __init__.py does it; both would load the scripts twice
    assert (ROOT / "LICENSE").read_text(encoding="utf-8").split()[:2] == ["Apache", "License"]


def test_changelog_leads_with_this_version():
    first = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert first and first.group(1) == project()["project"]["version"]


def requirement_names(text: str) -> list[str]:
    lines = (line.split("#")[0].strip() for line in text.splitlines())
    return [re.split(r"[<>=!~;\[ ]", line)[0].lower() for line in lines if line]


def test_requirements_install_nothing_new(comfyui_path):
    text = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    stock = requirement_names((comfyui_path / "requirements.txt").read_text(encoding="utf-8"))
    ours = requirement_names(text)
    assert ours and set(ours) <= set(stock), set(ours) - set(stock)
    assert not re.search(r"^[^#\n]*[<>=~]", text, re.MULTILINE), "pinning here could change somebody's ComfyUI"
    imported = {root for path in python_files(shipped()) for root in roots(absolute_imports(tree_of(path)))} & THIRD_PARTY
    assert {"pillow" if name == "PIL" else name for name in imported} == set(ours)


# ------------------------------------------------------------------------------------------------------------ documents

def node_ids() -> set[str]:
    """Node ids as the code states them."""
    ids = set()
    for path in NODES:
        for item in ast.walk(tree_of(path)):
            if isinstance(item, ast.keyword) and item.arg == "node_id" and isinstance(item.value, ast.Constant):
                ids.add(item.value.value)
    return ids


def test_every_node_has_help_and_translations_and_nothing_else_has():
    ids = node_ids()
    assert len(ids) >= 8 and all(name.startswith("SanaVideo") for name in ids)
    assert {path.stem for path in (ROOT / "web" / "docs").glob("*.md")} == ids
    for folder in (ROOT / "locales").iterdir():
        assert set(json.loads((folder / "nodeDefs.json").read_text(encoding="utf-8"))) == ids, folder.name


def test_readme_lists_exactly_the_nodes_and_its_files_exist():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = {name for line in text.splitlines() if line.startswith("|") for name in re.findall(r"`(SanaVideo\w+)`", line)}
    assert table == node_ids()
    assert "run.py demo" in text and "run.py test" in text
    for target in re.findall(r"\]\(([^)#]+)\)|src=\"([^\"]+)\"", text):
        link = target[0] or target[1]
        assert link.startswith("https://") or (ROOT / link).exists(), link


def test_workflows_are_named_in_the_readme_and_use_known_nodes():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    names = sorted(path.stem for path in (ROOT / "workflows").glob("*.json"))
    assert names == sorted(WORKFLOWS)
    for name in names:
        assert name in text, f"{name} is not in the README"
        nodes = json.loads((ROOT / "workflows" / f"{name}.json").read_text(encoding="utf-8"))["nodes"]
        used = {node["type"] for node in nodes if node["type"].startswith("SanaVideo")}
        assert used and used <= node_ids()


def test_workflows_explain_themselves_and_name_their_files():
    for name in WORKFLOWS:
        flow = json.loads((ROOT / "workflows" / f"{name}.json").read_text(encoding="utf-8"))
        assert (ROOT / "workflows" / f"{name}.jpg").read_bytes()[:3] == b"\xff\xd8\xff", name
        notes = [node["widgets_values"][0] for node in flow["nodes"] if node["type"] == "MarkdownNote"]
        assert len(notes) == 1 and notes[0].startswith("## ") and len(notes[0]) < 1300, name
        assert [group["title"][0] for group in flow["groups"]] == list("123456")[:len(flow["groups"])] and flow["groups"], name
        files = [model for node in flow["nodes"] for model in node["properties"].get("models", [])]
        assert len(files) == (0 if name.startswith("mini_") else 3), name
        assert all(node["properties"]["cnr_id"] in ("sana-video", "comfy-core") for node in flow["nodes"]), name
        seeds = [node["widgets_values"][4] for node in flow["nodes"] if node["type"] == "SanaVideoBlockSampler"]
        assert set(seeds) <= {"fixed"}, f"{name}: a seed that changes by itself would never resume a film"


# --------------------------------------------------------------------------------------------------- importing the core

def fresh_python(code: str) -> dict:
    """What a few lines print as JSON in a Python of their own, without ComfyUI."""
    prelude = ("import importlib.util, json, sys, time, torch\n"
               "def core():\n"
               f"    folder = {str(ROOT / 'sana_video_core')!r}\n"
               "    spec = importlib.util.spec_from_file_location('sana_video_core', folder + '/__init__.py',\n"
               "                                                  submodule_search_locations=[folder])\n"
               "    module = sys.modules['sana_video_core'] = importlib.util.module_from_spec(spec)\n"
               "    spec.loader.exec_module(module)\n"
               "    return module\n")
    result = subprocess.run([sys.executable, "-I", "-c", prelude + code], capture_output=True, text=True, cwd=ROOT.parent)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_core_imports_in_a_second_without_comfyui_and_triton():
    seen = fresh_python("before = set(sys.modules); start = time.process_time(); core()\n"
                        "print(json.dumps({'seconds': time.process_time() - start, 'new': sorted(set(sys.modules) - before)}))")
    assert seen["seconds"] < 1.0
    assert not roots(set(seen["new"])) & (COMFY | OPTIONAL | NETWORK)


def test_every_core_module_imports_alone():
    plain = [p for p in CORE if not roots(absolute_imports(top_level(p))) & OPTIONAL]  # kernels load where Triton is
    names = [".".join((*p.parts[:-1], *(() if p.stem == "__init__" else (p.stem,)))) for p in plain]
    seen = fresh_python("import builtins; core(); plain = builtins.__import__\n"
                        "def guard(name, *a, **k):\n"
                        "    if name.split('.')[0] == 'triton': raise ModuleNotFoundError(name)\n"
                        "    return plain(name, *a, **k)\n"
                        "builtins.__import__ = guard\n"
                        f"for name in {names!r}: importlib.import_module(name)\n"
                        "print(json.dumps({'comfy': [n for n in sys.modules if n.split('.')[0] == 'comfy']}))")
    assert not seen["comfy"]
