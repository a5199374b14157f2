"""Tokens job: trains or loads the tokeniser and encodes every document."""

if not __package__:  # run as a script
    import _script  # noqa: F401

import argparse
from collections.abc import Iterator
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa

from dataprep import tokenizer
from dataprep.storage import Attempt, Commit, UserError, read_groups
from dataprep.tokenizer import TokensConfig
from dataprep.tokenizer_training import sample, train
from jobs import corpus
from jobs.config import Config
from jobs.engine import Engine, Step, Task, once_per_run
from jobs.progress import say
from mixer.allocate import water_fill

VERSION = 4
Coder = tuple[str, str, bool, str]  # the arguments of `load`


@once_per_run
def build_tokenizer(engine: Engine, config: Config) -> tuple[str, str]:
    """(path, fingerprint) of the tokeniser: the one given, or one trained on this corpus and then kept."""
    path = config.tokens.tokenizer or _trained(engine, config)
    return path, tokenizer.identity(tokenizer.read(path), config.tokens)


def _trained(engine: Engine, config: Config) -> str:
    """Once trained it stays as it is when files are added: a model cannot change its tokeniser. To train anew, remove
    its directory.
    """
    partitions = corpus.partitions(engine, config)
    sizes = sample_sizes(corpus.totals(corpus.build(engine, config), "bytes"), config.tokens)
    paths: dict[str, list[str]] = {}
    for p in partitions:
        paths.setdefault(p.source, []).append(p.documents)
    step = Step("tokenizer", VERSION, config.tokens.model_dump(mode="json", exclude={"tokenizer"}))
    inputs = {p.key: p.fingerprint for p in partitions}
    task = Task("all", inputs, (paths, sizes, config.tokens), sum(sizes.values()))
    return engine.once(step, train_tokenizer, task, frozen=True).path("tokenizer")


def sample_sizes(text: dict[str, int], config: TokensConfig) -> dict[str, int]:
    """Bytes to train on by source: by its bytes of text and weight, as far as it has them; others get what it lacks."""
    weights = [size * Fraction(config.source_weights.get(source, 1)) for source, size in text.items()]
    parts = water_fill(int(config.sample_mb * 1e6), weights, list(text.values()))
    if not any(parts):
        raise UserError("tokens.source_weights leaves no text to train on: give a source with text a weight above 0")
    return dict(zip(text, parts, strict=True))


def train_tokenizer(
    out: Attempt, paths: dict[str, list[str]], sizes: dict[str, int], config: TokensConfig
) -> dict[str, Any]:
    data = train(sample(paths, sizes, config.seed), config)
    with out.file("tokenizer", ".json" if config.kind == "byte-level-bpe" else ".model") as path:
        Path(path).write_bytes(data)
    return {"bytes": len(data), "sample": sizes}


@once_per_run
def build(engine: Engine, config: Config) -> list[Commit]:
    """Bring the token ids up to date: one commit per corpus partition."""
    _, fingerprint = build_tokenizer(engine, config)
    step = Step("tokens", VERSION, {"tokenizer": fingerprint})
    tasks = [p.task(coder(engine, config), tokenizer=fingerprint) for p in corpus.partitions(engine, config)]
    return engine.map(step, encode_partition, tasks)


def coder(engine: Engine, config: Config) -> Coder:
    path, fingerprint = build_tokenizer(engine, config)
    return path, config.tokens.eos, config.tokens.bos, fingerprint


@lru_cache(1)
def load(path: str, eos: str, bos: bool, fingerprint: str) -> tokenizer.Tokenizer:
    """The tokeniser, kept from one partition to the next. fingerprint: so that a file that has changed is another."""
    return tokenizer.load(path, TokensConfig(eos=eos, bos=bos))


def encode_partition(out: Attempt, path: str, coder: Coder) -> dict[str, Any]:
    """One row group after the other, so that memory is bounded by that."""
    counted: list[pa.Table] = []

    def encoded() -> Iterator[pa.Table]:
        for documents in read_groups(path, ["doc", "source", "text"]):
            table, counts = tokenizer.encode_table(documents, load(*coder))
            counted.append(counts)
            yield table

    out.arrow("tokens", encoded(), tokenizer.TOKENS)
    return tokenizer.aggregates(pa.concat_tables(counted))


def main(engine: Engine, config: Config, arguments: argparse.Namespace) -> None:
    commits = build(engine, config)
    tokens, size, scripts = (corpus.totals(commits, name) for name in ("tokens", "bytes", "scripts"))
    whole = {"tokens": sum(tokens.values()), "bytes": sum(size.values())}
    sources = {source: {"tokens": count, "bytes": size[source]} for source, count in tokens.items()}
    for kind, counts in (("", sources), ("script ", scripts), ("", {"all": whole})):
        for name, count in counts.items():
            rate = count["tokens"] / max(1, count["bytes"])
            say(f"{kind}{name}: {count['tokens']:,} tokens, {rate:.3f} tokens per byte")


if __name__ == "__main__":
    from jobs.cli import run

    run("tokens")
