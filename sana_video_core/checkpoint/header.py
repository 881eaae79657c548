"""A strict reader of safetensors headers: everything is checked before a single tensor is touched.

The format (8 bytes length, JSON, data) is simple enough to lie in many ways; readers differ in what they believe. Here a
file is refused unless its tensors fill the data part exactly, in whole numbers that fit, under distinct names. The data
itself is not covered: a flipped bit in a weight needs a checksum (``integrity.py``). Not covered: reading tensors.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import NamedTuple

from ..errors import CheckpointError

MAX_HEADER_BYTES = 16 << 20  # 500 tensors take 60 KB; the format itself allows 100 MB
MAX_TENSORS = 100_000
MAX_ELEMENTS = 1 << 62
# Bits per element of every dtype that torch can hold.
DTYPE_BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "I64": 64, "I32": 32, "I16": 16,
    "I8": 8, "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8, "C64": 64,
}


class TensorInfo(NamedTuple):
    """One entry of the header; ``start`` and ``end`` are bytes from the begin of the data part."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(path: str | os.PathLike) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """({tensor name: info}, metadata) of a safetensors file whose header and size are consistent, else CheckpointError."""
    path = Path(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 10 or length > size - 8 or not 2 <= length <= MAX_HEADER_BYTES:
                raise damaged(path.name, f"{size} bytes with a header of {length} bytes",
                              f"at least 10 bytes, and a header within the file and {MAX_HEADER_BYTES} bytes")
            text = file.read(length)
    except OSError as error:
        raise unreadable(path, error) from error
    return parse_header(text, size - 8 - length, path.name)


def parse_header(text: bytes, data_bytes: int, name: str) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """As :func:`read_header`, for the header's bytes and the number of bytes that follow it. ``name`` is for messages."""
    table = strict_json(text, name)
    metadata = table.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise damaged(name, "metadata that is no table of texts")
    if len(table) > MAX_TENSORS:
        raise damaged(name, f"{len(table)} tensors", f"at most {MAX_TENSORS}")
    infos = {key: _entry(key, value, name) for key, value in table.items()}
    _require_gapless(infos, data_bytes, name)
    return infos, metadata


def strict_json(text: bytes, name: str) -> dict:
    """The JSON object in ``text``; doubled keys, NaN, other types at the top and text around it are refused."""
    def unique(pairs):
        table = dict(pairs)
        if len(table) != len(pairs):
            keys = [key for key, _ in pairs]
            doubled = next(key for key in keys if keys.count(key) > 1)
            raise ValueError(f"the name {doubled!r} occurs twice")
        return table

    def no_constant(value):
        raise ValueError(f"{value} is no JSON number")

    if text[:1] != b"{":
        raise damaged(name, f"a header that begins with {text[:12]!r}", "a JSON object")
    try:
        table = json.loads(text.decode("utf-8"), object_pairs_hook=unique, parse_constant=no_constant)
    except (ValueError, RecursionError) as error:  # JSON and UTF-8 errors are ValueErrors
        raise damaged(name, f"a header that is not valid JSON ({str(error)[:120]})") from error
    return table


def _entry(key: str, value: object, name: str) -> TensorInfo:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise damaged(name, f"tensor {key[:80]!r} without exactly dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise damaged(name, f"tensor {key[:80]!r} of dtype {str(dtype)[:20]!r}", ", ".join(DTYPE_BITS))
    if not _whole_numbers(shape) or len(shape) > 8:
        raise damaged(name, f"tensor {key[:80]!r} of shape {str(shape)[:60]}", "up to 8 whole numbers")
    if not _whole_numbers(offsets) or len(offsets) != 2:
        raise damaged(name, f"tensor {key[:80]!r} with data offsets {str(offsets)[:60]}", "two whole numbers")
    elements = math.prod(shape)
    if not 0 < elements <= MAX_ELEMENTS:
        raise damaged(name, f"tensor {key[:80]!r} of shape {str(shape)[:60]}", "at least one element, and a size that fits")
    wanted, (start, end) = elements * DTYPE_BITS[dtype] // 8, offsets
    if end - start != wanted:
        raise damaged(name, f"tensor {key[:80]!r} with {end - start} bytes", f"{wanted} bytes for {dtype} {shape}")
    return TensorInfo(dtype, tuple(shape), start, end)


def _whole_numbers(value: object) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n <= MAX_ELEMENTS for n in value)


def _require_gapless(infos: dict[str, TensorInfo], data_bytes: int, name: str) -> None:
    """Refuse overlaps, holes and bytes that no tensor owns, in this order: the first is the most telling."""
    order = sorted(infos.items(), key=lambda item: item[1].start)
    for (before, first), (key, info) in zip(order, order[1:]):
        if info.start < first.end:
            raise damaged(name, f"tensor {key[:80]!r} overlaps {before[:80]!r} (starts at byte {info.start})",
                          f"start at byte {first.end}")
    position = 0
    for key, info in order:
        if info.start != position:
            raise damaged(name, f"tensor {key[:80]!r} leaves a hole before it (starts at byte {info.start})",
                          f"start at byte {position}")
        position = info.end
        if position > data_bytes:
            raise damaged(name, f"tensor {key[:80]!r} ends at byte {position}", f"{data_bytes} bytes of data in the file")
    if position != data_bytes:
        raise damaged(name, f"{data_bytes - position} bytes after the last tensor")


def damaged(name: str, found: str, expected: str | None = None, action: str = "") -> CheckpointError:
    """The error for a file that is not what its format promises."""
    return CheckpointError(f"The model file {name} is damaged", found=found, expected=expected,
                           action=action or "Download or copy the file again")


def unreadable(path: Path, error: OSError) -> CheckpointError:
    """The error for a file that the system does not hand out."""
    return CheckpointError(f"The model file {path.name} cannot be read", found=error.strerror or type(error).__name__,
                           action="Check that the file exists and that you may read it")
