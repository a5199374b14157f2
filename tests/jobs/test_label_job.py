"""The label job against a real server on this machine that lies, hangs and fails; budget, key, kill and resume."""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from dataprep.classifier import Classifier
from dataprep.storage import UserError
from jobs import chat, classifier, label
from jobs.config import load
from jobs.engine import DryRunEnd, Engine
from tests.jobs import small
from tests.jobs.endpoint import GOOD, Endpoint
from tests.tree import commits, tree

CHECKOUT = Path(__file__).resolve().parents[2]
KEY = "sk-very-secret-0123456789"
USAGE = {"prompt_tokens": 1000, "completion_tokens": 20}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A small corpus, its quality scored and its sample taken: every test labels it under a model name of its own."""
    folder = tmp_path_factory.mktemp("label")
    small.write_corpus(folder / "in", files=2, documents=30)
    config = load(small.write_config(folder, labels={"per_stratum": 20}))
    with Engine(config.root, 0) as engine:
        label.build_sample(engine, config)
    return folder


def settings(server: Endpoint, model: str, **labels) -> dict:
    quick = {"backoff_s": 0.001, "retries": 3, "partition_rows": 4, "concurrency": 3, "per_stratum": 20}
    return {"labels": {"endpoint": server.url, "model": model, **quick, **labels}}


def run(folder: Path, server: Endpoint, model: str, dry_run=False, budget=None, **labels) -> list[dict]:
    """Run the job in this process; the rows of the model's labels, in the order of asking."""
    config = load(small.write_config(folder, f"{model}.yaml", **settings(server, model, **labels)))
    with Engine(config.root, 0, dry_run) as engine:
        label.main(engine, config, argparse.Namespace(budget=budget, command_line="my.yaml"))
        return rows_of(label.step(config.labels).directory(engine.root))


def rows_of(directory: str) -> list[dict]:
    return [row for c in label.committed(directory) for row in pq.read_table(c.path("labels")).to_pylist()]


def test_every_stratum_is_asked_about_once_and_rows_say_by_whom(folder):
    with Endpoint(lambda text, times: 0.02) as server:
        rows = run(folder, server, "plain")
        assert (
            len(rows) == len({r["doc"] for r in rows}) == len({r["text"] for r in rows}) == sum(server.asked.values())
        )
        counts = Counter((r["source"], r["tier"]) for r in rows)
        assert len(counts) > 1 and max(counts.values()) == 20
        assert {(r["model"], r["rubric"], len(r["rubric_hash"]), r["attempts"]) for r in rows} == {
            ("plain", "1", 32, 1)
        }
        assert all({k: r[k] for k in (*GOOD, *USAGE)} == {**GOOD, **USAGE} and r["failed"] is None for r in rows)
        request = server.requests[0]
        assert (request["path"], request["model"], request["max_tokens"]) == ("/v1/chat/completions", "plain", 200)
        assert "data to be rated" in request["messages"][0]["content"] and "Authorization" not in server.headers[0]
        assert 2 <= server.most_open <= 3
        asked = sum(server.asked.values())
        assert run(folder, server, "plain") == rows and sum(server.asked.values()) == asked


def test_long_texts_are_cut(folder):
    with Endpoint() as server:
        rows = run(folder, server, "cut", characters=100)
        assert max(len(t) for t in server.asked) == 100 and all(len(r["text"]) <= 100 for r in rows)


BAD_ANSWERS = {
    "not JSON": "I would say 3.",
    "fenced": f"```json\n{json.dumps(GOOD)}\n```",
    "out of range": json.dumps(GOOD | {"knowledge": 6}),
    "not whole": json.dumps(GOOD | {"knowledge": 3.5}),
    "a boolean": json.dumps(GOOD | {"helpfulness": True}),
    "unknown domain": json.dumps(GOOD | {"domain": "cats"}),
    "a domain of another type": json.dumps(GOOD | {"domain": ["other"]}),
    "one more key": json.dumps(GOOD | {"reason": "because"}),
    "a key twice": '{"knowledge": 1, "knowledge": 5, "helpfulness": 1, "domain": "other"}',
    "a list": "[3, 4]",
    "nested deep": "[" * 100_000,
    "empty": "",
    "no body": {"body": b""},
    "no choices": {"body": {"usage": USAGE}},
    "content of another type": {"body": {"choices": [{"message": {"content": 5}}]}},
    "endless": {"body": b'{"choices": "' + b"x" * (2 << 20)},
}


@pytest.mark.parametrize("what", BAD_ANSWERS)
def test_malformed_answers_are_asked_again_and_then_recorded(folder, what):
    """Of three texts, one is answered badly once, one always: only the latter fails, after three attempts."""
    texts: list[str] = []

    def behave(text, times):
        if text not in texts:
            texts.append(text)
        place = texts.index(text)
        return BAD_ANSWERS[what] if place == 1 or (place == 0 and times == 1) else None

    with Endpoint(behave) as server:
        rows = {r["text"]: r for r in run(folder, server, f"bad-{list(BAD_ANSWERS).index(what)}", per_stratum=3)}
        once, always = rows[texts[0]], rows[texts[1]]
        assert once["failed"] is None and once["attempts"] == 2
        assert always["failed"].startswith("malformed answer: ") and always["attempts"] == server.asked[texts[1]] == 3
        assert always["knowledge"] is None and always["domain"] is None
        assert sum(r["failed"] is not None for r in rows.values()) == 1
        asked = sum(server.asked.values())
        run(folder, server, f"bad-{list(BAD_ANSWERS).index(what)}", per_stratum=3)
        assert sum(server.asked.values()) == asked


FAULTS = {
    "429": {"status": 429},
    "retry later": {"status": 503, "headers": {"Retry-After": "0"}},
    "500": {"status": 500, "body": b"<html>"},
    "reset": "reset",
    "slow": 3.0,
}


@pytest.mark.parametrize("what", FAULTS)
def test_failing_calls_are_repeated(folder, what):
    """Every third question fails twice: all are rated in the end, and an answer is not mistaken for a second."""
    with Endpoint(lambda text, times: FAULTS[what] if times < 3 and len(text) % 3 == 0 else None) as server:
        rows = run(folder, server, f"fault-{what.replace(' ', '-')}", timeout_s=1, per_stratum=5)
        assert all(r["failed"] is None and r["attempts"] == 1 for r in rows)
        assert {server.asked[r["text"]] for r in rows} == {1, 3}


def test_retry_after_holds_for_all_questions(folder):
    """Two documents; the first question is told to wait a second: nothing that begins later comes sooner."""
    times: list[float] = []

    def behave(text, _):
        times.append(time.monotonic())
        return {"status": 429, "headers": {"Retry-After": "1"}} if len(times) == 1 else None

    with Endpoint(behave) as server:
        rows = run(folder, server, "patience", per_stratum=1, concurrency=1)
        assert all(r["failed"] is None for r in rows) and len(times) == len(rows) + 1
        assert times[1] - times[0] > 0.95


def test_an_endpoint_that_is_down_stops_the_job_and_is_asked_again_later(folder, monkeypatch):
    monkeypatch.setattr("jobs.label.MOST_UNRATED", 3)
    down = True
    with Endpoint(lambda text, times: {"status": 500} if down else None) as server:
        with pytest.raises(UserError, match=r"rated none of 3 documents in a row .*HTTP 500, 4 times"):
            run(folder, server, "down")
        assert sum(server.asked.values()) < 40
        down = False
        rows = run(folder, server, "down")
        rated = [r for r in rows if r["failed"] is None]
        assert {r["failed"] for r in rows} == {None, "no answer: HTTP 500, 4 times"}
        assert len({r["doc"] for r in rated}) == len(rated) == len({r["doc"] for r in rows})


@pytest.mark.parametrize(
    "what,message",
    [
        ({"status": 401, "body": {"error": f"Incorrect API key {KEY}"}}, "HTTP 401.; check the key in MY_KEY"),
        ({"status": 404, "body": {"error": f"no such model for {KEY}"}}, r"HTTP 404; check .*labels.model.*for \*\*\*"),
        ({"status": 307, "headers": {"Location": "http://127.0.0.1:9/steal"}}, "HTTP 307"),
    ],
)
def test_what_will_never_work_stops_at_once(folder, monkeypatch, what, message):
    monkeypatch.setenv("MY_KEY", KEY)
    with Endpoint(lambda text, times: what) as server:
        with pytest.raises(UserError, match=message) as caught:
            run(folder, server, f"never-{what['status']}", key_variable="MY_KEY")
        assert KEY not in str(caught.value) and sum(server.asked.values()) <= 3


def test_nobody_listens(folder):
    with Endpoint() as server:
        pass
    with pytest.raises(UserError, match="cannot connect to http"):
        run(folder, server, "nobody", retries=1)


def test_a_document_that_the_endpoint_refuses_costs_only_itself(folder):
    refused = {"status": 400, "body": {"error": {"message": "content\nfilter"}}}
    with Endpoint(lambda text, times: refused if len(text) % 4 == 0 else None) as server:
        rows = run(folder, server, "refused", concurrency=1)
        failed = [r for r in rows if r["failed"]]
        assert failed and {r["failed"] for r in failed} == {'HTTP 400: {"error": {"message": "content\\nfilter"}}'}
        assert all(len(r["text"]) % 4 == 0 and server.asked[r["text"]] == 1 for r in failed) and len(rows) > len(failed)


def test_a_model_that_never_keeps_to_the_form_does_not_spend_the_budget(folder, monkeypatch):
    monkeypatch.setattr("jobs.label.MOST_UNRATED", 3)
    told = pytest.raises(UserError, match=r"rated none of 3 documents in a row .*malformed answer")
    with Endpoint(lambda text, times: BAD_ANSWERS["endless"]) as server, told:
        run(folder, server, "useless", malformed_retries=0, concurrency=1)
    assert len(server.asked) == 3


def test_the_key_is_sent_and_never_shown(folder, tmp_path):
    """A server that quotes the key wherever it can, and a job as a user runs it: the key is in no file and no line."""

    def behave(text, times):
        bad = [
            {"status": 400, "body": f"key {KEY}".encode()},
            {"status": 500, "body": KEY.encode()},
            f"the key is {KEY}",
        ]
        return bad[len(text) % 4] if len(text) % 4 < 3 and times < 4 else None

    with Endpoint(behave) as server:
        sections = settings(server, "keyed", key_variable="MY_KEY", malformed_retries=0)
        config = small.write_config(folder, "keyed.yaml", **sections)
        command = [sys.executable, "jobs/label.py", config, "--root", str(tmp_path / "root")]
        environment = os.environ | {"MY_KEY": KEY}
        done = subprocess.run(command, cwd=CHECKOUT, env=environment, capture_output=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        assert {h["Authorization"] for h in server.headers} == {f"Bearer {KEY}"}
    assert KEY.encode() not in done.stdout + done.stderr
    files = [f for f in (tmp_path / "root").rglob("*") if f.is_file()]
    rows = [row for f in files if ".labels." in f.name for row in pq.read_table(f).to_pylist()]
    assert sum("***" in (r["failed"] or "") for r in rows) > 0
    assert not [f for f in files if KEY.encode() in f.read_bytes()] and KEY not in json.dumps(rows)


@pytest.mark.parametrize("budget", ["20000tokens", "0.5"])
def test_the_budget_holds_and_more_goes_on(folder, budget):
    """A call takes 1,020 tokens, or at 20 and 50 a million 0.021; what it could have taken is reserved before."""
    model = f"budget-{budget}"
    prices = {} if "tokens" in budget else {"price_input": 20, "price_output": 50}
    with Endpoint() as server:
        first = run(folder, server, model, budget=budget, **prices)
        calls = sum(server.asked.values())
        most, each = (20_000, 1020) if not prices else (0.5, 0.021)
        assert 3 < calls == len(first) and calls * each <= most
        assert len(first) + 1 < 37
        run(folder, server, model, budget=budget, **prices)  # for all runs together: at most a few shorter texts
        assert calls <= sum(server.asked.values()) <= most / each
        whole = run(folder, server, model, budget="9" + budget, **prices)
        assert {r["doc"] for r in first} < {r["doc"] for r in whole}
        assert sum(server.asked.values()) == len(whole) and set(server.asked.values()) == {1}


def test_a_lost_answer_counts_as_paid_for_in_full(folder):
    """Where nobody knows what a call took, it counts as the most that it can have taken."""
    with Endpoint(lambda text, times: "reset") as server, pytest.raises(UserError, match="documents in a row"):
        run(folder, server, "lost", retries=0, concurrency=1)
    config = load(small.write_config(folder, **settings(server, "lost")))
    rows = rows_of(label.step(config.labels).directory(config.root))
    assert rows and all(r["prompt_tokens"] > len(r["text"].encode()) and r["completion_tokens"] == 200 for r in rows)
    with Endpoint(lambda text, times: {"status": 500}) as server, pytest.raises(UserError, match="documents in a row"):
        run(folder, server, "free", retries=0, concurrency=1, budget="100000tokens")
    config = load(small.write_config(folder, **settings(server, "free")))
    assert {r["prompt_tokens"] for r in rows_of(label.step(config.labels).directory(config.root))} == {0}


def test_a_budget_too_small_for_one_call_asks_nothing(folder, capsys):
    with Endpoint() as server:
        assert run(folder, server, "tiny", budget="100tokens") == []
        with pytest.raises(UserError, match="but there are no prices"):
            run(folder, server, "tiny", budget="5")
        with pytest.raises(UserError, match="--budget much: must be money"):
            run(folder, server, "tiny", budget="much")
        assert not server.requests
    assert "the budget of 100tokens is used up" in capsys.readouterr().err


def test_a_dry_run_estimates_and_asks_nothing(folder, capsys, tmp_path):
    """The sample need not have been drawn, only the tiers must be there."""
    before = tree(folder / "root")
    estimates = []
    for per_stratum in (20, 19):  # the latter's sample is nowhere
        with Endpoint() as server, pytest.raises(DryRunEnd, match=r"^labels$"):
            prices = {"price_input": 1, "price_output": 2}
            run(folder, server, "dry", dry_run=True, per_stratum=per_stratum, key_variable="NOT_THERE", **prices)
        shown = capsys.readouterr().err
        assert "estimate: " in shown and "costing" in shown and not server.requests and tree(folder / "root") == before
        estimates.append(int(re.search(r"([\d,]+) documents sampled", shown)[1]))
    assert estimates[0] > estimates[1] > 30
    small.write_corpus(tmp_path / "in", files=1, documents=3)
    with Endpoint() as server, pytest.raises(DryRunEnd, match=r"^corpus$"):
        run(tmp_path, server, "dry", dry_run=True)
    assert not (tmp_path / "root").exists()


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.soak)])
def test_a_kill_loses_only_what_is_under_way(folder, tmp_path, workers):
    """SIGKILL twice in the middle: what is committed is not asked again, the files are an undisturbed run's."""
    with Endpoint(lambda text, times: 0.02) as server:
        config = small.write_config(folder, "kill.yaml", **settings(server, "kill"))
        whole, killed = tmp_path / "whole", tmp_path / "killed"
        for root in (whole, killed):
            shutil.copytree(folder / "root", root, ignore=lambda _, names: [n for n in names if "labels" in n])
        label_all(config, whole)
        server.asked.clear()
        command = [sys.executable, "jobs/label.py", config, "--root", str(killed), "--workers", str(workers)]
        for goal in (3, 6):
            job = subprocess.Popen(command, cwd=CHECKOUT, stderr=subprocess.DEVNULL)
            while job.poll() is None and sum(commits(d) for d in killed.glob("labels-*")) < goal:
                time.sleep(0.002)
            job.send_signal(signal.SIGKILL)
            assert job.wait() == -signal.SIGKILL
            done = {r["text"]: server.asked[r["text"]] for d in killed.glob("labels-*") for r in rows_of(str(d))}
            assert len(done) >= goal * 4
        label_all(config, killed)
        assert {text: server.asked[text] for text in done} == done
    assert tree(killed) == tree(whole)


def label_all(config: str, root: Path) -> None:
    with Engine(str(root), 0) as engine:
        label.build(engine, load(config, ["--root", str(root)]))


def test_the_classifier_learns_from_the_labels(folder):
    """Labels that follow a word of the text, through both jobs: the model knows the word."""

    def behave(text, times):
        good = len(text) % 2
        return json.dumps({"knowledge": 4 * good, "helpfulness": 2 + good, "domain": ["news", "other"][good]})

    with Endpoint(behave) as server:
        run(folder, server, "teacher", per_stratum=100)
        sections = settings(server, "teacher") | {"classifier": {"buckets": 4096, "held_out": 0.5}}
        config = load(small.write_config(folder, "teach.yaml", **sections))
        with Engine(config.root, 0) as engine:
            classifier.main(engine, config, argparse.Namespace())
            commit = classifier.build(engine, config)
        model = Classifier.load(commit.path("model"))
        assert model.heads == ("knowledge", "helpfulness") and model.domains == ("news", "other")
        assert commit.aggregates == model.about["metrics"]


def test_the_classifier_wants_labels(folder, tmp_path):
    config = load(small.write_config(folder, root=str(tmp_path)))
    with Engine(str(tmp_path), 0) as engine, pytest.raises(UserError, match=r"no labels: .*jobs/label.py"):
        classifier.build(engine, config)
    config = load(small.write_config(folder, root=str(tmp_path), classifier={"labels": ["/no/such/*.jsonl"]}))
    with Engine(str(tmp_path), 0) as engine, pytest.raises(UserError, match="no file matches /no/such"):
        classifier.build(engine, config)


def test_retry_after():
    assert chat.retry_after("7") == 7 and chat.retry_after("99999") == chat.LONGEST_RETRY_AFTER
    date = "Wed, 21 Oct 2026 07:28:00 GMT"
    assert chat.retry_after("soon") is chat.retry_after(date) is chat.retry_after("") is chat.retry_after(None) is None


@pytest.mark.parametrize(
    "labels,message",
    [
        ({"model": ""}, "labels.model is empty"),
        ({"model": "m", "key_variable": "NOT_THERE"}, "the environment has no NOT_THERE; export it"),
        ({"endpoint": "ftp://x"}, "must begin with http"),
        ({"endpoint": "https://user:pass@x/v1"}, "keys come from the environment"),
        ({"request": {"stream": True}}, "sets stream, which the job sets itself"),
        ({"budget": "a lot"}, "labels.budget"),
        ({"model": "m", "rubric": "/no/such/rubric"}, "labels.rubric: /no/such/rubric cannot be read"),
        ({"model": "m", "rubric": __file__}, "must begin with `version: NAME`"),
    ],
)
def test_mistakes_are_one_clear_message(folder, labels, message):
    with pytest.raises(UserError, match=message), Endpoint() as server:
        config = load(small.write_config(folder, "mistake.yaml", labels={"endpoint": server.url, **labels}))
        with Engine(config.root, 0) as engine:
            label.build(engine, config)
