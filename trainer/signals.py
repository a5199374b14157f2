"""SIGTERM asks the trainer to save and end: noticed between two steps, or at once while it waits for the packer."""

import contextlib
import signal
import threading
from collections.abc import Iterator

from dataprep.storage import UserError


class Stopped(UserError):
    """Raised where a step would begin; being a UserError, it reaches all ranks."""


class State:
    asked = False  # SIGTERM has come
    waiting = False  # it interrupts


@contextlib.contextmanager
def heeded() -> Iterator[None]:
    """While the block runs, SIGTERM only asks. Does nothing outside the main thread, where no signal arrives."""

    def ask(*_: object) -> None:
        State.asked = True
        if State.waiting:
            raise Stopped

    here = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, ask) if here else None
    try:
        yield
    finally:
        State.asked = False
        if here:
            signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def waiting() -> Iterator[None]:
    """A block that SIGTERM interrupts by `Stopped`."""
    State.waiting = True
    try:
        if State.asked:
            raise Stopped
        yield
    finally:
        State.waiting = False
