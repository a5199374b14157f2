"""Tokens job: trains or loads the tokeniser and encodes every document."""

if not __package__:  # run as a script
    import _script  # noqa: F401

import argparse
from functools import lru_cache

from dataprep import storage, tokenizer
from dataprep.storage import Attempt, Commit, UserError, read_table
from dataprep.tokenizer import TokensConfig
from jobs import corpus
from jobs.config import Config
from jobs.engine import Engine, Step, Task, once_per_run
from jobs.progress import say

VERSION = 3


@once_per_run
def build_tokenizer(engine: Engine, config: Config) -> tuple[str, str]:
    """(path, fingerprint) of the tokeniser file: the one given, or one trained on this corpus and then kept.

    Once trained it stays as it is when files are added: a model cannot change its tokeniser. To train anew, remove
    its directory.
    """
    if given := config.tokens.tokenizer:
        try:
            data = storage.read_bytes(given)
        except FileNotFoundError:
            raise UserError(f"tokens.tokenizer: there is no file {given}") from None
        except (OSError, ImportError, ValueError) as error:
            raise UserError(f"tokens.tokenizer: {given} cannot be read ({error}); name a tokeniser file") from None
        return given, storage.fingerprint(storage.xxhash.xxh3_128_hexdigest(data))
    partitions = corpus.partitions(engine, config)
    step = Step("tokenizer", VERSION, config.tokens.model_dump(mode="json", exclude={"tokenizer"}))
    inputs = {p.key: p.fingerprint for p in partitions}
    size = min(sum(p.bytes for p in partitions), int(config.tokens.sample_mb * 1e6))
    task = Task("all", inputs, ([p.documents for p in partitions], config.tokens), size)
    commit = engine.once(step, train_tokenizer, task, frozen=True)
    return commit.path("tokenizer"), commit.files["tokenizer"]["xxh3"]


def train_tokenizer(out: Attempt, paths: list[str], config: TokensConfig) -> dict:
    data = tokenizer.train(tokenizer.sample(paths, config), config)
    with out.file("tokenizer", ".json") as path, open(path, "wb") as file:
        file.write(data)
    return {"bytes": len(data)}


@once_per_run
def build(engine: Engine, config: Config) -> list[Commit]:
    """Bring the token ids up to date: one commit per corpus partition."""
    path, fingerprint = build_tokenizer(engine, config)
    step = Step("tokens", VERSION, config.tokens.model_dump(mode="json"))
    tasks = [p.task(path, config.tokens, tokenizer=fingerprint) for p in corpus.partitions(engine, config)]
    return engine.map(step, encode_partition, tasks)


@lru_cache(1)
def _load(path: str, config: TokensConfig) -> tokenizer.Tokenizer:
    return tokenizer.load(path, config)


def encode_partition(out: Attempt, path: str, tokenizer_path: str, config: TokensConfig) -> dict:
    table, counts = tokenizer.encode_table(read_table(path, ["doc", "source", "text"]), _load(tokenizer_path, config))
    out.arrow("tokens", [table], table.schema)
    return counts


def main(engine: Engine, config: Config, arguments: argparse.Namespace) -> None:
    commits = build(engine, config)
    tokens, size = (corpus.totals(commits, name) for name in ("tokens", "bytes"))
    for source, count in tokens.items():
        say(f"{source}: {count:,} tokens, {count / max(1, size[source]):.3f} tokens per byte")
    say(f"tokens: {sum(tokens.values()):,}")


if __name__ == "__main__":
    from jobs.cli import run

    run("tokens")
