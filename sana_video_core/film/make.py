"""Making a film: sample what is not finished, store each block at once, decode it while the film goes on.

Knows neither the model nor the VAE: it is handed a function that samples blocks and a decoder. Resuming is the normal case.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

from ..errors import StateError
from ..sampling.blocks import Block
from ..state import RecurrentState
from .folder import Film
from .video import FilmVideo

Sample = Callable[[int, RecurrentState | None], Iterator[Block]]
Replay = Callable[[int, RecurrentState | None, list[Tensor]], RecurrentState]


def make_film(
    film: Film, sample: Sample, video: FilmVideo | None = None, *, replay: Replay | None = None, keep_states: bool = True,
    on_block: Callable[[int, str], object] | None = None,
) -> RecurrentState | None:
    """Finish ``film`` and return the state after its last block.

    ``sample(first, state)`` yields the film's blocks from number ``first`` on, given the state before it. ``keep_states=False``
    keeps on disk only the states of the last two blocks (a 480p state has 153 MiB); then ``replay(first, state, latents)``
    commits latents again after an edit further back. ``on_block(block, what)`` hears "sampled", "decoded"; what it raises ends
    the run, with everything finished on disk.
    """
    total, done = len(film.plan.blocks), film.finished()
    if video is not None:
        video.open()
        while video.blocks < done:
            _show(video, on_block)
    state = state_before(film, done, replay)
    if done < total:
        for number, block in enumerate(sample(done, state), done):
            state = block.state
            film.write_block(number, block.latent, state)
            if not keep_states:
                film.drop_state(number - 2)
            if on_block is not None:
                on_block(number, "sampled")
            if video is not None:
                _show(video, on_block)
            del block
    if video is not None:
        video.catch_up()
    return state


def _show(video: FilmVideo, on_block) -> None:
    video.add(video.blocks)
    if on_block is not None:
        on_block(video.blocks - 1, "decoded")


def state_before(film: Film, block: int, replay: Replay | None = None) -> RecurrentState | None:
    """The state before ``block``: from disk, or from the nearest usable one by committing the latents in between again."""
    first = block
    while not film.can_continue(first):
        first -= 1
    if first == block:
        return film.state_after(block - 1)
    if replay is None:
        raise StateError(f"The state before block {block + 1} was not kept", found=film.block_path(block - 1).name,
                         action="Edit the film with the model connected; the state is then made again from the latents")
    return replay(first, film.state_after(first - 1), [film.latent(i) for i in range(first, block)])
