"""The hybrid decoder of MiniMax-Text-01: seven lightning layers to one of softmax attention, MoE in each, DeepNorm."""

import hashlib
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.nn import functional as F

from trainer.attention import (
    Layout,
    decay,
    lightning_attention,
    rotary_angles,
    rotate,
    softmax_attention,
)
from trainer.config import ModelConfig
from trainer.loss import head_loss
from trainer.moe import MoE


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
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.heads, self.layer, self.layers, self.block = config.heads, layer, config.layers, config.block
        width = config.heads * config.head_dim
        self.qkv_proj = linear(config.hidden, 3 * width)
        self.output_gate = linear(config.hidden, width)
        self.out_proj = linear(width, config.hidden)
        self.norm = RMSNorm(width, config.lightning_norm_eps)

    def forward(self, x_TD: Tensor, rotary: tuple[Tensor, Tensor], layout: Layout) -> Tensor:
        q_THN, k_THN, v_THN = F.silu(self.qkv_proj(x_TD)).unflatten(-1, (self.heads, -1)).chunk(3, dim=-1)
        powers = decay(self.heads, self.layer, self.layers, self.block, x_TD.device, x_TD.dtype)
        out_THN = lightning_attention(q_THN, k_THN, v_THN, powers, layout)
        return self.out_proj(self.norm(out_THN.flatten(1)) * self.output_gate(x_TD).sigmoid())


class SoftmaxAttention(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.head_dim = config.head_dim
        self.q_proj = linear(config.hidden, config.heads * config.head_dim)
        self.k_proj = linear(config.hidden, config.kv_heads * config.head_dim)
        self.v_proj = linear(config.hidden, config.kv_heads * config.head_dim)
        self.o_proj = linear(config.heads * config.head_dim, config.hidden)

    def forward(self, x_TD: Tensor, rotary: tuple[Tensor, Tensor], layout: Layout) -> Tensor:
        q_THN, k_TKN, v_TKN = (
            proj(x_TD).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        out_THN = softmax_attention(rotate(q_THN, *rotary), rotate(k_TKN, *rotary), v_TKN, layout)
        return self.o_proj(out_THN.flatten(1))


class Layer(nn.Module):
    """Post-norm DeepNorm, each norm moved to the next sublayer's entry: the residual carries the normed tensor."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.scale = (2 * config.layers) ** 0.25
        self.input_layernorm = RMSNorm(config.hidden, config.norm_eps)
        self.self_attn = SoftmaxAttention(config) if config.is_softmax(layer) else LightningAttention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden, config.norm_eps)
        self.mlp = MoE(config.hidden, config.experts, config.top_k, config.ffn)

    def forward(
        self, x_TD: Tensor, rotary: tuple[Tensor, Tensor], layout: Layout, real_T: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        x_TD = self.input_layernorm(x_TD)
        x_TD = torch.add(self.self_attn(x_TD, rotary, layout), x_TD, alpha=self.scale)
        x_TD = self.post_attention_layernorm(x_TD)
        y_TD, count_E, prob_E = self.mlp(x_TD, real_T)
        return torch.add(y_TD, x_TD, alpha=self.scale), count_E, prob_E


class Output(NamedTuple):
    loss_sum: Tensor  # over this batch's targets; 0 where none were given
    nll_T: Tensor  # each token's loss, without gradient
    hit_T: Tensor  # whether its target has the largest logit
    logits_TV: Tensor | None  # only where no targets were given
    count_LE: Tensor  # assignments per layer and expert
    prob_LE: Tensor  # sums of routing probabilities


class Decoder(nn.Module):
    def __init__(self, config: ModelConfig, vocabulary: int, rope_base: float):
        super().__init__()
        self.config, self.rope_base = config, rope_base
        self.embed_tokens = nn.Embedding(vocabulary, config.hidden)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.layers))
        self.norm = RMSNorm(config.hidden, config.norm_eps)
        self.lm_head = linear(config.hidden, vocabulary)

    def forward(
        self, token_T: Tensor, layout: Layout, target_T: Tensor | None = None, real_T: Tensor | None = None
    ) -> Output:
        """Loss (or, without targets, logits) of a packed stream. `real_T` is false where a token is padding."""
        x_TD = self.embed_tokens(token_T)
        real_T = torch.ones_like(token_T, dtype=torch.bool) if real_T is None else real_T
        rotary = rotary_angles(layout.position_T, self.config.rotary_dim, self.rope_base, x_TD.dtype)
        counts, probs = [], []
        for layer in self.layers:
            x_TD, count_E, prob_E = layer(x_TD, rotary, layout, real_T)
            counts.append(count_E)
            probs.append(prob_E)
        x_TD = self.norm(x_TD)
        router = torch.stack(counts), torch.stack(probs)
        if target_T is None:
            return Output(x_TD.new_zeros(()), (none := x_TD.new_zeros(0)), none, self.lm_head(x_TD), *router)
        return Output(*head_loss(x_TD, self.lm_head.weight, target_T), None, *router)


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
    """The matrices that one parameter holds side by side, each a view with its own Xavier initialisation and gain.

    DeepNorm: value, output and FFN matrices have gain (8 layers)^(-1/4), the others 1.
    """
    small = (8 * config.layers) ** -0.25
    if name.endswith("experts.gate_up_proj"):
        for e, expert in enumerate(full):
            for part, half in zip(("gate", "up"), expert.chunk(2), strict=True):
                yield f"{name}.{e}.{part}", half, small
    elif name.endswith("experts.down_proj"):
        for e, expert in enumerate(full):
            yield f"{name}.{e}", expert, small
    elif name.endswith("qkv_proj.weight"):
        parts = full.view(config.heads, 3, config.head_dim, -1).unbind(1)
        yield from ((f"{name}.{part}", m, g) for part, m, g in zip("qkv", parts, (1.0, 1.0, small), strict=True))
    else:
        yield name, full, small if name.endswith(("v_proj.weight", "o_proj.weight", "out_proj.weight")) else 1.0


@torch.no_grad()
def initialise(model: Decoder, seed: int) -> None:
    """Xavier (normal) for every matrix, ones for the norms. The values depend on seed and name, never on the mesh."""
    for name, parameter in model.named_parameters():
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        full = torch.ones(parameter.shape)
        if parameter.ndim > 1:
            for key, matrix, gain in matrices(name, full, model.config):
                generator = torch.Generator().manual_seed(
                    int.from_bytes(hashlib.sha256(f"{seed} {key}".encode()).digest()[:8], "little", signed=True)
                )
                rows, columns = matrix.shape[:-1].numel(), matrix.shape[-1]
                values = torch.randn(matrix.shape, generator=generator)
                matrix.copy_(values * (gain * math.sqrt(2 / (rows + columns))))
        if isinstance(parameter, DTensor):
            shape, offset = compute_local_shape_and_global_offset(
                parameter.shape, parameter.device_mesh, parameter.placements
            )
            for dim, (start, length) in enumerate(zip(offset, shape, strict=True)):
                full = full.narrow(dim, start, length)
        local.copy_(full)
