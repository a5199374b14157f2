"""Do deduplication, quality and the length curriculum help? `python -m benchmarks.ablation --corpus DIR`.

The same small model reads the same number of tokens from
  raw         everything there is,
  dedup       what deduplication keeps,
  filtered    of that, what fails no rule and is not in the lowest tier,
  upsampled   the same, documents of the highest tier up to four times as often as the others,
  curriculum  as upsampled, but in three stages of growing context instead of one of short context,
and predicts the same held-out documents. Per seed, the pool, the held-out documents, the draw and the first weights
are others; sources have equal shares in all arms. Run it again and it goes on; with everything there, it prints.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch starts: spinning threads would slow two runs at once

import argparse
import contextlib
import dataclasses
import itertools
import json
import time
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import ablation_data, ablation_results, common
from dataprep.storage import UserError, read_json, write_json
from jobs import train
from jobs.config import Config
from jobs.progress import say
from trainer.config import TrainConfig

ARMS = ("raw", "dedup", "filtered", "upsampled", "curriculum")
MODEL = {"hidden": 96, "heads": 3, "kv_heads": 1, "head_dim": 32, "rotary_dim": 16, "ffn": 96, "experts": 4}
TIMES, RATES = (0.0, 0.05, 0.6, 1.0), (0.0, 1.0, 1.0, 0.1)  # parts of the tokens and of --lr, linear between


def configuration(a: argparse.Namespace, root: Path, arm: str = "raw", seed: int = 0) -> Config:
    """One arm's pipeline. What comes before the plan is the same in all."""
    files = common.sources(a.corpus)
    chosen = a.sources or list(files)[: 3 if a.quick else None]
    if unknown := sorted(set(chosen) - set(files)):
        raise UserError(f"--sources: {a.corpus} has no {', '.join(unknown)}; it has {', '.join(sorted(files))}")
    longest = 8 * a.context
    recipe: list[tuple[int, float, float, dict[str, float] | None]] = [(a.context, 1e4, 1.0, None)]
    if arm == "curriculum":  # shares of short, medium and long documents as in MiniMax-01's extension stages
        recipe = [
            (a.context, 1e4, 0.6, None),
            (4 * a.context, 1e6, 0.2, {"short": 0.3, "medium": 0.7}),
            (longest, 1e6, 0.2, {"short": 0.3, "medium": 0.3, "long": 0.4}),
        ]
    stages, schedules, start = [], {}, 0.0
    for context, rope_base, part, shares in recipe:
        name = f"context-{context}"
        stages.append(
            {"name": name, "context": context, "rope_base": rope_base, "tokens": round(part * a.tokens)}
            | {"shares": shares, "source_weights": dict.fromkeys(chosen, 1 / len(chosen))}
        )
        schedules[name] = schedule(a.lr, start, min(1.0, start + part))
        start += part
    upsampled = arm in ("upsampled", "curriculum")
    return Config(
        root=str(root),
        corpus={"sources": [{"name": name, "paths": [str(files[name])]} for name in chosen]},
        dedup={"max_source_loss": 1.0},
        quality={
            "by_source": {name: [] for name in chosen if name.startswith("code")},
            "tiers": [{"by": "quantile", "low": 0.1, "high": 0.67}],
        },
        tokens={"vocab_size": a.vocabulary, "sample_mb": 10},
        mix={
            "thresholds": {"medium": a.context, "long": 4 * a.context},
            "tiers": {"high": {"copies": 4 if upsampled else 1}, "low": {"cap": 4}},
            "stages": stages,
            "held_out": {"fraction": 0.15, "tokens": 1 << 40, "context": longest},
            "shard_tokens": max(1 << 18, longest),
            "seed": seed,
        },
        train={
            "model": MODEL | a.model,
            "batch_tokens": a.batch_tokens,
            "stages": schedules,
            "evaluate_tokens": a.held_out_tokens,
            "evaluate_needles": a.needles,
            "seed": seed,
            "device": a.device,
            "dtype": "bfloat16" if a.device == "cuda" else "float32",
            "threads": max(1, (os.cpu_count() or 1) // a.at_once),
            "export": False,
            "checkpoint_steps": 50,
        },
    )


def schedule(peak: float, start: float, end: float) -> list[dict[str, Any]]:
    """A stage's part, from `start` to `end` of all tokens, of the one learning rate that all arms have."""
    marks = [start, *(x for x in TIMES if start < x < end), end]
    rates = [peak * float(np.interp(x, TIMES, RATES)) for x in marks]
    phases: list[dict[str, Any]] = [
        {"share": (b - a) / (end - start), "lr": rate}
        for (a, b), rate in zip(itertools.pairwise(marks), rates[1:], strict=True)
    ]
    if start:  # a schedule begins at a rate of 0
        phases[0]["share"] -= 1e-6
        phases.insert(0, {"share": 1e-6, "lr": rates[0], "shape": "constant"})
    return phases


def train_and_evaluate(config: TrainConfig, root: str, stages: list[str], longest: int) -> None:
    """In a process of its own: train, or go on; evaluate at the longest context too, whatever it was trained at."""
    from trainer.loop import train

    with open(Path(root) / "train.log", "a", buffering=1) as log, contextlib.redirect_stdout(log):
        last = Path(train(config, root, stages)["directory"]) / stages[-1]
        found = read_json(str(last / "evaluation.json"))
        if found["context"] != longest:
            found = evaluate_at(longest, config, root, last)
        write_json(str(last / f"at-{longest}.json"), found)


def evaluate_at(context: int, config: TrainConfig, root: str, directory: Path) -> dict[str, Any]:
    """As the trainer evaluates after a stage, but at another context than it was trained at."""
    from trainer.evaluate import evaluate
    from trainer.loop import begin
    from trainer.parallel import world
    from trainer.stages import HELD_OUT, open_log
    from trainer.vocabulary import load

    with world(config) as ranks:
        trained = begin(config, root, directory.name, directory, None, ranks)
        info = dataclasses.replace(trained.log.stage, context=context)
        vocabulary = load(root, info.tokenizer, info.vocab_size)
        return evaluate(trained.model, open_log(config, root, HELD_OUT), info, vocabulary, config, ranks)


def evaluations(config: Config) -> dict[str, Any] | None:
    """What a finished run's files say: `own`, at its last stage's context, and `longest`, at all arms' longest."""
    stages = [stage.name for stage in config.mix.stages]
    if (trained := train.finished(config.train, config.root, stages)) is None:
        return None
    last = Path(trained["directory"]) / stages[-1]
    longest = read_json(str(last / f"at-{config.mix.held_out.context}.json"))
    return longest and {"own": read_json(str(last / "evaluation.json")), "longest": longest}


def measure(a: argparse.Namespace, root: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """(arm, seed) -> `read` (what it was trained on) and its evaluations. What is there is not made again."""
    documents = ablation_data.load(configuration(a, root / "shared"), str(root / "related"), a.workers)
    found: dict[tuple[str, int], dict[str, Any]] = {}
    running: dict[Future, tuple[str, int, Config]] = {}
    began = time.monotonic()
    with ProcessPoolExecutor(a.at_once, get_context("spawn")) as pool:
        for seed, arm in itertools.product(range(a.seeds), ARMS):  # whole seeds first
            config = configuration(a, root / f"{arm}-{seed}", arm, seed)
            found[arm, seed] = {"read": ablation_data.pack(documents, arm, config, a.tokens / a.passes)}
            if there := evaluations(config):
                found[arm, seed] |= there
                continue
            names = [stage.name for stage in config.mix.stages]
            future = pool.submit(train_and_evaluate, config.train, config.root, names, 8 * a.context)
            running[future] = arm, seed, config
        for future in as_completed(running):
            future.result()
            arm, seed, config = running[future]
            found[arm, seed] |= evaluations(config) or {}
            bits = found[arm, seed]["own"]["held_out"]["bits_per_byte"]
            say(f"{arm}, seed {seed}: {bits:.4f} bits per byte; {(time.monotonic() - began) / 60:.0f} min so far")
    return found


def key_and_number(text: str) -> tuple[str, int]:
    key, _, number = text.partition("=")
    return key, int(number)


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--sources", nargs="+", metavar="NAME", help="of the directory's files; default: all")
    parser.add_argument("--root", default="runs/ablation", help="where everything lies, so that it can go on")
    parser.add_argument("--seeds", type=int, default=3, help="runs of every arm")
    parser.add_argument("--tokens", type=int, default=1_200_000, help="what every arm reads in all")
    parser.add_argument("--passes", type=float, default=1, help="how often that reads the pool's clean text")
    parser.add_argument("--held-out-tokens", type=int, default=150_000, help="to evaluate on, at most")
    parser.add_argument("--needles", type=int, default=4, help="of each length and depth")
    parser.add_argument("--context", type=int, default=512, help="of the short stage; the longest has 8 times as many")
    parser.add_argument("--vocabulary", type=int, default=4096, help="entries of the tokeniser")
    parser.add_argument("--model", nargs="+", type=key_and_number, default=[], metavar="KEY=N", help="of train.model")
    parser.add_argument("--batch-tokens", type=int, default=4096, help="of a step")
    parser.add_argument("--lr", type=float, default=5e-3, help="the highest learning rate")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--at-once", type=int, default=2, help="trainings that run beside each other")
    parser.add_argument("--workers", type=int, default=0, help="tasks at once of the jobs before; 0: no Ray")
    parser.add_argument("--docs", metavar="PAGE.md", help="write tables into this page, figures beside it (matplotlib)")
    a = parser.parse_args()
    a.model = dict(a.model)
    if a.quick:
        a.seeds, a.tokens, a.passes, a.held_out_tokens, a.needles = 1, 40_000, 0.5, 15_000, 1
        a.context, a.vocabulary, a.batch_tokens = 256, 1024, 2048
        a.model = {"hidden": 32, "heads": 1, "layers": 4, "softmax_every": 4, "ffn": 32} | a.model
    runs = len(ARMS) * a.seeds
    print(
        f"{runs} runs of {a.tokens:,} tokens, {a.at_once} at once, {common.about('torch')}; "
        "the default size takes about an hour on two cores, "
        f"--quick less than a minute; progress is in {a.root}/*/train.log"
    )
    found = measure(a, Path(a.root).absolute())
    figures = ablation_results.show(found, a.docs)
    if a.json:
        Path(a.json).write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
