"""SiLU for Triton kernels, in the forms that a card's instructions allow.

Import only where Triton is there. Triton's own division takes eight instructions, of which SiLU needs one: its denominator lies
between 1 and infinity, whose reciprocals the special function unit knows to one unit in the last place.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


def silu_form(wanted: str) -> str:
    """``wanted`` ('single' or 'pair') where its instructions exist (NVIDIA), else 'plain'."""
    return "plain" if triton.knobs.runtime.interpret or torch.version.cuda is None else wanted


@triton.jit
def _exp2(x):
    return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _reciprocal(x):
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def silu(x, FORM: tl.constexpr):
    """SiLU of float32; 'plain': an exponential and a division, else the instructions themselves."""
    if FORM == "plain":
        return x / (1.0 + tl.exp(-x))
    return x * _reciprocal(1.0 + _exp2(x * -1.4426950408889634))


@triton.jit
def silu_pair(a, b, FORM: tl.constexpr, CUT: tl.constexpr):
    """SiLU of two values; float32. The special function unit is the narrow place, so the forms differ in its use.

    'plain': two exponentials, two divisions. 'pair': the reciprocals of both come from one of their product (below -44, or
    2^-60, a sigmoid stops falling; CUT: no value is less already).
    """
    if FORM == "pair":
        power_a, power_b = a * -1.4426950408889634, b * -1.4426950408889634
        if not CUT:
            power_a, power_b = tl.minimum(power_a, 60.0), tl.minimum(power_b, 60.0)
        # a / (1 + p) and b / (1 + q) over one denominator, in as few instructions as there are
        p, q = _exp2(power_a), _exp2(power_b)
        below = 1.0 + q
        inverse = _reciprocal(p * below + below)
        return a * below * inverse, (b * p + b) * inverse
    return a / (1.0 + tl.exp(-a)), b / (1.0 + tl.exp(-b))
