"""The command line and the configuration: every mistake is one clear line and exit code 1; nothing is written."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dataprep.storage import UserError
from jobs import cli, corpus, dedup, mix
from jobs.config import load
from tests.jobs import small

CHECKOUT = Path(__file__).resolve().parents[2]


def run(capfd, job, *argv: str) -> tuple[int, str]:
    code = cli.main(job, list(argv))
    return code, capfd.readouterr().err.strip()


@pytest.mark.parametrize(
    "change,words",
    [
        ({"dedup": {"treshold": 0.7}}, ["dedup.treshold", "did you mean threshold"]),
        ({"dedupe": {}}, ["dedupe", "did you mean dedup"]),
        ({"dedup": {"threshold": 1.5}}, ["dedup.threshold", "1.5", "less than or equal to 1"]),
        ({"workers": "many"}, ["workers", "many", "integer"]),
        ({"corpus": {"sources": []}}, ["corpus.sources"]),
        ({"corpus": {"sources": [{"name": "x", "kind": "csv", "paths": ["a"]}]}}, ["kind", "csv", "jsonl"]),
        ({"mix": {"stages": [{"name": "a", "tokens": 5}]}}, ["mix.stages.0.context", "missing"]),
        (
            {"mix": {"stages": [{"name": "a", "context": 8, "tokens": 5, "shares": {"short": 0.5}}]}},
            ["mix.stages.0.shares", "sum to 1"],
        ),
        ({"train": {"model": {"heads": 3, "kv_heads": 2}}}, ["train.model", "heads (3)", "kv_heads (2)"]),
        ({"export": {"formats": ["csv"]}}, ["export.formats.0", "csv", "megatron"]),
        ({"quality": {"by_source": {"tail": []}}}, ["quality.by_source", "tail", "tales"]),
        ({"quality": {"tiers": [{"source": "tail"}]}}, ["quality.tiers", "tail", "tales"]),
        ({"train": {"stages": {"bse": [{"share": 1, "lr": 0.1}]}}}, ["train.stages", "bse", "base"]),
        ({"root": ""}, ["root"]),
        ({"mix": {"stages": [{"name": "a", "context": 1 << 40, "tokens": 5}]}}, ["mix.stages.0.context"]),
        ({"mix": {"stages": [{"name": "a", "context": 8, "tokens": 1 << 63}]}}, ["mix.stages.0.tokens"]),
        ({"mix": {"stages": [{"name": "a" * 300, "context": 8, "tokens": 5}]}}, ["mix.stages.0.name"]),
    ],
)
def test_a_wrong_key_or_value_names_key_value_and_what_is_right(tmp_path, capfd, change, words):
    code, error = run(capfd, corpus, small.write_config(tmp_path, **change))
    assert code == 1 and error.startswith("error: ") and "Traceback" not in error
    assert all(word in error for word in words), error
    assert not (tmp_path / "root").exists()


def test_all_mistakes_are_told_at_once(tmp_path):
    with pytest.raises(UserError) as told:
        load(small.write_config(tmp_path, dedup={"threshold": 2}, workers=-1))
    assert len(str(told.value).splitlines()) == 2
    with pytest.raises(UserError) as told:
        load(small.write_config(tmp_path, corpus={"sources": [{"name": "a/b", "paths": ["x"]}]}))
    assert len(str(told.value).splitlines()) == 1  # not also that there is no source left


def test_a_malformed_value_on_the_command_line(tmp_path, capfd):
    code, error = run(capfd, corpus, small.write_config(tmp_path), "--export.formats", '["x"')
    assert code == 1 and "command line" in error and "Traceback" not in error


@pytest.mark.parametrize("spelling", ["file://{}", "{}/", "~/root"])
def test_roots_are_spelled_in_many_ways(tmp_path, capfd, monkeypatch, spelling):
    monkeypatch.setenv("HOME", str(tmp_path))
    small.write_corpus(tmp_path / "in", files=1, documents=5)
    code, error = run(capfd, corpus, small.write_config(tmp_path), "--root", spelling.format(tmp_path / "root"))
    assert code == 0, error
    assert (tmp_path / "root" / "manifest.jsonl").exists()


@pytest.mark.parametrize("content", ["a: [1", "1: 2", "- a list", "", "root: x\n\troot: y"])
def test_a_file_that_is_no_configuration(tmp_path, capfd, content):
    (tmp_path / "c.yaml").write_text(content)
    code, error = run(capfd, corpus, str(tmp_path / "c.yaml"))
    assert code == 1 and error.startswith("error: ") and len(error.splitlines()) == 1


def test_yaml_cannot_run_code(tmp_path, capfd):
    (tmp_path / "c.yaml").write_text(f"!!python/object/apply:os.system ['touch {tmp_path}/owned']")
    code, error = run(capfd, corpus, str(tmp_path / "c.yaml"))
    assert code == 1 and "not YAML" in error and not (tmp_path / "owned").exists()


def test_missing_input_and_unusable_root(tmp_path, capfd):
    code, error = run(capfd, corpus, small.write_config(tmp_path))
    assert code == 1 and str(tmp_path / "in") in error and len(error.splitlines()) == 1
    small.write_corpus(tmp_path / "in", files=1, documents=5)
    (tmp_path / "file").write_text("")
    code, error = run(capfd, corpus, small.write_config(tmp_path), "--root", str(tmp_path / "file"))
    assert code == 1 and str(tmp_path / "file") in error and len(error.splitlines()) == 1
    for root in ("nowhere://x", "/tmp/\0", str(tmp_path / ("x" * 300))):
        code, error = run(capfd, corpus, small.write_config(tmp_path, root=root))
        assert code == 1 and error.startswith("error: cannot use") and len(error.splitlines()) == 1


def test_the_command_line_overrides_the_file(tmp_path):
    path = small.write_config(tmp_path, dedup={"threshold": 0.7, "seed": 5})
    config = load(path, ["--dedup.threshold", "0.9", "--root", "/elsewhere", "--corpus.partition_mb", "2"])
    assert (config.dedup.threshold, config.dedup.seed, config.root, config.corpus.partition_mb) == (
        0.9,
        5,
        "/elsewhere",
        2,
    )


def test_an_unknown_flag_is_refused(tmp_path, capfd):
    code, error = run(capfd, corpus, small.write_config(tmp_path), "--dedup.treshold", "0.9")
    assert code == 1 and "--dedup.treshold" in error and len(error.splitlines()) == 1


def test_the_environment_decides_nothing(tmp_path, monkeypatch):
    for name in ("ROOT", "WORKERS", "DEDUP__THRESHOLD"):
        monkeypatch.setenv(name, "9")
    config = load(small.write_config(tmp_path))
    assert config.root == str(tmp_path / "root") and config.workers == 0


def test_help_lists_every_key(capsys):
    assert cli.main(mix, ["--help"]) == 0
    text = capsys.readouterr().out
    for key in (
        "--plan-only",
        "--dedup.threshold",
        "--mix.stages[].context",
        "--train.model.layers",
        "--corpus.sources",
    ):
        assert key in text, key


def test_a_reader_that_has_seen_enough_is_no_error():
    command = f"{sys.executable} jobs/pipeline.py --help | head -1"
    done = subprocess.run(command, shell=True, cwd=CHECKOUT, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: jobs/pipeline.py") and done.stderr == ""


def test_dry_run_tells_and_writes_nothing(tmp_path, capfd):
    small.write_corpus(tmp_path / "in", files=1, documents=8)
    path = small.write_config(tmp_path)
    code, said = run(capfd, dedup, path, "--dry-run")
    assert code == 0 and "corpus: 0 of 1 partitions there, 1 would run" in said
    assert not (tmp_path / "root").exists()
    assert run(capfd, corpus, path)[0] == 0
    code, said = run(capfd, dedup, path, "--dry-run")
    assert code == 0 and "corpus: all 1 partitions there" in said and "dedup-signatures" in said


def test_the_real_recipe_has_the_papers_numbers():
    values = yaml.safe_load((CHECKOUT / "configs" / "minimax-text-01.yaml").read_text())
    config = load(str(CHECKOUT / "configs" / "minimax-text-01.yaml"))
    assert [s.context for s in config.mix.stages] == [8192, 131_072, 524_288, 1_048_576]
    assert [s.tokens for s in config.mix.stages] == [11_400 * 10**9, 300 * 10**9, 32 * 10**9, 26 * 10**9]
    assert [s.rope_base for s in config.mix.stages] == [1e4, 5e6, 1e7, 1e7]
    assert config.mix.stages[2].shares.model_dump() == {"short": 0.35, "medium": 0.35, "long": 0.3}
    model = config.train.model
    assert (model.layers, model.hidden, model.heads, model.kv_heads, model.head_dim) == (80, 6144, 64, 8, 128)
    assert (model.experts, model.top_k, model.ffn, values["tokens"]["vocab_size"]) == (32, 2, 9216, 200_064)
