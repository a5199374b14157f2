"""The data jobs from raw files to packed shards: resume, staleness, added and removed input, kills, takedowns."""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from dataprep import storage, tokenizer
from dataprep.storage import Commit, UserError, read_table
from jobs import corpus, dedup, export, mix, quality, tokens
from jobs.config import load
from jobs.engine import Engine
from mixer import pack
from mixer.reader import ShardLog
from tests.jobs import small
from tests.tree import commits, tree

CHECKOUT = Path(__file__).resolve().parents[2]


def run(folder: Path, job=mix, **sections) -> None:
    """Run a job in this process on the small corpus in `folder/in`."""
    config = load(small.write_config(folder, **sections))
    with Engine(config.root, config.workers) as engine:
        flags = argparse.Namespace(plan_only=False, explain=None, diff=None, examples=False)
        job.main(engine, config, flags)


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Path:
    """A finished run up to packed shards. Tests that change it take a copy."""
    folder = tmp_path_factory.mktemp("done")
    small.write_corpus(folder / "in")
    small.write_quality_files(folder)
    run(folder, **settings(folder))
    return folder


@pytest.fixture
def copy(done, tmp_path) -> Path:
    """A copy of the finished run that reads the same input files."""
    shutil.copytree(done / "root", tmp_path / "root")
    (tmp_path / "in").symlink_to(done / "in")
    return tmp_path


def settings(done: Path) -> dict:
    """A configuration with all that quality can do; the source's paths as in the finished run, so that a copy finds
    the same manifest entries."""
    quality = {
        "classifier": str(done / "model.safetensors"),
        "score": "quality",
        "tiers": [{"by": "quantile", "low": 0.2, "high": 0.7}],
        "decontaminate": {"sets": {"quiz": str(done / "quiz.jsonl")}},
    }
    return {"corpus": {"sources": [{"name": "tales", "paths": [str(done / "in")]}]}, "quality": quality}


def test_planted_duplicates_and_bad_lines_are_found(done):
    config = load(small.write_config(done, **settings(done)))
    with Engine(config.root, 0) as engine:
        built = corpus.build(engine, config)
        verdicts = [row for c in dedup.build(engine, config) for row in read_table(c.path("dedup")).to_pylist()]
        documents = [r for p in corpus.partitions(engine, config) for r in read_table(p.documents).to_pylist()]
        tiers = quality.tiers(quality.build(engine, config))
        hits = [c.aggregates["evaluation"]["tales"].get("quiz", 0) for c in quality.build(engine, config)]
    assert corpus.totals(built, "quarantined") == {"tales": {"malformed JSON": 3, "empty text": 3}}
    assert corpus.totals(built, "documents") == {"tales": 3 * 62} and len(documents) == 3 * 62
    assert sum(tiers["tales"].values()) == 3 * 62 and min(tiers["tales"].values()) > 30 and sum(hits) == 1
    by_id, kept = {d["doc"]: d for d in documents}, {v["doc"] for v in verdicts if v["keep"]}
    removed = {by_id[v["doc"]]["id"]: (v["reason"], by_id[v["keeper"]]["id"]) for v in verdicts if not v["keep"]}
    for n in range(3):
        assert removed[f"{n}-60"] == ("exact", f"{n}-1")
        pair = {f"{n}-61", f"{n}-0"}
        gone = next(iter(pair & set(removed)))
        assert removed[gone] == ("near", next(iter(pair - {gone})))
    assert all(v["keeper"] in kept and v["jaccard"] >= 0.8 for v in verdicts if not v["keep"])
    assert len(removed) == 6


def test_shards_hold_the_documents_tokens_in_planned_shares(done):
    config = load(small.write_config(done, **settings(done)))
    documents = {}
    with Engine(config.root, 0) as engine:
        coder = tokenizer.load(tokens.build_tokenizer(engine, config)[0], config.tokens)
        for p, commit in zip(corpus.partitions(engine, config), tokens.build(engine, config), strict=True):
            texts, encoded = read_table(p.documents), read_table(commit.path("tokens"))
            for doc, text, ids in zip(texts["doc"], texts["text"], encoded["ids"], strict=True):
                documents[doc.as_py()] = np.frombuffer(ids.as_py(), np.uint16)
                assert coder.decode(documents[doc.as_py()][:-1]) == text.as_py()
        stages = mix.prepare(engine, config).stages
    longest = max(s.info.context for s in stages)
    trained, held_out = set(), set()
    for stage in stages:
        log = ShardLog(stage.directory)
        total = log.wait(1 << 60)
        batch = log.read(0, total)
        drawn: dict[tuple[int, int], int] = {}
        for s in batch.segments:
            doc, offset = int(s["doc"]), int(s["offset"])
            ids = batch.tokens[s["sequence"], s["start"] : s["start"] + s["length"]]
            assert np.array_equal(ids, documents[doc][offset : offset + len(ids)])
            drawn[doc, int(s["copy"])] = drawn.get((doc, int(s["copy"])), 0) + len(ids)
            (held_out if stage.info.stage == "held-out" else trained).add(doc)
        for (doc, _), count in drawn.items():
            assert count == len(documents[doc]) or len(documents[doc]) > longest
        end = storage.read_json(storage.join(stage.directory, "end.json"))
        if stage.info.stage == "longer":
            packed = dict.fromkeys(log.stage.classes, 0)
            for cell in end["totals"]["cells"]:
                packed[cell["length_class"]] += cell["tokens"]
            for name, share in {"short": 0.3, "medium": 0.4, "long": 0.3}.items():
                assert packed[name] / end["totals"]["packed"] == pytest.approx(share, abs=0.01)
    assert held_out and not held_out & trained


def test_a_second_run_changes_nothing_and_any_removed_directory_comes_back(done, copy):
    before = tree(copy / "root")
    stamps = {f: f.stat().st_mtime_ns for f in (copy / "root").rglob("*") if f.is_file() and f.name != ".lock"}
    run(copy, **settings(done))
    assert tree(copy / "root") == before and all(f.stat().st_mtime_ns == stamp for f, stamp in stamps.items())
    for directory in sorted(d for d in (copy / "root").iterdir() if d.is_dir()):
        shutil.rmtree(directory)
        run(copy, **settings(done))
        assert tree(copy / "root") == before, directory.name


def test_an_added_file_is_the_only_one_read(tmp_path, monkeypatch):
    small.write_corpus(tmp_path / "in", files=2)
    run(tmp_path)
    content = small.file_content(random.Random("new"), 20, 7)
    (tmp_path / "in" / "07.jsonl").write_text(content)
    ran: dict[str, list[str]] = {}
    steps = [(corpus, "make_group"), (dedup, "sign_partition"), (tokens, "encode_partition")]
    steps += [(quality, "measure_partition"), (quality, "score_partition")]

    def watched(name, function):
        return lambda out, *args: (ran.setdefault(name, []).append(out.key), function(out, *args))[1]

    for module, name in steps:
        monkeypatch.setattr(module, name, watched(name, getattr(module, name)))
    run(tmp_path)
    manifest = [json.loads(line) for line in (tmp_path / "root" / "manifest.jsonl").read_text().splitlines()]
    groups = {entry["group"] for entry in manifest if entry["path"].endswith("07.jsonl")}
    assert set(ran) == {name for _, name in steps}
    assert {int(key.split("-")[0]) for keys in ran.values() for key in keys} == groups


def test_a_removed_file_leaves_no_trace_in_the_shards(tmp_path):
    small.write_corpus(tmp_path / "in", files=3)
    run(tmp_path)
    (tmp_path / "in" / "01.jsonl").unlink()
    run(tmp_path)
    directory = storage.read_json(str(tmp_path / "root/latest/pack-base.json"))["directory"]
    log = ShardLog(str(tmp_path / "root" / directory))
    segments = log.read(0, log.wait(1 << 60)).segments
    assert len(segments) and not (segments["doc"] >> 40 == 1).any()


def test_takedowns_reach_every_stage_without_new_tokens(done, copy):
    config = load(small.write_config(copy, **settings(done)))
    with Engine(config.root, 0) as engine:
        paths = [p.documents for p in corpus.partitions(engine, config)]
        rows = [row for p in paths for row in read_table(p, ["doc", "id", "content_hash"]).to_pylist()]
    victims = [rows[5], rows[70], rows[100]]
    names = [f"doc:{victims[0]['doc']}", victims[1]["id"], victims[2]["content_hash"].hex()]
    (copy / "exclude.txt").write_text("\n".join(names) + "\n")
    before = {d.name: d.stat().st_mtime_ns for d in (copy / "root").glob("tokens-*/*")}
    run(copy, mix={"exclude": str(copy / "exclude.txt")}, **settings(done))
    assert before == {d.name: d.stat().st_mtime_ns for d in (copy / "root").glob("tokens-*/*")}
    for pointer in (copy / "root/latest").glob("pack-*.json"):
        log = ShardLog(str(copy / "root" / json.loads(pointer.read_text())["directory"]))
        docs = set(log.read(0, log.wait(1 << 60)).segments["doc"].tolist())
        assert docs and not docs & {v["doc"] for v in victims}


def test_contaminated_documents_are_dropped_or_kept(done, copy):
    config = load(small.write_config(copy, **settings(done)))
    with Engine(config.root, 0) as engine:
        rows = [r for p in corpus.partitions(engine, config) for r in read_table(p.documents).to_pylist()]
    victim = next(r for r in rows if r["id"] == "1-30")
    lines = victim["text"].upper().split("\n")
    (copy / "quiz.jsonl").write_text(json.dumps({"question": lines[0], "answer": lines[1]}) + "\n")
    section = {"sets": {"quiz": {"path": str(copy / "quiz.jsonl"), "fields": ["question", "answer"]}}}
    docs = {}
    for action in ("drop", "keep"):
        sections = {**settings(done), "quality": {"decontaminate": {**section, "action": action}}}
        run(copy, **sections)
        log = ShardLog(str(copy / "root" / storage.read_json(str(copy / "root/latest/pack-base.json"))["directory"]))
        docs[action] = set(log.read(0, log.wait(1 << 60)).segments["doc"].tolist())
        plan = storage.read_json(str(next((copy / "root").glob(f"{latest(copy, 'plan')}/*.plan.*.json"))))
        assert plan["removed"]["contaminated"]["documents"] == (action == "drop")
        run(copy, export, **sections)
        files = (copy / "root" / latest(copy, "export")).glob("*.parquet")
        exported = {row["id"] for f in files for row in read_table(str(f)).to_pylist()}
        assert ("1-30" in exported) == (action == "keep") and len(exported) == 3 * 60 - (action == "drop")
        found = [storage.read_json(str(f)) for f in (copy / "root" / latest(copy, "quality")).glob("*.commit.json")]
        assert sum(c["aggregates"]["evaluation"]["tales"].get("quiz", 0) for c in found) == 1
    assert victim["doc"] not in docs["drop"]


def latest(folder: Path, step: str) -> str:
    return storage.read_json(str(folder / f"root/latest/{step}.json"))["directory"]


def test_rules_and_tiers_are_tried_out_without_measuring_again(done, copy, monkeypatch):
    monkeypatch.setattr(quality, "measure_partition", None)
    tiers = [{"by": "quantile", "low": 0.3, "high": 0.7}]
    sections = settings(done)
    sections["quality"] |= {"rules": ["fineweb"], "tiers": tiers}
    config = load(small.write_config(copy, **sections))
    with Engine(config.root, 0) as engine:
        quality.main(engine, config, argparse.Namespace(examples=True))
        counts = quality.tiers(quality.build(engine, config))["tales"]
        rows = quality.examples(engine, config)
    assert sum(counts.values()) == 3 * 62 and min(counts.values()) > 30
    page = (copy / "root/quality-examples.html").read_text()
    assert [row["tier"] for row in rows] == ["high"] * 3 + ["medium"] * 3 + ["low"] * 3
    assert all(str(row["doc"]) in page for row in rows) and page.count("<h2>tales: ") == 3


def test_a_broken_promise_stops_the_job_before_the_stage_ends(done, copy, monkeypatch):
    for directory in (copy / "root").glob("pack-*"):
        shutil.rmtree(directory)

    def lossy(*args):
        packed = pack.pack_window(*args)
        packed.counts["sources"]["tales"]["packed"] -= 1
        return packed

    monkeypatch.setattr(mix, "pack_window", lossy)
    with pytest.raises(UserError, match=r"stage held-out is not packed as promised: source tales: \d+ tokens in, but"):
        run(copy, **settings(done))
    assert not list((copy / "root").rglob("end.json"))


def test_export_writes_what_is_kept(done, copy):
    sections = {**settings(done), "export": {"formats": ["parquet", "jsonl.zst", "megatron"]}}
    run(copy, export, **sections)
    folder = next((copy / "root").glob("export-*"))
    rows = [row for f in sorted(folder.glob("*.parquet")) for row in read_table(str(f)).to_pylist()]
    assert len(rows) == 3 * 60 - 1 and {"text", "tier", "score", "n_tokens"} <= set(rows[0])
    import zstandard

    lines = b"".join(
        zstandard.ZstdDecompressor().stream_reader(f.open("rb")).read() for f in sorted(folder.glob("*.jsonl.zst"))
    )
    assert [json.loads(line)["text"] for line in lines.splitlines()] == [row["text"] for row in rows]
    total = sum(row["n_tokens"] for row in rows)
    assert sum(f.stat().st_size for f in folder.glob("*.bin")) == 2 * total
    assert {f.stem for f in folder.glob("*.bin")} == {f.stem for f in folder.glob("*.idx")}


@pytest.mark.parametrize(
    "sections,message",
    [
        ({"corpus": {"sources": [{"name": "x", "paths": ["/no/such/*.jsonl"]}]}}, "/no/such"),
        ({"tokens": {"tokenizer": "/no/such/tokenizer.json"}}, "/no/such/tokenizer.json"),
        ({"tokens": {"tokenizer": "nowhere://x/tokenizer.json"}}, "cannot be read"),
        ({"mix": {"exclude": "/no/such/list"}}, "/no/such/list"),
        ({"mix": {"stages": [{"name": "b", "context": 128, "tokens": 10**9}]}}, "b"),
        ({"dedup": {"max_source_loss": 0.0}}, "max_source_loss"),
        ({"mix": {"stages": [{"name": "b", "context": 128, "tokens": 9999, "source_weights": {"tail": 1}}]}}, "tail"),
    ],
)
def test_impossible_wishes_are_one_clear_message(done, copy, sections, message):
    with pytest.raises(UserError, match=message):
        run(copy, **{**settings(done), **sections})
    assert not list((copy / "root").rglob(".tmp-*"))


def command(done: Path, root: Path, job: str, workers: int) -> list[str]:
    config = small.write_config(done, **settings(done), export={"formats": ["parquet", "jsonl.zst", "megatron"]})
    return [sys.executable, f"jobs/{job}.py", config, "--workers", str(workers), "--root", str(root)]


def finish(arguments: list[str]) -> None:
    done = subprocess.run(arguments, cwd=CHECKOUT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("workers", [1, 2])
def test_same_bytes_on_ray(done, tmp_path, workers):
    finish(command(done, tmp_path / "root", "mix", workers))
    assert tree(tmp_path / "root") == tree(done / "root")


def kill(arguments: list[str], root: Path, goal: int) -> None:
    """Start the command and SIGKILL it with all its workers when `goal` commits are there."""
    run = subprocess.Popen(
        arguments, cwd=CHECKOUT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    while run.poll() is None and commits(root) < goal:
        time.sleep(0.002)
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()


JOBS = ["corpus", "dedup", "quality", "tokens", "mix", "export"]


def test_two_kills_of_every_job_leave_no_trace(done, tmp_path):
    """The jobs one after the other, each killed at two moments of its own work, then run to its end."""
    for job in JOBS:
        finish(command(done, tmp_path / "whole", job, 0))
        for _ in range(2):
            before, goal = commits(tmp_path / "killed"), commits(tmp_path / "whole")
            moment = before + random.Random(f"{job} {before}").randint(1, max(1, goal - before - 1))
            kill(command(done, tmp_path / "killed", job, 0), tmp_path / "killed", moment)
        finish(command(done, tmp_path / "killed", job, 0))
        assert tree(tmp_path / "killed") == tree(tmp_path / "whole"), job


def test_a_kill_with_all_ray_workers_leaves_no_trace(done, tmp_path):
    kill(command(done, tmp_path / "root", "mix", 2), tmp_path / "root", commits(done / "root") // 3)
    finish(command(done, tmp_path / "root", "mix", 2))
    assert tree(tmp_path / "root") == tree(done / "root")


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(15))
def test_soak_thirty_kills(done, tmp_path, seed):
    rng = random.Random(seed)
    for goal in sorted(rng.sample(range(1, commits(done / "root")), 2)):
        kill(command(done, tmp_path / "root", "mix", rng.choice([0, 2])), tmp_path / "root", goal)
    finish(command(done, tmp_path / "root", "mix", 2))
    assert tree(tmp_path / "root") == tree(done / "root")


def test_commits_can_be_read_by_anyone(done):
    """Every commit is plain JSON that names existing files with their sizes and checksums."""
    files = list((done / "root").rglob("*.commit.json"))
    assert len(files) > 20
    for file in files:
        commit = Commit.load(str(file.parent), file.name.removesuffix(storage.COMMIT))
        for entry in commit.files.values():
            path = file.parent / entry["name"]
            assert path.stat().st_size == entry["bytes"] and storage.checksum(str(path)) == entry["xxh3"]
