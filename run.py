#!/usr/bin/env python3
"""The one entry for people and CI: demo, film, test, golden, judge, bench, ops. Standard library only, Python 3.10 or newer.

The first use makes an environment under .runtime (packages and the real ComfyUI); COMFYUI_PATH uses an existing one instead.
Commands that need torch run this file again inside that environment.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
# A script's folder comes first on sys.path, and this one would hide ComfyUI's nodes.py behind our nodes/.
sys.path[:] = [entry for entry in sys.path if Path(entry or os.curdir).resolve() != ROOT]


def load(name: str, path: Path):
    """A module or package by its place on disk."""
    folder = [str(path.parent)] if path.name == "__init__.py" else None
    spec = importlib.util.spec_from_file_location(name, path, submodule_search_locations=folder)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


PASSED_ON = {  # these take their arguments as they are
    "film": "the embedded model's film in a run folder: run.py film --blocks N --dir D [--prompt P] [--seed S]",
    "test": "run every test that needs no GPU; further arguments go to pytest",
    "golden": "check golden files: run.py golden DIR [--allow-unsupported]",
    "judge": "the embedded model's prompt adherence: run.py judge [--clips N] [--film BLOCKS]",
    "bench": "a benchmark against its peers; run.py bench lists them",
    "ops": "operators, backends, availability and reasons",
}


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command, and for those in PASSED_ON everything after it as ``rest``."""
    top = argparse.ArgumentParser(prog="run.py", description="SANA-Video for ComfyUI: try it, test it, measure it.")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    demo = commands.add_parser("demo", help="make a video with the real ComfyUI and the embedded model")
    demo.add_argument("--prompt", help="what the video shows (coloured shapes that move); default: the workflow's own")
    demo.add_argument("--seed", type=int, help="another seed gives another video")
    demo.add_argument("--out", type=Path, default=ROOT / "out", help="folder for the video (default: out)")
    demo.add_argument("--gpu", action="store_true", help="let ComfyUI use the GPU (set COMFYUI_PATH to a ComfyUI that has one)")
    for name, about in PASSED_ON.items():
        commands.add_parser(name, help=about)
    if arguments and arguments[0] in PASSED_ON:
        return argparse.Namespace(command=arguments[0], rest=arguments[1:])
    return top.parse_args(arguments)


def main(arguments: list[str]) -> int:
    if sys.version_info < (3, 10):  # noqa: UP036  (older Pythons must be told, not shown a traceback)
        print(f"Python 3.10 or newer is needed; this is {sys.version.split()[0]}.")
        return 1
    load("tools", ROOT / "tools" / "__init__.py")
    sys.stdout.reconfigure(errors="replace")  # a prompt may hold what an old console cannot show
    if arguments[:1] == ["--inside"]:
        try:
            return inside(arguments[1], arguments[2:])
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)
            return 130
    options = parse(arguments)
    from tools import demo, environment, places, server, testing

    server.stop_on_terminate()
    try:
        env = environment.ensure()
        if options.command == "demo":
            return demo.demo(env, options)
        if options.command == "test":
            return testing.run_tests(env, options.rest)
        command = [env.python, Path(__file__).resolve(), "--inside", options.command, *options.rest]
        alike = testing.ALIKE if options.command == "golden" else {}
        return follow([str(part) for part in command], env.child_env(**alike))
    except places.RunError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


def follow(command: list[str], variables: dict[str, str], patience: float = 10) -> int:
    """Run ``command`` to its end and return its exit status. Ctrl-C reaches it from the terminal too: it has ``patience``
    seconds to end in order and to say how far it came."""
    child = subprocess.Popen(command, env=variables)
    try:
        return child.wait()
    except KeyboardInterrupt:
        try:
            return child.wait(patience)
        except subprocess.TimeoutExpired:
            raise KeyboardInterrupt from None
    finally:
        child.kill()
        child.wait()


def inside(command: str, arguments: list[str]) -> int:
    """The part of a command that runs in the environment, where torch is."""
    load("sana_video_core", ROOT / "sana_video_core" / "__init__.py")
    if command == "ops":
        from sana_video_core import ops
        from sana_video_core.vae import fused  # noqa: F401  brings the decoder's operator

        rows = [("operator", "backend", "state"), *ops.report()]
        widths = [max(len(row[column]) for row in rows) for column in range(2)]
        for row in rows:
            print(f"{row[0]:{widths[0]}}  {row[1]:{widths[1]}}  {row[2]}")
        return 0
    if command == "golden":
        return load("golden_check", ROOT / "tests" / "golden" / "check.py").main(arguments) or 0
    if command == "judge":
        from sana_video_core.mini import evaluate

        return evaluate.main(arguments) or 0
    if command == "film":
        from sana_video_core.mini import film

        return film.main(arguments)
    if command == "judge-video":
        from tools import inspect_video

        return inspect_video.main(Path(arguments[0]), arguments[1], int(arguments[2]))
    load("bench", ROOT / "bench" / "__init__.py")
    from bench import cli

    return cli.main(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
