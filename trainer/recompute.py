"""What each layer keeps for its backward pass and what it computes again, and its compilation by torch.compile."""

from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from trainer.config import TrainConfig
from trainer.model import Decoder

BACKEND = "inductor"
ROUTING = ("trivium::route",)  # never computed again: a rounding error would send tokens to other experts
COSTLY = (
    *ROUTING,
    "aten::mm",
    "trivium::grouped_linear",
    "trivium::lightning_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "torch_attn::_varlen_attn",
    "trivium::attend_documents",
    "_c10d_functional::all_to_all_single",
    "_c10d_functional::all_gather_into_tensor",
)


def prepare(model: Decoder, config: TrainConfig) -> None:
    """Give every layer the checkpointing and compilation of the configuration; before FSDP wraps it."""
    for layer in model.layers:
        forward: Any = layer.forward
        if config.checkpointing != "none":
            kept = operators(ROUTING if config.checkpointing == "full" else COSTLY)
            contexts = partial(create_selective_checkpoint_contexts, kept)
            forward = partial(checkpoint, forward, use_reentrant=False, context_fn=contexts)
        if config.compile:
            whole = config.parallel.ep == config.parallel.cp == 1  # else a layer's exchanges part its graph
            forward = torch.compile(forward, backend=BACKEND, fullgraph=whole)
        layer.forward = forward


def operators(names: tuple[str, ...]) -> list[Any]:
    """The overloads of those of these operators that this build of torch has."""
    found = []
    for namespace, name in (full.split("::") for full in names):
        packet = getattr(getattr(torch.ops, namespace), name, None)
        found += [getattr(packet, overload) for overload in packet.overloads()] if packet else []
    return found
