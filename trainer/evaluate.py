"""Evaluation of a stage: bits per byte on held-out documents, loss by position, needles and keys (docs/trainer.md)."""

import math
from collections import defaultdict
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from mixer.reader import ShardLog, StageInfo
from trainer.config import TrainConfig
from trainer.data import Packed, available, micro_batches
from trainer.model import Decoder, Output
from trainer.parallel import World
from trainer.probes import Item, Rows, haystacks, held_out
from trainer.vocabulary import Vocabulary

SUMS = ("loss", "tokens", "bytes", "asked", "found")  # of each item, over its targets
POSITIONS = 40  # powers of two


@torch.no_grad()
def evaluate(
    model: Decoder, log: ShardLog, stage: StageInfo, vocabulary: Vocabulary | None, config: TrainConfig, world: World
) -> dict[str, Any]:
    """The report on a model at the end of `stage`, from the held-out shards `log`. On all ranks.

    Without a vocabulary, what needs one is None: bytes, needles, keys.
    """
    items = held_out(log, available(log, 1 << 62, world), config.evaluate_tokens, stage.context)
    if vocabulary and items:
        hay = np.concatenate([item.tokens for item in items])
        items += haystacks(hay[hay != stage.eos], vocabulary, stage.context, config.evaluate_needles)
    rows = Rows(items, stage.context, stage)
    lengths = torch.tensor([len(item.tokens) for item in items], device=world.device)
    answers = torch.tensor([item.answer for item in items], device=world.device)
    token_bytes = torch.zeros(stage.vocab_size, dtype=torch.int64, device=world.device)
    if vocabulary:
        token_bytes += torch.from_numpy(vocabulary.token_bytes).to(world.device)
    sums = torch.zeros(len(SUMS), len(items) + 1, dtype=torch.float64, device=world.device)  # the last item: padding
    positions = torch.zeros(2, POSITIONS, dtype=torch.float64, device=world.device)
    for packed in micro_batches(cast(ShardLog, rows), 0, len(rows.tokens), config, world):
        out = model(packed.token_T, packed.layout, packed.target_T)
        add(sums, positions, out, packed, lengths, answers, token_bytes)
    world.sum(sums)
    world.sum(positions)
    return report(items, sums[:, :-1].cpu().numpy(), positions.tolist(), vocabulary is not None)


def add(
    sums: Tensor, positions: Tensor, out: Output, packed: Packed, lengths: Tensor, answers: Tensor, token_bytes: Tensor
) -> None:
    """Add a batch to the items' sums (SUMS x items) and to loss and tokens by position."""
    numbers = torch.from_numpy(packed.segments["doc"].astype(np.int64)).to(sums.device)
    item_T = torch.cat([numbers, numbers.new_tensor([len(lengths)])])[packed.segment_T]
    has = packed.target_T >= 0
    place = packed.layout.position_T
    known = item_T.clamp(max=len(lengths) - 1)
    asked = has & (place >= (lengths - 1 - answers)[known])
    nbytes = token_bytes[packed.target_T.clamp(min=0)] * has
    values = torch.stack([x.double() for x in (out.nll_T, has, nbytes, asked, asked & out.hit_T)])
    sums.index_add_(1, item_T, values)
    document = has & (answers == 0)[known]
    bucket = (place + 1).double().log2().floor().long()
    positions.index_add_(1, bucket, torch.stack([out.nll_T.double() * document, document.double()]))


def report(items: list[Item], sums: np.ndarray, positions: list[list[float]], text: bool) -> dict[str, Any]:
    """What evaluation.json says of the items' sums (SUMS x items) and of loss and tokens by position."""

    def groups(probe: str | None, *keys: str) -> dict[tuple, list[int]]:
        found = defaultdict(list)
        for i, item in enumerate(items):
            if item.about.get("probe") == probe:
                found[tuple(item.about[key] for key in keys)].append(i)
        return dict(sorted(found.items()))

    def score(members: list[int]) -> dict[str, Any]:
        loss, tokens, size = sums[:3, members].sum(1).tolist()
        return {
            "tokens": int(tokens),
            "bytes": int(size) if text else None,
            "loss": loss / tokens if tokens else None,
            "bits_per_byte": loss / math.log(2) / size if text and size else None,
        }

    def grid(probe: str, *keys: str) -> list[dict[str, Any]]:
        exact = sums[3] == sums[4]
        return [
            {**dict(zip(keys, names, strict=True)), "samples": len(members), "exact": float(exact[members].mean())}
            for names, members in groups(probe, *keys).items()
        ]

    documents = [i for members in groups(None).values() for i in members]
    return {
        "schema": 1,
        "held_out": score(documents) | {"documents": len(documents)},
        "sources": {name: score(members) for (name,), members in groups(None, "source").items()},
        "classes": {name: score(members) for (name,), members in groups(None, "class").items()},
        "cells": [{"source": s, "class": c, **score(m)} for (s, c), m in groups(None, "source", "class").items()],
        "positions": [
            {"from": (1 << k) - 1, "to": (2 << k) - 1, "tokens": int(n), "loss": loss / n}
            for k, (loss, n) in enumerate(zip(*positions, strict=True))
            if n
        ],
        "needle": grid("needle", "length", "depth"),
        "recall": grid("recall", "length", "pairs"),
    }
