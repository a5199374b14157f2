"""Packed and trained roots, and the trainer's command line."""

import json
import shutil

import pytest

from tests.trainer.shards import write_root
from tests.trainer.training import CONFIG, STAGES
from trainer import __main__
from trainer.loop import train


@pytest.fixture(scope="session")
def packed(tmp_path_factory):
    root = tmp_path_factory.mktemp("packed")
    write_root(root)
    return root


@pytest.fixture
def root(packed, tmp_path):
    return shutil.copytree(packed, tmp_path / "root")


@pytest.fixture(scope="session")
def trained(packed, tmp_path_factory):
    """(root, what train returned) of an uninterrupted run on one process."""
    root = shutil.copytree(packed, tmp_path_factory.mktemp("trained") / "root")
    return root, train(CONFIG, str(root), STAGES)


@pytest.fixture
def call(root, tmp_path, monkeypatch, capsys):
    """Run the command line: (exit code, what it said). `mix` and `train` are the configuration's sections."""

    def call(*words, mix=None, train=None):
        path = tmp_path / "config.yaml"
        mix = mix or {"stages": [{"name": name} for name in STAGES]}
        path.write_text(json.dumps({"root": str(root), "mix": mix, "train": train or CONFIG.model_dump(mode="json")}))
        monkeypatch.setattr("sys.argv", ["trainer", str(path), *words])
        code = 0
        try:
            __main__.main()
        except SystemExit as end:
            code = end.code
        return code, capsys.readouterr()

    return call
