"""The tokens job: a SentencePiece model trained with weighted sources, encoding, resume, and what renews the ids."""

import argparse
import json
import shutil
from pathlib import Path

import pytest
import sentencepiece

from dataprep.storage import UserError, read_table
from dataprep.tokenizer import TokensConfig
from dataprep.tokenizer_training import train
from jobs import corpus, tokens
from jobs.config import Config, load
from jobs.engine import Engine
from tests.jobs import small
from tests.tree import tree

TOKENS = {"kind": "sentencepiece-bpe", "vocab_size": 400, "sample_mb": 0.02, "source_weights": {"rare": 5, "none": 0}}


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Config:
    """Three sources in several partitions each, encoded."""
    folder = tmp_path_factory.mktemp("tokens")
    sources = []
    for seed, name in enumerate(("common", "rare", "none")):
        small.write_corpus(folder / name, files=2, documents=20, seed=seed)
        sources.append({"name": name, "paths": [str(folder / name)]})
    sections = {"corpus": {"sources": sources, "partition_mb": 0.03, "group_mb": 0.03}, "tokens": TOKENS}
    made = load(small.write_config(folder, **sections))
    run(made)
    return made


def run(config: Config) -> None:
    with Engine(config.root, config.workers) as engine:
        tokens.main(engine, config, argparse.Namespace())


def test_ids_are_the_librarys_and_sums_agree(config: Config) -> None:
    with Engine(config.root, 0) as engine:
        path, _ = tokens.build_tokenizer(engine, config)
        commits = tokens.build(engine, config)
        partitions = corpus.partitions(engine, config)
        size = corpus.totals(corpus.build(engine, config), "bytes")
    oracle = sentencepiece.SentencePieceProcessor(model_file=path)
    count = dict.fromkeys(size, 0)
    for p, commit in zip(partitions, commits, strict=True):
        documents, encoded = read_table(p.documents), read_table(commit.path("tokens"))
        assert encoded["doc"].equals(documents["doc"])
        for text, ids in zip(documents["text"].to_pylist(), encoded["ids"].to_pylist(), strict=True):
            expected = [*oracle.encode(text), oracle.eos_id()]
            assert list(memoryview(ids).cast("H")) == expected
            count[p.source] += len(expected)
    assert corpus.totals(commits, "tokens") == count
    assert corpus.totals(commits, "bytes") == size
    assert corpus.totals(commits, "scripts") == {"Latin": {"tokens": sum(count.values()), "bytes": sum(size.values())}}


def test_what_is_lost_is_made_again_to_the_same_bytes(config: Config) -> None:
    root = Path(config.root)
    before = tree(root)
    for lost in [*root.glob("tokens-*/*.arrow"), *root.glob("tokenizer-*")][1:]:
        shutil.rmtree(lost) if lost.is_dir() else lost.unlink()
    run(config)
    assert tree(root) == before


def test_only_another_tokeniser_renews_the_ids(config: Config, tmp_path: Path) -> None:
    """A file's place, or how it was once trained, is nothing to the ids; its bytes and the control tokens are."""
    with Engine(config.root, 0) as engine:
        model = Path(tokens.build_tokenizer(engine, config)[0])
        directory = tokens.build(engine, config)[0].directory
    elsewhere, other = tmp_path / "same.model", tmp_path / "other.json"
    shutil.copy(model, elsewhere)
    from tests.dataprep.test_tokenizer import CONFIG, CORPUS

    other.write_bytes(train(CORPUS, CONFIG))
    ran = {}
    for name, changes in {
        "moved": {"tokenizer": str(elsewhere), "vocab_size": 999, "seed": 3},
        "begin": {"tokenizer": str(elsewhere), "bos": True},
        "other": {"tokenizer": str(other)},
    }.items():
        changed = config.model_copy(update={"tokens": TokensConfig(**changes)})
        with Engine(config.root, 0) as engine:
            ran[name] = tokens.build(engine, changed)[0].directory
    assert ran["moved"] == directory
    assert len(set(ran.values())) == 3


def test_sample_sizes() -> None:
    text = {"a": 900_000, "b": 100_000}
    assert tokens.sample_sizes(text, TokensConfig(sample_mb=0.1)) == {"a": 90_000, "b": 10_000}
    weighted = TokensConfig(sample_mb=0.18, source_weights={"b": 9})
    assert tokens.sample_sizes(text, weighted) == {"a": 90_000, "b": 90_000}
    assert tokens.sample_sizes(text, TokensConfig(sample_mb=0.4, source_weights={"b": 99})) == {
        "a": 300_000,
        "b": 100_000,
    }
    assert tokens.sample_sizes(text, TokensConfig(source_weights={"a": 0})) == {"a": 0, "b": 100_000}
    with pytest.raises(UserError, match="no text to train on"):
        tokens.sample_sizes(text, TokensConfig(source_weights={"a": 0, "b": 0}))


def test_a_sample_leaves_out_what_weighs_nothing(config: Config) -> None:
    (commit,) = Path(config.root).glob("tokenizer-*/*.commit.json")
    sizes = json.loads(commit.read_text())["aggregates"]["sample"]
    assert sizes["none"] == 0 and sizes["rare"] > 3 * sizes["common"] > 0
