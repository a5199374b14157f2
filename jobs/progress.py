"""Progress of long work: a bar with rate and time left on a terminal, plain lines in a job's log."""

import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

console = Console(stderr=True, highlight=False, width=None if sys.stderr.isatty() else 160)
LINE_EVERY = 5.0  # seconds between plain lines


def say(text: str) -> None:
    """One line for a person, beside any progress bar."""
    console.print(text, markup=False, soft_wrap=True)


class Progress:
    """Counts partitions of one step; the rate is in MB of input per second, of this run only."""

    def __init__(self, name: str, total: int, done: int, bytes_to_do: int):
        self.name, self.total, self.done = name, total, done
        self.bytes, self.bytes_to_do = 0, bytes_to_do
        self.started = self.last_line = time.monotonic()
        self.bar: Any = None

    def __enter__(self) -> "Progress":
        if console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
            )
            self.bar = Bar(*columns, TimeRemainingColumn(), console=console, transient=True)
            self.bar.start()
            self.row = self.bar.add_task(self.name, total=self.total, completed=self.done, rate="")
        return self

    def advance(self, size: int) -> None:
        self.done += 1
        self.bytes += size
        if self.bar:
            self.bar.update(self.row, completed=self.done, rate=self._rate())
        elif time.monotonic() - self.last_line > LINE_EVERY and self.done < self.total:
            self.last_line = time.monotonic()
            say(f"{self.name}: {self.done} of {self.total} partitions{self._rate()}{self._left()}")

    def __exit__(self, kind: object, *_: object) -> None:
        if self.bar:
            self.bar.stop()
        if kind is None:
            say(f"{self.name}: {self.total} partitions{self._rate()}, {time.monotonic() - self.started:.1f} s")

    def _rate(self) -> str:
        return f", {self.bytes / 1e6 / max(1e-9, time.monotonic() - self.started):.1f} MB/s" if self.bytes else ""

    def _left(self) -> str:
        if not self.bytes:
            return ""
        left = (self.bytes_to_do - self.bytes) * (time.monotonic() - self.started) / self.bytes
        return f", about {left:.0f} s left"


def fail(text: str) -> None:
    """An error for a person: one line on standard error."""
    print(text, file=sys.stderr, flush=True)
