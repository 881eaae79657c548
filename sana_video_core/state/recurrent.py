"""The constant-memory state of block-causal linear attention (paper §3.3, causal spec 1 and 3).

Per layer: the running sum of v k'^T, the running sum of the keys, and the last frame before the temporal convolution.
Running sums equal the official per-block list summed from the left, in O(1) memory and work a block. A state is an
immutable NamedTuple: every operation returns a new one. Not covered: files (``state/files.py``), sampling.
"""

from __future__ import annotations

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
    ``window``: 0 = all history, w = the sums of the last w blocks only (then ``recent`` holds their contributions).
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

    @classmethod
    def empty(
        cls, spec: str, grid: tuple[int, int], batch: int, precision: str = "quality", window: int = 0,
        keep_undo: bool = False,
    ) -> RecurrentState:
        """The state before the first block."""
        if window < 0:
            raise StateError("The window cannot be negative", found=window, expected="0 (all history) or more blocks")
        return cls(STATE_VERSION, spec, precision, 0, 0, tuple(grid), batch, window, keep_undo, ())

    def advance(self, own: tuple[LayerState, ...], frames: int, latent: Tensor) -> RecurrentState:
        """The state after a block of ``frames`` latent frames whose contributions are ``own`` (from the t = 0 pass)."""
        recent = ((*self.recent, own)[-self.window:]) if self.window else ()
        if self.window:
            layers = recent[0]
            for block in recent[1:]:
                layers = _add(layers, block)
        else:
            layers = _add(self.layers, own) if self.layers else own
        undo = Undo(self.layers, self.position, latent.detach()) if self.keep_undo else None
        return self._replace(position=self.position + frames, blocks=self.blocks + 1, layers=layers, recent=recent,
                             undo=undo)

    def before_last(self) -> tuple[RecurrentState, Tensor]:
        """(the state before the last block, that block's clean latent); needs ``keep_undo``."""
        if self.undo is None:
            raise StateError("This state cannot take its last block back", found="no undo data",
                             action="Carry the state with 'keep undo' switched on")
        return self._replace(
            position=self.undo.position, blocks=self.blocks - 1, layers=self.undo.layers,
            recent=self.recent[:-1] if self.window else (), undo=None,
        ), self.undo.latent

    def to(self, device: torch.device | str, copy: bool = False) -> RecurrentState:
        """The same state with its tensors on ``device`` (fresh tensors when ``copy``)."""
        return _map(self, lambda t: t.to(device, copy=copy))

    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.numel() * t.element_size() for t in tensors(self))


def _add(total: tuple[LayerState, ...], own: tuple[LayerState, ...]) -> tuple[LayerState, ...]:
    """History plus one contribution; the tail is replaced."""
    return tuple(LayerState(t.vk + o.vk, t.ksum + o.ksum, o.tail) for t, o in zip(total, own, strict=True))


def _map(value, function):
    """``value`` with ``function`` applied to every tensor inside (nested) tuples."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple):
        items = [_map(v, function) for v in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return value


def tensors(value) -> list[Tensor]:
    """All tensors inside (nested) tuples, in order."""
    found: list[Tensor] = []
    _map(value, lambda t: found.append(t) or t)
    return found


def check_fits(state: RecurrentState, spec: ModelSpec, grid: tuple[int, int], batch: int) -> None:
    """Raise a StateError that names the first field in which ``state`` does not fit the model and the latent."""
    checks = (
        ("version", state.version, STATE_VERSION, "Make the state again with this version of the pack"),
        ("model", state.spec, spec.name, "Load the model that made the state"),
        ("token grid (height, width)", tuple(state.grid), tuple(grid), "Keep the resolution of the film"),
        ("batch size", state.batch, batch, "Keep the batch size (and CFG) of the film"),
    )
    for field, found, expected, action in checks:
        if found != expected:
            raise StateError(f"The state does not fit: {field} differs", found=found, expected=expected, action=action)
    if state.layers and len(state.layers) != spec.depth:
        raise StateError("The state does not fit: number of layers differs", found=len(state.layers), expected=spec.depth)
