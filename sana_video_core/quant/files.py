"""Quantised layers of a model file: their marks read, their tensors checked by name before anything is built.

ComfyUI's layers believe what they get: a scale in a wrong layout gives noise without an error, a missing one a warning in the
log. So everything is compared with ``FORMATS`` here, and the error names what does not fit.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..checkpoint.convert import listed, short
from ..checkpoint.header import damaged, strict_json
from ..checkpoint.keys import QUANT_SUFFIXES, Entry, key_table
from ..checkpoint.source import PREFIXES
from ..errors import CheckpointError
from ..specs import ModelSpec
from .formats import FORMATS, MAX_MARK_BYTES, Part, mark_from, rotation
from .policy import Mark

METADATA = "_quantization_metadata"
MARK = ".comfy_quant"
Fault = tuple[str, str]  # kind, what


def read_marks(state: Mapping[str, Tensor], metadata: Mapping[str, str], name: str = "") -> dict[str, Mark]:
    """{layer: Mark} out of the ``.comfy_quant`` tensors and the header's table of quantised layers, in either form or both."""
    marks = {}
    for key, tensor in state.items():
        if key.endswith(MARK):
            layer = key.removesuffix(MARK)
            if tensor.dtype != torch.uint8 or tensor.ndim != 1 or tensor.numel() > MAX_MARK_BYTES:
                found = f"the tensor {key[:80]} of {short(tensor.dtype)} {list(tensor.shape)}"
                raise damaged(name, found, "a short row of bytes")
            marks[layer] = mark_from(strict_json(bytes(tensor.tolist()), name), layer, name)
    for layer, value in _listed_layers(metadata, name).items():
        layer = next((layer[len(p):] for p in PREFIXES if layer.startswith(p) and f"{layer[len(p):]}.weight" in state), layer)
        mark = mark_from(value, layer, name)
        if marks.setdefault(layer, mark) != mark:
            raise damaged(name, f"two descriptions of the quantised layer {layer[:80]} that differ")
    return marks


def _listed_layers(metadata: Mapping[str, str], name: str) -> dict:
    if METADATA not in metadata:
        return {}
    layers = strict_json(metadata[METADATA].encode(), name).get("layers")
    if not isinstance(layers, dict):
        raise damaged(name, "a list of quantised layers that is no table")
    return layers


def check_layers(state: Mapping[str, Tensor], marks: Mapping[str, Mark], spec: ModelSpec, name: str = "") -> None:
    """One CheckpointError that names every tensor of a quantised layer that is missing, unexpected or of a wrong form.

    state: the whole file in official or native naming.
    """
    table = key_table(spec)
    faults: list[Fault] = []
    for layer, mark in marks.items():
        entry = table.get(f"{layer}.weight")
        if entry is None or len(entry.native) != 2:
            faults.append(("unexpected", f"{layer} (quantised)"))
            continue
        parts = FORMATS[mark.format]
        for part in parts:
            faults += _part_faults(state, layer, mark, part, entry)
        known = {part.suffix for part in parts} | {MARK}
        faults += [("unexpected", layer + s) for s in QUANT_SUFFIXES if s not in known and layer + s in state]
        if (group := rotation(mark)) and entry.native[1] % group:
            faults.append(("impossible", f"{layer}: rotation in groups of {group} for {entry.native[1]} inputs"))
    if faults:
        kinds = list(dict.fromkeys(kind for kind, _ in faults))
        raise CheckpointError(
            f"The quantised layers of {name or 'the checkpoint'} do not fit {spec.name}",
            found="; ".join(listed([what for k, what in faults if k == kind], kind) for kind in kinds),
            expected="the tensors that ComfyUI writes for these formats", action="Download the file again, or choose another")


def _part_faults(state: Mapping[str, Tensor], layer: str, mark: Mark, part: Part, entry: Entry) -> list[Fault]:
    key = layer + part.suffix
    tensor = state.get(key)
    if tensor is None:
        return [("missing", key)] if part.needed else []
    allowed = part.shapes(*entry.native)
    if part.suffix == ".weight" and allowed == (entry.native,) and not rotation(mark):
        allowed += (entry.original,)  # one number a weight: a convolution can still be laid out as a matrix
    faults = []
    if tuple(tensor.shape) not in allowed:
        faults.append(("of another shape", f"{key} {list(tensor.shape)} instead of {list(allowed[0])}"))
    if tensor.dtype not in part.dtypes:
        faults.append(("of a wrong dtype", f"{key} {short(tensor.dtype)} instead of {short(part.dtypes[0])}"))
    elif tensor.dtype == torch.float32 and not bool((torch.isfinite(tensor) & (tensor >= 0)).all()):
        faults.append(("not a scale", f"{key}: a value below 0 or not finite"))
    return faults
