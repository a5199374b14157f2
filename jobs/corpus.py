"""Corpus job: reads every source's files into documents, and puts what it cannot read into quarantine, with reasons."""

if not __package__:  # run as a script
    import _script  # noqa: F401

import argparse
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dataprep import manifest
from dataprep.config import CorpusConfig, SourceConfig
from dataprep.corpus import RECORD_BITS, build_group
from dataprep.storage import Attempt, Commit, UserError, add_up, arrow_file, fingerprint, join, latest
from jobs.config import Config
from jobs.engine import Engine, Step, Task, once_per_run
from jobs.progress import say

VERSION = 4
NOT_CONTENT = {"paths", "include", "exclude", "max_bytes"}  # keys that choose files, not what a file becomes


@dataclass(frozen=True)
class Partition:
    """One Parquet file of documents, all of one source: what every later step maps over."""

    key: str
    source: str
    documents: str
    fingerprint: str
    bytes: int

    def task(self, *args: Any, **inputs: str) -> Task:
        """A task for this partition: its documents' path, then `args`; further inputs by name."""
        return Task(self.key, {"documents": self.fingerprint, **inputs}, (self.documents, *args), self.bytes)


@once_per_run
def build(engine: Engine, config: Config) -> list[Commit]:
    """Bring the corpus up to date. One commit per group of input files."""
    corpus = config.corpus
    path = join(engine.root, "manifest.jsonl")
    before, inputs = manifest.load(path), manifest.list_inputs(corpus)
    if inside := [i.path for i in inputs if i.path.startswith(engine.root + "/")]:
        raise UserError(
            f"{inside[0]} of source {inputs[0].source} lies in the outputs' root {engine.root}; keep them apart"
        )
    entries, active = manifest.update(before, inputs, corpus.group_mb * 1e6)
    if not engine.dry_run:
        manifest.save(path, entries)
    tasks = []
    for number, members in sorted(manifest.groups(active).items()):
        source = corpus.source(members[0].source)
        content = source.model_dump(mode="json", exclude=NOT_CONTENT)
        versions = {f"{e.file}": e.version for e in members} | {"source": fingerprint(content)}
        tasks.append(Task(f"{number:05d}", versions, (members, source, corpus), sum(e.bytes for e in members)))
    step = Step("corpus", VERSION, {"partition_mb": corpus.partition_mb, "zstd_level": corpus.zstd_level})
    return engine.map(step, make_group, tasks)


def make_group(out: Attempt, entries: list[manifest.Entry], source: SourceConfig, corpus: CorpusConfig) -> dict:
    return build_group(out, entries, source, corpus)


@once_per_run
def partitions(engine: Engine, config: Config) -> list[Partition]:
    """The corpus as its partitions, in document order. UserError where there is not one document."""
    found = [
        Partition(
            f"{c.key}-{name.removeprefix('documents-')}",
            next(iter(c.aggregates["documents"])),
            c.path(name),
            c.files[name]["xxh3"],
            c.files[name]["bytes"],
        )
        for c in build(engine, config)
        for name in sorted(c.files)
        if name.startswith("documents-")
    ]
    if not found and not engine.dry_run:
        bad = sum(n for reasons in totals(build(engine, config), "quarantined").values() for n in reasons.values())
        raise UserError(
            f"the corpus has no documents; {bad} records are in quarantine, with reasons (corpus-*/*.quarantine.*): "
            "look there, and at corpus.sources"
        )
    return found


def documents(
    root: str, docs: Collection[int], columns: Sequence[str] = ("source", "id", "origin", "text")
) -> dict[int, dict[str, Any]]:
    """doc -> its row, for those of `docs` that the corpus under a root holds. A text is read with its row group."""
    directory, entries = latest(root, "corpus"), manifest.load(join(root, "manifest.jsonl"))
    by_group: dict[int, list[int]] = {}
    for doc in docs:
        if (file := doc >> RECORD_BITS) < len(entries):
            by_group.setdefault(entries[file].group, []).append(doc)
    found: dict[int, dict[str, Any]] = {}
    for group, members in by_group.items():
        commit, values = Commit.load(directory or "", f"{group:05d}"), pa.array(members, pa.uint64())
        for path in [commit.path(name) for name in commit.files if name.startswith("documents-")] if commit else ():
            with arrow_file(path) as opened:
                parquet = pq.ParquetFile(opened)
                for number in range(parquet.num_row_groups):
                    here = pc.is_in(parquet.read_row_group(number, ["doc"])["doc"], values)
                    if pc.any(here).as_py():
                        rows = parquet.read_row_group(number, ["doc", *columns]).filter(here)
                        found |= {row["doc"]: row for row in rows.to_pylist()}
    return found


def totals(commits: list[Commit], name: str) -> dict[str, Any]:
    """An aggregate {source: count} or {source: {reason: count}} summed over commits."""
    return dict(sorted(add_up(commit.aggregates[name] for commit in commits).items()))


def main(engine: Engine, config: Config, arguments: argparse.Namespace) -> None:
    commits = build(engine, config)
    documents, size, bad = (totals(commits, name) for name in ("documents", "bytes", "quarantined"))
    for source in sorted(documents | bad):
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(bad.get(source, {}).items()))
        say(
            f"{source}: {documents.get(source, 0):,} documents, {size.get(source, 0) / 1e6:,.1f} MB"
            + (f"; quarantined: {reasons}" if reasons else "")
        )
    say(f"corpus: {sum(documents.values()):,} documents, {sum(size.values()) / 1e6:,.1f} MB in {engine.root}")


if __name__ == "__main__":
    from jobs.cli import run

    run("corpus")
