"""Damaged safetensors files: the ten kinds of the reliability measurements, reproducible from a number.

``mutate(blob, kind, rng)`` returns the damaged bytes and the tensors that were hit. The kinds that change a table entry keep
the rest of the file well formed, so that only the check in question can notice.
"""

from __future__ import annotations

import json
import random
import struct
from typing import NamedTuple

KINDS = ("truncated", "header length", "header byte", "data bit", "empty offsets", "overlap", "shape", "dtype", "trailing",
         "shifted")
# Dtypes of the same width: the file stays consistent, only its meaning changes.
TWINS = {"F32": ("I32", "U32"), "BF16": ("F16", "I16", "U16"), "F16": ("BF16", "I16", "U16")}


class Mutation(NamedTuple):
    """``data`` is the damaged file, ``victims`` the tensors whose entries were changed (empty when none in particular)."""

    kind: str
    data: bytes
    victims: tuple[str, ...] = ()


def split(blob: bytes) -> tuple[dict, bytes]:
    """(header table, data part)."""
    length = struct.unpack("<Q", blob[:8])[0]
    return json.loads(blob[8:8 + length]), blob[8 + length:]


def join(table: dict, data: bytes) -> bytes:
    """The file of this header and data."""
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def mutate(blob: bytes, kind: str, rng: random.Random) -> Mutation:
    """One random damage of that kind; never a no-op."""
    return _KINDS[kind](blob, rng)


def _truncated(blob, rng):
    return Mutation("truncated", blob[:rng.randrange(len(blob))])


def _flip(blob, offset, rng):
    out = bytearray(blob)
    out[offset] ^= 1 << rng.randrange(8)
    return bytes(out)


def _header_length(blob, rng):
    return Mutation("header length", _flip(blob, rng.randrange(8), rng))


def _header_byte(blob, rng):
    length = struct.unpack("<Q", blob[:8])[0]
    offset = 8 + rng.randrange(length)
    if rng.random() < 0.5:
        return Mutation("header byte", _flip(blob, offset, rng))
    out = bytearray(blob)  # a digit or letter for another: the file often stays valid JSON
    pool = b"0123456789" if chr(out[offset]).isdigit() else b"abcdefghijklmnopqrstuvwxyz_.FIBU"
    out[offset] = rng.choice([c for c in pool if c != out[offset]])
    return Mutation("header byte", bytes(out))


def _data_bit(blob, rng):
    table, data = split(blob)
    offset = rng.randrange(len(data))
    victim = next(k for k, v in table.items() if k != "__metadata__" and v["data_offsets"][0] <= offset < v["data_offsets"][1])
    return Mutation("data bit", _flip(blob, len(blob) - len(data) + offset, rng), (victim,))


def _pick(table, rng, count=1):
    return rng.sample(sorted(k for k in table if k != "__metadata__"), count)


def _empty_offsets(blob, rng):
    """A tensor without bytes; in half of the cases its bytes are cut out, so that the others stay gapless."""
    table, data = split(blob)
    victim = _pick(table, rng)[0]
    start, end = table[victim]["data_offsets"]
    table[victim]["data_offsets"] = [start, start]
    if rng.random() < 0.5:
        data = data[:start] + data[end:]
        for key, entry in table.items():
            if key != "__metadata__" and entry["data_offsets"][0] >= end:
                entry["data_offsets"] = [n - (end - start) for n in entry["data_offsets"]]
    return Mutation("empty offsets", join(table, data), (victim,))


def _overlap(blob, rng):
    """Two tensors over the same bytes: of the same size, or one inside the other."""
    table, data = split(blob)
    size = {k: v["data_offsets"][1] - v["data_offsets"][0] for k, v in table.items() if k != "__metadata__"}
    while True:
        a, b = _pick(table, rng, 2)
        if size[a] <= size[b]:
            start = table[b]["data_offsets"][0] + rng.randrange(size[b] - size[a] + 1)
            table[a]["data_offsets"] = [start, start + size[a]]
            return Mutation("overlap", join(table, data), (a, b))


def _shape(blob, rng):
    """Another shape, of another size or of the same (turned round, flattened, a one added)."""
    table, data = split(blob)
    victim = _pick(table, rng)[0]
    shape = table[victim]["shape"]
    options = [[*shape, 1], [1, *shape], [n + 1 for n in shape], shape[:-1] + [shape[-1] * 2], shape[1:] or [1]]
    if len(shape) > 1:
        options += [[shape[0] * shape[1], *shape[2:]]] + ([shape[::-1]] if shape[::-1] != shape else [])
    table[victim]["shape"] = rng.choice([o for o in options if o != shape])
    return Mutation("shape", join(table, data), (victim,))


def _dtype(blob, rng):
    table, data = split(blob)
    victim = _pick(table, rng)[0]
    table[victim]["dtype"] = rng.choice(TWINS[table[victim]["dtype"]])
    return Mutation("dtype", join(table, data), (victim,))


def _trailing(blob, rng):
    return Mutation("trailing", blob + rng.randbytes(rng.randrange(1, 65)))


def _shifted(blob, rng):
    """All offsets, or one tensor's, a few bytes further or nearer."""
    table, data = split(blob)
    step = rng.choice([n for n in range(-16, 17) if n])
    victims = _pick(table, rng) if rng.random() < 0.5 else [k for k in table if k != "__metadata__"]
    for key in victims:
        table[key]["data_offsets"] = [n + step for n in table[key]["data_offsets"]]
    return Mutation("shifted", join(table, data), tuple(victims))


_KINDS = {"truncated": _truncated, "header length": _header_length, "header byte": _header_byte, "data bit": _data_bit,
          "empty offsets": _empty_offsets, "overlap": _overlap, "shape": _shape, "dtype": _dtype, "trailing": _trailing,
          "shifted": _shifted}
