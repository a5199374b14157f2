"""One step's loss and gradients on a mesh: what `test_parallel.py` compares, and what its processes execute."""

import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch._dynamo.utils import counters

from mixer.reader import Batch
from mixer.shards import SEGMENT
from tests.trainer.ranks import join
from tests.trainer.training import whole
from trainer import checkpoint, recompute
from trainer.collectives import clip_gradients
from trainer.config import ModelConfig, ParallelConfig, TrainConfig
from trainer.data import micro_batches
from trainer.moe import balance_loss
from trainer.parallel import build_model, build_optimizer, world

CONTEXT, VOCABULARY = 48, 50
# A row's documents; the rest is padding. Cut in two or four: documents that span three ranks, start on a border and
# do not, and a padding tail with whole ranks of it.
ROWS = [[48], [12, 24, 12], [5, 38], [7, 4], [1, 1, 33, 13], [20, 28], [3, 9, 30, 6]]
MODEL = {
    "hidden": 32, "heads": 2, "kv_heads": 1, "head_dim": 16, "rotary_dim": 8, "ffn": 24, "block": 8,
    "layers": 4, "softmax_every": 2, "aux_loss": 0.1,
}  # fmt: skip
ROUTINGS = {
    "dropless": {"block": 5},
    "capacity": {"capacity": "group", "capacity_factor": 0.8, "routing_group": 2},
}


@dataclass
class Result:
    loss: float
    norm: float
    load_LE: Tensor
    initial: dict[str, Tensor]
    gradients: dict[str, Tensor]
    graphs: int  # that torch.compile made, of all layers
    breaks: int


class Log:
    """Stands in for a stage's shards."""

    stage = SimpleNamespace(context=CONTEXT, eos=0, dtype=np.uint16)

    def __init__(self, rows: list[list[int]] = ROWS):
        self.rows = rows

    def read_ahead(self, ranges: list[tuple[int, int]]) -> None:
        pass

    def read(self, a: int, b: int) -> Batch:
        tokens = np.random.default_rng(0).integers(0, VOCABULARY, (len(self.rows), CONTEXT), np.uint16)
        segments = [
            (row, start, length, 0, 0, 0, 0, 0, 0)
            for row, lengths in enumerate(self.rows[a:b])
            for start, length in zip(np.cumsum([0, *lengths]), lengths, strict=False)
        ]
        return Batch(tokens[a:b], np.array(segments, SEGMENT))


def config(
    routing: str,
    micro_tokens: int = 2 * CONTEXT,
    dtype: str = "float64",
    checkpointing: str = "none",
    compile: bool = False,
    **mesh: Any,
) -> TrainConfig:
    model = ModelConfig(**MODEL | ROUTINGS.get(routing, {"capacity": routing, "capacity_factor": 0.8}))
    mesh_config = ParallelConfig(**mesh)
    how = {"dtype": dtype, "micro_tokens": micro_tokens, "checkpointing": checkpointing, "compile": compile}
    return TrainConfig(model=model, parallel=mesh_config, threads=1, **how)


def step(config: TrainConfig, rows: list[list[int]] = ROWS) -> Result:
    """On every rank of the process group; all ranks return the whole."""
    recompute.BACKEND = "aot_eager"
    torch._dynamo.reset()
    counters.clear()
    with world(config) as ranks:
        model = build_model(config, VOCABULARY, 1e4, ranks)
        initial = {name: whole(p).detach().clone() for name, p in model.named_parameters()}
        batches = list(micro_batches(Log(rows), 0, len(rows), config, ranks))
        counts = torch.tensor([[(b.target_T >= 0).sum(), b.real_T.sum()] for b in batches]).sum(0)
        targets, tokens = ranks.sum(counts).tolist()
        total = torch.zeros((), dtype=torch.float64)
        load_LE = torch.zeros(config.model.layers, config.model.experts, dtype=torch.int64)
        for batch in batches:
            out = model(batch.token_T, batch.layout, batch.target_T)
            balance = balance_loss(out.routing.count_GE, out.routing.prob_GE, tokens)
            loss = out.loss_sum / targets + config.model.aux_loss * balance
            loss.backward()
            total += loss.detach()
            load_LE += out.routing.load_E
        gradients = {name: whole(p.grad).clone() for name, p in model.named_parameters()}
        norm = clip_gradients(model.parameters(), 1e-3)
        graphs = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
        return Result(float(ranks.sum(total)), float(norm), ranks.sum(load_LE), initial, gradients, *graphs)


def first_layer_drops(config: TrainConfig, shared: bool) -> list[int]:
    """What every rank drops of its first micro-batch in the first layer, with or without the global router."""
    with world(config) as ranks, torch.no_grad():
        model = build_model(config, VOCABULARY, 1e4, ranks)
        if not shared:
            for layer in model.layers:
                layer.mlp.peers = None
        batch = next(iter(micro_batches(Log(), 0, len(ROWS), config, ranks)))
        load_E = model(batch.token_T, batch.layout).routing.load_E[0]
        dropped = torch.zeros(ranks.size, dtype=torch.int64)
        dropped[ranks.rank] = batch.real_T.sum() * config.model.top_k - load_E.sum()
        return ranks.sum(dropped).tolist()


def saved(config: TrainConfig, directory: Path, write: bool = False) -> dict[str, Tensor]:
    """Weights and moments, whole: as they are written after an update, or as this mesh reads them."""
    with world(config) as ranks:
        model = build_model(config, VOCABULARY, 1e4, ranks)
        optimizer = build_optimizer(config, model)
        if write:
            for p in model.parameters():
                p.grad = p.detach().clone()
            for group in optimizer.param_groups:
                group["lr"] = 0.01
            optimizer.step()
            saver = checkpoint.Saver(ranks, keep=1)
            saver.save(directory, model, optimizer, checkpoint.Progress("base"), {})
            saver.wait()
        else:
            checkpoint.load(directory / "step-00000000", model, optimizer)
        held = {name: {"weight": p, **optimizer.state[p]} for name, p in model.named_parameters()}
        return {f"{n} {key}": whole(x).detach().clone() for n, parts in held.items() for key, x in parts.items()}


RESHARDED = {2: [{"etp": 2}, {}], 4: [{"ep": 2, "etp": 2}, {"etp": 4}, {"dp_replicate": 2, "etp": 2}, {"ep": 4}]}
CASES = {
    2: {
        "dp2": {}, "replicate2": {"dp_replicate": 2}, "ep2": {"ep": 2}, "cp2": {"cp": 2}, "cp2 ep2": {"cp": 2, "ep": 2},
        "dp2, one pass": {"micro_tokens": 4 * CONTEXT}, "cp2 float32": {"cp": 2, "ep": 2, "dtype": "float32"},
        "dp2 compiled": {"compile": True}, "ep2 compiled": {"ep": 2, "compile": True},
        "cp2 ring": {"cp": 2, "cp_attention": "ring", "checkpointing": "selective"},
        "etp2": {"etp": 2}, "cp2 etp2": {"cp": 2, "etp": 2, "checkpointing": "full"},
    },
    4: {
        "dp2 replicate2": {"dp_replicate": 2}, "ep4": {"ep": 4, "micro_tokens": CONTEXT}, "cp4": {"cp": 4},
        "cp4, row by row": {"cp": 4, "micro_tokens": 12}, "dp2 cp2": {"cp": 2},
        "dp2 ep2": {"ep": 2, "micro_tokens": CONTEXT}, "cp2 ep2": {"cp": 2, "ep": 2},
        "replicate2 ep2": {"dp_replicate": 2, "ep": 2}, "cp4 ring": {"cp": 4, "cp_attention": "ring"},
        "dp2 cp2 ring": {"cp": 2, "cp_attention": "ring"},
        "etp4": {"etp": 4, "micro_tokens": CONTEXT}, "ep2 etp2": {"ep": 2, "etp": 2},
        "dp2 etp2": {"etp": 2, "checkpointing": "selective"}, "replicate2 etp2": {"dp_replicate": 2, "etp": 2},
    },
}  # fmt: skip


def main(out: Path) -> None:
    join()
    found = {}
    for name, values in CASES[dist.get_world_size()].items():
        for routing in ROUTINGS:
            found[name, routing] = vars(step(config(routing, **values)))
    found["two tokens", "dropless"] = vars(step(config("dropless", ep=dist.get_world_size()), [[2]]))
    drops = {s: first_layer_drops(config("ep_group", ep=2), s) for s in (True, False)}
    drops["again"] = first_layer_drops(config("ep_group", ep=2), True)
    drops["etp"] = first_layer_drops(config("ep_group", etp=2), True)
    readers = enumerate(RESHARDED[dist.get_world_size()])
    states = [saved(config("dropless", **mesh), out.with_suffix(""), write=i == 0) for i, mesh in readers]
    if dist.get_rank() == 0:
        torch.save((found, drops, states), out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
