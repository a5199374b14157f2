"""Quality job: signals, reasons, a score and a tier for every document."""

if not __package__:  # run as a script
    import _script  # noqa: F401

import argparse
from collections import Counter
from unicodedata import unidata_version  # letters and digits are as this version has them

from dataprep import quality
from dataprep.quality import QualityConfig
from dataprep.storage import Attempt, Commit, read_table
from jobs import corpus
from jobs.config import Config
from jobs.engine import Engine, Step, once_per_run
from jobs.progress import say

VERSION = 1


@once_per_run
def build(engine: Engine, config: Config) -> list[Commit]:
    """Bring the scores up to date: one commit per corpus partition."""
    about = config.quality.model_dump(mode="json") | {"unicode": unidata_version}
    step = Step("quality", VERSION, about)
    tasks = [p.task(config.quality) for p in corpus.partitions(engine, config)]
    return engine.map(step, score_partition, tasks)


def score_partition(out: Attempt, path: str, config: QualityConfig) -> dict:
    documents = read_table(path, ["doc", "source", "text"])
    table = quality.score(documents, config)
    out.table("quality", table)
    return quality.aggregates(table, documents)


def tiers(commits: list[Commit]) -> dict[str, dict[str, int]]:
    """Source -> tier -> documents."""
    result: dict[str, Counter] = {}
    for commit in commits:
        for source, counts in commit.aggregates["tiers"].items():
            result.setdefault(source, Counter()).update(counts)
    return {source: dict(counts) for source, counts in sorted(result.items())}


def main(engine: Engine, config: Config, arguments: argparse.Namespace) -> None:
    for source, counts in tiers(build(engine, config)).items():
        shares = ", ".join(f"{tier} {counts.get(tier, 0):,}" for tier in ("low", "medium", "high"))
        say(f"{source}: {shares}")


if __name__ == "__main__":
    from jobs.cli import run

    run("quality")
