"""The report: its numbers against the tables themselves, hostile documents, the server, and the page in a browser."""

import base64
import hashlib
import http.client
import json
import random
import re
import shutil
import threading
from collections import Counter
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import plotly.graph_objects as go
import pyarrow.parquet as pq
import pytest

from dataprep.storage import UserError, read_table, write_json
from jobs import report, report_data, report_figures, report_page, report_training, tables
from jobs.cli import main
from jobs.config import load
from jobs.report_data import Outputs
from tests.jobs import small
from tests.jobs.test_data_jobs import run

EVIL = "</script><script>alert(1)</script></textarea></pre><img src=x onerror=alert(2)>{{ 7 * 7 }}\u202eevil\u2066 <!--"
STAGES = ("base", "longer")


def train(root: Path) -> None:
    """What a trainer leaves behind: two stages of metrics, an event, an evaluation."""
    rng, tokens = random.Random(0), 0
    for number, stage in enumerate(STAGES):
        records = []
        for step in range(1, 41):
            tokens += 1000
            losses = {name: {"a": 5 - step / 20, EVIL: 4.0} for name in ("sources", "classes", "tiers", "copies")}
            records.append(
                {"stage": stage, "step": 40 * number + step, "tokens": tokens, "stage_tokens": 1000 * step,
                 "loss": None if step == 7 else 5 - step / 20, "balance": 1.0, "gradient": rng.random() + 0.1,
                 "lr": 1e-3, "sequences": float("nan") if step == 9 else 8,
                 "seconds": 1.0, "wait_seconds": 0.1, "tokens_per_second": 1000.0, "memory_gb": 1.0, "mfu": 0.3,
                 "drop_rate": 0.0, "router_entropy": 1.3, "expert_load": [[0.9, 1.1], [1.2, 0.8]], **losses}
            )  # fmt: skip
        folder = root / "train-0123" / stage
        folder.mkdir(parents=True)
        text = "".join(json.dumps(r) + "\n" for r in records)
        (folder / "metrics.jsonl").write_text(text + '{"step": 99, "tok')  # a line cut off by a crash
        event = {"event": "skipped", "step": 7, "tokens": 7000, "loss": None, "documents": [{"doc": 1, "source": EVIL}]}
        (folder / "events.jsonl").write_text(json.dumps(event) + "\n")
        score = {"tokens": 100, "bytes": 400, "loss": 4.5, "bits_per_byte": 1.6}
        write_json(
            str(folder / "evaluation.json"),
            {"schema": 1, "stage": stage, "step": 40, "tokens": tokens, "context": 128, "cells": [],
             "held_out": score | {"documents": 3}, "sources": {EVIL: score | {"loss": float("nan")}},
             "classes": {"short": score},
             "positions": [{"from": k, "to": 2 * k + 1, "tokens": 3, "loss": 6.0 - k} for k in (0, 1, 3)],
             "needle": [{"length": n, "depth": d, "samples": 2, "exact": d} for n in (64, 128) for d in (0.0, 1.0)],
             "recall": [{"length": 64, "pairs": 3, "samples": 2, "exact": 0.5}]},
        )  # fmt: skip
    write_json(str(root / "latest" / "train.json"), {"directory": "train-0123"})


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Path:
    """A run up to packed shards over a corpus with hostile documents, and what a trainer would leave behind."""
    folder = tmp_path_factory.mktemp("report")
    small.write_corpus(folder / "in")
    long = small.text(random.Random("evil"), 120)
    texts = [f"{EVIL} {long}", f"{long} {EVIL} changed", EVIL, "\u202e" * 300, "a" * 100_000]
    lines = [json.dumps({"text": text, "id": EVIL + str(k)}) for k, text in enumerate(texts)]
    (folder / "in" / "evil.jsonl").write_text("\n".join(lines) + "\n")
    run(folder)
    train(folder / "root")
    return folder


@pytest.fixture(scope="module")
def page(done) -> str:
    return report_page.render(load(str(done / "config.yaml")), "CONFIG.yaml")


class Elements(HTMLParser):
    """Every element with its attributes, the scripts' content, and what is text."""

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.scripts, self.words = [], [], []
        self.inside = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.inside = tag
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        if self.inside == "script":
            self.scripts[-1] += data
        elif self.inside != "style":
            self.words.append(data)


def figures(page: str) -> dict[str, dict]:
    return json.loads(next(s for s in Elements(page).scripts if s.startswith("{")))


def test_the_flow_agrees_with_the_tables(done):
    outputs = Outputs(str(done / "root"))
    flow = report_data.flow(outputs)
    verdicts, tiers = Counter(), Counter()
    for dedup, quality, tokens in zip(
        *(sorted((done / "root").glob(f"{name}-[0-9a-f]*/*.{end}")) for name, end in
          (("dedup", "parquet"), ("quality", "parquet"), ("tokens", "arrow"))), strict=True
    ):  # fmt: skip
        kept, n_tokens = pq.read_table(dedup), read_table(str(tokens))["n_tokens"].to_pylist()
        verdicts.update(reason or "kept" for reason in kept["reason"].to_pylist())
        for keep, tier, n in zip(
            kept["keep"].to_pylist(), pq.read_table(quality)["tier"].to_pylist(), n_tokens, strict=True
        ):
            tiers[tier, "tokens"] += n * keep
            tiers[tier, "documents"] += keep
    every = flow[""]
    assert {reason: n["documents"] for reason, n in every["verdicts"].items()} == dict(verdicts)
    for tier in ("low", "medium", "high"):
        cells = [n for (t, _), n in every["cells"].items() if t == tier]
        assert [sum(n[k] for n in cells) for k in (0, 1)] == [tiers[tier, "documents"], tiers[tier, "tokens"]]
    assert list(flow) == ["", "tales"] and str(every) == str(flow["tales"])


def test_what_enters_a_node_leaves_it(done):
    outputs = Outputs(str(done / "root"))
    flow = report_data.flow(outputs)
    for source in ("", "tales"):
        for links in (
            report_figures.document_links(flow[source]),
            report_figures.token_links(flow[source], outputs.plan, source),
        ):
            into, out = Counter(), Counter()
            for a, b, n in links:
                assert n >= 0
                out[a] += n
                into[b] += n
            assert {n: into[n] for n in into.keys() & out.keys()} == {n: out[n] for n in into.keys() & out.keys()}
        assert sum(n for a, b, n in links if b == "stage base") == outputs.plan.stages[0].tokens
        assert sum(n for a, _, n in links if a == "tokens") == flow[source]["tokens"]
    documents = report_figures.document_links(flow[""])
    assert sum(n for a, _, n in documents if a == "records") == (
        flow[""]["read"] + sum(flow[""]["quarantined"].values())
    )


def test_clusters_show_the_removed_text_that_is_least_like_the_kept_one(done):
    found = report_data.clusters(Outputs(str(done / "root")))
    (removed,) = (done / "root").glob("dedup-verdicts-*/*.removed.*")
    rows = pq.read_table(removed).to_pylist()
    assert sum((size - 1) * n for size, n in found["sizes"].items()) == len(rows)
    least = {}
    for row in rows:
        least[row["cluster"]] = min(least.get(row["cluster"], 2), row["jaccard"])
    sizes = [pair["documents"] for pair in found["largest"]]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] == max(found["sizes"])
    jaccard = {row["doc"]: row["jaccard"] for row in rows}
    for pair in found["largest"]:
        assert jaccard[pair["gone"]["doc"]] == least[pair["kept"]["doc"]] == pair["least_jaccard"]
    evil = next(p for p in found["largest"] if EVIL[:20] in p["kept"]["head"] + p["gone"]["head"])
    assert "changed" in "".join(one + other for _, one, other, _ in evil["places"])


def test_every_figure_is_one_that_plotly_knows(page):
    found = figures(page)
    assert len(found) > 20
    for name, figure in found.items():
        go.Figure(figure)  # refuses keys and values that there are not
        assert figure["data"], name


def test_hostile_text_stays_text(page):
    elements = Elements(page)
    assert len(page) < 8e6
    assert [attributes.get("type", "code") for tag, attributes in elements.tags if tag == "script"] == [
        "application/json", "code", "code"
    ]  # fmt: skip
    assert not [a for tag, a in elements.tags if tag == "img" or any(key.startswith("on") for key in a)]
    assert not {"textarea", "iframe", "object", "link", "base", "form"} & {tag for tag, _ in elements.tags}
    words = "".join(elements.words)
    assert "<script>alert(1)</script></textarea>" in words and "{{ 7 * 7 }}" in words
    for character in "\u202e\u2066":
        assert character not in page.replace(report_page.get_plotlyjs(), "")
    assert "a" * 3000 not in page.replace(report_page.get_plotlyjs(), "")


def test_the_policy_allows_the_pages_own_scripts_and_nothing_else(page):
    elements = Elements(page)
    policy = next(a["content"] for tag, a in elements.tags if a.get("http-equiv") == "Content-Security-Policy")
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    digests = {base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in elements.scripts[1:]}
    assert set(rules.pop("script-src").split()) == {f"'sha256-{d}'" for d in digests}
    assert rules == {
        "default-src": "'none'", "style-src": "'unsafe-inline'", "img-src": "data:",
        "base-uri": "'none'", "form-action": "'none'",
    }  # fmt: skip
    assert not [a for _, a in elements.tags if a.get("src") or (a.get("href") or "#")[0] != "#"]  # fetches nothing


def test_ten_megabytes_of_one_word_are_bounded():
    word = "x" * 10_000_000
    row = {"doc": 1, "source": "s", "origin": word, "text": word}
    pair = report_data.pair(row, row | {"text": word + "y"})
    pair["kept"].pop("origin")
    pair["gone"].pop("origin")
    assert len(json.dumps(pair)) < 20_000
    assert [pair[name]["characters"] for name in ("kept", "gone")] == [10_000_000, 10_000_001]
    assert len(tables.visible(word, 200)) < 300
    assert tables.visible("a\u202eb\x00\n\tc\u2028", 100) == "a\\u202eb\\x00\n    c\\u2028"
    assert report_figures.label(f"<b>{word}") == "&lt;b&gt;" + "x" * 37 + "..."


def test_a_page_of_a_corpus_alone(tmp_path, capfd):
    small.write_corpus(tmp_path / "in", files=1)
    config = small.write_config(tmp_path)
    assert main(report, [config]) == 1
    assert "there are no outputs under" in capfd.readouterr().err
    from jobs import corpus

    run(tmp_path, corpus)
    assert main(report, [config, "--output", str(tmp_path / "out" / "page.html")]) == 0
    page = (tmp_path / "out" / "page.html").read_text()
    assert {tag["id"] for name, tag in Elements(page).tags if name == "section"} == {"flow", "provenance"}
    assert f"file://{tmp_path}/out/page.html" in capfd.readouterr().err.replace("\n", "")


def test_a_page_without_the_verdicts(done, tmp_path):
    """Any directory may be removed; the page shows what is there, and its arithmetic is left blank."""
    root = shutil.copytree(done / "root", tmp_path / "root")
    shutil.rmtree(root / json.loads((root / "latest" / "dedup.json").read_text())["directory"])
    page = report_page.render(load(str(done / "config.yaml"), ["--root", str(root)]), "CONFIG.yaml")
    sections = {tag.get("id") for name, tag in Elements(page).tags if name == "section"}
    assert "flow" in sections and "dedup" not in sections


def test_an_evaluation_of_another_form_is_named(done, tmp_path):
    root = shutil.copytree(done / "root", tmp_path / "root")
    path = root / "train-0123" / "base" / "evaluation.json"
    for text in ("", "[]", "{}", '{"held_out": null, "sources": []}'):
        path.write_text(text)
        with pytest.raises(UserError, match=rf"{path} is damaged"):
            report_training.stages(Outputs(str(root)))


def test_outputs_of_another_version_are_named_and_left_out(done, tmp_path):
    shutil.copytree(done / "root", tmp_path / "root")
    (step,) = (tmp_path / "root").glob("quality-*/step.json")
    write_json(str(step), json.loads(step.read_text()) | {"version": 0})
    (commit, *_) = step.parent.glob("*.commit.json")
    write_json(str(commit), json.loads(commit.read_text()) | {"aggregates": {"of": "old"}})
    page = report_page.render(load(str(done / "config.yaml"), ["--root", str(tmp_path / "root")]), "CONFIG.yaml")
    assert "quality" not in {tag.get("id") for name, tag in Elements(page).tags if name == "section"}
    assert "left out above until they are made anew: quality." in page


def test_a_users_password_in_an_address_is_not_shown(done):
    values = small.config(done, corpus={"sources": [{"name": "tales", "paths": ["s3://me:secret@bucket/x"]}]})
    page = report_page.render(report.Config(**values), "CONFIG.yaml --corpus s3://me:secret@bucket/x")
    assert "secret" not in page and "s3://...@bucket/x" in page


@pytest.mark.parametrize("steps", [0, 1, report_training.POINTS, report_training.POINTS + 1, 5000])
def test_long_curves_show_every_so_many_steps(tmp_path, steps):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f'{{"tokens": {k}}}\n' for k in range(steps)) + '{"tok')
    tokens = [record["tokens"] for record in report_training.thinned(str(path))]
    assert len(tokens) <= report_training.POINTS and set(tokens) <= set(range(steps))
    assert tokens[:1] == [0][:steps] and len({b - a for a, b in pairwise(tokens)}) <= 1
    assert report_training.thinned(str(tmp_path / "none")) == []


@pytest.fixture
def served(done):
    with report.server(load(str(done / "config.yaml")), "CONFIG.yaml", 0) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield running.server_address
        running.shutdown()
        thread.join()


def ask(address, method="GET", path="/", **headers) -> tuple[int, dict, bytes]:
    connection = http.client.HTTPConnection(*address)
    connection.request(method, path, headers={"Host": f"127.0.0.1:{address[1]}", **headers})
    answer = connection.getresponse()
    return answer.status, dict(answer.headers), answer.read()


def test_the_server_shows_the_page_and_nothing_else_to_this_machine(served, done):
    assert served[0] == "127.0.0.1"
    status, headers, body = ask(served)
    assert status == 200 and b'id="training"' in body and int(headers["Refresh"]) >= report.FRESH
    for path in ("/config.yaml", "/../root/manifest.jsonl", "//etc/passwd", "/?x"):
        assert ask(served, path=path)[0] == 404
    assert ask(served, Host="evil.example:80")[0] == 403
    assert ask(served, "POST")[0] == 501
    pointer = done / "root" / "latest" / "train.json"
    before = pointer.read_bytes()
    try:
        pointer.unlink()
        assert b'id="training"' not in ask(served)[2]
        pointer.write_text("{")
        status, headers, body = ask(served)
        assert status == 503 and b"train.json is damaged" in body and "Refresh" in headers
    finally:
        pointer.write_bytes(before)
    with pytest.raises(UserError, match="cannot be used"):
        report.server(None, "", served[1])


BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-headless-shell", "google-chrome", "chrome"))), None
)


@pytest.mark.skipif(not BROWSER, reason="no Chromium on this machine")
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_the_page_in_a_browser(page, tmp_path, width, scheme):
    from playwright.sync_api import sync_playwright

    (tmp_path / "report.html").write_text(page)
    said = []
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu"])
        tab = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        tab.on("console", lambda message: said.append(message.text))
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.on("dialog", lambda dialog: said.append(dialog.message))
        tab.on("request", lambda r: None if r.url.startswith(("file:", "data:")) else said.append(r.url))
        tab.goto((tmp_path / "report.html").as_uri())
        tab.wait_for_selector("body[data-drawn]")
        count = len(figures(page))
        assert tab.evaluate("document.body.dataset.drawn") == str(count)
        drawn = (
            "[...document.querySelectorAll('.plot')].filter(p => p.querySelector('.main-svg') && p.clientWidth > 200)"
        )
        marks = (
            ".filter(p => p.querySelector('.sankey-link, .bars path, .scatterlayer path, .heatmaplayer image, .hm'))"
        )
        assert tab.evaluate(f"{drawn}{marks}.length") == count
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        for kind, heading in (("number", "documents"), ("text", "source")):
            column = tab.locator("#dedup table, #flow table").first.locator(
                "th", has_text=heading if kind == "text" else "tokens"
            )
            cells = "b => [...b.closest('table').tBodies[0].rows].map(r => r.cells[b.parentElement.cellIndex])"
            button = column.first.locator("button")
            for _ in range(2):
                button.click()
                order = column.first.get_attribute("aria-sort")
                key = "c.dataset.v" if kind == "number" else "c.textContent"
                values = button.evaluate(f"b => ({cells})(b).map(c => {key})")
                values = [float(v) for v in values if v] if kind == "number" else [v.lower() for v in values]
                assert values == sorted(values, reverse=order == "descending")
        assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == (
            "rgb(18, 22, 28)" if scheme == "dark" else "rgb(251, 250, 248)"
        )
        browser.close()
    assert said == []
    assert re.search(r"<html lang", page)
