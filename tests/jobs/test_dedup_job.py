"""The dedup job as a whole: the alarm, what it explains, its options, and documents that would break lesser jobs."""

import argparse
import json
import random
from pathlib import Path

import pytest

from dataprep import storage
from dataprep.storage import UserError, read_table
from dedup.keepers import CLUSTERS
from jobs import cli, corpus, dedup
from jobs.config import load
from jobs.engine import Engine
from tests.jobs import small


def text(name: str, words: int = 120) -> str:
    """A text of its own for every name."""
    return small.text(random.Random(name), words // 8)


def near(original: str, word: str) -> str:
    return original.rsplit(" ", 1)[0] + " " + word


def write(folder: Path, **files: list[str]) -> dict:
    """One JSONL file and one source per keyword; returns the corpus section."""
    for name, texts in files.items():
        path = folder / "in" / f"{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        content = "".join(json.dumps({"text": t, "id": f"{name}-{i}"}) + "\n" for i, t in enumerate(texts))
        if not path.exists() or path.read_text() != content:  # another time would make it another file
            path.write_text(content)
    sources = [{"name": name, "paths": [str(folder / "in" / f"{name}.jsonl")]} for name in files]
    return {"sources": sources, "partition_mb": 0.03, "group_mb": 0.03}


def run(folder: Path, sources: dict, explain: int | None = None, **options) -> dict[str, tuple[str, str]]:
    """id -> (reason, keeper's id) of what is removed."""
    config = load(small.write_config(folder, corpus=sources, dedup={"max_source_loss": 1, **options}))
    with Engine(config.root, config.workers) as engine:
        dedup.main(engine, config, argparse.Namespace(explain=explain))
        verdicts = [row for c in dedup.build(engine, config) for row in read_table(c.path("dedup")).to_pylist()]
        documents = [r for p in corpus.partitions(engine, config) for r in read_table(p.documents).to_pylist()]
    ids = {d["doc"]: d["id"] for d in documents}
    kept = {v["doc"] for v in verdicts if v["keep"]}
    assert [v["doc"] for v in verdicts] == [d["doc"] for d in documents]
    assert all(v["keeper"] in kept for v in verdicts if not v["keep"])
    return {ids[v["doc"]]: (v["reason"], ids[v["keeper"]]) for v in verdicts if not v["keep"]}


def test_the_alarm_comes_before_anything_is_final_and_names_clusters(tmp_path, capsys):
    pages = [near(text("page"), f"number\x1b[31m{i:03}") for i in range(30)]
    sources = write(tmp_path, books=[text(f"book {i}") for i in range(9)], calls=pages)
    with pytest.raises(UserError) as failure:
        run(tmp_path, sources, max_source_loss=0.5)
    said = str(failure.value)
    assert "source calls: near duplicates would take 96.7%" in said and "max_source_loss: 0.97" in said
    assert "29 like" in said and said.count("calls.jsonl:") == 2 and "books.jsonl" not in said and "\x1b" not in said
    assert not list((tmp_path / "root").glob("dedup-[0-9a-f]*")) and not (tmp_path / "root/latest/dedup.json").exists()
    doc = said.split("such as ")[1].split(maxsplit=1)[0]
    assert cli.main(dedup, [str(tmp_path / "config.yaml"), "--explain", doc]) == 0  # after an alarm too
    assert "is removed as a near duplicate" in capsys.readouterr().out
    assert len(run(tmp_path, sources, max_source_loss=0.97)) == 29


def test_a_stopped_run_leaves_the_last_verdicts(tmp_path):
    run(tmp_path, write(tmp_path, web=[text(f"{i}") for i in range(5)]))
    latest = (tmp_path / "root/latest/dedup.json").read_bytes()
    folder = tmp_path / "root" / json.loads(latest)["directory"]
    before = {f.name: f.read_bytes() for f in folder.iterdir()}
    with pytest.raises(UserError, match="max_source_loss"):
        run(tmp_path, write(tmp_path, web=[near(text("one"), f"{i}") for i in range(5)]), max_source_loss=0.5)
    assert {f.name: f.read_bytes() for f in folder.iterdir()} == before
    assert (tmp_path / "root/latest/dedup.json").read_bytes() == latest


def test_exact_copies_alarm_nobody(tmp_path):
    assert len(run(tmp_path, write(tmp_path, web=[text("one")] * 50), max_source_loss=0)) == 49


def test_clusters_are_a_table_largest_first(tmp_path):
    page, other = text("page"), text("other")
    web = [page, page, near(page, "x"), near(page, "y"), other, other, text("alone")]
    run(tmp_path, write(tmp_path, web=web))
    folder = tmp_path / "root" / storage.read_json(str(tmp_path / "root/latest/dedup-verdicts.json"))["directory"]
    table = read_table(str(next(folder.glob("all.clusters.*"))))
    assert table.schema.equals(CLUSTERS)
    assert [[r["documents"], r["exact"], r["near"]] for r in table.to_pylist()] == [[4, 1, 2], [2, 1, 0]]
    assert table["least_jaccard"][0].as_py() < 1 == table["least_jaccard"][1].as_py()


def test_explain_shows_keeper_and_differences(tmp_path, capsys):
    page = text("page")
    sources = write(tmp_path, web=[page + " and one more", near(page, "\x1b]0;evil\x07 end"), text("alone")])
    run(tmp_path, sources, explain=1)
    said = capsys.readouterr().out
    assert "document 1 (" in said and "is removed as a near duplicate (Jaccard 0.9" in said and "document 0 (" in said
    assert "[-" in said and "\\x1b]0;evil\\x07" in said and "{+" in said and "\x1b" not in said
    run(tmp_path, sources, explain=0)
    assert "is kept; documents removed as its duplicates: 1" in capsys.readouterr().out
    for wrong in (3, 1 << 50, -1, 1 << 70):
        with pytest.raises(UserError, match=f"there is no document {wrong};"):
            run(tmp_path, sources, explain=wrong)


def test_within_sources_or_across_them(tmp_path):
    page, other = text("page"), text("other")
    sources = write(tmp_path, web=[page, other, near(other, "x")], books=[page, near(page, "y"), text("alone")])
    across, within = run(tmp_path, sources), run(tmp_path, sources, scope="within")
    assert within.keys() < across.keys() and across.keys() - within.keys() <= {"web-0", "books-0", "books-1"}
    assert all(gone.split("-")[0] == keeper.split("-")[0] for gone, (_, keeper) in within.items())
    assert {reason for reason, _ in across.values()} == {"exact", "near"} and len(within) == 2


def test_new_files_against_old_ones(tmp_path):
    page, other = text("page"), text("other")
    old = {"old": [page, other, near(other, "x")]}
    before = run(tmp_path, write(tmp_path, **old))
    sources = write(tmp_path, **old, new=[page + " and some more", other + " and even more", near(text("a"), "b")])
    by_length = run(tmp_path, sources)
    assert by_length["old-0"] == ("near", "new-0") and "new-1" not in by_length
    against = run(tmp_path, sources, against=1)
    assert {gone: v for gone, v in against.items() if gone.startswith("old")} == before  # nothing more, nothing less
    assert against["new-0"] == ("near", "old-0") and "new-1" in against and "new-2" not in against


HOSTILE = {
    "line": "x" * (1 << 20),
    "words in a line": " ".join(f"w{i * i % 7919}" for i in range(180_000)),
    "nul": "\0" * 1000 + " ".join(f"nul\0word{i}" for i in range(50)),
    "surrogate": "lone \ud800 surrogate \udfff " + " ".join(f"escaped{i}" for i in range(50)),
    "rtl": " ".join("אבגד"[i % 4] + "הוזח"[i // 4 % 4] + "\u05b8" + "טיכלמ"[i // 16 % 5] for i in range(80)),
    "combining": "a" + "\u0301" * 5000 + " " + " ".join(f"e\u0301\u0327{i}" for i in range(50)),
    "repeated": "spam " * 50_000,
    "control": "\x1b[2J\r\n\x85\u2028" * 100,
    "emoji": "\U0001f469\u200d\U0001f680" * 1000,
    "spaces": " \t\n" * 1000 + "end",
}


def test_hostile_documents_go_through_the_whole_job(tmp_path):
    texts = list(HOSTILE.values())
    web = [t for one in texts for t in (one, one, one + " one more word")] + [text(f"{i}") for i in range(60)]
    removed = run(tmp_path, write(tmp_path, web=web, empty=[""] * 10_000))
    names = {f"web-{3 * i + k}": (name, k) for i, name in enumerate(HOSTILE) for k in range(3)}
    found = {names[gone]: (reason, names[keeper]) for gone, (reason, keeper) in removed.items()}
    near_ones = {"words in a line", "nul", "surrogate", "rtl", "combining"}
    for name in HOSTILE:
        copies = {gone[1]: verdict for gone, verdict in found.items() if gone[0] == name}
        assert all(keeper[0] == name for _, keeper in copies.values())
        if name in near_ones:  # the longest stays
            assert copies.keys() == {0, 1} and {keeper for _, keeper in copies.values()} == {(name, 2)}
        else:  # too few words for a shingle, or too different with three more
            assert copies == {1: ("exact", (name, 0))}, name
    config = load(small.write_config(tmp_path))
    groups = [storage.read_json(str(f)) for f in (tmp_path / "root").glob("corpus-*/*.commit.json")]
    quarantined = [n for g in groups for n in g["aggregates"]["quarantined"].get("empty", {}).values()]
    assert config.root and sum(quarantined) == 10_000


@pytest.mark.soak
def test_a_document_of_100_mb(tmp_path):
    numbers = random.Random(1)
    huge = " ".join(f"{numbers.getrandbits(40):x}" for _ in range(9_500_000))
    removed = run(tmp_path, write(tmp_path, web=[huge, huge, huge[:-30], text("a")]))
    assert removed == {"web-1": ("exact", "web-0"), "web-2": ("near", "web-0")}
