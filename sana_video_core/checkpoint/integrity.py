"""A checksum over the weights of our own files. safetensors itself has none: a flipped bit in a weight goes unseen.

The value covers every tensor's name, dtype, shape and bytes, and the spec in the metadata; it does not depend on the order of
the tensors in the file. It holds 16 hex digits a tensor (in the order of their names), so that a damaged tensor can be named,
and then the full SHA-256 of everything. SHA-256 runs at 1-2 GB/s a core, so files up to :data:`VERIFY_LIMIT` are verified on
every load (well under a second); larger ones only when asked to. Files of others carry no checksum: they are "unverified".
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from ..errors import CheckpointError

CHECK_KEY = "sana_video_check"
VERIFY_LIMIT = 1 << 30  # bytes
SHORT = 16  # hex digits a tensor
WORKERS = 4


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a CPU tensor in row-major order, as a view where it is contiguous."""
    return memoryview(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())


def tensor_digest(name: str, tensor: Tensor) -> str:
    """SHA-256 in hex over the name, dtype, shape and bytes."""
    digest = hashlib.sha256(f"{name}|{tensor.dtype}|{list(tensor.shape)}|".encode())
    digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def digests(state: Mapping[str, Tensor]) -> dict[str, str]:
    """{name: digest}; a few tensors at a time, since hashing leaves Python's lock."""
    with ThreadPoolExecutor(WORKERS) as pool:
        return dict(zip(state, pool.map(tensor_digest, state, state.values()), strict=True))


def check_value(table: Mapping[str, str], spec_text: str) -> str:
    """The metadata value for tensors with these digests and this spec text."""
    lines = [f"{name}|{table[name]}" for name in sorted(table)]
    whole = hashlib.sha256("\n".join([spec_text, *lines]).encode()).hexdigest()
    return "".join(table[name][:SHORT] for name in sorted(table)) + whole


def check_length(tensors: int) -> int:
    """Characters of a check value for that many tensors."""
    return SHORT * tensors + 64


def verify(state: Mapping[str, Tensor], value: str, spec_text: str, name: str) -> None:
    """CheckpointError that names the damaged tensors unless ``value`` is the check value of ``state``."""
    table = digests(state)
    if check_value(table, spec_text) == value:
        return
    found = "the file's description does not match its checksum"
    if len(value) == check_length(len(table)):
        bad = [key for i, key in enumerate(sorted(table)) if value[SHORT * i:SHORT * (i + 1)] != table[key][:SHORT]]
        if bad:
            found = f"{len(bad)} tensors do not match their checksum, such as {', '.join(bad[:3])}"
    raise CheckpointError(f"The model file {name} is damaged", found=found,
                          action="Copy the file again; if a tool changed its weights on purpose, let it drop the metadata "
                                 f"entry {CHECK_KEY}")
