"""What the shards job shows a person: totals, the text of a sequence, the documents of a step and where they came from.

Text comes from anybody: all that could move, hide or colour what a terminal shows is printed escaped.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

from dataprep import tokenizer
from dataprep.corpus import RECORD_BITS
from dataprep.storage import UserError, add_up, join, read_json
from dataprep.tokenizer import TokensConfig
from dedup.explain import printable
from jobs.corpus import documents
from jobs.tables import Table
from mixer.guarantees import CELL
from mixer.reader import ShardLog
from mixer.shards import StageInfo

COLOURS = ("cyan", "yellow", "green", "magenta")
console = Console(highlight=False, soft_wrap=True)


def stats(stage: StageInfo, ended: bool, totals: dict[str, Any]) -> list[Table]:
    """Every number of a stage's totals, and packed tokens by source, tier and length class."""
    numbers = [[name, f"{n:,}"] for name, n in sorted(totals.items()) if isinstance(n, int | float)]
    cells = [(cell, cell["tokens"]) for cell in totals.get("cells", [])]
    whole = sum(tokens for _, tokens in cells)
    by = {name: add_up({cell[name]: tokens} for cell, tokens in cells) for name in CELL}
    packed = [[name, value, n, n / whole] for name, sums in by.items() for value, n in sorted(sums.items())]
    title = f"stage {stage.stage}{'' if ended else ', still being packed'}"
    return [Table(title, "total, is", numbers), Table("packed", "by, name, tokens:count, share:share", packed)]


def decoder(root: str, log: ShardLog) -> Callable[[np.ndarray], str]:
    """Ids to text, with the tokeniser the stage was packed with; the numbers where it is not there any more."""
    about = join(root, "latest", "vocabulary.json")
    used = read_json(about, path=str, tokenizer=str, eos=str, bos=bool) or {}
    if used.get("tokenizer") != log.stage.tokenizer:
        return lambda ids: " ".join(map(str, ids.tolist()))
    path = used["path"] if used["path"].startswith("/") or "://" in used["path"] else join(root, used["path"])
    config = TokensConfig(eos=used["eos"], bos=used["bos"])
    if tokenizer.identity(tokenizer.read(path), config) != log.stage.tokenizer:
        raise UserError(f"{path} is not the tokeniser any more that {log.directory} was packed with; put that one back")
    return tokenizer.load(path, config).decode


def inspect(log: ShardLog, sequence: int, most: int, decode: Callable[[np.ndarray], str]) -> None:
    """One sequence: a line about each segment, then its text, of at most `most` tokens."""
    stage, batch = log.stage, log.read(sequence, sequence + 1)
    segments = f"{len(batch.segments)} segments"
    console.print(f"stage {stage.stage}, sequence {sequence}: {stage.context:,} tokens, {segments}")
    for number, s in enumerate(batch.segments):
        colour = COLOURS[number % len(COLOURS)]
        ids = batch.tokens[0, s["start"] : s["start"] + s["length"]]
        console.print(Text(f"── {s['start']}..{s['start'] + s['length']} {describe(stage, s)}", f"bold {colour}"))
        # A bar before every line, so that no text can pass for one of ours.
        lines = decode(ids[:most]).split("\n")
        console.print(Text("\n".join(f"│ {printable(line)}" for line in lines), colour))
        if len(ids) > most:
            console.print(Text(f"│ ... {len(ids) - most:,} more tokens", "dim"))
    padding = stage.context - int(batch.segments["length"].sum())
    console.print(f"── padding: {padding:,} tokens")


def describe(stage: StageInfo, s: np.void) -> str:
    codes = (stage.sources, s["source"]), (stage.tiers, s["tier"]), (stage.classes, s["length_class"])
    source, tier, length_class = (names[code] if code < len(names) else f"code {code}" for names, code in codes)
    about = f"source {printable(source)}, tier {tier}, {length_class}, copy {s['copy']}"
    return f"doc {s['doc']}, tokens {s['offset']}..{int(s['offset']) + int(s['length'])}, {about}"


def explain(root: str, log: ShardLog, first: int, last: int) -> None:
    """A line for each segment of sequences [first, last): where it lies, which document, which record it was."""
    log.wait(last)
    segments = log.read(first, last).segments
    rows = documents(root, np.unique(segments["doc"]).tolist(), ["id", "origin"])
    console.print(f"stage {log.stage.stage}, sequences {first}..{last}: {len(segments):,} segments")
    for s in segments:
        file, record = divmod(int(s["doc"]), 1 << RECORD_BITS)
        gone = f"record {record} of line {file + 1} of manifest.jsonl, not in the corpus any more"
        row = rows.get(int(s["doc"]), {"id": None, "origin": gone})
        named = f" id {printable(row['id'])}" if row["id"] not in (None, row["origin"]) else ""
        place = f"{first + s['sequence']}:{s['start']}..{s['start'] + s['length']}"
        console.print(Text(f"{place} {describe(log.stage, s)}, from {printable(row['origin'])}{named}"))
