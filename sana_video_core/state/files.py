"""A recurrent state as a file: every field of it, the fingerprints of what made it, sealed against any change.

Layout: ``layers.<i>.{vk,ksum,tail}``, ``recent.<w>.<i>.*``, ``undo.layers.<i>.*``, ``undo.latent``; the other fields are in
the JSON record. Not covered: where files lie (nodes, film).
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ..errors import StateError
from ..specs import ModelSpec
from .recurrent import STATE_VERSION, LayerState, RecurrentState, Undo
from .sealed import Table, read_sealed, write_sealed

FORMAT_VERSION = 1
KIND = "state file"
MAX_STATE_BYTES = 16 << 30
MAX_LAYERS, MAX_WINDOW = 1000, 10_000
_PARTS = LayerState._fields
_FIELDS = ("version", "spec", "precision", "position", "blocks", "batch", "window", "keep_undo", "model", "caption")
_KINDS = {"spec": str, "precision": str, "model": str, "caption": str, "keep_undo": bool}


def save_state(state: RecurrentState, path: str | Path, fingerprints: dict[str, str] | None = None) -> None:
    """Write ``state``. ``fingerprints`` such as {"vae": ..., "settings": ...} are stored and compared on loading."""
    write_sealed(path, state_tensors(state), {"kind": KIND, "format": FORMAT_VERSION, "state": state_record(state),
                                              "fingerprints": dict(fingerprints or {})})


def load_state(
    path: str | Path, spec: ModelSpec | None = None, fingerprints: dict[str, str] | None = None,
) -> tuple[RecurrentState, dict[str, str]]:
    """(state, stored fingerprints). ``spec`` fixes the model, ``fingerprints`` must equal the stored ones of that name."""
    def check(record: dict, table: Table) -> None:
        if record.get("kind") != KIND or record.get("format") != FORMAT_VERSION:
            raise StateError("This file is not a state file of this version of the pack", found=Path(path).name,
                             expected=f"format {FORMAT_VERSION}", action="Make the state again")
        check_layout(record.get("state"), table, spec)
        stored = record.get("fingerprints")
        for name, wanted in (fingerprints or {}).items():
            if not isinstance(stored, dict) or stored.get(name) != wanted:
                found = stored.get(name, "nothing recorded") if isinstance(stored, dict) else "nothing recorded"
                raise StateError(f"The state does not fit: {name} differs", found=found, expected=wanted,
                                 action=f"Use the {name} that the state was made with")

    record, tensors = read_sealed(path, KIND, MAX_STATE_BYTES, check)
    return build_state(record["state"], tensors), dict(record["fingerprints"])


def state_record(state: RecurrentState) -> dict:
    """The fields of ``state`` that are not tensors."""
    record = {name: getattr(state, name) for name in _FIELDS}
    record |= {"grid": list(state.grid), "layers": len(state.layers), "recent": len(state.recent), "undo": None}
    if state.undo is not None:
        record["undo"] = {"position": state.undo.position, "layers": len(state.undo.layers)}
    return record


def state_tensors(state: RecurrentState, prefix: str = "") -> dict[str, Tensor]:
    """The tensors of ``state`` by name."""
    named: dict[str, Tensor] = {}

    def put(name: str, layers: tuple[LayerState, ...]) -> None:
        for i, layer in enumerate(layers):
            named.update({f"{prefix}{name}.{i}.{part}": getattr(layer, part) for part in _PARTS})

    put("layers", state.layers)
    for w, layers in enumerate(state.recent):
        put(f"recent.{w}", layers)
    if state.undo is not None:
        put("undo.layers", state.undo.layers)
        named[f"{prefix}undo.latent"] = state.undo.latent
    return named


def build_state(record: dict, tensors: dict[str, Tensor], prefix: str = "") -> RecurrentState:
    """The state of a record and tensors that :func:`check_layout` has passed."""
    def get(name: str, count: int) -> tuple[LayerState, ...]:
        return tuple(LayerState(*(tensors[f"{prefix}{name}.{i}.{part}"] for part in _PARTS)) for i in range(count))

    undo = None
    if record["undo"] is not None:
        undo = Undo(get("undo.layers", record["undo"]["layers"]), record["undo"]["position"], tensors[f"{prefix}undo.latent"])
    depth = record["layers"]
    return RecurrentState(
        **{name: record[name] for name in _FIELDS}, grid=tuple(record["grid"]), layers=get("layers", depth),
        recent=tuple(get(f"recent.{w}", depth) for w in range(record["recent"])), undo=undo)


def check_layout(record: object, table: Table, spec: ModelSpec | None = None, prefix: str = "") -> None:
    """Refuse a record whose fields, tensors and shapes do not belong together, before anything is allocated."""
    _check_record(record)
    if record["version"] != STATE_VERSION:
        raise StateError("The state does not fit: version differs", found=record["version"], expected=STATE_VERSION,
                         action="Make the state again with this version of the pack")
    if spec is not None and record["spec"] != spec.name:
        raise StateError("The state does not fit: model differs", found=record["spec"], expected=spec.name,
                         action="Load the model that made the state")
    depth = record["layers"]
    wanted = [f"{prefix}layers.{i}.{part}" for i in range(depth) for part in _PARTS]
    wanted += [f"{prefix}recent.{w}.{i}.{part}" for w in range(record["recent"]) for i in range(depth) for part in _PARTS]
    if record["undo"] is not None:
        wanted += [f"{prefix}undo.layers.{i}.{part}" for i in range(record["undo"]["layers"]) for part in _PARTS]
        wanted.append(f"{prefix}undo.latent")
    names = [name for name in table if name.startswith(prefix)]
    if sorted(names) != sorted(wanted):
        odd = sorted(set(names) ^ set(wanted))
        raise StateError("The state file does not hold what its record says", found=f"{len(odd)} names such as {odd[:2]}")
    if depth and spec is not None and depth != spec.depth:
        raise StateError("The state does not fit: number of layers differs", found=depth, expected=spec.depth)
    sizes = _sizes(record, table, spec, prefix)
    for name in names:
        _check_shape(name.removeprefix(prefix), table[name], record, sizes)


def _check_record(record: object) -> None:
    def whole(value: object, high: int) -> bool:
        return type(value) is int and 0 <= value <= high

    if not isinstance(record, dict):
        raise StateError("The state file has no record of the state")
    limits = {"version": 1 << 30, "position": 1 << 40, "blocks": 1 << 40, "batch": 1 << 10, "window": MAX_WINDOW,
              "layers": MAX_LAYERS, "recent": MAX_WINDOW}
    wrong = [name for name, high in limits.items() if not whole(record.get(name), high)]
    wrong += [name for name, kind in _KINDS.items() if type(record.get(name)) is not kind]
    grid, undo = record.get("grid"), record.get("undo")
    if not (isinstance(grid, list) and len(grid) == 2 and all(whole(n, 1 << 16) and n for n in grid)):
        wrong.append("grid")
    if undo is not None and not (isinstance(undo, dict) and whole(undo.get("position"), 1 << 40)
                                 and whole(undo.get("layers"), MAX_LAYERS)):
        wrong.append("undo")
    if wrong:
        raise StateError("The state file has fields that make no sense", found=", ".join(wrong))


def _sizes(record: dict, table: Table, spec: ModelSpec | None, prefix: str) -> tuple[int, int, int]:
    """(heads, head dim, width) that every layer must have: the model's, or those of the first layer."""
    if spec is not None:
        return spec.linear_heads, spec.linear_head_dim, spec.width
    if not record["layers"]:
        return 0, 0, 0
    shape = table[f"{prefix}layers.0.vk"][1]
    if len(shape) != 4:
        raise StateError("A tensor of the state has a wrong shape", found=f"layers.0.vk {list(shape)}")
    return shape[1], shape[3], shape[1] * shape[3]


def _check_shape(name: str, entry: tuple[torch.dtype, tuple[int, ...]], record: dict, sizes: tuple[int, int, int]) -> None:
    (dtype, shape), (heads, dim, width), batch = entry, sizes, record["batch"]
    part = name.rsplit(".", 1)[1]
    if part == "latent":
        fits = len(shape) == 5 and dtype.is_floating_point
    elif part == "tail" and name.startswith("recent"):
        fits = shape == (0,)
    else:
        wanted = {"vk": (batch, heads, dim, dim), "ksum": (batch, heads, 1, dim),
                  "tail": (batch, 1, record["grid"][0] * record["grid"][1], width)}[part]
        fits = shape == wanted and dtype.is_floating_point
    if not fits:
        raise StateError("A tensor of the state has a wrong shape", found=f"{name} {list(shape)} {dtype}")
