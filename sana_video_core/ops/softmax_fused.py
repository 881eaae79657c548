"""The text attention on Hopper: a kernel of its own (``kernels_softmax.py``). Elsewhere ``fused.py`` and torch's run."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from . import reference
from .descriptors import misplaced, pieces
from .fused import _kernels, _row, programs_of, text_operands
from .fused_torch import one_dtype
from .reference import Rows
from .registry import Constraint, fault_of

WORDS_HELD = 320  # text tokens for which a program has room


def _form(words: int) -> dict[str, int]:
    """How a text is taken: CHUNKS pieces of CHUNK tokens, by GROUPS groups of warps with room for STAGES tiles of queries.

    A place must always serve the same group, for a barrier tells no more than two rounds apart: STAGES is a multiple of GROUPS.
    Three groups have registers for one piece of 64; with more they were slower, as were pieces of 128 for long texts.
    """
    if words <= 64:
        return {"CHUNK": 64, "CHUNKS": 1, "GROUPS": 3, "STAGES": 6}
    chunk = 128 if words <= 128 else 64
    return {"CHUNK": chunk, "CHUNKS": -(-words // chunk), "GROUPS": 2, "STAGES": 4}


def softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None, lengths: tuple[int, ...] | None = None,
    norm: tuple[Tensor, float] | None = None, *, given: Tensor | None = None,
) -> Tensor | Rows:
    """See ``reference.softmax_attention``, with ``lengths``; rounded as in ``fused.softmax_attention``. A row of the batch at a
    time."""
    q, k, v, out, factor, (weight, eps) = text_operands(q, k, v, norm, given)
    _, tokens, channels = q.shape
    dim, kernels, fp8 = channels // heads, _kernels("kernels_softmax"), given is not None
    rows, scale = kernels.ROWS.value, dim**-0.5 * 1.4426950408889634  # scores count in powers of two
    tiles, programs = programs_of(tokens, rows)
    goal = pieces(out.view(-1, tokens, heads, dim), 1, rows, 1, 128)
    with torch.cuda.device_of(q):
        for i, words in enumerate(lengths):
            if norm is not None:
                _kernels("kernels_text").query_factor_kernel[(tokens,)](
                    q[i], factor, tokens, eps, **_row(channels), TOKENS=1, num_warps=1)
            kernels.text_softmax_kernel[(heads, programs)](
                pieces(q[i], rows, 128), factor, weight, k[i], v[i], given if fp8 else factor, goal, i, tokens, words, tiles,
                k.stride(1), v.stride(1), scale, HAS_NORM=norm is not None, D=dim, FP8=fp8, **_form(words),
                num_warps=kernels.WARPS.value)
    return Rows(out, given) if fp8 else out


@cache
def gluon_fault(device: torch.device) -> str | None:
    """Reason why the kernel does not work there, or None: a small attention is made and compared, once."""
    made = torch.Generator(device).manual_seed(0)
    q, k, v = (torch.randn(1, n, 224, generator=made, device=device).bfloat16() for n in (150, 120, 120))

    def error() -> float:
        call = q, k, v, 2, None, (100,), (q[0, 0], 1e-6)
        right = reference.softmax_attention(q.float(), k.float(), v.float(), 2, None, (100,), (q[0, 0].float(), 1e-6))
        return float((softmax_attention(*call) - right).norm() / right.norm())

    return fault_of("softmax_attention", error, "other kernels run instead")


def refuses(q, k, v, heads, mask=None, lengths=None, norm=None, **_) -> str | None:
    """Reason to refuse a call, or None."""
    if torch.compiler.is_compiling():
        return "is not for compiled graphs"
    if lengths is None:
        return "needs to know how many text tokens are valid"
    if max(lengths) > WORDS_HELD or not min(lengths):
        return f"has room for 1 to {WORDS_HELD} text tokens, here are {min(lengths)} to {max(lengths)}"
    dim = q.shape[-1] // heads
    if dim <= 64 or dim % 16:
        return f"is made for heads of 80, 96, 112 or 128 channels, this one has {dim}"
    reason = one_dtype(q, k, v, *(() if norm is None else norm[:1])) or misplaced(q)
    return reason or (gluon_fault(q.device) if q.is_cuda else None)


def register(operators: dict) -> None:
    """Add this kernel to the operator of that name; before the others, so that it is asked first."""
    operators["softmax_attention"].add("gluon", softmax_attention, Constraint(
        devices=("cuda",), dtypes=(torch.bfloat16,), generation=9, triton=True, inference_only=True, check=refuses))
