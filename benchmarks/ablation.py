"""Do deduplication, quality and the length curriculum help? `python -m benchmarks.ablation --corpus DIR`.

The same small model reads the same number of tokens from
  raw         everything there is,
  dedup       what deduplication keeps,
  filtered    of that, what fails no rule and is not in the lowest tier,
  upsampled   the same, documents of the highest tier up to four times as often as the others,
  curriculum  as upsampled, but in three stages of growing context instead of one of short context,
and predicts the same held-out documents. Per seed, the pool, the held-out documents, the draw and the first weights
are others; sources have equal shares in all arms. Run it again and it goes on; with everything there, it prints.
Any key of the arms' configuration may be given as to a job: --train.model.layers 16 --train.device cuda.
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
import yaml

from benchmarks import ablation_data, ablation_results, common
from dataprep.storage import UserError, read_json, write_json
from jobs import train
from jobs.config import Config, load
from jobs.progress import say
from trainer.config import TrainConfig

ARMS = ("raw", "dedup", "filtered", "upsampled", "curriculum")
MODEL = {"hidden": 96, "heads": 3, "kv_heads": 1, "head_dim": 32, "rotary_dim": 16, "ffn": 96, "experts": 4}
QUICK_MODEL = MODEL | {"hidden": 32, "heads": 1, "layers": 4, "softmax_every": 4, "ffn": 32}
TIMES, RATES = (0.0, 0.05, 0.6, 1.0), (0.0, 1.0, 1.0, 0.1)  # parts of the tokens and of --lr, linear between


def configuration(a: argparse.Namespace, root: Path, arm: str = "raw", seed: int = 0) -> Config:
    """One arm's pipeline, also as a file beside its root. What comes before the plan is the same in all."""
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
    values = {
        "root": str(root),
        "workers": 0,
        "corpus": {"sources": [{"name": name, "paths": [str(files[name])]} for name in chosen]},
        "dedup": {"max_source_loss": 1.0},
        "quality": {
            "by_source": {name: [] for name in chosen if name.startswith("code")},
            "tiers": [{"by": "quantile", "low": 0.1, "high": 0.67}],
        },
        "tokens": {"vocab_size": 1024 if a.quick else 4096, "sample_mb": 10},
        "mix": {
            "thresholds": {"medium": a.context, "long": 4 * a.context},
            "tiers": {"high": {"copies": 4 if upsampled else 1}, "low": {"cap": 4}},
            "stages": stages,
            "held_out": {"fraction": 0.15, "tokens": 1 << 40, "context": longest},
            "shard_tokens": max(1 << 18, longest),
            "seed": seed,
        },
        "train": {
            "model": QUICK_MODEL if a.quick else MODEL,
            "batch_tokens": 2048 if a.quick else 4096,
            "stages": schedules,
            "evaluate_tokens": 15_000 if a.quick else 150_000,
            "evaluate_needles": 1 if a.quick else 4,
            "seed": seed,
            "threads": max(1, (os.cpu_count() or 1) // a.at_once),
            "export": False,
            "checkpoint_steps": 50,
        },
    }
    root.parent.mkdir(parents=True, exist_ok=True)
    root.with_suffix(".yaml").write_text(yaml.safe_dump(values))
    return load(str(root.with_suffix(".yaml")), a.overrides)


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


def train_and_evaluate(config: Config) -> dict[str, Any]:
    """In a process of its own: train, or go on, and evaluate at the longest context too, whatever it was trained at.

    Returns the evaluations `own`, at the last stage's context, and `longest`."""
    stages, context = [stage.name for stage in config.mix.stages], config.mix.held_out.context or 0
    with open(Path(config.root) / "train.log", "a", buffering=1) as log, contextlib.redirect_stdout(log):
        if not (trained := train.finished(config.train, config.root, stages)):
            from trainer import loop

            trained = loop.train(config.train, config.root, stages)
        last = Path(trained["directory"]) / stages[-1]
        own, longest = (read_json(str(last / name)) for name in ("evaluation.json", f"at-{context}.json"))
        if not longest:
            longest = own if own["context"] == context else evaluate_at(context, config.train, config.root, last)
            write_json(str(last / f"at-{context}.json"), longest)
    return {"own": own, "longest": longest}


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


def measure(a: argparse.Namespace, root: Path) -> ablation_results.Found:
    """What every arm and seed was trained on, and its evaluations. What is there is not made again."""
    results, documents = ablation_data.load(configuration(a, root / "shared"), str(root / "related"))
    found: ablation_results.Found = {}
    running: dict[Future, tuple[str, int]] = {}
    began = time.monotonic()
    with ProcessPoolExecutor(a.at_once, get_context("spawn")) as pool:
        for seed, arm in itertools.product(range(a.seeds), ARMS):  # whole seeds first
            config = configuration(a, root / f"{arm}-{seed}", arm, seed)
            found[arm, seed] = {"read": ablation_data.pack(results, documents, arm, config, a.tokens / a.passes)}
            running[pool.submit(train_and_evaluate, config)] = arm, seed
        for future in as_completed(running):
            arm, seed = running[future]
            found[arm, seed] |= future.result()
            bits = found[arm, seed]["own"]["held_out"]["bits_per_byte"]
            say(f"{arm}, seed {seed}: {bits:.4f} bits per byte; {(time.monotonic() - began) / 60:.0f} min so far")
    return found


def main() -> None:
    parser = common.parser(__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--sources", nargs="+", metavar="NAME", help="of the directory's files; default: all")
    parser.add_argument("--root", default="runs/ablation", help="where everything lies, so that it can go on")
    parser.add_argument("--seeds", type=int, default=3, help="runs of every arm")
    parser.add_argument("--tokens", type=int, default=1_200_000, help="what every arm reads in all")
    parser.add_argument("--passes", type=float, default=1, help="how often that reads the pool's clean text")
    parser.add_argument("--context", type=int, default=512, help="of the short stage; the longest has 8 times as many")
    parser.add_argument("--lr", type=float, default=5e-3, help="the highest learning rate")
    parser.add_argument("--at-once", type=int, default=2, help="trainings that run beside each other")
    parser.add_argument("--figures", metavar="DIR", help="draw the page's two figures there (SVG; needs matplotlib)")
    a, overrides = parser.parse_known_args()
    a.overrides = overrides
    if a.quick:
        a.seeds, a.tokens, a.passes, a.context = 1, 40_000, 0.5, 256
    print(
        f"{len(ARMS) * a.seeds} runs of {a.tokens:,} tokens, {a.at_once} at once, {common.about('torch')}; "
        "the default size takes about an hour on two cores, "
        f"--quick less than a minute; progress is in {a.root}/*/train.log"
    )
    try:
        found = measure(a, Path(a.root).absolute())
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
    figures = ablation_results.show(found, a.figures)
    if a.json:
        Path(a.json).write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
