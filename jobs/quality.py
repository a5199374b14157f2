"""Quality job: signals, language, reasons, a score and a tier for every document, and overlaps with evaluation sets."""

if not __package__:  # run as a script
    import _script  # noqa: F401

import argparse
from collections import Counter
from typing import Any
from unicodedata import unidata_version  # letters and digits are as this version has them

import pyarrow as pa
import pyarrow.compute as pc
import pycld2

from dataprep import decontaminate, quality, storage
from dataprep.quality_report import aggregates, sheet, smallest
from dataprep.rules import TIERS, QualityConfig
from dataprep.storage import Attempt, Commit, UserError, read_table
from jobs import corpus
from jobs.config import Config
from jobs.engine import Engine, Step, once_per_run
from jobs.progress import say

VERSION = 4
MEASURED = {"classifier", "score", "decontaminate"}  # keys that `measure` depends on


@once_per_run
def signals(engine: Engine, config: Config) -> list[Commit]:
    """Bring what is measured up to date: one commit per corpus partition."""
    section = config.quality
    about = section.model_dump(mode="json", include=MEASURED) | {
        "unicode": unidata_version,
        "cld2": pycld2.__version__,
    }
    about["decontaminate"] = section.decontaminate.model_dump(mode="json", exclude={"threshold", "action"})
    files = {f"decontaminate.sets.{name}": s.path for name, s in section.decontaminate.sets.items()}
    if section.classifier:
        files["classifier"] = section.classifier
    inputs = {name: _content(name, path) for name, path in files.items()}
    decontaminate.load.cache_clear()  # by an earlier run in this process, of files that may have changed
    if section.decontaminate.sets and not engine.dry_run:
        _report(decontaminate.load(section.decontaminate.model_dump_json()))
    tasks = [p.task(section, **inputs) for p in corpus.partitions(engine, config)]
    return engine.map(Step("signals", VERSION, about), measure_partition, tasks)


def _content(name: str, path: str) -> str:
    """The fingerprint of a file that the configuration names."""
    try:
        return storage.fingerprint(storage.xxhash.xxh3_128_hexdigest(storage.read_bytes(path)))
    except (OSError, ImportError, ValueError) as error:
        raise UserError(f"quality.{name}: {path} cannot be read ({error}); name a file") from None


def _report(index: decontaminate.Index) -> None:
    passed = ", ".join(f"{count:,} of {name}" for name, count in index.passed_over.items() if count)
    say(
        f"decontamination: {index.total:,} items of {', '.join(index.sets)}"
        + (f"; too short or all in the set's own wording, so not looked for: {passed}" if passed else "")
    )


def measure_partition(out: Attempt, path: str, config: QualityConfig) -> dict:
    documents = read_table(path, ["doc", "source", "text"])
    table = quality.measure(documents, config)
    out.table("signals", table)
    return {"scores": quality.histograms(table, documents)}


@once_per_run
def build(engine: Engine, config: Config) -> list[Commit]:
    """Bring verdicts up to date: one commit per corpus partition. Tiers by quantile depend on all scores."""
    measured = signals(engine, config)
    limits = quality.cuts(storage.add_up(c.aggregates["scores"] for c in measured), config.quality)
    tasks = []
    for p, commit in zip(corpus.partitions(engine, config), measured, strict=True):
        mine = {s: {l: limits[s][l] for l in languages} for s, languages in commit.aggregates["scores"].items()}
        inputs = {"signals": commit.fingerprint, "cuts": storage.fingerprint(mine)}
        tasks.append(p.task(commit.path("signals"), config.quality, mine, **inputs))
    about = config.quality.model_dump(mode="json", exclude=MEASURED)
    about["threshold"] = config.quality.decontaminate.threshold
    return engine.map(Step("quality", VERSION, about), score_partition, tasks)


def score_partition(out: Attempt, path: str, signals_path: str, config: QualityConfig, limits: quality.Cuts) -> dict:
    documents, measured = read_table(path, ["doc", "source", "text"]), read_table(signals_path)
    table = quality.judge(documents, measured, config, limits)
    out.table("quality", table)
    return aggregates(table, documents, measured)


def tiers(commits: list[Commit]) -> dict[str, dict[str, int]]:
    """Source -> tier -> documents."""
    result: dict[str, Counter] = {}
    for cell in (cell for commit in commits for cell in commit.aggregates["cells"]):
        result.setdefault(cell["source"], Counter())[cell["tier"]] += cell["documents"]
    return {source: dict(counts) for source, counts in sorted(result.items())}


def examples(engine: Engine, config: Config) -> list[dict[str, Any]]:
    """Of every source and tier, the EXAMPLES documents of smallest hash: their rows of all tables, joined."""
    commits = build(engine, config)
    chosen = smallest(commit.aggregates["examples"] for commit in commits)
    order = [one["doc"] for s in sorted(chosen) for tier in reversed(TIERS) for one in chosen[s].get(tier, [])]
    rows: dict[int, dict[str, Any]] = {doc: {} for doc in order}
    for p, measured, commit in zip(corpus.partitions(engine, config), signals(engine, config), commits, strict=True):
        here = [e["doc"] for tiers in commit.aggregates["examples"].values() for few in tiers.values() for e in few]
        wanted = pa.array([doc for doc in here if doc in rows], pa.uint64())
        for path in (p.documents, measured.path("signals"), commit.path("quality")) if len(wanted) else ():
            table = read_table(path)
            for row in table.filter(pc.is_in(table["doc"], wanted)).to_pylist():
                rows[row["doc"]].update(row)
    return list(rows.values())


def flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--examples", action="store_true", help="write a sheet of examples per source and tier to read")


def main(engine: Engine, config: Config, arguments: argparse.Namespace) -> None:
    for source, counts in tiers(build(engine, config)).items():
        shares = ", ".join(f"{tier} {counts.get(tier, 0):,}" for tier in TIERS)
        say(f"{source}: {shares}")
    if arguments.examples:
        path = storage.join(engine.root, "quality-examples.html")
        storage.write_bytes(path, sheet(examples(engine, config)).encode())
        say(f"examples: {path}")


if __name__ == "__main__":
    from jobs.cli import run

    run("quality")
