"""Sealed safetensors: an ordinary safetensors file with a JSON record and a checksum over every byte of the file.

safetensors itself carries no checksum: a flipped bit in a weight, a renamed tensor or a changed number in the header is
read without complaint. Here the digest in ``__metadata__`` covers the whole file (its own 64 digits counted as zeros), so no
altered file is ever read. Sizes are checked against the file and a cap before anything is allocated. Any safetensors reader
can open the file. Not covered: what the tensors mean (``files.py``, the film's block files).
"""

from __future__ import annotations

import hmac
import json
import math
import re
import struct
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ..errors import StateError
from .atomic import best_algorithm, disk_error, hasher, write_atomic

MAX_HEADER = 8 << 20
MAX_RANK = 8
RECORD = "sana_video"
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "U8": torch.uint8}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_DIGEST = re.compile(rb'"digest":"(blake3|sha256):([0-9a-f]{64})"')

Table = dict[str, tuple[torch.dtype, tuple[int, ...]]]


def _bytes_of(t: Tensor):
    return memoryview(t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())


def write_sealed(path: str | Path, tensors: dict[str, Tensor], record: dict) -> None:
    """Write ``tensors`` and the JSON-able ``record`` to ``path``, atomically."""
    algorithm = best_algorithm()
    table: dict = {"__metadata__": {"format": "pt", "digest": f"{algorithm}:{'0' * 64}",
                                    RECORD: json.dumps(record, sort_keys=True, allow_nan=False)}}
    start = 0
    for name, t in tensors.items():
        if t.dtype not in _NAMES:
            raise StateError("A tensor of this kind cannot be saved", found=f"{name}: {t.dtype}")
        end = start + t.numel() * t.element_size()
        table[name] = {"dtype": _NAMES[t.dtype], "shape": list(t.shape), "data_offsets": [start, end]}
        start = end
    header = json.dumps(table, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    if len(header) > MAX_HEADER:
        raise StateError("The record is too large for one file", found=f"{len(header)} bytes", expected=f"at most {MAX_HEADER}")
    digest = hasher(algorithm)
    digest.update(struct.pack("<Q", len(header)) + header)
    for t in tensors.values():
        digest.update(_bytes_of(t))
    place = _DIGEST.search(header).start(2)
    header = header[:place] + digest.hexdigest().encode() + header[place + 64:]

    def pieces():
        yield struct.pack("<Q", len(header)) + header
        for t in tensors.values():
            yield _bytes_of(t)

    write_atomic(path, pieces())


def read_sealed(
    path: str | Path, kind: str, cap: int, check: Callable[[dict, Table], None] | None = None, skip: str | None = None,
) -> tuple[dict, dict[str, Tensor]]:
    """(record, tensors) of a sealed file; refused unless every byte is as it was written.

    ``kind`` names the file in messages. ``cap`` bounds the bytes of its tensors. ``check(record, table)`` may refuse the layout
    before anything is allocated. Tensors whose name begins with ``skip`` are verified but not kept.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            return _read(file, path, kind, cap, check, skip)
    except FileNotFoundError as error:
        raise StateError(f"There is no such {kind}", found=str(path), action="Check the name and the folder") from error
    except OSError as error:
        raise disk_error(error, path, "read") from error


def _damaged(kind: str, path: Path, found: str) -> StateError:
    return StateError(f"The {kind} {path.name} is damaged or was changed", found=found,
                      action="Use an undamaged copy, or make it again")


def _read_header(file, path: Path, kind: str) -> tuple[int, int, bytes]:
    """(bytes of the file, bytes of the header, header); the length is checked before anything is read."""
    size = file.seek(0, 2)
    file.seek(0)
    start = file.read(8)
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
    if not 2 <= length <= min(MAX_HEADER, size - 8):
        raise _damaged(kind, path, f"{size} bytes, header of {length}")
    return size, length, file.read(length)


def _read(file, path: Path, kind: str, cap: int, check, skip) -> tuple[dict, dict[str, Tensor]]:
    size, length, header = _read_header(file, path, kind)
    seals = _DIGEST.findall(header)
    if len(seals) != 1:
        raise StateError(f"The file {path.name} is no {kind} of this pack", found="no checksum", action="Choose another file")
    algorithm, seal = (part.decode() for part in seals[0])
    record, table = _parse(header, path, kind)
    if sum(math.prod(shape) * dtype.itemsize for dtype, shape in table.values()) != size - 8 - length:
        raise _damaged(kind, path, "sizes that do not fill the file")
    if size > cap:
        raise StateError(f"The {kind} {path.name} is too large", found=f"{size} bytes", expected=f"at most {cap}")
    digest = hasher(algorithm)
    place = _DIGEST.search(header).start(2)
    digest.update(struct.pack("<Q", length) + header[:place] + b"0" * 64 + header[place + 64:])
    refusal = None
    if check is not None:
        try:
            check(record, table)
        except StateError as error:
            refusal = error  # an altered file must say so, whatever field the change happens to have hit
    tensors = _payload(file, table, digest, skip if refusal is None else "")
    if not hmac.compare_digest(digest.hexdigest(), seal):
        raise _damaged(kind, path, "contents that do not match the checksum")
    if refusal is not None:
        raise refusal
    return record, tensors


def _parse(header: bytes, path: Path, kind: str) -> tuple[dict, Table]:
    try:
        entries = json.loads(header.decode(), object_pairs_hook=_unique)
        record = json.loads(entries.pop("__metadata__")[RECORD])
        if not isinstance(record, dict):
            raise ValueError("no record")
        table: Table = {}
        end = 0
        for name, entry in entries.items():
            shape = tuple(entry["shape"])
            begin, after = entry["data_offsets"]
            if len(shape) > MAX_RANK or any(type(n) is not int or n < 0 for n in (*shape, begin, after)) or begin != end:
                raise ValueError(name[:80])
            table[name] = (_DTYPES[entry["dtype"]], shape)
            end = begin + math.prod(shape) * table[name][0].itemsize
            if after != end:
                raise ValueError(name[:80])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(kind, path, f"a header that cannot be read ({str(error)[:80]})") from error
    return record, table


def _unique(pairs: list) -> dict:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("a name that occurs twice")
    return entries


def _payload(file, table: Table, digest, skip: str | None) -> dict[str, Tensor]:
    """Read and hash the tensors one by one; those that begin with ``skip`` go through a small buffer only."""
    tensors: dict[str, Tensor] = {}
    for name, (dtype, shape) in table.items():
        if skip is not None and name.startswith(skip):
            left = math.prod(shape) * dtype.itemsize
            while left and (piece := file.read(min(left, 1 << 22))):
                digest.update(piece)
                left -= len(piece)
            continue
        t = torch.empty(shape, dtype=dtype)
        raw = memoryview(t.flatten().view(torch.uint8).numpy())
        done = 0
        while done < len(raw) and (got := file.readinto(raw[done:])):
            done += got
        digest.update(raw)
        tensors[name] = t
    return tensors


def read_record(path: str | Path, kind: str) -> dict:
    """The record of a sealed file whose structure and length are right, without reading (and so without verifying) the rest."""
    path = Path(path)
    try:
        with open(path, "rb") as file:
            size, length, header = _read_header(file, path, kind)
            record, table = _parse(header, path, kind)
    except OSError as error:
        raise disk_error(error, path, "read") from error
    if sum(math.prod(shape) * dtype.itemsize for dtype, shape in table.values()) != size - 8 - length:
        raise _damaged(kind, path, "sizes that do not fill the file")
    return record
