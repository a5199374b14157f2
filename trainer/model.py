"""The hybrid decoder of MiniMax-Text-01: seven lightning layers to one of softmax attention, MoE in each, DeepNorm."""

import hashlib
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.nn import functional as F

from kernels.fused import gated_norm, rotate_both
from kernels.head_loss import head_loss
from kernels.lightning_chunks import Decay, decay
from trainer.attention import Layout, lightning_attention, rotary_angles, softmax_attention
from trainer.config import ModelConfig
from trainer.moe import MoE, Routing


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)


class LightningAttention(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.heads = config.heads
        width = config.heads * config.head_dim
        self.qkv_proj = linear(config.hidden, 3 * width)
        self.output_gate = linear(config.hidden, width)
        self.out_proj = linear(width, config.hidden)
        self.norm = RMSNorm(width, config.lightning_norm_eps)

    def forward(self, x_TD: Tensor, powers: Decay, layout: Layout) -> Tensor:
        out_THN = lightning_attention(self.qkv_proj(x_TD).unflatten(-1, (self.heads, -1)), powers, layout)
        gate_TX = self.output_gate(x_TD)
        return self.out_proj(gated_norm(out_THN.flatten(1), gate_TX, self.norm.weight, self.norm.eps))


class SoftmaxAttention(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.head_dim, self.ring = config.head_dim, False
        self.q_proj = linear(config.hidden, config.heads * config.head_dim)
        self.k_proj = linear(config.hidden, config.kv_heads * config.head_dim)
        self.v_proj = linear(config.hidden, config.kv_heads * config.head_dim)
        self.o_proj = linear(config.heads * config.head_dim, config.hidden)

    def forward(self, x_TD: Tensor, rotary: tuple[Tensor, Tensor], layout: Layout) -> Tensor:
        q_THN, k_TKN, v_TKN = (
            proj(x_TD).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        out_THN = softmax_attention(*rotate_both(q_THN, k_TKN, *rotary), v_TKN, layout, self.ring)
        return self.o_proj(out_THN.flatten(1))


class Layer(nn.Module):
    """Post-norm DeepNorm, each norm moved to the next sublayer's entry: the residual carries the normed tensor.

    Its number is not in its graph, so that torch.compile makes one for all layers of a kind: `place` tells its
    attention where tokens lie, by the angles of RoPE or by the powers of this layer's decay.
    """

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.scale = (2 * config.layers) ** 0.25
        self.input_layernorm = RMSNorm(config.hidden, config.norm_eps)
        self.self_attn = SoftmaxAttention(config) if config.is_softmax(layer) else LightningAttention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden, config.norm_eps)
        self.mlp = MoE(config)

    def forward(self, x_TD: Tensor, place: tuple[Tensor, Tensor] | Decay, layout: Layout) -> tuple[Tensor, Routing]:
        x_TD = self.input_layernorm(x_TD)
        x_TD = torch.add(self.self_attn(x_TD, place, layout), x_TD, alpha=self.scale)
        x_TD = self.post_attention_layernorm(x_TD)
        y_TD, routing = self.mlp(x_TD, layout)
        return torch.add(y_TD, x_TD, alpha=self.scale), routing


class Output(NamedTuple):
    loss_sum: Tensor  # over this batch's targets; 0 where none were given
    nll_T: Tensor  # each token's loss, without gradient
    hit_T: Tensor  # whether its target has the largest logit
    logits_TV: Tensor | None  # only where no targets were given
    routing: Routing  # of all layers; its count_LGE over the ranks that share a group, the rest this rank's


class Decoder(nn.Module):
    def __init__(self, config: ModelConfig, vocabulary: int, rope_base: float):
        super().__init__()
        self.config, self.rope_base = config, rope_base
        self.embed_tokens = nn.Embedding(vocabulary, config.hidden)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.layers))
        self.norm = RMSNorm(config.hidden, config.norm_eps)
        self.lm_head = linear(config.hidden, vocabulary)

    def forward(self, token_T: Tensor, layout: Layout, target_T: Tensor | None = None) -> Output:
        """Loss (or, without targets, logits) of a packed stream, or of this rank's slice of it."""
        x_TD = self.embed_tokens(token_T)
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        rotary = rotary_angles(layout.position_T, self.config.rotary_dim, self.rope_base, wide)
        layers = []
        m = self.config
        for number, layer in enumerate(self.layers):
            powers = decay(m.heads, number, m.layers, m.block, x_TD.device, x_TD.dtype)
            x_TD, routing = layer(x_TD, rotary if m.is_softmax(number) else powers, layout)
            layers.append(routing)
        x_TD = self.norm(x_TD)
        routing = Routing(*map(torch.stack, zip(*layers, strict=True)))
        if layout.cp is not None:
            dist.all_reduce(routing.count_GE, group=layout.cp.get_group())
        if target_T is None:
            return Output(x_TD.new_zeros(()), (none := x_TD.new_zeros(0)), none, self.lm_head(x_TD), routing)
        return Output(*head_loss(x_TD, self.lm_head.weight, target_T), None, routing)


def parameter_counts(config: ModelConfig, vocabulary: int) -> tuple[int, int]:
    """(all, those that one token uses: without embeddings, head and routers), counted on the meta device."""
    with torch.device("meta"):
        model = Decoder(config, vocabulary, 1.0)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    experts = sum(n for name, n in sizes.items() if ".experts." in name)
    unused = sum(n for name, n in sizes.items() if name.endswith((".gate.weight", "lm_head.weight", "tokens.weight")))
    total = sum(sizes.values())
    return total, total - unused - experts + experts * config.top_k // config.experts


def matrices(name: str, full: Tensor, config: ModelConfig) -> Iterator[tuple[str, Tensor, float]]:
    """The matrices that one parameter (or one expert of it) holds side by side, each a view with its own Xavier
    initialisation and gain: DeepNorm's (8 layers)^(-1/4) for value, output and FFN matrices, 1 for the others.
    """
    small = (8 * config.layers) ** -0.25
    if ".gate_up_proj" in name:
        yield from ((f"{name}.{part}", half, small) for part, half in zip(("gate", "up"), full, strict=True))
    elif name.endswith("qkv_proj.weight"):
        parts = full.view(config.heads, 3, config.head_dim, -1).unbind(1)
        yield from ((f"{name}.{part}", m, g) for part, m, g in zip("qkv", parts, (1.0, 1.0, small), strict=True))
    else:
        gain_small = ".down_proj" in name or name.endswith(("v_proj.weight", "o_proj.weight", "out_proj.weight"))
        yield name, full, small if gain_small else 1.0


def xavier(name: str, shape: torch.Size, config: ModelConfig, seed: int) -> Tensor:
    """Normal values of variance `gain^2 * 2 / (rows + columns)` for every matrix, decided by seed and name alone."""
    full = torch.empty(shape)
    for key, matrix, gain in matrices(name, full, config):
        digest = hashlib.sha256(f"{seed} {key}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        deviation = gain * math.sqrt(2 / (matrix.shape[:-1].numel() + matrix.shape[-1]))
        matrix.copy_(torch.randn(matrix.shape, generator=generator) * deviation)
    return full


def local_part(parameter: Tensor) -> tuple[Tensor, tuple[slice, ...]]:
    """What this rank holds of a parameter, and where in the whole that lies."""
    if not isinstance(parameter, DTensor):
        return parameter, tuple(slice(0, n) for n in parameter.shape)
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return parameter.to_local(), tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))


@torch.no_grad()
def initialise(model: Decoder, seed: int) -> None:
    """Xavier for every matrix, ones for the norms: the same on every mesh, one matrix in memory at a time."""
    for name, parameter in model.named_parameters():
        local, part = local_part(parameter)
        if parameter.ndim == 1:
            local.fill_(1.0)
        elif parameter.ndim == 2:
            local.copy_(xavier(name, parameter.shape, model.config, seed)[part])
        else:
            for expert, number in zip(local, range(part[0].start, part[0].stop), strict=True):
                expert.copy_(xavier(f"{name}.{number}", parameter.shape[1:], model.config, seed)[part[1:]])
