"""The ablation: its split leaks nothing, all arms have one learning rate, and a small run gives figures and goes on."""

import importlib.util
import json
import random
import sys
from argparse import Namespace

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import ablation, ablation_data, ablation_results
from mixer.reader import SEGMENT, ShardLog
from tests.corpora import write
from tests.jobs import small
from trainer.schedule import learning_rate


def sizes(**other):
    values = {
        "corpus": "", "sources": None, "quick": True, "context": 256, "tokens": 30_000, "passes": 0.5, "lr": 4e-3,
        "at_once": 1, "overrides": ["--tokens.vocab_size", "512"],
    }  # fmt: skip
    return Namespace(**values | other)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two sources; in each, some documents have an exact copy and some a near one."""
    directory = tmp_path_factory.mktemp("corpora")
    for name in ("tales", "news"):
        rng = random.Random(name)
        texts = [small.text(rng, rng.choice([6, 6, 15, 40, 100])) for _ in range(150)]
        texts += texts[::5] + [f"{t} Once more." for t in texts[::3]]
        write(directory, name, ({"text": t, "id": str(i)} for i, t in enumerate(texts)))
    return directory


@given(st.lists(st.integers(0, 19), min_size=20, max_size=20), st.lists(st.integers(0, 19), min_size=20, max_size=20))
def test_components_are_those_of_a_search(first, second):
    doc = np.arange(20) * 7 + 3
    number = ablation_data.components(doc, [doc[first], doc[second]])
    neighbours = [{first[i], second[i]} | {j for j in range(20) if i in (first[j], second[j])} for i in range(20)]
    for start in range(20):
        reached, new = set(), {start}
        while new:
            reached, new = reached | new, set().union(*(neighbours[i] for i in new)) - reached - new
        assert (number == number[start]).nonzero()[0].tolist() == sorted(reached)


def test_all_arms_have_the_same_learning_rate_at_every_token(folder):
    a = sizes(corpus=str(folder), tokens=1000)
    for arm in ("raw", "curriculum"):
        config = ablation.configuration(a, folder, arm)
        assert config.tokens.vocab_size == 512  # as the overrides have it
        rates = []
        for stage in config.mix.stages:
            phases = config.train.stages[stage.name]
            rates += [learning_rate(phases, n, stage.tokens) for n in range(1, stage.tokens + 1)]
        expected = np.interp(np.arange(1, 1001) / 1000, [0, 0.05, 0.6, 1], [0, 4e-3, 4e-3, 4e-4])
        np.testing.assert_allclose(rates, expected, rtol=1e-6)


def test_the_split_is_the_same_for_all_arms_and_leaks_nothing(folder, tmp_path):
    a = sizes(corpus=str(folder))
    results, documents = ablation_data.load(ablation.configuration(a, tmp_path / "shared"), str(tmp_path / "related"))
    doc, kept, clean, related = (documents[name].to_numpy() for name in ("doc", "kept", "clean", "related"))
    assert (~kept).sum() >= 100 and len(np.unique(related)) <= kept.sum()
    groups = dict(zip(doc.tolist(), related.tolist(), strict=True))
    read, held_out = {}, {}
    for arm in ablation.ARMS:
        config = ablation.configuration(a, tmp_path / arm, arm, seed=1)
        read[arm] = ablation_data.pack(results, documents, arm, config, pool_tokens=60_000)
        keep = ablation_data.may_be_drawn(documents, arm, config, pool_tokens=60_000)
        drawn = {True: [], False: []}
        for path in (tmp_path / arm).glob("pack-*"):
            log = ShardLog(str(path))
            drawn["held-out" in path.name].append(log.read(0, log.wait(1 << 62)))
        assert len(drawn[False]) == len(config.mix.stages)
        (held,) = drawn[True]
        held_out[arm] = held.tokens.tobytes()
        unseen = np.unique(held.segments["doc"])
        seen = np.unique(np.concatenate([batch.segments["doc"] for batch in drawn[False]]))
        assert not {groups[d] for d in unseen.tolist()} & {groups[d] for d in seen.tolist()}
        assert set(seen.tolist()) <= set(doc[keep].tolist()) and set(unseen.tolist()) <= set(doc[clean].tolist())
    assert len(set(held_out.values())) == 1 and len(held_out["raw"]) > 0
    assert read["raw"]["duplicates"] > 0.02
    assert all(read[arm]["duplicates"] == 0 for arm in ablation.ARMS[1:])
    assert read["filtered"]["unclean"] == read["upsampled"]["unclean"] == 0


def test_what_is_read_counts_repeats_and_duplicates_by_tokens():
    columns = {"doc": [1, 2, 3, 4], "n_tokens": [10, 12, 20, 30], "cluster": [1, 1, 3, 4]}
    documents = pa.table(columns | {"clean": [True, False, False, True]})

    class Log:
        def wait(self, wanted):
            return 2

        def read(self, start, stop):
            segments = np.zeros(5, SEGMENT)
            segments["doc"], segments["length"] = [1, 2, 3, 4, 1], [10, 12, 20, 30, 8]
            segments["tier"], segments["length_class"] = [2, 0, 1, 2, 2], [0, 0, 1, 2, 0]
            return Namespace(segments=segments)

    found = ablation_data.what_is_read(documents, [Log()])
    assert found == pytest.approx(
        {"tokens": 80, "documents": 4, "repeats": 8 / 80, "duplicates": 10 / 80, "unclean": 20 / 80}
        | {"high tier": 48 / 80, "long documents": 30 / 80}
    )


def report(bits, loss, needle):
    return {
        "sources": {"a": {"bits_per_byte": bits - 0.5}, "b": {"bits_per_byte": bits + 0.5}},
        "classes": {"long": {"bits_per_byte": bits}, "short": {"bits_per_byte": bits}},
        "positions": [{"from": 0, "to": 1, "tokens": 5, "loss": loss}, {"from": 1, "to": 3, "tokens": 9, "loss": loss}],
        "needle": [{"length": 64, "depth": d, "samples": 2, "exact": needle * d * 2} for d in (0.0, 0.5, 1.0)],
        "recall": [{"length": 64, "pairs": 3, "samples": 2, "exact": 0.0}],
    }


def test_tables_have_mean_spread_and_the_difference_seed_by_seed(tmp_path, capsys):
    bits = {"raw": (2, 3), "dedup": (1.8, 2.9), "filtered": (2, 3), "upsampled": (2.1, 3.1), "curriculum": (2, 3)}
    found = {
        (arm, seed): {
            "read": {"tokens": 1000, "repeats": 0.25},
            "own": report(values[seed], 1.0, 0.0),
            "longest": report(values[seed], 5.0 if arm == "upsampled" else 4.0, 0.5),
        }
        for arm, values in bits.items()
        for seed in (1, 0)
    }
    draws = importlib.util.find_spec("matplotlib")
    figures = ablation_results.show(found, str(tmp_path) if draws else None)
    lines = capsys.readouterr().out.splitlines()
    expected = "2.350 ± 0.778 (-0.150 ± 0.071) | 2.500 ± 0.707 (+0.000 ± 0.000) | 2.600 ± 0.707 (+0.100 ± 0.000) |"
    assert f"| mean of the sources | 2.500 ± 0.707 | {expected}" in lines
    assert "| position 1 to 2 | 5.000 ± 0.000 | 4.000 ± 0.000 (-1.000 ± 0.000) |" in lines
    assert figures["data.a.dedup"] == pytest.approx(1.85) and figures["data.a.dedup_spread"] == pytest.approx(
        0.7778, rel=1e-3
    )
    assert figures["length.needle,_64_tokens.curriculum"] == 0.5 and figures["read.repeats.raw"] == 0.25
    assert [path.stat().st_size > 1000 for path in tmp_path.glob("*.svg")] == [True, True] * bool(draws)


def test_a_quick_run_ends_in_figures_and_goes_on(folder, tmp_path, monkeypatch):
    arguments = ["x", "--corpus", str(folder), "--quick", "--root", str(tmp_path / "root")]
    monkeypatch.setattr(sys, "argv", [*arguments, "--json", str(tmp_path / "figures.json")])
    ablation.main()
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert all(0 < figures[f"data.mean_of_the_sources.{arm}"] < 8 for arm in ("raw", "dedup", "filtered", "upsampled"))
    assert {"data.tales.raw", "length.needle,_2,048_tokens.curriculum", "read.tokens.raw"} <= set(figures)

    trained = {path: path.stat().st_mtime_ns for path in (tmp_path / "root").glob("*/train-*/*/*.json")}
    ablation.main()
    assert json.loads((tmp_path / "figures.json").read_text()) == figures and len(trained) >= 14
    assert trained == {path: path.stat().st_mtime_ns for path in (tmp_path / "root").glob("*/train-*/*/*.json")}
