"""Training speed on the CPU beside `transformers`' MiniMax, same weights: `python -m benchmarks.train_cpu [--long]`."""

import resource
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from transformers import MiniMaxForCausalLM
from transformers.utils import logging

from benchmarks import common
from benchmarks.common import about, medians
from dataprep.storage import UserError
from mixer.reader import SEGMENT, Batch
from trainer.checkpoint import Progress, Saver
from trainer.config import ModelConfig, TrainConfig
from trainer.data import pack
from trainer.hf import export
from trainer.model import Decoder
from trainer.moe import balance_loss
from trainer.parallel import build_model, build_optimizer, world
from trainer.stages import open_log

MODEL = ModelConfig(hidden=256, layers=8, heads=4, kv_heads=2, head_dim=64, rotary_dim=32, ffn=512, experts=8, block=64)
VOCABULARY = 8192
LENGTHS = {"512": 512, "2k": 2048, "8k": 8192}
BATCH = 8  # documents in one of their padded batches
PASS = 8192  # tokens of one of our passes: about as many as in one of theirs


def their_step(model: MiniMaxForCausalLM, optimizer: torch.optim.Optimizer, batches: list[torch.Tensor]) -> None:
    """One optimiser step on batches of rows padded with -100."""
    for row in batches:
        real = row >= 0
        out = model(
            row.clamp(min=0), attention_mask=real.long(), labels=row, use_cache=False, output_router_logits=True
        )
        (out.loss / len(batches)).backward()
    optimizer.step()
    optimizer.zero_grad()


def our_step(model: Decoder, optimizer: torch.optim.Optimizer, batches: list[Batch]) -> None:
    for batch in batches:
        packed = pack(batch, MODEL.block)
        out = model(packed.token_T, packed.layout, packed.target_T)
        tokens = int(packed.real_T.sum())
        loss = out.loss_sum / tokens + 0.01 * balance_loss(out.routing.count_GE, out.routing.prob_GE, tokens)
        (loss / len(batches)).backward()
    optimizer.step()
    optimizer.zero_grad()


def one_document(length: int) -> Batch:
    tokens = np.random.default_rng(length).integers(1, VOCABULARY, (1, length))
    return Batch(tokens, np.array([(0, 0, length, 0, 0, 0, 0, 0, 0)], SEGMENT))


def padded(documents: list[np.ndarray], by_length: bool) -> list[torch.Tensor]:
    """Batches of BATCH documents padded to their longest, in random order or grouped by length."""
    order = np.random.default_rng(0).permutation(len(documents))
    if by_length:
        order = order[np.argsort([len(documents[i]) for i in order], kind="stable")]
    batches = []
    for members in (order[i : i + BATCH] for i in range(0, len(order), BATCH)):
        longest = max(len(documents[i]) for i in members)
        rows = [F.pad(torch.from_numpy(documents[i]), (0, longest - len(documents[i])), value=-100) for i in members]
        batches.append(torch.stack(rows))
    return batches


def pair(directory: Path, model: Decoder, config: TrainConfig, ranks: object) -> MiniMaxForCausalLM:
    """transformers' model with the same weights."""
    saver, progress = Saver(ranks, keep=1), Progress("benchmark")
    shape = {"vocabulary": VOCABULARY, "rope_base": 1e4, "context": 8192, "eos": 0}
    saver.save(
        directory, model, build_optimizer(config, model), progress, shape | {"config": config.model_dump(mode="json")}
    )
    saver.wait()
    export(directory / progress.checkpoint, directory / "hf")
    logging.set_verbosity_error()  # it tells of decay buffers that it makes itself
    logging.disable_progress_bar()
    return MiniMaxForCausalLM.from_pretrained(directory / "hf").train()


def compare(root: str | None, stage: str, quick: bool, lengths: bool) -> dict[str, float]:
    torch.set_num_threads(2)
    config = TrainConfig(model=MODEL)
    repeats = 1 if quick else 5
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as directory, world(config) as ranks:
        ours = build_model(config, VOCABULARY, 1e4, ranks)
        theirs = pair(Path(directory), ours, config, ranks)
        millions = sum(p.numel() for p in ours.parameters()) / 1e6
        print(f"{millions:.1f} M parameters, 2 threads; {about('torch', 'transformers')}")
        adam = build_optimizer(config, ours), torch.optim.AdamW(theirs.parameters(), lr=0.0, fused=True)
        for name, length in LENGTHS.items() if lengths else ():
            batch = one_document(length)
            rows = [torch.from_numpy(batch.tokens)]
            steps = {"ours": partial(our_step, ours, adam[0], [batch])}
            steps["theirs"] = partial(their_step, theirs, adam[1], rows)
            figures |= row(name, length, medians(steps, repeats))
        if lengths:
            figures["tokens_s"] = figures["tokens_s_2k"]
        if root:
            figures |= packed(root, stage, ours, theirs, adam, 2 if quick else 16, 1 if quick else 3)
    return figures


def row(name: str, tokens: int, seconds: dict[str, float]) -> dict[str, float]:
    speeds = {who: tokens / s for who, s in seconds.items()}
    rest = ", ".join(f"{who} {speed:,.0f}" for who, speed in speeds.items())
    print(f"{name:>6}: {rest} tokens/s; {speeds['ours'] / speeds['theirs']:.2f}x", flush=True)
    return {f"tokens_s_{name}": speeds["ours"], f"vs_transformers_{name}": speeds["ours"] / speeds["theirs"]}


def packed(root: str, stage: str, ours, theirs, adam, sequences: int, repeats: int) -> dict[str, float]:
    """Real tokens per second on the first sequences of a packed stage: our rows, their documents padded."""
    log = open_log(TrainConfig(), root, stage)
    sequences = min(sequences, log.wait(sequences))
    batch, rows = log.read(0, sequences), max(1, PASS // log.stage.context)
    ours_rows = [log.read(a, min(a + rows, sequences)) for a in range(0, sequences, rows)]
    if log.stage.vocab_size > VOCABULARY:
        raise UserError(f"{root} has a vocabulary of {log.stage.vocab_size}; the benchmark's model has {VOCABULARY}")
    documents = [
        batch.tokens[s["sequence"], s["start"] : s["start"] + s["length"]].astype(np.int64) for s in batch.segments
    ]
    tokens = sum(map(len, documents))
    print(
        f"{stage}: {len(batch.tokens)} sequences of {log.stage.context}, {len(documents)} documents, {tokens:,} tokens"
    )
    steps = {"ours": partial(our_step, ours, adam[0], ours_rows)}
    for name, by_length in (("theirs", False), ("theirs_grouped", True)):
        steps[name] = partial(their_step, theirs, adam[1], padded(documents, by_length))
    seconds = medians(steps, repeats)
    figures = row("packed", tokens, seconds)
    return figures | {"vs_transformers_grouped": seconds["theirs_grouped"] / seconds["ours"]}


def long_row() -> dict[str, float]:
    """One optimiser step of the tiny model on a row of 1M tokens, documents of up to 4K."""
    torch.set_num_threads(2)
    config = TrainConfig(model=ModelConfig(preset="tiny"), checkpointing="full")
    length = 1 << 20
    rng = np.random.default_rng(0)
    cuts = np.unique(np.append(np.minimum(np.cumsum(rng.integers(64, 4097, length // 64)), length), 0))
    segments = np.zeros(len(cuts) - 1, SEGMENT)
    segments["start"], segments["length"], segments["doc"] = cuts[:-1], np.diff(cuts), np.arange(len(cuts) - 1)
    batch = Batch(rng.integers(1, 4096, (1, length)), segments)
    with world(config) as ranks:
        model = build_model(config, 4096, 1e7, ranks)
        optimizer = build_optimizer(config, model)
        began = time.perf_counter()
        our_step(model, optimizer, [batch])
        seconds = time.perf_counter() - began
    gigabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"1M-token row, {len(segments):,} documents: one step in {seconds:.1f} s, {gigabytes:.1f} GB")
    return {"long_seconds": seconds, "long_gb": gigabytes}


def main() -> None:
    parser = common.parser(__doc__, reads_corpus=False)
    parser.add_argument("--root", help="a root with packed shards of the demo, for the packed comparison")
    parser.add_argument("--stage", default="context-2k", help="the stage to take them from")
    parser.add_argument("--packed", action="store_true", help="only the packed comparison")
    parser.add_argument("--long", action="store_true", help="only the step on a row of 1M tokens")
    arguments = parser.parse_args()
    print(f"takes about {2 if arguments.long else 1 if arguments.quick else 10} minutes")
    if arguments.long:
        figures = long_row()
    else:
        figures = compare(arguments.root, arguments.stage, arguments.quick, lengths=not arguments.packed)
    common.report(arguments.json, figures)


if __name__ == "__main__":
    main()
