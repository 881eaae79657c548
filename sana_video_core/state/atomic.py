"""Files that exist whole or not at all: temporary file, flush, fsync, rename, fsync of the folder; and checksums.

Every call into the operating system goes through :data:`SYSTEM`, so that a test can let the nth one fail. A crash at any
moment leaves the old file or the new one, and at most a ``*.part`` file that :func:`remove_orphans` clears away.
"""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from ..errors import StateError

PART = ".part"
_REASONS = {
    errno.ENOSPC: ("the disk is full", "Free some space on that disk and run again; finished blocks are kept"),
    errno.EDQUOT: ("your disk quota is used up", "Free some space on that disk and run again; finished blocks are kept"),
    errno.EROFS: ("the disk is read-only", "Choose a folder that can be written to"),
    errno.EACCES: ("writing there is not allowed", "Choose a folder that can be written to, or change its permissions"),
    errno.EPERM: ("writing there is not allowed", "Choose a folder that can be written to, or change its permissions"),
    errno.EIO: ("the disk reports an input/output error", "Check the disk; finished blocks are kept"),
}


class System:
    """The calls that can fail. Replaced in fault tests."""

    def open(self, path: Path, mode: str) -> BinaryIO:
        return open(path, mode)

    def write(self, file: BinaryIO, data) -> None:
        file.write(data)

    def sync(self, file: BinaryIO) -> None:
        """Out of this process and onto the disk."""
        file.flush()
        os.fsync(file.fileno())

    def replace(self, source: Path, target: Path) -> None:
        os.replace(source, target)

    def sync_folder(self, folder: Path) -> None:
        """Makes a rename durable. Windows has no such call and needs none."""
        if os.name == "nt":
            return
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def unlink(self, path: Path) -> None:
        path.unlink(missing_ok=True)

    def mkdir(self, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)


SYSTEM = System()


def disk_error(error: OSError, path: Path, verb: str = "written") -> StateError:
    """What an OSError means to an artist."""
    reason, action = _REASONS.get(error.errno, (error.strerror or str(error), "Check the folder and the disk, then run again"))
    return StateError(f"The file {path.name} could not be {verb}", found=f"{reason} ({path.parent})", action=action)


def write_atomic(path: str | Path, pieces: Iterable) -> None:
    """Write the bytes-like ``pieces`` to ``path``. On any failure the old file stays and a StateError tells why."""
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}{PART}")
    try:
        SYSTEM.mkdir(path.parent)
        with SYSTEM.open(part, "wb") as file:
            for piece in pieces:
                SYSTEM.write(file, piece)
            SYSTEM.sync(file)
        SYSTEM.replace(part, path)
        SYSTEM.sync_folder(path.parent)
    except OSError as error:
        raise disk_error(error, path) from error
    finally:
        try:
            part.unlink(missing_ok=True)
        except OSError:  # a read-only disk keeps nothing that could be removed
            part = None


def append_synced(path: Path, data) -> None:
    """Append to a file and bring it onto the disk. Not atomic: the caller knows how long the file should be."""
    try:
        with SYSTEM.open(path, "ab") as file:
            SYSTEM.write(file, data)
            SYSTEM.sync(file)
    except OSError as error:
        raise disk_error(error, path) from error


def remove(path: Path) -> None:
    """Remove a file if it is there."""
    try:
        SYSTEM.unlink(path)
    except OSError as error:
        raise disk_error(error, path, "removed") from error


def remove_orphans(folder: Path) -> int:
    """Clear what crashed writers left. Only for a folder that this process has locked."""
    orphans = list(folder.glob(f".*{PART}"))
    for path in orphans:
        remove(path)
    return len(orphans)


def best_algorithm() -> str:
    """"blake3" where the package is there (it comes with ComfyUI), else "sha256"."""
    try:
        import blake3  # noqa: F401
    except ImportError:
        return "sha256"
    return "blake3"


def hasher(algorithm: str):
    """A hash object with ``update`` and ``hexdigest`` (64 hex digits)."""
    if algorithm == "sha256":
        return hashlib.sha256()
    if algorithm != "blake3":
        raise StateError("Unknown checksum", found=algorithm[:40], expected="blake3 or sha256")
    try:
        import blake3
    except ImportError as error:
        raise StateError("This file carries a blake3 checksum, and the package blake3 is missing",
                         action="Install blake3 in ComfyUI's Python (it is one of ComfyUI's own requirements)") from error
    return blake3.blake3()
