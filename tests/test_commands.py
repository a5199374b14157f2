"""Every command of the README and docs/ that says so is run here, the tutorial's first, on a small corpus of its files.

A line `> Run by ...` or `> Run for the release ...` speaks for the commands below it, up to the next such line.
"""

import importlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from jobs import cli
from tests import corpora
from tests.jobs import small
from tests.jobs.endpoint import GOOD, Endpoint
from tests.test_docs import CHECKOUT, blocks, commands
from trainer import __main__ as trainer

DOCUMENTS = {  # of each file of the tutorial: how many, and of how many sentences
    "en_powershell_docs": (60, 12),
    "en_c4_sample": (60, 4),
    "en_wikitext2_valtest": (15, 30),
    "multi_nltk_public_domain": (20, 120),
}
SHORTER = 4  # than the tutorial's are the lengths here
TOKENS = 8_192  # of a stage, and of what is held out
MODEL = "root/classifier-*/*.safetensors"
STAND_INS = {  # what the reader chooses, and what it is here; a pattern is looked for when the command is run
    "CONFIG": "my.yaml", "CONFIG.yaml": "my.yaml", "configs/h100.yaml": "my.yaml", "MODEL": MODEL,
    "/absolute/path": "root", "/shared/h100": "root",
    "jobs/NAME.py": "jobs/corpus.py", "NAME": "main", "base": "main", "books/high/long": "books/medium/long",
    "1099511627776": str(1 << 40), "595": "0", "50": "5", "100": "5", "8": "2",
}  # fmt: skip
BY_OTHERS = {"--serve", "activate", ".venv/bin/activate"}  # tests/jobs/test_report.py; the Makefile
RUN_HERE = dict.fromkeys(
    tuple(STAND_INS.get(word, word) for word in command.words)
    for command in commands()
    if command.by == "tests/test_commands.py" and not BY_OTHERS & set(command.words)
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A directory with the tutorial's corpora and its `my.yaml`, all its parts put together."""
    folder = tmp_path_factory.mktemp("docs")
    for name, (documents, sentences) in DOCUMENTS.items():
        rng = random.Random(name)
        texts = [small.text(rng, sentences) for _ in range(documents)]
        texts.append(f"{texts[-1]} And so on.")
        corpora.write(folder, name, ({"text": text} for text in texts))
    values: dict = {}
    for page in ("tutorial.md", "labels.md"):
        for block in blocks(page, "yaml"):
            values |= yaml.safe_load(block.replace("CORPORA", str(folder)))
    values |= {"root": str(folder / "root"), "workers": 0}
    mix = values["mix"]
    mix["thresholds"] = {name: length // SHORTER for name, length in mix["thresholds"].items()}
    mix["held_out"]["tokens"] = mix["shard_tokens"] = TOKENS
    for stage in mix["stages"]:
        stage |= {"tokens": TOKENS, "context": stage["context"] // SHORTER}
    values["train"] |= {"batch_tokens": 1024, "evaluate_tokens": 2048, "threads": 1}
    rated = [{"text": small.text(random.Random(k), 8), "knowledge": 4 + k % 2} for k in range(200)]
    (folder / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rated))
    with Endpoint(
        lambda text, times: json.dumps(GOOD | dict.fromkeys(("knowledge", "helpfulness"), 4 + len(text) % 2))
    ) as server:
        values["labels"]["endpoint"] = server.url
        values["labels"].pop("key_variable")
        (folder / "my.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
        yield folder


def found(word: str) -> str:
    return str(next(Path().glob(word))) if "*" in word else word


@pytest.mark.parametrize("command", RUN_HERE, ids=" ".join)
def test_a_command(command, folder, monkeypatch, capfd):
    monkeypatch.chdir(folder)
    program, *words = map(found, command)
    if program == "torchrun":
        subprocess.run(
            [Path(sys.executable).parent / program, *words], check=True, env={**os.environ, "PYTHONPATH": CHECKOUT}
        )
    elif words[:2] == ["-m", "trainer"]:
        monkeypatch.setattr("sys.argv", words[1:])
        trainer.main()
    else:
        job = importlib.import_module(words[0].removesuffix(".py").replace("/", "."))
        assert cli.main(job, words[1:]) == 0, capfd.readouterr().err


def test_the_contracts_are_as_described(folder):
    """The snippets of docs/architecture.md, on what the commands above have made."""
    found: dict = {"root": str(folder / "root")}
    for snippet in blocks("architecture.md", "python"):
        exec(snippet, found)
    in_all = sum(number + 1 for number, _ in DOCUMENTS.values())
    assert sum(map(len, found["documents"].values())) == in_all > sum(map(len, found["chosen"])) > 0
    assert [stage["name"] for stage in found["plan"]["stages"]] == ["main", "context-2k", "context-8k"]
    assert found["checkpoint"]["tokens"] > 2 * TOKENS
