"""SIGTERM asks the trainer to save and end: noticed between two steps, or at once while it waits for the packer."""

import contextlib
import signal
import threading
from collections.abc import Iterator

from dataprep.storage import UserError


class Stopped(UserError):
    """Raised where a step would begin; being a UserError, it reaches all ranks."""


class _State:
    asked = False
    waiting = False


def asked() -> bool:
    """Whether SIGTERM has come."""
    return _State.asked


@contextlib.contextmanager
def heeded() -> Iterator[None]:
    """While the block runs, SIGTERM only asks. Does nothing outside the main thread, where no signal arrives."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(*_: object) -> None:
        _State.asked = True
        if _State.waiting:
            raise Stopped

    before = signal.signal(signal.SIGTERM, ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        _State.asked = False


@contextlib.contextmanager
def waiting() -> Iterator[None]:
    """A block that SIGTERM interrupts by `Stopped`."""
    _State.waiting = True
    try:
        if _State.asked:
            raise Stopped
        yield
    finally:
        _State.waiting = False
