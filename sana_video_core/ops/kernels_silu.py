"""SiLU for Triton kernels, in the forms that a card's instructions allow, and other single instructions of NVIDIA's cards.

Import only where Triton is there. Triton's own division takes eight instructions, of which SiLU needs one: its denominator lies
between 1 and infinity, whose reciprocals the special function unit knows to one unit in the last place.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


def silu_form(wanted: str) -> str:
    """``wanted`` ('single' or 'half') where its instructions exist (NVIDIA), else 'plain'."""
    return "plain" if triton.knobs.runtime.interpret or torch.version.cuda is None else wanted


@triton.jit
def _exp2(x):
    return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def reciprocal(x, NATIVE: tl.constexpr):
    """1 / x of float32; NATIVE: by one instruction, to one unit in the last place, and 0 where x is beyond 2^126."""
    if NATIVE:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    return 1.0 / x


@triton.jit
def fetch(at):
    """Have the lines at these places brought into the second-level cache; NVIDIA's cards only."""
    tl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [at], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def word(first, second, KIND: tl.constexpr, NATIVE: tl.constexpr):
    """Two float32 values as the halves of one word, float16 or bfloat16; NATIVE: by the one instruction that NVIDIA's cards
    have for it."""
    if NATIVE:
        code: tl.constexpr = "cvt.rn.f16x2.f32 $0, $2, $1;" if KIND == tl.float16 else "cvt.rn.bf16x2.f32 $0, $2, $1;"
        return tl.inline_asm_elementwise(code, "=r,f,f", [first, second], dtype=tl.int32, is_pure=True, pack=1)
    low = first.to(KIND).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return low | (second.to(KIND).to(tl.int16, bitcast=True).to(tl.int32) << 16)


@triton.jit
def silu(x, FORM: tl.constexpr):
    """SiLU of float32; 'plain': an exponential and a division, else the instructions themselves."""
    if FORM == "plain":
        return x / (1.0 + tl.exp(-x))
    return x * reciprocal(1.0 + _exp2(x * -1.4426950408889634), True)


@triton.jit
def silu_of_half(h, FORM: tl.constexpr):
    """SiLU of ``2 h``, float32. 'half': h + h tanh(h), one use of the special function unit where the others take two. NVIDIA
    promises an error of 2^-11 of |h|, an eighth of what bfloat16 rounds 2 h by; an H200 keeps to 2^-17 for every bfloat16."""
    if FORM == "half":
        return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [h], dtype=tl.float32, is_pure=True, pack=1) * h + h
    return 2.0 * h / (1.0 + tl.exp(-2.0 * h))
