"""Our own model files: safetensors with the spec and a checksum in the metadata, complete under their name or not there."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import SanaVideoError
from ..specs import ModelSpec
from .convert import convert
from .detect import spec_to_text
from .integrity import CHECK_KEY, check_length, check_value, tensor_bytes, tensor_digest
from .source import SPEC_KEY

_DTYPE_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}


def save_transformer(
    model_or_state: nn.Module | Mapping[str, Tensor], spec: ModelSpec | None, path: str | os.PathLike, to: str = "original",
    dtype: torch.dtype | None = None,
) -> Path:
    """Write a complete set of weights to ``path`` (.safetensors) under the names of ``to``; returns the path.

    spec:  None takes the network's. dtype: None keeps each tensor's. One tensor at a time is cast and written. The file is
    written beside its place, flushed to the disk and renamed, so a crash or a full disk leaves an older file as it was.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise SanaVideoError("Models are saved as safetensors", found=path.name, action=f"Use {path.stem}.safetensors")
    state = model_or_state.state_dict() if isinstance(model_or_state, nn.Module) else model_or_state
    spec = spec if spec is not None else getattr(model_or_state, "spec", None)
    if spec is None:
        raise SanaVideoError("A spec is needed to save a plain state dict", expected="a ModelSpec")
    weights = convert(state, spec, to)
    dtypes = {name: dtype or tensor.dtype for name, tensor in weights.items()}
    odd = next((d for d in dtypes.values() if d not in _DTYPE_NAMES), None)
    if odd is not None:
        raise SanaVideoError("Weights cannot be saved in this dtype", found=odd, expected=", ".join(_DTYPE_NAMES.values()))
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        with temporary.open("xb") as file:
            _write(file, weights, dtypes, spec_to_text(spec))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _flush_folder(path.parent)
    except OSError as error:
        raise SanaVideoError(f"The model file {path.name} could not be written", found=error.strerror or type(error).__name__,
                             action="Check the disk's space and the folder's permissions; an older file is unchanged") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    return path


def _write(file, weights: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype], spec_text: str) -> None:
    """Header with room for the checksum, the tensors (wide dtypes first, so that all stay aligned), then the checksum."""
    order = sorted(weights, key=lambda name: (-dtypes[name].itemsize, name))
    header, position = {}, 0
    for name in order:
        end = position + weights[name].numel() * dtypes[name].itemsize
        header[name] = {"dtype": _DTYPE_NAMES[dtypes[name]], "shape": list(weights[name].shape), "data_offsets": [position, end]}
        position = end
    room = "0" * check_length(len(order))
    metadata = {"format": "pt", SPEC_KEY: spec_text, CHECK_KEY: room}
    text = json.dumps({"__metadata__": metadata} | header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    digests = {}
    for name in order:
        tensor = weights[name].detach().to("cpu", dtypes[name]).contiguous()
        digests[name] = tensor_digest(name, tensor)
        file.write(tensor_bytes(tensor))
    file.seek(8 + text.index(f'"{CHECK_KEY}":"'.encode()) + len(CHECK_KEY) + 4)
    file.write(check_value(digests, spec_text).encode())


def _flush_folder(folder: Path) -> None:
    """Make the rename itself last through a power cut (not possible on Windows, and not needed there)."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
