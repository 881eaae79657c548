"""The constant-memory state of block-causal linear attention (paper §3.3, causal spec 1 and 3).

Per layer: the running sum of v k'^T, the running sum of the keys, and the last frame before the temporal convolution.
Running sums equal the official per-block list summed from the left, in O(1) memory and work a block. A state is an
immutable NamedTuple: every operation returns a new one. Files: ``state/files.py``. Not covered: sampling.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import StateError
from ..specs import ModelSpec

STATE_VERSION = 1


class LayerState(NamedTuple):
    """``vk [B, H, Dv, Dk]`` and ``ksum [B, H, 1, D]`` (sums), ``tail [B, 1, S, C]`` (last frame of the last block)."""

    vk: Tensor
    ksum: Tensor
    tail: Tensor


class Undo(NamedTuple):
    """What is needed to take the last block back: the layers before it, its first frame and its clean latent."""

    layers: tuple[LayerState, ...]
    position: int
    latent: Tensor


class RecurrentState(NamedTuple):
    """What the model carries from block to block.

    ``position``: absolute first latent frame (in tokens of time) of the next block. ``grid``: (height, width) in tokens.
    ``window``: 0 = all history, w = the sums of the last w blocks only (then ``recent`` holds their contributions, without
    tails). ``model``: fingerprint of the weights that made it, ``caption``: of the text that the last block was committed
    with; both "" when nobody recorded them.
    """

    version: int
    spec: str
    precision: str
    position: int
    blocks: int
    grid: tuple[int, int]
    batch: int
    window: int
    keep_undo: bool
    layers: tuple[LayerState, ...]
    recent: tuple[tuple[LayerState, ...], ...] = ()
    undo: Undo | None = None
    model: str = ""
    caption: str = ""

    @classmethod
    def empty(
        cls, spec: str, grid: tuple[int, int], batch: int, precision: str = "quality", window: int = 0,
        keep_undo: bool = False, model: str = "",
    ) -> RecurrentState:
        """The state before the first block."""
        if window < 0:
            raise StateError("The window cannot be negative", found=window, expected="0 (all history) or more blocks")
        return cls(STATE_VERSION, spec, precision, 0, 0, tuple(grid), batch, window, keep_undo, (), model=model)

    def advance(self, own: tuple[LayerState, ...], frames: int, latent: Tensor) -> RecurrentState:
        """The state after a block of ``frames`` latent frames whose contributions are ``own`` (from the t = 0 pass)."""
        recent: tuple[tuple[LayerState, ...], ...] = ()
        if self.window:
            sums = tuple(o._replace(tail=o.tail.new_empty(0)) for o in own)  # only the last block's tail is ever read
            recent = (*self.recent, sums)[-self.window:]
            layers = recent[0]
            for block in recent[1:]:
                layers = _add(layers, block)
            layers = tuple(t._replace(tail=o.tail) for t, o in zip(layers, own, strict=True))
        else:
            layers = _add(self.layers, own) if self.layers else own
        undo = Undo(self.layers, self.position, latent.detach()) if self.keep_undo else None
        return self._replace(position=self.position + frames, blocks=self.blocks + 1, layers=layers, recent=recent,
                             undo=undo, caption="")

    def before_last(self) -> tuple[RecurrentState, Tensor]:
        """(the state before the last block, that block's clean latent); needs ``keep_undo``."""
        if self.undo is None:
            raise StateError("This state cannot take its last block back", found="no undo data",
                             action="Carry the state with 'keep undo' switched on")
        return self._replace(
            position=self.undo.position, blocks=self.blocks - 1, layers=self.undo.layers,
            recent=self.recent[:-1] if self.window else (), undo=None, caption="",
        ), self.undo.latent

    def forgotten(self) -> RecurrentState:
        """The same place in the film with nothing remembered."""
        return self._replace(layers=(), recent=(), undo=None, caption="")

    def windowed(self, window: int) -> RecurrentState:
        """The same state that from here on remembers the last ``window`` blocks only (0: forgets nothing more).

        What a full history has before its last block can only be told apart with undo data, so such a state keeps its last
        block. What a window has forgotten stays forgotten.
        """
        if window < 0:
            raise StateError("The window cannot be negative", found=window, expected="0 (all history) or more blocks")
        if window == 0 or not self.layers:
            return self._replace(window=window, recent=())
        recent = self.recent[-window:]
        if not self.window:
            if self.undo is None:
                raise StateError("This state cannot tell its last block from the blocks before", found="no undo data",
                                 action="Carry the state with 'keep undo' switched on")
            own = self.layers
            if self.undo.layers:
                own = tuple(LayerState(n.vk - e.vk, n.ksum - e.ksum, n.tail)
                            for n, e in zip(self.layers, self.undo.layers, strict=True))
            recent = (tuple(o._replace(tail=o.tail.new_empty(0)) for o in own),)
        layers = recent[0]
        for block in recent[1:]:
            layers = _add(layers, block)
        layers = tuple(t._replace(tail=o.tail) for t, o in zip(layers, self.layers, strict=True))
        return self._replace(window=window, recent=recent, layers=layers)

    def to(self, device: torch.device | str, copy: bool = False) -> RecurrentState:
        """The same state with its tensors on ``device`` (fresh tensors when ``copy``)."""
        return map_tensors(self, lambda t: t.to(device, copy=copy))

    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.numel() * t.element_size() for t in tensors(self))

    def without_undo(self) -> RecurrentState:
        """The same state, no longer able to take its last block back: half the size."""
        return self._replace(undo=None, keep_undo=False)

    def save(self, path: str | Path, fingerprints: dict[str, str] | None = None) -> None:
        """Write the state to a safetensors file, whole or not at all. See ``files.save_state``."""
        from .files import save_state

        save_state(self, path, fingerprints)

    @classmethod
    def load(
        cls, path: str | Path, spec: ModelSpec | None = None, fingerprints: dict[str, str] | None = None,
    ) -> RecurrentState:
        """Read a state back; any damage, and any field that differs from what is given, is refused by name."""
        from .files import load_state

        return load_state(path, spec, fingerprints)[0]


def _add(total: tuple[LayerState, ...], own: tuple[LayerState, ...]) -> tuple[LayerState, ...]:
    """History plus one contribution; the tail is replaced."""
    return tuple(LayerState(t.vk + o.vk, t.ksum + o.ksum, o.tail) for t, o in zip(total, own, strict=True))


def map_tensors(value, function):
    """``value`` with ``function`` applied to every tensor inside (nested) tuples."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple):
        items = [map_tensors(v, function) for v in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return value


def tensors(value) -> list[Tensor]:
    """All tensors inside (nested) tuples, in order."""
    found: list[Tensor] = []
    map_tensors(value, lambda t: found.append(t) or t)
    return found


def layers_on(state: RecurrentState, device: torch.device | str) -> tuple[LayerState, ...]:
    """The sums and tails only, on ``device``."""
    return map_tensors(state.layers, lambda t: t.to(device))


def check_fits(
    state: RecurrentState, spec: ModelSpec, grid: tuple[int, int], batch: int, precision: str | None = None, model: str = "",
) -> None:
    """Raise a StateError that names the first field in which ``state`` does not fit the model and the latent.

    ``precision`` and ``model`` (a fingerprint of the weights) are compared when given and recorded.
    """
    checks = (
        ("version", state.version, STATE_VERSION, "Make the state again with this version of the pack"),
        ("model", state.spec, spec.name, "Load the model that made the state"),
        ("token grid (height, width)", tuple(state.grid), tuple(grid), "Keep the resolution of the film"),
        ("batch size", state.batch, batch, "Keep the batch size of the film, and CFG on or off"),
        ("precision", state.precision, state.precision if precision is None else precision, "Use the mode of the film"),
        ("weights", state.model, model if model and state.model else state.model, "Load the model that made the state"),
    )
    for field, found, expected, action in checks:
        if found != expected:
            raise StateError(f"The state does not fit: {field} differs", found=found, expected=expected, action=action)
    if state.layers and len(state.layers) != spec.depth:
        raise StateError("The state does not fit: number of layers differs", found=len(state.layers), expected=spec.depth)
