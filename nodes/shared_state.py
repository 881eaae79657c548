"""STATE between nodes, protected: ComfyUI hands the same object to every consumer and to later prompts (comfyui spec 9.1).

A node of somebody else that wrote into a state's tensors would change what all others read, without any error. So the tensors of
a state on a wire can be read but not written: every operation in place, also through a view, is refused, and results that share
their memory are protected too. Our own nodes take the plain tensors out again. Not covered: code that goes around PyTorch.
"""

from __future__ import annotations

import torch

from ..sana_video_core.errors import StateError
from ..sana_video_core.state import RecurrentState, map_tensors, tensors


class ReadOnlyTensor(torch.Tensor):
    """A tensor that shares the memory of ``plain`` and refuses to change it. Anything computed from it is an ordinary tensor."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, plain: torch.Tensor):
        guard = torch.Tensor._make_subclass(cls, plain)
        guard.plain = plain
        return guard

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        kwargs, read = kwargs or {}, []
        for place, declared in enumerate(function._schema.arguments):
            value = args[place] if place < len(args) else kwargs.get(declared.name)
            held = guarded(value)
            if held and declared.alias_info is not None and declared.alias_info.is_write:
                raise StateError("A state must not be written to: other nodes and later runs read the same one",
                                 found=str(function), action="Write to a copy, such as tensor.clone()")
            read += held
        result = function(*(unguarded(a) for a in args), **{name: unguarded(v) for name, v in kwargs.items()})
        memory = {t.plain.untyped_storage().data_ptr() for t in read}

        def protect(value):
            if isinstance(value, (list, tuple)):
                return type(value)(protect(v) for v in value)
            shares = isinstance(value, torch.Tensor) and value.untyped_storage().data_ptr() in memory
            return cls(value) if shares else value

        return protect(result)

    # What PyTorch offers for plain tensors only; each gives a copy.
    def numpy(self, *args, **options):
        return self.plain.clone().numpy(*args, **options)

    def tolist(self):
        return self.plain.tolist()

    def __repr__(self, **options):
        return self.plain.__repr__(**options)

    def __deepcopy__(self, memo):
        return self.plain.clone()

    def __reduce_ex__(self, protocol):
        return self.plain.clone().__reduce_ex__(protocol)


def guarded(value) -> list[ReadOnlyTensor]:
    """All protected tensors in an argument of an operation."""
    if isinstance(value, (list, tuple)):
        return [t for v in value for t in guarded(v)]
    return [value] if isinstance(value, ReadOnlyTensor) else []


def unguarded(value):
    """An argument of an operation with plain tensors, on the same memory."""
    if isinstance(value, ReadOnlyTensor):
        return value.plain
    return [unguarded(v) for v in value] if isinstance(value, (list, tuple)) else value


def hand_out(state: RecurrentState) -> RecurrentState:
    """``state`` for a STATE output; one that is protected already stays the same object."""
    if all(isinstance(t, ReadOnlyTensor) for t in tensors(state)):
        return state
    return map_tensors(state, lambda t: t if isinstance(t, ReadOnlyTensor) else ReadOnlyTensor(t))


def take_in(state: RecurrentState) -> RecurrentState:
    """The state of a STATE input with plain tensors on the same memory; nothing is copied, so never write to them."""
    return map_tensors(state, unguarded)
