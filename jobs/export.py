"""Export job: the kept documents with chosen attributes as Parquet, JSONL.zst or Megatron-LM token files."""

if not __package__:  # run as a script
    import _script  # noqa: F401

import argparse
import io
import json

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import zstandard

from dataprep import megatron, storage
from dataprep.storage import Attempt, Commit, UserError, read_table
from jobs import corpus, dedup, quality, tokens
from jobs.config import Config
from jobs.engine import Engine, Step, once_per_run
from jobs.progress import say
from mixer.exclude import excludes, load_exclude

VERSION = 2
DOCUMENT = ["doc", "source", "id", "text", "meta"]


@once_per_run
def build(engine: Engine, config: Config) -> list[Commit]:
    """Bring the export up to date: for every corpus partition, one file of each format asked for."""
    export = config.export
    steps = {"dedup": dedup.build, "quality": quality.build, "tokens": tokens.build, "signals": quality.signals}
    commits = [step(engine, config) for step in steps.values()]
    exclude = config.mix.exclude
    drop = config.quality.decontaminate.drops
    excluded = storage.fingerprint(load_exclude(exclude)["id"].to_pylist())
    tasks = []
    for p, *attributes in zip(corpus.partitions(engine, config), *commits, strict=True):
        paths = [c.path(name) for c, name in zip(attributes, steps, strict=True)]
        inputs = {name: c.fingerprint for c, name in zip(attributes, steps, strict=True)}
        args = (paths, list(export.attributes), list(export.formats), exclude, drop)
        tasks.append(p.task(*args, exclude=excluded, **inputs))
    about = export.model_dump(mode="json") | {"contaminated": drop}
    return engine.map(Step("export", VERSION, about), export_partition, tasks)


def export_partition(
    out: Attempt,
    path: str,
    attributes: list[str],
    wanted: list[str],
    formats: list[str],
    exclude: str | None,
    drop: bool,
) -> dict:
    documents = read_table(path)
    tables = [read_table(p) for p in attributes]
    keep = pc.and_(tables[0]["keep"], pa.array(~excludes(load_exclude(exclude), documents)[0]))
    if drop:
        keep = pc.and_(keep, pc.invert(tables[1]["contaminated"]))
    documents = documents.select(DOCUMENT)
    for name in dict.fromkeys(wanted):
        documents = documents.append_column(name, _column(tables, name))
    documents = documents.filter(keep)
    if "parquet" in formats:
        with out.file("parquet", ".parquet", plain=True) as file:
            pq.write_table(documents, file, compression="zstd", row_group_size=1 << 14)
    if "jsonl.zst" in formats:
        with out.file("jsonl", ".jsonl.zst", plain=True) as file:
            write_jsonl(documents, file)
    if "megatron" in formats:
        ids = tables[2].filter(keep)
        with out.file("bin", ".bin", plain=True) as bin_path, out.file("idx", ".idx", plain=True) as idx_path:
            megatron.write(bin_path, idx_path, [ids], _token_dtype(tables[2]))
    return {"documents": len(documents), "bytes": pc.sum(pc.binary_length(documents["text"])).as_py() or 0}


def _column(tables: list[pa.Table], name: str) -> pa.ChunkedArray:
    known = sorted({c for t in tables for c in t.column_names} - {"doc", "ids"})
    for table in tables:
        if name in known and name in table.column_names:
            return table[name]
    raise UserError(f"export.attributes: there is no attribute {name}; there are {', '.join(known)}")


def _token_dtype(table: pa.Table) -> str:
    size, count = pc.sum(pc.binary_length(table["ids"])).as_py() or 0, pc.sum(table["n_tokens"]).as_py() or 0
    return "uint32" if count and size // count == 4 else "uint16"


def write_jsonl(table: pa.Table, path: str) -> None:
    """One object per line; `meta` as the object it holds."""
    with open(path, "wb") as raw, zstandard.ZstdCompressor(3).stream_writer(raw) as stream:
        lines = io.TextIOWrapper(stream, "utf-8", newline="\n")
        for batch in table.to_batches(max_chunksize=1024):
            for row in batch.to_pylist():
                row["meta"] = json.loads(row["meta"])
                lines.write(json.dumps(row, ensure_ascii=False) + "\n")
        lines.flush()


def main(engine: Engine, config: Config, arguments: argparse.Namespace) -> None:
    commits = build(engine, config)
    documents = sum(c.aggregates["documents"] for c in commits)
    say(f"export: {documents:,} documents in {commits[0].directory if commits else engine.root}")


if __name__ == "__main__":
    from jobs.cli import run

    run("export")
