"""The loss on held-out sequences, in nats per token, together and by source."""

from typing import Any

import torch

from mixer.reader import ShardLog
from trainer.config import TrainConfig
from trainer.data import available, micro_batches
from trainer.metrics import group_means, group_names, group_sums
from trainer.model import Decoder
from trainer.parallel import World


@torch.no_grad()
def evaluate(model: Decoder, log: ShardLog, config: TrainConfig, world: World) -> dict[str, Any]:
    """The first `evaluate_tokens` of the held-out shards: `held_out_loss`, `held_out_tokens`, `held_out_sources`.

    The loss is None where there is not one target.
    """
    wanted = -(-config.evaluate_tokens // log.stage.context)
    sequences = available(log, wanted, world)
    names = group_names(log.stage)
    sums = torch.zeros(2, sum(map(len, names.values())), dtype=torch.float64, device=world.device)
    for packed in micro_batches(log, 0, sequences, config, world):
        out = model(packed.token_T, packed.layout, packed.target_T, packed.real_T)
        sums += group_sums(out.nll_T, packed, names)
    total, targets = world.sum(sums)[:, : len(log.stage.sources)].sum(1).tolist()
    return {
        "held_out_loss": total / targets if targets else None,
        "held_out_tokens": int(targets),
        "held_out_sources": group_means(sums, names)["sources"],
    }
