"""A network's calls without gradients as recorded CUDA graphs: small networks wait for their launches, films make many.

The rotary table, which depends on where a film is, is a number to a recording; :class:`Places` makes it an input. On a CPU the
same calls simply run. Not covered: gradients (``common.Graphed``).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..dit.embeddings import rope_table
from ..dit.model import SanaVideoTransformer
from ..specs import ModelSpec
from ..state import LayerState, RecurrentState
from ..state.recurrent import tensors
from .fast import full_precision_attention, replaced_operators


def place_state(spec: ModelSpec, grid: tuple[int, int], batch: int, position: int, window: int = 0,
                keep_undo: bool = False) -> RecurrentState:
    """An empty state (token ``grid``) that begins at latent frame ``position`` of a film instead of 0."""
    return RecurrentState.empty(spec.name, grid, batch, "quality", window, keep_undo)._replace(position=position)


def layers_of(flat) -> tuple[LayerState, ...]:
    """The inverse of ``tensors(state.layers)``."""
    return tuple(LayerState(*flat[i:i + 3]) for i in range(0, len(flat), 3))


class Places:
    """The rotary tables of the frames ``first`` .. ``last`` of a film, and the attention that takes the one that is set."""

    def __init__(self, spec: ModelSpec, grid: tuple[int, int], first: int, last: int, device):
        self.first, self.frame = first, grid[0] * grid[1]
        self.table = rope_table(last - first, *grid, spec.linear_head_dim, first, device=device)
        self.angles: tuple[Tensor, Tensor] = self.table

    def at(self, position: int, frames: int) -> tuple[Tensor, Tensor]:
        """(cos, sin), each ``[N, D/2]``."""
        rows = slice((position - self.first) * self.frame, (position - self.first + frames) * self.frame)
        return tuple(t[rows] for t in self.table)

    def attention(self, qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, *args, **kwargs):
        """As ``reference.linear_attention`` in float32, with the table that is set instead of the one given."""
        return full_precision_attention(qkv, q_weight, k_weight, *self.angles, *args, **kwargs)

    @contextlib.contextmanager
    def operators(self) -> Iterator[None]:
        """Within the block the network runs at the place that is set."""
        with replaced_operators(linear_attention=self.attention):
            yield


class Recorded:
    """``work(*tensors) -> tensors`` as a CUDA graph for each set of shapes, recorded at its first call.

    ``work`` must not wait for the GPU nor bring numbers to it, and nothing in it may want gradients.
    """

    WARM_UP = 3

    def __init__(self, work: Callable[..., tuple[Tensor, ...]], graphs: bool = True):
        self.work, self.use_graphs = work, graphs
        self.graphs: dict[tuple, tuple] = {}

    def __call__(self, *given: Tensor) -> tuple[Tensor, ...]:
        if not (self.use_graphs and given[0].is_cuda):
            return self.work(*given)
        key = tuple((t.shape, t.dtype) for t in given)
        if key not in self.graphs:
            self.graphs[key] = self._record(given)
        graph, inputs, outputs = self.graphs[key]
        torch._foreach_copy_(inputs, list(given))
        graph.replay()
        return tuple(t.clone() for t in outputs)

    def _record(self, given: tuple[Tensor, ...]) -> tuple:
        inputs = [t.clone() for t in given]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(self.WARM_UP):
                self.work(*inputs)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            outputs = self.work(*inputs)
        return graph, inputs, outputs


class Player:
    """A frozen network behind the calls that sampling uses: ``player(latent, ...)`` and ``player.absorb(latent, ...)``.

    No weight may want gradients; gradients stay switched on (the network leaves out what waits for the GPU by that).
    """

    def __init__(self, network: SanaVideoTransformer, places: Places, graphs: bool = True):
        assert not any(p.requires_grad for p in network.parameters())
        self.network, self.places, self.spec = network, places, network.spec
        self._velocity, self._own = Recorded(self._run, graphs), Recorded(self._contribution, graphs)

    def __call__(self, latent: Tensor, times: Tensor, text: Tensor, mask: Tensor, *, state: RecurrentState) -> Tensor:
        """As the network's own call."""
        angles = self.places.at(state.position, latent.shape[2])
        return self._velocity(latent, times, text, mask, *angles, *tensors(state.layers))[0]

    def absorb(self, latent: Tensor, text: Tensor, mask: Tensor, *, state: RecurrentState) -> RecurrentState:
        """As the network's own call."""
        frames = latent.shape[2]
        own = self._own(latent, text, mask, *self.places.at(state.position, frames), *tensors(state.layers))
        return state.advance(layers_of(own), frames, latent)

    def _state(self, latent: Tensor, layers) -> RecurrentState:
        """A state with these layers that forgets all but the block that it takes in: what it then holds is that block's own."""
        grid = tuple(n // p for n, p in zip(latent.shape[3:], self.spec.patch[1:]))
        return place_state(self.spec, grid, len(latent), 0, window=1)._replace(layers=layers_of(layers))

    def _run(self, latent: Tensor, times: Tensor, text: Tensor, mask: Tensor, cos: Tensor, sin: Tensor, *layers: Tensor):
        self.places.angles = cos, sin
        return (self.network(latent, times, text, mask, state=self._state(latent, layers)),)

    def _contribution(self, latent: Tensor, text: Tensor, mask: Tensor, cos: Tensor, sin: Tensor, *layers: Tensor):
        self.places.angles = cos, sin
        return tuple(tensors(self.network.absorb(latent, text, mask, state=self._state(latent, layers)).layers))
