"""Tables for a person, made once: printed on a terminal, or shown on the report's page. No text in them can do harm."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table as Lines
from rich.text import Text

from dedup.explain import printable
from jobs.progress import console

SHOWN = 16  # rows on a terminal


def visible(text: str, length: int = 2000) -> str:
    """A text as it may be shown: bounded, and what could move or hide other text (controls, bidi) spelt out."""
    shown = "\n".join(printable(line.expandtabs(4)) for line in text[:length].split("\n"))
    return shown + (f" [... {len(text) - length:,} more characters]" if len(text) > length else "")


FORMATS: dict[str, Callable[[Any], str]] = {
    "text": lambda x: visible(str(x), 200),
    "count": "{:,}".format,
    "share": "{:.2%}".format,
    "number": "{:,.4g}".format,
    "MB": lambda x: f"{x / 1e6:,.1f}",
}


@dataclass(frozen=True)
class Table:
    """columns: `name:kind, ...`, a kind of FORMATS or none for text; rows: a value per column, None: an empty cell."""

    title: str
    columns: str
    rows: list[list[Any]]
    note: str = ""

    @property
    def heads(self) -> list[tuple[str, str]]:
        return [(name, kind or "text") for name, _, kind in (c.partition(":") for c in self.columns.split(", "))]

    def cells(self, row: list[Any]) -> list[str]:
        kinds = [kind for _, kind in self.heads]
        return ["" if value is None else FORMATS[kind](value) for kind, value in zip(kinds, row, strict=True)]


def show(table: Table, to: Console = console, most: int = SHOWN) -> None:
    """Print its first rows, text to the left and numbers to the right; nothing where there is none."""
    if not table.rows:
        return
    lines = Lines(title=Text(table.title), title_justify="left", caption=Text(table.note), caption_justify="left")
    for name, kind in table.heads:
        lines.add_column(Text(name), justify="left" if kind == "text" else "right")
    for row in table.rows[:most]:
        lines.add_row(*map(Text, table.cells(row)))
    if len(table.rows) > most:
        lines.add_row(Text(f"and {len(table.rows) - most:,} more"))
    to.print(lines)
