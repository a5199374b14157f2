"""Classifier job: trains the quality classifier from labelled rows, and reports how far it can be trusted."""

if not __package__:  # run as a script
    import _script  # noqa: F401

import argparse
from typing import Any

from dataprep import storage
from dataprep.classifier import Classifier, ClassifierConfig
from dataprep.storage import Attempt, Commit, UserError
from dataprep.train_classifier import GROUPS, read_rows, train
from jobs import label
from jobs.config import Config
from jobs.engine import Engine, Step, Task, once_per_run
from jobs.progress import say

VERSION = 2
LEAST_SHOWN = 20  # held-out rows of a language or source


@once_per_run
def build(engine: Engine, config: Config) -> Commit:
    """Bring the classifier up to date: one file, `model`; its metrics are the commit's aggregates."""
    paths = label_files(engine, config)
    inputs = {path: storage.fingerprint(storage.xxhash.xxh3_128_hexdigest(storage.read_bytes(path))) for path in paths}
    step = Step("classifier", VERSION, config.classifier.model_dump(mode="json", exclude={"labels"}))
    return engine.once(step, train_model, Task("all", inputs, (paths, config.classifier)))


def label_files(engine: Engine, config: Config) -> list[str]:
    """The files that `classifier.labels` names, or those that the label job last wrote."""
    found: list[str] = []
    for pattern in config.classifier.labels:
        files = storage.expand(pattern)
        if not files:
            raise UserError(f"classifier.labels: no file matches {pattern}")
        found += files
    if found:
        return sorted(set(found))
    labels = storage.latest(engine.root, "labels")
    commits = label.committed(labels) if labels else []
    if not commits:
        raise UserError("no labels: name files in classifier.labels, or let a language model rate some (jobs/label.py)")
    return [commit.path("labels") for commit in commits]


def train_model(out: Attempt, paths: list[str], config: ClassifierConfig) -> dict[str, Any]:
    model = train(read_rows(paths, config), config)
    with out.file("model", ".safetensors") as path:
        model.save(path)
    return model.about["metrics"]


def main(engine: Engine, config: Config, arguments: argparse.Namespace) -> None:
    commit = build(engine, config)
    metrics = Classifier.load(commit.path("model")).about["metrics"]
    counts = metrics.pop("rows")
    say(f"trained on {counts['train']:,} rows, calibrated on {counts['calibrate']:,}; on the held-out rows:")
    for head, found in metrics.items():
        show(f"{head}, all", found["all"])
        for group in GROUPS:
            enough = {name: values for name, values in found[group].items() if values["rows"] >= LEAST_SHOWN}
            for name, values in enough.items():
                show(f"{head}, {group} {name}", values)
            if few := sorted(found[group].keys() - enough.keys()):
                say(f"{head}, {group}s with under {LEAST_SHOWN} rows, too few to tell: {', '.join(few)}")
    say(f"model: {commit.path('model')}")


def show(where: str, values: dict[str, Any]) -> None:
    shown = (f"{name} {'-' if value is None else value}" for name, value in values.items() if name != "rows")
    say(f"{where} ({values['rows']:,} rows): {', '.join(shown)}")


if __name__ == "__main__":
    from jobs.cli import run

    run("classifier")
