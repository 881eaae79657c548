"""run.py's parts without a network: the set-up's steps and stamps, the workflow converter, the websocket, small helpers."""

from __future__ import annotations

import io
import json
import os
import socket
import struct
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import pytest

from tools import browser, client, demo, environment, places, server, testing, workflow
from tools.places import RunError

# --------------------------------------------------------------------------------------------------------------- set-up


class Recorder(environment.SetUp):
    """A set-up in a temporary folder whose steps only note that they ran."""

    def __init__(self, folder: Path, ran: list[str], broken: str = ""):
        self.stamps_file, self.busy_file, self.log = folder / "stamps.json", folder / "busy", folder / "setup.log"
        self.python = folder / "python"
        self.python.touch()
        (folder / "ComfyUI").mkdir(exist_ok=True)
        (folder / "ComfyUI" / "main.py").touch()

        def step(name):
            def action():
                if name == broken:
                    raise RunError("no network")
                self.busy_file.unlink(missing_ok=True)
                ran.append(name)
            return action

        self.steps = [(name, recipe, step(name), name) for name, recipe in
                      (("venv", 1), ("comfyui", 1), ("torch", 1), ("packages", 1))]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "COMFYUI", tmp_path / "ComfyUI")
    monkeypatch.setattr(environment, "LOGS", tmp_path / "logs")
    return tmp_path


def test_set_up_runs_once_and_then_only_what_changed(folder):
    ran: list[str] = []
    Recorder(folder, ran).run()
    assert ran == ["venv", "comfyui", "torch", "packages"]
    Recorder(folder, ran).run()
    assert len(ran) == 4
    changed = Recorder(folder, ran)
    changed.steps[3] = ("packages", 2, *changed.steps[3][2:])
    changed.run()
    assert ran[4:] == ["packages"]


def test_a_failed_step_is_repeated_and_the_ones_before_it_are_not(folder):
    ran: list[str] = []
    with pytest.raises(RunError, match="no network"):
        Recorder(folder, ran, broken="torch").run()
    assert ran == ["venv", "comfyui"]
    Recorder(folder, ran).run()
    assert ran == ["venv", "comfyui", "torch", "packages"]


def test_after_a_kill_in_the_middle_of_pip_the_environment_is_made_again(folder, capsys):
    ran: list[str] = []
    Recorder(folder, ran).run()
    (folder / "busy").write_text("torch==9")
    Recorder(folder, ran).run()
    assert ran[4:] == ["venv", "torch", "packages"] and "cut off while installing torch==9" in capsys.readouterr().out


def test_lost_parts_are_made_again(folder):
    ran: list[str] = []
    Recorder(folder, ran).run()
    again = Recorder(folder, ran)
    (folder / "ComfyUI" / "main.py").unlink()
    again.run()
    assert ran[4:] == ["comfyui"]
    again = Recorder(folder, ran)
    again.python.unlink()
    again.run()
    assert ran[5:] == ["venv", "torch", "packages"]


def test_damaged_stamps_count_as_none(folder):
    ran: list[str] = []
    (folder / "stamps.json").write_text('{"venv": ')
    Recorder(folder, ran).run()
    assert len(ran) == 4


def test_a_failing_program_shows_its_last_lines_and_where_the_log_is(folder):
    setup = Recorder(folder, [])
    with pytest.raises(RunError) as caught:
        setup.call([sys.executable, "-c", "print('the reason'); raise SystemExit(3)"], "installing nothing", "Do this.")
    assert "the reason" in str(caught.value) and "Installing nothing failed (exit code 3). Do this." in str(caught.value)
    assert str(setup.log) in str(caught.value)


@pytest.mark.parametrize(("code", "kept"), [("raise SystemExit(1)", False), ("import os; os.kill(os.getpid(), 9)", True)])
def test_the_busy_mark_stays_only_after_a_kill(folder, monkeypatch, code, kept):
    setup = Recorder(folder, [])
    plain = setup.call
    monkeypatch.setattr(setup, "call", lambda command, *rest: plain([sys.executable, "-c", code], *rest))
    with pytest.raises(RunError):
        setup.pip("install", "x", about="x")
    assert setup.busy_file.exists() is (kept and os.name == "posix")


def test_comfyui_is_unpacked_whole_or_not_at_all(folder, monkeypatch):
    monkeypatch.setattr(environment, "RUNTIME", folder)
    setup, archive = Recorder(folder, []), folder / "dl" / environment.SDIST_FILE
    archive.parent.mkdir()

    def pack(version):
        with tarfile.open(archive, "w:gz") as tar:
            for name, text in (("main.py", "x"), ("comfyui_version.py", f'__version__ = "{version}"'), ("../../evil.py", "x")):
                info = tarfile.TarInfo(environment.SDIST_TREE + name)
                info.size = len(text)
                tar.addfile(info, io.BytesIO(text.encode()))
        monkeypatch.setattr(environment, "SDIST_SHA256", environment.sha256(archive))

    pack("0.1.0")
    (folder / "ComfyUI" / "old").touch()
    with pytest.raises(RunError, match=r"does not hold ComfyUI"):
        setup.unpack_comfyui()
    assert (folder / "ComfyUI" / "old").exists()
    pack(environment.COMFYUI_VERSION)
    setup.unpack_comfyui()
    assert sorted(p.name for p in (folder / "ComfyUI").iterdir()) == ["comfyui_version.py", "main.py"]
    assert not list(folder.parent.rglob("evil.py"))


def test_an_existing_comfyui_is_used_with_its_python_and_never_changed(tmp_path, monkeypatch):
    monkeypatch.delenv("COMFYUI_PYTHON", raising=False)
    with pytest.raises(RunError, match=r"no main\.py"):
        environment.existing(tmp_path)
    (tmp_path / "main.py").touch()
    found = environment.existing(tmp_path)
    assert found.python == Path(sys.executable) and not found.own and found.child_env()["COMFYUI_PATH"] == str(tmp_path)
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    assert environment.ensure() == found and [p.name for p in tmp_path.iterdir()] == ["main.py"]
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho no torch here >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("COMFYUI_PYTHON", str(broken))
    if os.name == "posix":
        with pytest.raises(RunError, match="no torch here.*COMFYUI_PYTHON"):
            environment.existing(tmp_path)


def test_the_lock_waits_for_its_holder_and_dies_with_it(tmp_path):
    code = ("import sys, importlib.util\n"
            f"spec = importlib.util.spec_from_file_location('places', {places.__file__!r})\n"
            "module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)\n"
            f"with module.locked(module.Path({str(tmp_path / 'lock')!r})): print('held', flush=True); sys.stdin.read()\n")
    holder = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    order = []

    def wait():
        with places.locked(tmp_path / "lock"):
            order.append("second")

    thread = threading.Thread(target=wait)
    thread.start()
    thread.join(0.3)
    assert order == []
    holder.kill()
    thread.join(20)
    assert order == ["second"]
    holder.communicate()


def test_pins_cover_what_is_installed(root):
    """The constraints name every package that the tests run with, so that a fresh set-up gets the same."""
    from importlib import metadata

    lines = (root / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {environment.bare_name(line): line.split("==")[1].split(";")[0] for line in lines if "==" in line}
    for name in ("aiohttp", "av", "comfy-kitchen", "numpy", "transformers", "pytest", "hypothesis", "safetensors"):
        assert pins[name] and metadata.version(name)


# ------------------------------------------------------------------------------------------------------------ workflows

INFO = {
    "Load": {"input": {"required": {"file": [["a", "b"], {}], "seed": ["INT", {"control_after_generate": True}],
                                    "scale": ["FLOAT", {}]}}, "input_order": {"required": ["file", "seed", "scale"]},
             "display_name": "Load it"},
    "Change": {"input": {"required": {"model": ["MODEL", {}], "strength": ["FLOAT", {}], "given": ["INT", {"forceInput": True}]},
                         "optional": {"mode": ["COMBO", {"options": ["x", "y"]}]}},
               "input_order": {"required": ["model", "strength", "given"], "optional": ["mode"]}, "display_name": "Change it"},
    "Save": {"input": {"required": {"model": ["MODEL"], "codec": ["COMFY_DYNAMICCOMBO_V3", {"options": [
        {"key": "h264", "inputs": {"required": {"quality": ["INT", {}]}}}, {"key": "vp9", "inputs": {}}]}],
        "name": ["STRING", {}]}}, "input_order": {"required": ["model", "codec", "name"]}, "display_name": "Save it"},
}


def ui(mode: int = 0) -> dict:
    return {
        "nodes": [
            {"id": 1, "type": "Load", "widgets_values": ["b", 7, "randomize", 0.5],
             "outputs": [{"type": "MODEL"}, {"type": "INT"}]},
            {"id": 2, "type": "Change", "mode": mode, "widgets_values": [0.25, "y"], "title": "Mine",
             "outputs": [{"type": "MODEL"}], "inputs": [{"name": "model", "type": "MODEL", "link": 10},
                                                        {"name": "given", "type": "INT", "link": 11}]},
            {"id": 3, "type": "Save", "widgets_values": ["h264", 20, "film"],
             "inputs": [{"name": "model", "type": "MODEL", "link": 12},
                        {"name": "name", "type": "STRING", "widget": {"name": "name"}, "link": None}]},
            {"id": 4, "type": "MarkdownNote", "widgets_values": ["read me"]},
        ],
        "links": [[10, 1, 0, 2, 0, "MODEL"], [11, 1, 1, 2, 1, "INT"], [12, 2, 0, 3, 0, "MODEL"]],
    }


def test_widgets_links_seeds_and_notes_become_a_prompt():
    prompt = workflow.to_api(ui(), INFO)
    assert prompt == {
        "1": {"class_type": "Load", "inputs": {"file": "b", "seed": 7, "scale": 0.5}, "_meta": {"title": "Load it"}},
        "2": {"class_type": "Change", "inputs": {"strength": 0.25, "mode": "y", "model": ["1", 0], "given": ["1", 1]},
              "_meta": {"title": "Mine"}},
        "3": {"class_type": "Save", "inputs": {"codec": "h264", "codec.quality": 20, "name": "film", "model": ["2", 0]},
              "_meta": {"title": "Save it"}},
    }


def test_a_bypassed_node_passes_its_link_on_and_a_muted_one_cuts_it():
    bypassed, muted = workflow.to_api(ui(mode=4), INFO), workflow.to_api(ui(mode=2), INFO)
    assert "2" not in bypassed and bypassed["3"]["inputs"]["model"] == ["1", 0]
    assert "2" not in muted and "model" not in muted["3"]["inputs"]


def test_unknown_nodes_and_odd_widgets_are_refused_by_name():
    graph = ui()
    graph["nodes"][0]["type"] = "Nowhere"
    with pytest.raises(RunError, match="Nowhere"):
        workflow.to_api(graph, INFO)
    graph = ui()
    graph["nodes"][0]["widgets_values"] = {"file": "b"}
    with pytest.raises(RunError, match="Load"):
        workflow.to_api(graph, INFO)


# ------------------------------------------------------------------------------------------------------------ websocket

def frame(kind: int, payload: bytes, last: bool = True) -> bytes:
    size = len(payload)
    if size < 126:
        length = bytes([size])
    else:
        length = b"\x7e" + struct.pack(">H", size) if size < 1 << 16 else b"\x7f" + struct.pack(">Q", size)
    return bytes([(0x80 if last else 0) | kind]) + length + payload


@pytest.fixture
def peer():
    """A server that shakes hands, sends the given bytes and records what it gets."""
    listener = socket.create_server(("127.0.0.1", 0))
    record = {}

    def serve():
        connection, _ = listener.accept()
        with connection:
            head = b""
            while b"\r\n\r\n" not in head:
                head += connection.recv(4096)
            connection.sendall(record.get("answer", b"HTTP/1.1 101 Switching Protocols\r\n\r\n") + record["send"])
            connection.settimeout(5)
            try:
                while chunk := connection.recv(4096):
                    record["got"] = record.get("got", b"") + chunk
            except OSError:
                return

    thread = threading.Thread(target=serve, daemon=True)
    record["start"] = lambda: (thread.start(), client.Events("127.0.0.1", listener.getsockname()[1], "me"))[1]
    record["thread"] = thread
    yield record
    listener.close()


def test_messages_are_put_together_from_frames(peer):
    long = json.dumps({"type": "long", "data": {"text": "x" * 70_000}}).encode()
    preview = struct.pack(">II", 4, 17) + b'{"node_id": "12"}' + b"\xff\xd8\xff picture"
    peer["send"] = (frame(1, b'{"type": "status", "da', last=False) + frame(9, b"are you there") + frame(0, b'ta": {"a": 1}}')
                    + frame(2, preview) + frame(2, struct.pack(">II", 1, 1) + b"old") + frame(1, long) + frame(8, b""))
    with peer["start"]() as events:
        got = list(events.until(10))
    peer["thread"].join(10)
    assert [event.type for event in got] == ["status", "preview", "preview", "long"]
    assert got[0].data == {"a": 1} and got[3].data["text"] == "x" * 70_000
    assert got[1].data == {"node_id": "12"} and got[1].image.startswith(b"\xff\xd8\xff") and got[1].binary_type == 4
    assert got[2].binary_type == 1 and got[2].image == b"old"
    assert peer["got"].count(b"\x8a") >= 1  # the ping was answered, with a masked pong
    assert b"supports_preview_metadata" not in peer["got"]  # client frames are masked


def test_waiting_ends_in_time_and_a_lost_server_is_an_error(peer):
    peer["send"] = b""
    with peer["start"]() as events:
        assert list(events.until(0.2)) == []


def test_a_refused_websocket_is_an_error(peer):
    peer["answer"], peer["send"] = b"HTTP/1.1 403 Forbidden\r\n\r\n", b""
    with pytest.raises(RunError, match="403"):
        peer["start"]()


# -------------------------------------------------------------------------------------------------------- small helpers

def test_the_chosen_browser_wins_and_browser_tests_are_recognised(monkeypatch, tmp_path):
    monkeypatch.setenv("SANA_VIDEO_BROWSER", "/my/browser")
    assert browser.find() == browser.ensure() == "/my/browser"
    (tmp_path / "tests" / "browser").mkdir(parents=True)
    (tmp_path / "tests" / "unit").mkdir()
    monkeypatch.setattr(testing, "ROOT", tmp_path)
    assert testing.needs_browser([]) and testing.needs_browser(["-x", "tests"]) and testing.needs_browser(["tests/browser"])
    assert not testing.needs_browser(["tests/unit"]) and not testing.needs_browser(["--ignore=tests/browser"])


def test_only_the_whole_suite_runs_in_several_processes(monkeypatch, tmp_path):
    (tmp_path / "tests").mkdir()
    monkeypatch.setattr(testing, "ROOT", tmp_path)
    monkeypatch.setattr(testing.os, "cpu_count", lambda: 2)
    assert testing.processes([]) == testing.processes(["-q", "--ignore=tests/browser"]) == [
        "-n", "2", "--dist", "loadfile", "--no-loadscope-reorder"]
    for own in (["tests"], ["-m", "gpu"], ["-x"], ["-n0"], ["-n", "3"], ["-s"], ["-p", "no:xdist"]):
        assert testing.processes(own) == []
    monkeypatch.setattr(testing.os, "cpu_count", lambda: 64)
    assert testing.processes([])[1] == "4"


def test_a_pack_folder_is_linked_and_an_old_link_replaced(tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "file").touch()
    for target in ("old", "new", "new"):
        server.link_folder(tmp_path / target, tmp_path / "link")
    assert (tmp_path / "link" / "file").is_file()


def test_free_ports_are_free():
    with socket.create_server(("127.0.0.1", server.free_port())) as listener:
        assert listener.getsockname()[1] > 0


def test_the_demo_keeps_every_video_and_says_when_there_is_none(tmp_path):
    (tmp_path / "output" / "video").mkdir(parents=True)
    (tmp_path / "output" / "video" / "a.mp4").write_bytes(b"film")
    files = [{"filename": "a.mp4", "subfolder": "video", "type": "output"}]
    assert [demo.keep(tmp_path, files, tmp_path / "out").name for _ in range(2)] == ["demo_001.mp4", "demo_002.mp4"]
    with pytest.raises(RunError, match=r"b\.png"):
        demo.keep(tmp_path, [{"filename": "b.png"}], tmp_path / "out")


def test_the_demo_puts_prompt_and_seed_where_they_belong():
    graph = {"1": {"class_type": demo.TEXT_NODE, "inputs": {"prompt": "old"}}, "2": {"class_type": "K", "inputs": {"seed": 1}}}
    assert demo.change(graph, None, None) == "old" and graph["2"]["inputs"]["seed"] == 1
    assert demo.change(graph, "new", 5) == "new" and graph["2"]["inputs"]["seed"] == 5


@pytest.mark.parametrize(("arguments", "code", "words"), [
    ([], 2, "usage: run.py"), (["nonsense"], 2, "invalid choice"), (["--help"], 0, "demo"),
    (["demo", "--nonsense"], 2, "unrecognized arguments: --nonsense"),
])
def test_wrong_commands_are_explained(root, arguments, code, words):
    result = subprocess.run([sys.executable, root / "run.py", *arguments], capture_output=True, text=True)
    assert result.returncode == code and words in result.stdout + result.stderr and "Traceback" not in result.stderr


def test_a_wrong_comfyui_path_is_one_readable_line(root, tmp_path):
    result = subprocess.run([sys.executable, root / "run.py", "ops"], capture_output=True, text=True,
                            env=os.environ | {"COMFYUI_PATH": str(tmp_path)})
    assert result.returncode == 1 and result.stderr.count("\n") == 1 and "COMFYUI_PATH" in result.stderr
