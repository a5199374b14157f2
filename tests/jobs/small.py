"""A small corpus with known duplicates and bad records, and a configuration for it: for the jobs' tests."""

import json
import random
from pathlib import Path

import yaml

from dataprep.classifier import ClassifierConfig
from dataprep.train_classifier import Row, train

WORDS = [
    a + b + c for a in ("ka", "lo", "mi", "ser", "tan") for b in ("ri", "do", "ve") for c in ("", "n", "sto", "la")
]
COMMON = ["the", "of", "and", "that", "have", "with", "to", "be"]


def sentence(rng: random.Random) -> str:
    words = [rng.choice(COMMON if rng.random() < 0.35 else WORDS) for _ in range(rng.randint(6, 14))]
    return " ".join(words).capitalize() + "."


def text(rng: random.Random, sentences: int) -> str:
    return "\n".join(" ".join(sentence(rng) for _ in range(4)) for _ in range(max(1, sentences // 4)))


def write_corpus(folder: Path, files: int = 3, documents: int = 60, seed: int = 0) -> None:
    """JSONL files: documents of many lengths; in each file an exact copy, a near duplicate and two bad lines."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(files):
        (folder / f"{number:02d}.jsonl").write_text(file_content(random.Random(f"{seed}-{number}"), documents, number))


def file_content(rng: random.Random, documents: int, number: int) -> str:
    texts = [text(rng, rng.choice([8, 16, 40, 100])) for _ in range(documents)]
    words = texts[0].split(" ")
    texts += [texts[1], " ".join([*words[:-1], "changed"])]
    lines = [json.dumps({"text": t, "id": f"{number}-{i}", "url": f"http://x/{i}"}) for i, t in enumerate(texts)]
    lines[3:3] = ["{not json", json.dumps({"text": "  ", "id": "empty"})]
    return "\n".join(lines) + "\n"


def write_quality_files(folder: Path) -> None:
    """`model.safetensors`: a classifier whose head `quality` tells texts with many an `n` from others.
    `quiz.jsonl`: an evaluation set of one document of the corpus in `in`."""
    document = json.loads((folder / "in/02.jsonl").read_text().splitlines()[10])
    (folder / "quiz.jsonl").write_text(json.dumps({"text": document["text"].upper()}))
    rng = random.Random("model")
    texts = [text(rng, 8) for _ in range(200)]
    rows = [Row(t.encode(), {"quality": float(t.count("n") / len(t) > 0.054)}, {}, "") for t in texts]
    train(rows, ClassifierConfig(buckets=1 << 10, held_out=0.5)).save(str(folder / "model.safetensors"))


def config(folder: Path, **sections: dict) -> dict:
    """A configuration that goes from the corpus to two short stages in seconds; `sections` override keys."""
    values = {
        "root": str(folder / "root"),
        "workers": 0,
        "corpus": {
            "sources": [{"name": "tales", "paths": [str(folder / "in")]}],
            "partition_mb": 0.03,
            "group_mb": 0.03,
        },
        "quality": {},
        "tokens": {"vocab_size": 512, "sample_mb": 1},
        "mix": {
            "thresholds": {"medium": 128, "long": 512},
            "shard_tokens": 4096,
            "held_out": {"fraction": 0.05, "tokens": 4096},
            "stages": [
                {"name": "base", "context": 128, "tokens": 20_000},
                {
                    "name": "longer",
                    "context": 512,
                    "rope_base": 1e6,
                    "tokens": 10_000,
                    "shares": {"short": 0.3, "medium": 0.4, "long": 0.3},
                },
            ],
        },
        "train": {
            "model": {"preset": "tiny"},
            "batch_tokens": 2048,
            "evaluate_tokens": 2048,
            "threads": 1,
        },
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section} if isinstance(section, dict) else section
    return values


def write_config(folder: Path, name: str = "config.yaml", **sections: dict) -> str:
    path = folder / name
    path.write_text(yaml.safe_dump(config(folder, **sections)))
    return str(path)
