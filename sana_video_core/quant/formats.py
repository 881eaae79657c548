"""What a quantised layer consists of in a file: tensors, dtypes and shapes of every format (comfyui spec 5.2).

``FORMATS`` is plain data, so a check can name what is missing, and a new format is one row. Block scales lie in tiles of
128 x 4 (cuBLAS' order), hence the rounded shapes. Not covered: the numbers inside.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import CheckpointError
from .policy import Mark

E4M3_MAX, E2M1_MAX = 448.0, 6.0
MAX_MARK_BYTES = 4096
Shapes = Callable[[int, int], tuple[tuple[int, ...], ...]]  # (outputs, inputs) -> allowed shapes


def up(number: int, step: int) -> int:
    """``number`` rounded up to a multiple of ``step``."""
    return -(-number // step) * step


def _scalar(rows: int, columns: int):
    return (), (1,)


def _rows(rows: int, columns: int):
    return (rows, 1), (), (1,)  # one scale a row, or one in all; a plain [rows] would be applied to the columns


def _inputs(rows: int, columns: int):
    return ((columns,),)


def _matrix(rows: int, columns: int):
    return ((rows, columns),)


def _blocks(block: int, step: int) -> Shapes:
    """Scales of blocks of ``block`` inputs, for a weight padded to multiples of ``step``."""
    return lambda rows, columns: ((up(up(rows, step), 128), up(up(columns, step) // block, 4)),)


class Part(NamedTuple):
    """One tensor of a quantised layer."""

    suffix: str
    dtypes: tuple[torch.dtype, ...]
    shapes: Shapes
    needed: bool = True


FLOAT = (torch.float32,)
_FP8_SCALES = (Part(".weight_scale", FLOAT, _scalar), Part(".input_scale", FLOAT, _scalar, False))

# {ComfyUI's name: the tensors beside the bias; the weight first}
FORMATS: dict[str, tuple[Part, ...]] = {
    "float8_e4m3fn": (Part(".weight", (torch.float8_e4m3fn,), _matrix), *_FP8_SCALES),
    "float8_e5m2": (Part(".weight", (torch.float8_e5m2,), _matrix), *_FP8_SCALES),
    "int8_tensorwise": (Part(".weight", (torch.int8,), _matrix), Part(".weight_scale", FLOAT, _rows)),
    "mxfp8": (
        Part(".weight", (torch.float8_e4m3fn,), lambda rows, columns: ((up(rows, 32), up(columns, 32)),)),
        Part(".weight_scale", (torch.float8_e8m0fnu, torch.uint8), _blocks(32, 32)),
        Part(".input_scale", FLOAT, _scalar, False),
    ),
    "nvfp4": (
        Part(".weight", (torch.uint8,), lambda rows, columns: ((up(rows, 16), up(columns, 16) // 2),)),
        Part(".weight_scale", (torch.float8_e4m3fn, torch.uint8), _blocks(16, 16)),
        Part(".weight_scale_2", FLOAT, _scalar),
        Part(".input_scale", FLOAT, _scalar, False),
        Part(".pre_quant_scale", (torch.float32, torch.bfloat16, torch.float16), _inputs, False),
    ),
}


def tensor_scale(weight: Tensor, name: str) -> Tensor:
    """The one float32 scale of a whole weight (formats float8_e4m3fn and nvfp4): its largest value becomes the format's.

    1 for a weight of zeros, where the division would give NaN.
    """
    largest = {"float8_e4m3fn": E4M3_MAX, "nvfp4": E4M3_MAX * E2M1_MAX}[name]
    amax = weight.abs().amax().float()
    return torch.where(amax > 0, amax / largest, torch.ones_like(amax))


def mark_tensor(mark: Mark) -> Tensor:
    """The bytes of a layer's ``.comfy_quant`` tensor."""
    return torch.tensor(list(json.dumps({"format": mark.format} | mark.options).encode()), dtype=torch.uint8)


def mark_from(value: object, layer: str, name: str) -> Mark:
    """The Mark in one layer's JSON table; refused unless ComfyUI would read it the same way."""
    table = dict(value) if isinstance(value, dict) else {}
    kind = table.pop("format", None)
    if not isinstance(kind, str) or kind not in FORMATS:
        raise CheckpointError(f"The file {name} is quantised in a format that this version does not know",
                              found=f"{layer[:80]}: {str(kind)[:40]}", expected=", ".join(FORMATS),
                              action="Choose a file in one of these formats, or the unquantised file")
    inner = table.get("params") if isinstance(table.get("params"), dict) else {}
    group = table.get("convrot_groupsize", inner.get("convrot_groupsize", 256))
    flags = [table.get("full_precision_matrix_mult", False), table.get("convrot", inner.get("convrot", False))]
    if not all(type(flag) is bool for flag in flags) or type(group) is not int or group < 1:
        raise CheckpointError(f"The file {name} describes a quantised layer in an unknown way",
                              found=f"{layer[:80]}: {json.dumps(value)[:120]}", action="Download the file again")
    return Mark(kind, table)


def rotation(mark: Mark) -> int:
    """Group size of the input rotation of an int8 layer, 0 without one."""
    inner = mark.options.get("params") if isinstance(mark.options.get("params"), dict) else {}
    if mark.format != "int8_tensorwise" or not mark.options.get("convrot", inner.get("convrot", False)):
        return 0
    return mark.options.get("convrot_groupsize", inner.get("convrot_groupsize", 256))
