"""Packed sequences as the model takes them: one stream of tokens, targets, document boundaries."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from dataprep.storage import UserError
from mixer.batches import slices
from mixer.reader import Batch, ShardLog
from trainer import signals
from trainer.attention import Layout
from trainer.config import TrainConfig
from trainer.parallel import World

NO_TARGET = -100


@dataclass(frozen=True)
class Packed:
    """Sequences [start, stop) of a stage end to end. T = their number times the context."""

    token_T: Tensor  # int64
    target_T: Tensor  # int64: the next token of the same segment, or NO_TARGET
    segment_T: Tensor  # int64: the token's row in `segments`; -1: padding
    segments: np.ndarray  # SEGMENT
    layout: Layout

    @property
    def real_T(self) -> Tensor:
        return self.segment_T >= 0

    @property
    def counts(self) -> Tensor:
        """Targets, real tokens, and the sum of the documents' squared lengths, which one of the ranks that share the
        sequences counts."""
        squares = (self.segments["length"] ** 2).sum() if self.layout.part.start == 0 else 0
        return torch.stack(
            [(self.target_T >= 0).sum(), self.real_T.sum(), self.real_T.new_tensor(squares, dtype=torch.int64)]
        )


def pack(
    batch: Batch, block: int, device: torch.device | str = "cpu", masked: bool = False,
    together: int = 1, cp: DeviceMesh | None = None,
) -> Packed:  # fmt: skip
    """Lay a batch of sequences end to end; with `cp`, this rank's part of them, an equal and contiguous one.

    Every segment is a document of its own to the model, and so is the padding after a row's last. A segment's last
    token has no target: what follows belongs to another document. EOS is learned, as the target of the token before
    it. `together`: sequences that make a routing group. `masked`: everything counts as padding (for a rank that has no
    sequence of its own).
    """
    rows, context = batch.tokens.shape
    segments = batch.segments
    start = segments["sequence"].astype(np.int64) * context + segments["start"]
    edges = np.unique(np.concatenate([start, start + segments["length"], np.arange(rows + 1) * context]))

    segment = np.full(rows * context, -1, np.int64)
    if not masked and len(start):
        at = np.searchsorted(start, edges[:-1]).clip(max=len(start) - 1)
        segment = np.repeat(np.where(start[at] == edges[:-1], at, -1), np.diff(edges))

    token = batch.tokens.reshape(-1).astype(np.int64)
    target = np.append(token[1:], NO_TARGET)
    target[edges[1:] - 1] = NO_TARGET
    target[segment < 0] = NO_TARGET
    group = np.where(segment < 0, -1, np.arange(len(token)) // (context * together))
    layout = Layout.of(edges.tolist(), block, device, torch.from_numpy(group), -(-rows // together), cp)
    token_T, target_T, segment_T = (torch.from_numpy(x)[layout.part].to(device) for x in (token, target, segment))
    return Packed(token_T, target_T, segment_T, segments[: 0 if masked else None], layout)


def available(log: ShardLog, wanted: int, ranks: World) -> int:
    """Wait for `wanted` sequences; how many of them there are (fewer: the stage has ended), the same on every rank."""

    def wait() -> int:
        with signals.waiting():
            return log.wait(wanted)

    there = min(wanted, ranks.broadcast(wait))
    return min(there, log.wait(there))  # rank 0 has seen them; on the others this looks them up


def micro_batches(log: ShardLog, start: int, stop: int, config: TrainConfig, world: World) -> Iterator[Packed]:
    """This rank's parts of sequences [start, stop), as many routing groups at a time as `micro_tokens` allows.

    Every rank gets the same number of parts. One left without a sequence of its own computes on a masked one, so that
    all take part in every collective.
    """
    group, cp, context = config.model.routing_group, config.parallel.cp, log.stage.context
    if context % cp:
        raise UserError(f"train.parallel.cp is {cp}; it must divide the stage's context, {context}")
    rank, ranks = world.dp.get_local_rank(), world.dp.size()
    rows = group * max(1, config.micro_tokens * cp // (context * group))
    mine = list(slices(start, stop, rank, ranks, rows, group))
    # The next step is most likely as large as this one; if not, its parts are read when it comes.
    log.read_ahead([*mine, *slices(stop, 2 * stop - start, rank, ranks, rows, group)])
    for a, b in mine:
        batch = log.read(a, b) if a < b else Batch.masked(log.stage, 1)
        yield pack(batch, config.model.block, world.device, a == b, group, world.cp)
