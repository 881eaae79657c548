"""What a kernel in Gluon takes as a matrix that it reads or writes in pieces. Imports Triton at the first call."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

KINDS = {torch.bfloat16: "bfloat16", torch.float8_e4m3fn: "float8e4nv", torch.int32: "int32"}


@cache
def _layout(kind: torch.dtype, shape: tuple[int, ...]):
    """How a piece lies in shared memory; and the descriptors' class. Making a layout takes longer than all else here."""
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    return gl.NVMMASharedLayout.get_default_for(list(shape), getattr(gl, KINDS[kind])), TensorDescriptor


def misplaced(matrix: Tensor) -> str | None:
    """Reason to refuse a matrix that begins where a descriptor cannot."""
    return "reads matrices that begin at multiples of 16 bytes" if matrix.data_ptr() % 16 else None


def pieces(matrix: Tensor, *shape: int):
    """A descriptor of ``matrix`` (last channels contiguous, steps and start in multiples of 16 bytes) in pieces of ``shape``."""
    layout, kind = _layout(matrix.dtype, shape)
    return kind.from_tensor(matrix, list(shape), layout)
