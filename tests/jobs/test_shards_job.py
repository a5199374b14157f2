"""jobs/shards.py on packed text, some of it hostile: what it shows is what the shards and the raw input hold."""

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

from dataprep.storage import UserError, read_json, write_json
from jobs import cli, shards
from jobs.config import load
from mixer.reader import ShardLog
from tests.jobs import small
from tests.jobs.test_data_jobs import run

HOSTILE = "Good words \x1b[2J\x1b]0;title\x07 and \u202e reversed \r\n── 0..9 doc 1, a line like ours. "


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    small.write_corpus(folder / "in", files=2)
    lines = [json.dumps({"text": f"{i} {HOSTILE}" * 4, "id": f"bad \x1b[31m {i}"}) for i in range(40)]
    (folder / "in" / "hostile.jsonl").write_text("\n".join(lines))
    run(folder)
    return folder


@pytest.fixture
def copy(packed, tmp_path) -> Path:
    shutil.copytree(packed / "root", tmp_path / "root")
    values = yaml.safe_load((packed / "config.yaml").read_text()) | {"root": str(tmp_path / "root")}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    return tmp_path


def shown(capsys, folder: Path, *words: str, code: int = 0) -> str:
    assert cli.main(shards, [str(folder / "config.yaml"), *words]) == code
    return capsys.readouterr().out


def rows(text: str) -> set[tuple[str, ...]]:
    return {tuple(cell.strip() for cell in line.split("│")) for line in text.splitlines() if "│" in line}


def log(folder: Path, stage: str) -> ShardLog:
    found = ShardLog(
        str(folder / "root" / read_json(str(folder / "root" / "latest" / f"pack-{stage}.json"))["directory"])
    )
    found.wait(0)
    return found


def test_stats_are_those_of_the_end_and_of_the_commits_before_it(copy, capsys):
    text = shown(capsys, copy, "stats", "--stage", "base")
    end = Path(log(copy, "base").directory, "end.json")
    totals = json.loads(end.read_text())["totals"]
    assert re.search(rf"tokens_in +│ +{totals['tokens_in']:,} ", text)
    assert re.search(rf"source +│ tales +│ +{totals['packed']:,} +│ +100.00%", text)
    end.unlink()
    running = shown(capsys, copy, "stats", "--stage", "base")
    assert "stage base, still being packed" in running
    assert rows(running) and rows(running) <= rows(text)  # what follows from the sums is in the end's alone


def test_verify_puts_damage_into_quarantine_and_takes_it_out_again(copy, capsys):
    base = log(copy, "base")
    shown(capsys, copy, "verify")
    quarantine = Path(base.directory, "quarantine.json")
    assert not quarantine.exists()
    shard = Path(base.open(1).path)
    whole = shard.read_bytes()
    at = len(whole) // 2
    shard.write_bytes(whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :])
    with pytest.raises(UserError, match=rf"{shard.name}, batch 0: damaged"):
        base.read(*base.span(1))
    assert cli.main(shards, [str(copy / "config.yaml"), "verify"]) == 1
    said = capsys.readouterr().err
    first, last = base.span(1)
    assert f"{shard.name}, batch 0: checksum differs; sequences {first}..{last}" in " ".join(said.split())
    entry = {"shard": 1, "batch": 0, "file": shard.name, "first": first, "sequences": last - first}
    assert read_json(str(quarantine)) == {"batches": [entry | {"why": "checksum differs"}]}
    shard.unlink()
    shown(capsys, copy, "verify", "--stage", "base", code=1)
    assert read_json(str(quarantine)) == {"batches": [entry | {"why": "no file"}]}
    masked = ShardLog(base.directory, "mask")
    masked.wait(0)
    assert len(masked.read(0, last).segments) == len(base.read(0, first).segments)
    shard.write_bytes(whole)
    shown(capsys, copy, "verify")
    assert not quarantine.exists()


def test_inspect_shows_the_text_and_nothing_that_a_terminal_obeys(packed, capsys):
    base = log(packed, "base")
    raw = {}
    for number, path in enumerate(sorted((packed / "in").iterdir())):
        for record, line in enumerate(path.read_text().splitlines()):
            raw[number << 40 | record] = line
    segments = base.read(0, base.span(base.shards - 1)[1]).segments
    hostile = segments["sequence"][segments["doc"] >> 40 == 2]
    assert len(hostile)
    for sequence in {0, 1, *hostile[:3].tolist()}:
        batch = base.read(sequence, sequence + 1)
        text = shown(capsys, packed, "inspect", "--stage", "base", "--sequence", str(sequence), "--tokens", "5000")
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", text)
        headers = re.findall(r"^── \d+\.\.\d+ doc (\d+),", text, re.M)
        assert [int(doc) for doc in headers] == batch.segments["doc"].tolist()
        assert "\\x1b[2J\\x1b]0;title\\x07" in text or sequence != hostile[0]
        for s in batch.segments[batch.segments["offset"] == 0]:
            begin = json.loads(raw[int(s["doc"])])["text"][:12]
            assert begin in text


def test_inspect_in_colour_and_with_another_tokeniser(copy, capsys, monkeypatch):
    monkeypatch.setattr("jobs.shards_report.console._force_terminal", True)
    monkeypatch.setattr("jobs.shards_report.console._color_system", 1)
    assert "\x1b[36m│ " in shown(capsys, copy, "inspect", "--sequence", "1")
    about = copy / "root" / "latest" / "vocabulary.json"
    used = read_json(str(about))
    (copy / "other.json").write_text("{}")
    for path in ("other.json", "none.json"):
        write_json(str(about), used | {"path": str(copy / path)})
        shown(capsys, copy, "inspect", code=1)
    write_json(str(about), used | {"tokenizer": "another"})
    assert re.search(r"│ \d+ \d+ \d+", shown(capsys, copy, "inspect"))


def test_explain_leads_back_to_the_raw_record(packed, capsys):
    """2,048 tokens a step; batches of 512 after the first stage's beginning. Steps are counted over the stages."""
    config = load(str(packed / "config.yaml"))
    in_base = log(packed, "base").span(log(packed, "base").shards - 1)[1]
    steps = [("base", a, min(a + 16, in_base)) for a in range(0, in_base, 16)]
    steps += [("longer", 0, 4)]
    assert config.train.batch_tokens == 2048
    for step in (1, len(steps) - 1, len(steps)):
        stage, first, last = steps[step - 1]
        text = shown(capsys, packed, "explain", "--step", str(step))
        assert "\x1b" not in text
        segments = log(packed, stage).read(first, last).segments
        heading, *lines = text.splitlines()
        assert heading == f"stage {stage}, sequences {first}..{last}: {len(segments)} segments"
        for line, s in zip(lines, segments, strict=True):
            path, record, id_ = re.search(r"from (.*):(\d+) id (.*)$", line).groups()
            original = json.loads(Path(path).read_text().splitlines()[int(record)])
            assert original["id"].replace("\x1b", "\\x1b") == id_
            assert f"doc {s['doc']}," in line and line.startswith(f"{first + s['sequence']}:{s['start']}..")
    marks = ["--train.batch_marks", '{"4096": 512}']
    assert "sequences 36..40:" in shown(capsys, packed, "explain", "--step", "4", *marks)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--stage", "typo"], "no stage typo; it has held-out, base, longer"),
        (["explain"], "explain needs --step N"),
        (["explain", "--step", "1000"], "there is no step 1000: what is packed makes steps 1.."),
        (["explain", "--step", "0"], "there is no step 0"),
        (["explain", "--step", "1", "--stage", "base"], "counted over all stages, and no --stage"),
        (["inspect", "--sequence", "100000"], "has sequences 0.."),
    ],
)
def test_mistakes_are_one_line(packed, capsys, words, message):
    assert cli.main(shards, [str(packed / "config.yaml"), *words]) == 1
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said
