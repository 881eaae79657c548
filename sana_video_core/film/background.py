"""A film's work that needs no card (writing, encoding), done by a thread while the next pictures are made.

Threads, not processes: what they call (x264, hashing, files) lets Python go on. They are daemons: a run that is ended leaves
what a kill would leave, which the film's files are made for.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from queue import SimpleQueue


def in_background(function: Callable, *args) -> Future:
    """``function(*args)`` in a thread of its own; the Future has its result or what it raised."""
    future: Future = Future()

    def run() -> None:
        try:
            future.set_result(function(*args))
        except Exception as error:  # handed to whoever asks for the result
            future.set_exception(error)
        finally:
            future.cancel()  # where neither happened, nobody shall wait

    threading.Thread(target=run, name=f"film {function.__name__}", daemon=True).start()
    return future


class Feed:
    """Pieces from one thread to another, in order. ``end()`` ends the iteration, ``break_off()`` makes it raise."""

    def __init__(self):
        self._queue: SimpleQueue = SimpleQueue()

    def put(self, piece) -> None:
        self._queue.put((piece, None))

    def end(self) -> None:
        self._queue.put((None, StopIteration()))

    def break_off(self) -> None:
        self._queue.put((None, BrokenOff()))

    def __iter__(self) -> Iterator:
        while True:
            piece, end = self._queue.get()
            if isinstance(end, StopIteration):
                return
            if end is not None:
                raise end
            yield piece


class BrokenOff(Exception):
    """The pieces ended too early."""
