"""Cases for kernels in Triton's interpreter on the CPU: awkward sizes and layouts, poisoned memory, closeness."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch

CASES = 6


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Fresh memory holds NaN, so that a value nobody wrote is seen."""
    real = {"empty": torch.empty, "empty_like": torch.empty_like}
    for name, function in real.items():
        monkeypatch.setattr(torch, name, lambda *a, f=function, **k: _poisoned(f(*a, **k)))


def _poisoned(fresh: torch.Tensor) -> torch.Tensor:
    return fresh.fill_(float("nan") if fresh.is_floating_point() else -1)


def flat(value) -> list[torch.Tensor]:
    """All tensors of an operator's answer."""
    return [value] if isinstance(value, torch.Tensor) else [t for part in value for t in flat(part)]


def as_on_a_card(monkeypatch, operators, backend: str, functions: dict, **changes) -> None:
    """Let the CPU pass for a card with ``backend`` of some operators: {name: a function in its backend's place, or None}.
    ``changes`` to what they declare."""
    for name, function in functions.items():
        own, constraint = operators[name].backends[backend]
        here = dataclasses.replace(constraint, **{"devices": ("cpu",), "dtypes": (torch.float32, torch.bfloat16), "triton": False}
                                   | changes)
        monkeypatch.setitem(operators[name].backends, backend, (function or own, here))


def tamper(layer: torch.nn.Module, what: str) -> None:
    """What others do to a layer: 'hook', 'pre-hook', 'forward', 'dtype', 'gradient'; anything else leaves it alone."""
    if what == "hook":
        layer.register_forward_hook(lambda *a: None)
    if what == "pre-hook":
        layer.register_forward_pre_hook(lambda *a: None)
    if what == "forward":
        layer.forward = lambda x: x
    if what == "dtype":
        layer.double()
    if what == "gradient":
        layer.requires_grad_(True)


def draw(seed: int):
    """(noise, batch, frames, height, width, heads, head dim) of a case; every third in bfloat16."""
    pick, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    dtype = torch.bfloat16 if seed % 3 == 2 else torch.float32

    def noise(*shape, scale=1.0):
        return (torch.randn(shape, generator=generator) * scale).to(dtype)

    return (noise, pick.randint(1, 4), pick.randint(1, 3), pick.randint(1, 3), pick.choice((1, 3, 4, 5, 9)),
            pick.randint(1, 3), pick.choice((2, 6, 16, 22, 56)))


def close(found, expected, dtype=None) -> None:
    """Every value written, and right to the last bits of ``dtype`` (its own); the interpreter cuts a bfloat16 instead of
    rounding it."""
    assert found.shape == expected.shape and found.is_contiguous() and bool(torch.isfinite(found).all())
    error = float((found.double() - expected.double()).norm() / expected.double().norm())
    assert error < (8e-3 if (dtype or found.dtype) == torch.bfloat16 else 2e-6)


def wide(*args):
    return [a.float() if isinstance(a, torch.Tensor) else a for a in args]


def scattered(x):
    """The same values, the last two axes swapped in memory."""
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)
