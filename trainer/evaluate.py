"""The loss on held-out sequences, in nats per token, together and by source."""

from typing import Any

import torch

from mixer.reader import ShardLog
from trainer.config import TrainConfig
from trainer.data import available, micro_batches
from trainer.metrics import loss_by_source, mean_by_source
from trainer.model import Decoder
from trainer.parallel import World


@torch.no_grad()
def evaluate(model: Decoder, log: ShardLog, config: TrainConfig, world: World) -> dict[str, Any]:
    """The first `evaluate_tokens` of the held-out shards: `held_out_loss`, `held_out_tokens`, `held_out_sources`.

    The loss is None where there is not one target.
    """
    wanted = -(-config.evaluate_tokens // log.stage.context)
    sequences = available(log, wanted, world)
    sums = torch.zeros(2, len(log.stage.sources), dtype=torch.float64, device=world.device)
    for packed in micro_batches(log, 0, sequences, config, world):
        out = model(packed.token_T, packed.layout, packed.target_T)
        sums += loss_by_source(out.nll_T, packed, len(log.stage.sources))
    total, targets = world.sum(sums).sum(1).tolist()
    return {
        "held_out_loss": total / targets if targets else None,
        "held_out_tokens": int(targets),
        "held_out_sources": mean_by_source(sums, log.stage.sources),
    }
