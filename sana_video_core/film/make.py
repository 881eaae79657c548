"""Making a film: sample what is not finished, store each block at once, decode it while the film goes on.

On a CPU a block is on disk before the next one is begun. Where a card decodes, the CPU's work runs beside it
(``FilmVideo.overlap``): a block is written while it is decoded (and on, if the card is faster than the disk), and its frames are
encoded while the next one is sampled. The last frames that the decoder has queued are not waited for before the next block is
queued behind them. Knows neither the model nor the VAE: it is handed a function that samples blocks and a decoder. Resuming is
the normal case.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from concurrent.futures import Future

from torch import Tensor

from ..errors import StateError
from ..sampling.blocks import Block
from ..state import RecurrentState
from .background import in_background
from .folder import Film
from .transfer import later_on_cpu, soon_on_cpu
from .video import FilmVideo

Sample = Callable[[int, RecurrentState | None], Iterator[Block]]
Replay = Callable[[int, RecurrentState | None, list[Tensor]], RecurrentState]


def make_film(
    film: Film, sample: Sample, video: FilmVideo | None = None, *, replay: Replay | None = None, keep_states: bool = True,
    on_block: Callable[[int, str], object] | None = None, on_latent: Callable[[int, Tensor], object] | None = None,
) -> RecurrentState | None:
    """Finish ``film`` and return the state after its last block.

    ``sample(first, state)`` yields the film's blocks from number ``first`` on, given the state before it; they may come
    unchecked (``sample_blocks``). ``keep_states=False`` keeps on disk only the states of the last two blocks (a 480p state has
    153 MiB); then ``replay(first, state, latents)`` commits latents again after an edit further back. ``on_block(block, what)``
    hears "sampled" (it is on disk), "decoded" (the decoder has done its part) and "shown" (the file has it); ``on_latent(block,
    latent)`` is handed every new latent on the CPU once it is on disk, in order. What they raise ends the run, with everything
    finished on disk.
    """
    total, done, hear = len(film.plan.blocks), film.finished(), on_block or (lambda block, what: None)
    show, stores = None if video is None else _Show(video, hear), _Store(hear, on_latent or (lambda block, latent: None))
    try:
        if show is not None:
            for number in range(video.open(), done):
                show.begin(number)
                show.decoded()
        state = state_before(film, done, replay)
        if done < total:
            for number, block in enumerate(sample(done, state), done):
                latent, state, check = block.latent.detach().float(), block.state, block.check
                del block
                _keep(film, number, latent, state, check, show, stores, hear)
                if not keep_states:
                    film.drop_state(number - 2)
        stores.finish()
        if show is not None:
            show.finish()
            video.catch_up()
    finally:
        stores.settle()
        if video is not None:
            video.settle()
    return state


def _keep(film: Film, number: int, latent: Tensor, state: RecurrentState | None, check: Callable[[], None], show: _Show | None,
          stores: _Store, hear) -> None:
    """Store a block once ``check()`` has passed, and decode it; a card begins to decode before that, so that it does not wait."""
    if show is None or not show.video.overlap:
        check()
        latent = latent.cpu()
        film.write_block(number, latent, state)
        stores.stored(number, latent)
        if show is not None:
            show.begin(number)
            show.decoded()
        return
    show.finish()
    latent_there, state_there = soon_on_cpu(latent), later_on_cpu(None if state is None else film.kept(number, state))

    def store() -> Tensor:
        film.write_block(number, latent_there(), state_there())
        return latent_there()

    @functools.cache
    def begin() -> Future:
        check()
        return stores.begin(number, store)

    try:
        show.begin(number, latent, begin)
    finally:  # also after a failure or Cancel in the decoder: the block is finished
        begin()
        stores.finish(wait=not latent.is_cuda)
    show.decoded()


class _Store:
    """Blocks on their way to the disk. One may still be while the next is sampled: where a card is faster than the disk."""

    def __init__(self, hear, take):
        self.hear, self.take, self.pending = hear, take, None

    def begin(self, block: int, write: Callable[[], Tensor]) -> Future:
        self.finish()
        self.pending = block, in_background(write)
        return self.pending[1]

    def finish(self, wait: bool = True) -> None:
        """The block begun is on disk, or what went wrong is raised; without ``wait`` only if that is known already."""
        if self.pending is not None and (wait or self.pending[1].done()):
            (block, future), self.pending = self.pending, None
            self.stored(block, future.result())

    def stored(self, block: int, latent: Tensor) -> None:
        self.take(block, latent)
        self.hear(block, "sampled")

    def settle(self) -> None:
        """Wait, where something else has gone wrong already."""
        if self.pending is not None:
            self.pending[1].exception()


class _Show:
    """Blocks on their way into the video; with overlap one of them may be unfinished when the next is sampled."""

    def __init__(self, video: FilmVideo, hear):
        self.video, self.hear, self.last = video, hear, None

    def begin(self, block: int, latent: Tensor | None = None, store: Callable[[], Future] | None = None) -> None:
        self.finish()
        self.video.begin(block, latent, store)
        self.last = block

    def decoded(self) -> None:
        """The decoder has done its part of the last block."""
        self.hear(self.last, "decoded")
        if not self.video.overlap:
            self.finish()

    def finish(self) -> None:
        if self.last is not None:
            block, self.last = self.last, None
            self.video.finish()
            self.hear(block, "shown")


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
