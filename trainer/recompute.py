"""What each layer keeps for its backward pass and what it computes again, and its compilation by torch.compile."""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import SAC_IGNORED_OPS, checkpoint, create_selective_checkpoint_contexts

from kernels.lightning_chunks import Decay
from trainer.attention import Layout
from trainer.config import TrainConfig
from trainer.model import Decoder
from trainer.moe import Routing

BACKEND = "inductor"
GRAPHS = 64  # that torch.compile may make: two kinds of layer, training or evaluation, batches of ever other numbers
ALWAYS = (  # never computed again
    "trivium::route",  # a rounding error would send tokens to other experts
    # Softmax attention's cost grows with the square of a document's length, its result does not.
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "torch_attn::_varlen_attn",
)
COSTLY = (
    "aten::mm",
    "trivium::grouped_linear",
    "trivium::swiglu_linear",
    "trivium::lightning_attention",
    "_c10d_functional::all_to_all_single",
    "_c10d_functional::all_gather_into_tensor",
)
UNCOUNTED = "profiler::_record_function_enter_new", "profiler::_record_function_exit"


def prepare(model: Decoder, config: TrainConfig) -> None:
    """Give every layer the checkpointing and compilation of the configuration; before FSDP wraps it."""
    if config.compile:
        torch._dynamo.config.recompile_limit = GRAPHS
    # Inside a layer FSDP marks its steps for the profiler, the second time more of them; torch would refuse.
    SAC_IGNORED_OPS.update(operators(UNCOUNTED))
    mesh = config.parallel
    local = mesh.cp == mesh.ep == mesh.etp == 1  # a layer exchanges nothing with other ranks
    for number, layer in enumerate(model.layers):
        forward: Any = layer.forward
        if config.checkpointing != "none":
            kept = operators(ALWAYS if config.checkpointing == "full" else ALWAYS + COSTLY)
            contexts = partial(create_selective_checkpoint_contexts, kept)
            forward = partial(checkpoint, forward, use_reentrant=False, context_fn=contexts)
        if config.compile and (config.device == "cuda" or not config.model.is_softmax(number)):
            # On the CPU softmax attention is a loop over a batch's documents: no graph would fit the next batch.
            forward = torch.compile(forward, backend=BACKEND, fullgraph=local)  # exchanges part a layer's graph
        # Without capacity and exchanges a document's tokens depend on no other document: layers need not hold what
        # they compute again for all of a long stream.
        alone = config.model.capacity == "none" and local
        layer.forward = partial(in_parts, forward) if config.checkpointing == "full" and alone else forward


def in_parts(
    forward: Any, x_TD: Tensor, place: tuple[Tensor, Tensor] | Decay, layout: Layout
) -> tuple[Tensor, Routing]:
    """A layer over one part of the stream after the other."""
    if len(layout.parts) == 1:
        return forward(x_TD, place, layout)
    lengths = [part.stop - part.start for part, _ in layout.parts]
    places: Any = [place] * len(lengths)
    if not isinstance(place, Decay):
        places = zip(*(angle.split(lengths) for angle in place), strict=True)
    pieces = zip(x_TD.split(lengths), places, layout.parts, strict=True)
    outs, routings = zip(*(forward(x, where, own) for x, where, (_, own) in pieces), strict=True)
    return torch.cat(outs), Routing(*(torch.stack(sums).sum(0) for sums in zip(*routings, strict=True)))


def operators(names: tuple[str, ...]) -> list[Any]:
    """The overloads of those of these operators that this build of torch has."""
    found = []
    for namespace, name in (full.split("::") for full in names):
        packet = getattr(getattr(torch.ops, namespace), name, None)
        found += [getattr(packet, overload) for overload in packet.overloads()] if packet else []
    return found
