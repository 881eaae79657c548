"""The browser for the tests: one that is installed, else Debian's Chromium when this process may install it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from .places import LOGS, RunError, locked, say, tail

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "microsoft-edge", "msedge")
PLACES = (
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
    "/Applications/Microsoft Edge.app/Contents/MacOS/Microsoft Edge",
)
WINDOWS = ("Google/Chrome/Application/chrome.exe", "Chromium/Application/chrome.exe", "Microsoft/Edge/Application/msedge.exe")


def find() -> str | None:
    """The path of an installed Chromium, Chrome or Edge; SANA_VIDEO_BROWSER names one explicitly."""
    chosen = os.environ.get("SANA_VIDEO_BROWSER")
    if chosen:
        return chosen
    roots = [os.environ.get(name) for name in ("PROGRAMFILES", "PROGRAMFILES(X86)", "LOCALAPPDATA")]
    windows = [str(Path(root) / place) for root in roots if root for place in WINDOWS]
    found = next((path for path in map(shutil.which, NAMES) if path), None)
    return found or next((place for place in (*PLACES, *windows) if Path(place).is_file()), None)


def ensure() -> str:
    """The path of a browser; installs Chromium on Debian and Ubuntu when this is root."""
    with locked(LOGS / "browser.lock"):
        path = find()
        if path:
            return path
        if sys.platform != "linux" or os.geteuid() != 0 or not shutil.which("apt-get"):
            raise RunError("The browser tests need Chromium, Chrome or Edge. Install one, or set SANA_VIDEO_BROWSER to its "
                           "program; or leave those tests out: run.py test --ignore=tests/browser")
        say("set-up: Chromium for the browser tests (290 MB)")
        install()
        path = find()
    if not path:
        raise RunError("apt-get installed chromium, but no browser was found afterwards.")
    return path


def install() -> None:
    """apt-get's Chromium, with the output in a log."""
    log = LOGS / "browser.log"
    quiet = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for command in (["apt-get", "update"],
                    ["apt-get", "install", "-y", "--no-install-recommends", "chromium", "fonts-liberation"]):
        with log.open("a", encoding="utf-8") as output:
            code = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, env=quiet).returncode
        if code:
            raise RunError(f"{tail(log)}\n{' '.join(command)} failed (exit code {code}). Install Chromium by hand, or "
                           "leave those tests out: run.py test --ignore=tests/browser")
