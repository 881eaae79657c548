"""Faults on demand: the nth call into the operating system fails, or the process dies at it."""

from __future__ import annotations

import contextlib
import os
import signal
import threading

from sana_video_core.state.atomic import SYSTEM, System

CALLS = ("open", "write", "sync", "replace", "sync_folder", "unlink", "mkdir")


class Fault:
    """Counts events; at the nth it strikes (n = 0: never)."""

    def __init__(self, nth: int, strike):
        self.nth, self.strike, self.count, self.struck = nth, strike, 0, False

    def event(self) -> None:
        self.count += 1
        if self.count == self.nth:
            self.struck = True
            self.strike()


@contextlib.contextmanager
def watched(fault: Fault, short_writes: bool = False):
    """Every call of the core's file layer is an event of ``fault`` (a failing write leaves half of its bytes behind)."""
    plain, one = System(), threading.RLock()  # a film's files are written by several threads

    def wrap(name):
        call = getattr(plain, name)

        def run(*args):
            with one:
                if name == "write" and short_writes and fault.count + 1 == fault.nth:
                    call(args[0], bytes(args[1])[: len(args[1]) // 2])
                fault.event()
                return call(*args)

        return run

    for name in CALLS:
        setattr(SYSTEM, name, wrap(name))
    try:
        yield fault
    finally:
        for name in CALLS:
            delattr(SYSTEM, name)


def failing(nth: int, number: int):
    """The nth call raises an OSError of that number."""
    def strike():
        raise OSError(number, os.strerror(number))

    return watched(Fault(nth, strike), short_writes=True)


def deadly(nth: int) -> Fault:
    """kill -9 of this process at the nth event."""
    return Fault(nth, lambda: os.kill(os.getpid(), signal.SIGKILL))
