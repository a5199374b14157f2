"""The small model and configuration of the training tests, and how they look at what a run left behind."""

import json
from pathlib import Path

from torch import Tensor
from torch.distributed.tensor import DTensor

from tests.trainer.shards import VOCABULARY
from trainer import checkpoint, metrics
from trainer.config import ModelConfig, OptimizerConfig, Phase, TrainConfig
from trainer.parallel import build_model, build_optimizer, world

MODEL = ModelConfig(
    hidden=32, heads=2, kv_heads=1, head_dim=16, rotary_dim=8, ffn=24, block=16, layers=4, softmax_every=4
)
CONFIG = TrainConfig(
    model=MODEL, dtype="float64", batch_tokens=480, micro_tokens=192, checkpoint_steps=4, evaluate_tokens=600,
    schedule=(Phase(share=0.2, lr=5e-3), Phase(share=0.8, lr=5e-4, shape="cosine")),
    optimizer=OptimizerConfig(clip=0.5), threads=1,
)  # fmt: skip
STAGES = ["base", "longer"]


def whole(x: Tensor) -> Tensor:
    """All of a parameter, however it lies on the ranks; one process has it whole."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def records(root, stage):
    (directory,) = Path(root).glob("train-*")
    return metrics.read(directory / stage / "metrics.jsonl")


def without_speed(rows):
    speed = {"tokens_per_second", "seconds", "wait_seconds", "memory_gb", "mfu"}
    return [{k: v for k, v in row.items() if k not in speed} for row in rows]


def weights(root, stage):
    (directory,) = Path(root).glob("train-*")
    path = checkpoint.checkpoints(directory / stage)[-1]
    with world(CONFIG) as ranks:
        model = build_model(CONFIG, VOCABULARY, 1e4, ranks)
        checkpoint.load(path, model, build_optimizer(CONFIG, model))
        return {name: whole(p) for name, p in model.named_parameters()}


def repack(root, stage, **changes):
    """Change what a stage's stage.json says."""
    path = root / f"pack-{stage}" / "stage.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
