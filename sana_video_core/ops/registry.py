"""Operators and their backends: one place that chooses, can be forced, and can say why a backend does not run.

Every operator has a plain-torch reference (``reference.py``: the truth) and, where it pays, faster backends that declare
as data what they need. A caller never mentions a backend. Not covered: the kernels themselves.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache, lru_cache

import torch

from ..errors import SanaVideoError

log = logging.getLogger(__name__)


@lru_cache(maxsize=1)
def triton_missing() -> str | None:
    """Reason why Triton cannot be used here, or None."""
    return None if importlib.util.find_spec("triton") else "the package triton is not installed"


@cache
def triton_fault(device: torch.device) -> str | None:
    """Reason why Triton's kernels do not work on this device although it is installed, or None. Tried once.

    A missing C compiler or a driver that does not fit shows only when a kernel is built.
    """
    try:
        importlib.import_module(".fused", __package__).self_test(device)
    except Exception as error:  # whatever a compiler, a driver or a loader can raise
        reason = f"Triton does not work here ({type(error).__name__}: {str(error).strip()[:200]})"
        log.warning("%s; the slower plain operators run instead", reason)
        return reason
    return None


def fault_of(name: str, error: Callable[[], float], instead: str) -> str | None:
    """Reason why a kernel in Gluon, an experimental part of Triton that may change with any version of it, does not work here, or
    None. ``error`` runs it on something small and says how far it is from the truth."""
    try:
        found = error()
        reason = None if found < 0.01 else f"its kernel gives wrong values here (error {found:.3f})"
    except Exception as fault:  # whatever a compiler or another version's names can raise
        reason = f"its kernel does not work here ({type(fault).__name__}: {str(fault).strip()[:200]})"
    if reason:
        log.warning("%s: %s; %s", name, reason, instead)
    return reason


@cache
def capability(device: torch.device) -> tuple[int, int]:
    """A card's compute capability. Torch asks the driver each time, and operators are called thousands of times a second."""
    return torch.cuda.get_device_capability(device)


def _card_refusal(found: tuple[int, int], least: tuple[int, int], generation: int | None) -> str | None:
    """Reason why a card of compute capability ``found`` cannot do what a backend needs, or None."""
    if generation not in (None, found[0]):
        return f"is made for cards of compute capability {generation}"
    return f"needs compute capability {'.'.join(map(str, least))}" if found < least else None


def _machine_refusal(device: torch.device, triton: bool, least: tuple[int, int], generation: int | None) -> str | None:
    """Reason why this machine cannot do what a backend needs on ``device``, or None."""
    if triton and (missing := triton_missing()):
        return missing
    if device.type != "cuda":
        return None
    if reason := _card_refusal(capability(device), least, generation):
        return reason
    return triton_fault(device) if triton else None


# torch.compiler.assume_constant_result sets the same mark, but loads the whole compiler to do so.
_machine_refusal._dynamo_marked_constant = True


@dataclass(frozen=True)
class Constraint:
    """What a backend needs, as data. ``generation``: the one major number of the capability that it is made for. ``check`` looks
    at the call's arguments and returns a reason to refuse, or None."""

    devices: tuple[str, ...] = ("cpu", "cuda")
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    capability: tuple[int, int] = (0, 0)
    generation: int | None = None
    triton: bool = False
    inference_only: bool = False
    check: Callable[..., str | None] | None = None

    def refusal(self, x: torch.Tensor, args: tuple, kwargs: dict) -> str | None:
        """The first reason why a call with first tensor ``x`` cannot run here, or None."""
        if x.device.type not in self.devices:
            return f"needs {' or '.join(self.devices)}, the input is on {x.device.type}"
        if x.dtype not in self.dtypes:
            return f"does not support {x.dtype}"
        if reason := _machine_refusal(x.device, self.triton, self.capability, self.generation):
            return reason
        if self.inference_only and torch.is_grad_enabled() and any(
            isinstance(a, torch.Tensor) and a.requires_grad for a in args
        ):
            return "has no backward pass"
        return self.check(*args, **kwargs) if self.check else None


@dataclass
class Operator:
    """A named function with a reference and any number of backends, tried in the order they were added.

    ``compiled``: what stands for a backend inside a graph of torch.compile, which fuses the other ones' plain functions itself.
    ``faults``: (backend, device) whose kernels this card could not build, and why; they are not tried again.
    """

    name: str
    reference: Callable
    backends: dict[str, tuple[Callable, Constraint]] = field(default_factory=dict)
    compiled: dict[str, Callable] = field(default_factory=dict)
    forced: str | None = None
    faults: dict[tuple[str, str], str] = field(default_factory=dict)

    def add(self, backend: str, function: Callable, constraint: Constraint) -> None:
        self.backends[backend] = (function, constraint)

    def choose(self, *args, **kwargs) -> tuple[str, Callable, dict[str, str]]:
        """(backend name, function, reasons why the others were passed over) for a call with these arguments."""
        reasons: dict[str, str] = {}
        for name, (function, constraint) in self.backends.items():
            if self.forced not in (None, name):
                continue
            reason = self.faults and self.faults.get((name, str(args[0].device))) or constraint.refusal(args[0], args, kwargs)
            if reason is None:
                return name, function, reasons
            reasons[name] = reason
        if self.forced not in (None, "reference"):
            raise SanaVideoError(
                f"The operator {self.name} was forced to '{self.forced}', which cannot run here",
                found=reasons.get(self.forced, "no such backend"), expected=", ".join([*self.backends, "reference"]),
            )
        return "reference", self.reference, reasons

    def __call__(self, *args, **kwargs):
        if not self.backends or self.forced == "reference":
            return self.reference(*args, **kwargs)
        name, function, _ = self.choose(*args, **kwargs)
        if torch.compiler.is_compiling():
            return self.compiled.get(name, self.reference)(*args, **kwargs)
        if self.forced is not None or name == "reference":
            return function(*args, **kwargs)
        try:
            return function(*args, **kwargs)
        except Exception as error:
            if not type(error).__module__.startswith("triton"):
                raise
            self._give_up(name, str(args[0].device), error)
        return self(*args, **kwargs)  # a kernel that cannot be built has not run, so nothing has been changed

    def _give_up(self, name: str, device: str, error: Exception) -> None:
        """A kernel that does not fit this card (shared memory, registers) or that its compiler refuses: do without it."""
        reason = f"its kernel cannot be built here ({type(error).__name__}: {str(error).strip()[:200]})"
        self.faults[name, device] = reason
        log.warning("%s, %s: %s; the slower plain operator runs instead", self.name, name, reason)


OPERATORS: dict[str, Operator] = {}


def operator(reference: Callable) -> Operator:
    """Register a reference implementation; the returned operator is called in its place."""
    op = Operator(reference.__name__, reference)
    OPERATORS[op.name] = op
    return op


@contextlib.contextmanager
def force(backend: str | None, *names: str) -> Iterator[None]:
    """Within the block, the named operators (all when none is named) run this backend or raise."""
    chosen = [OPERATORS[n] for n in names] if names else list(OPERATORS.values())
    before = [op.forced for op in chosen]
    for op in chosen:
        op.forced = backend
    try:
        yield
    finally:
        for op, old in zip(chosen, before):
            op.forced = old


def report() -> list[tuple[str, str, str]]:
    """(operator, backend, state) rows for ``run.py ops``; state is 'available' or the reason why not on this machine."""
    rows = []
    for op in OPERATORS.values():
        for name, (_, constraint) in op.backends.items():
            fault = next((reason for (backend, _), reason in op.faults.items() if backend == name), None)
            rows.append((op.name, name, f"unavailable: {fault}" if fault else _machine_state(constraint)))
        rows.append((op.name, "reference", "available"))
    return rows


def _machine_state(constraint: Constraint) -> str:
    if constraint.triton and (missing := triton_missing()):
        return f"unavailable: {missing}"
    if "cpu" in constraint.devices:
        return "available"
    if not torch.cuda.is_available():
        return "unavailable: no CUDA device"
    reason = _card_refusal(torch.cuda.get_device_capability(), constraint.capability, constraint.generation)
    return f"unavailable: {reason}" if reason else "available"
