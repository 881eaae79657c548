"""Check a table of weights against the key table, and take it from any public naming to any other.

Conversion reshapes, permutes, splits and joins; it never rounds and never writes into a tensor (which can be a read-only
view of a file). Everything is checked by name first, so a failure leaves nothing behind. Tensors on the meta device work.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

import torch
from torch import Tensor

from ..errors import CheckpointError, SanaVideoError
from ..specs import ModelSpec
from .keys import NAMINGS, QUANT_SUFFIXES, TAPS, UNUSED, Entry, key_table, naming_of, quantised_layers

SHOWN = 4  # names of each kind of fault that an error lists
WEIGHT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2)

Shapes = Mapping[str, tuple[int, ...]]


def shapes_of(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """{name: shape}."""
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def validate(
    shapes: Shapes, spec: ModelSpec, *, dtypes: Mapping[str, torch.dtype] | None = None, quantised: Collection[str] = (),
    name: str = "",
) -> str:
    """The naming ('original' or 'diffusers') of a complete and fitting table of weights; else one CheckpointError.

    The error lists missing, unexpected and mis-shaped tensors by name. ``original`` and ``native`` shapes may be mixed.
    dtypes:    when given, weights must be floating point, and float16 must not be mixed with bfloat16: both are 2 bytes wide,
               so a file with both has most likely a damaged header.
    quantised: layers whose weight may be absent or packed (any shape and dtype); scales beside it are allowed. Layer names
               or the names of their '.comfy_quant' marks.
    name:      the file's name, for the message.
    """
    layers = quantised_layers(quantised)
    naming = naming_of(shapes)
    expected = _expected(spec, naming)
    free = {f"{layer}.weight" for layer in layers}
    missing = [key for key in expected if key not in shapes and key not in free]
    unexpected = [key for key in shapes if key not in expected and not UNUSED.fullmatch(key) and not _beside(key, layers)]
    unexpected += sorted(f"{layer} (quantised)" for layer in layers if f"{layer}.weight" not in expected)
    misshaped = [f"{key} {list(shapes[key])} instead of {list(allowed[0])}" for key, allowed in expected.items()
                 if key in shapes and key not in free and tuple(shapes[key]) not in allowed]
    wrong_dtype = _wrong_dtypes(dtypes, expected, free) if dtypes else []
    faults = [(missing, "missing"), (unexpected, "unexpected"), (misshaped, "of another shape"),
              (wrong_dtype, "of a wrong dtype")]
    if any(names for names, _ in faults):
        raise CheckpointError(
            f"The checkpoint {name} does not fit {spec.name}".replace("  ", " "),
            found="; ".join(listed(names, kind) for names, kind in faults if names),
            expected=f"the {len(expected)} tensors of {spec.name} in {naming} naming",
            action="Download the file again, or choose a file of this model")
    return naming


def _expected(spec: ModelSpec, naming: str) -> dict[str, tuple[tuple[int, ...], ...]]:
    """{name: allowed shapes}."""
    table = key_table(spec)
    if naming == "diffusers":
        return {part: (entry.part,) for entry in table.values() for part in entry.diffusers}
    return {key: (entry.original, entry.native) for key, entry in table.items()}


def _beside(key: str, layers: set[str]) -> bool:
    """True for the scales and marks of a quantised layer."""
    return any(key.endswith(s) and key[:-len(s)] in layers for s in QUANT_SUFFIXES)


def _wrong_dtypes(dtypes: Mapping[str, torch.dtype], expected: Collection[str], free: set[str]) -> list[str]:
    used = {key: dtypes[key] for key in expected if key in dtypes and key not in free}
    wrong = [f"{key} {short(dtype)}" for key, dtype in used.items() if dtype not in WEIGHT_DTYPES]
    half = {dtype: [key for key, d in used.items() if d == dtype] for dtype in (torch.float16, torch.bfloat16)}
    if all(half.values()):
        fewer, other = sorted(half, key=lambda d: len(half[d]))
        wrong += [f"{key} {short(fewer)} among {short(other)}" for key in half[fewer]]
    return wrong


def short(dtype: torch.dtype) -> str:
    """'bfloat16' for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def listed(names: list[str], kind: str) -> str:
    """'5 missing (a, b, c, d and 1 more)'."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{len(names)} {kind} ({', '.join(n[:100] for n in names[:SHOWN])}{more})"


def convert(
    state: Mapping[str, Tensor], spec: ModelSpec, to: str = "native", *, quantised: Collection[str] = (), name: str = "",
) -> dict[str, Tensor]:
    """``state`` (any naming) under the names and shapes of ``to``: 'native', 'original' or 'diffusers'.

    Complete and checked (see :func:`validate`, also for ``quantised`` and ``name``), in the order of the network. Unused
    tensors of official files are dropped. Tensors are views where the layouts allow it.
    """
    return dict(convert_items(state, spec, to, quantised=quantised, name=name))


def convert_items(
    state: Mapping[str, Tensor], spec: ModelSpec, to: str = "native", *, quantised: Collection[str] = (), name: str = "",
) -> Iterator[tuple[str, Tensor]]:
    """:func:`convert`, one tensor at a time: for a caller who casts or moves each before the next is made."""
    if to not in NAMINGS:
        raise SanaVideoError("Unknown naming", found=to, expected=", ".join(NAMINGS))
    layers = quantised_layers(quantised)
    dtypes = {key: tensor.dtype for key, tensor in state.items()}
    naming = validate(shapes_of(state), spec, dtypes=dtypes, quantised=layers, name=name)
    if layers and (to != "native" or naming == "diffusers"):
        raise SanaVideoError("Quantised weights cannot change their layout", found=f"{naming} to {to}",
                             expected="ComfyUI's naming on both sides", action="Convert before quantising")
    for key, entry in key_table(spec).items():
        if key.removesuffix(".weight") in layers:
            if key in state:  # packed as it is; a convolution of one number a weight becomes a matrix like any other
                yield key, to_matrix(state[key], entry) if tuple(state[key].shape) == entry.original else state[key]
        elif naming == "diffusers" and to == "diffusers":
            yield from ((part, state[part]) for part in entry.diffusers)
        else:
            yield from _renamed(key, entry, _ours(state, key, entry, naming), to)
    yield from ((key, tensor) for key, tensor in state.items() if _beside(key, layers))


def _ours(state: Mapping[str, Tensor], key: str, entry: Entry, naming: str) -> Tensor:
    if naming != "diffusers":
        return state[key]
    parts = [state[part] for part in entry.diffusers]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _renamed(key: str, entry: Entry, tensor: Tensor, to: str) -> Iterator[tuple[str, Tensor]]:
    if to == "native":
        yield key, to_matrix(tensor, entry)
    elif to == "original":
        yield key, to_convolution(tensor, entry)
    else:
        yield from zip(entry.diffusers, to_convolution(tensor, entry).chunk(len(entry.diffusers)), strict=True)


def to_matrix(tensor: Tensor, entry: Entry) -> Tensor:
    """The weight as the network holds it. The temporal convolution ``[D, D, 3, 1]`` becomes ``[D, 3D]``, taps side by side:
    previous, same, next frame (the order of ``ops.temporal_taps``)."""
    if tuple(tensor.shape) == entry.native:
        return tensor
    if _is_temporal(entry):
        return tensor[..., 0].permute(0, 2, 1).flatten(1)
    return tensor.reshape(entry.native)


def to_convolution(tensor: Tensor, entry: Entry) -> Tensor:
    """The weight in the official shape; the inverse of :func:`to_matrix`."""
    if tuple(tensor.shape) == entry.original:
        return tensor
    if _is_temporal(entry):
        return tensor.unflatten(1, (TAPS, -1)).permute(0, 2, 1)[..., None]
    return tensor.reshape(entry.original)


def _is_temporal(entry: Entry) -> bool:
    return entry.diffusers[0].endswith("ff.conv_temp.weight")
