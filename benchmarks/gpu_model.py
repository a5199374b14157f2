"""Whole-model speed on one GPU for `benchmarks/gpu.py`: the `h100` preset, dropless, on packed random documents."""

import importlib.util
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from unittest.mock import patch

import torch
from torch import Tensor

from trainer import attention
from trainer.attention import Layout
from trainer.config import ModelConfig, TrainConfig
from trainer.cost import peak_flops, step_flops
from trainer.moe import balance_loss
from trainer.parallel import build_model, build_optimizer, world

VOCABULARY = 65_536
TOKENS = 32_768  # of a step, or one sequence where that is longer
CONTEXTS = {"8k": 8192, "32k": 32_768, "128k": 131_072}
STEPS = 8


def document_ends(tokens: int, context: int = 8192) -> list[int]:
    """Where packed documents begin and end: about 30 % of the tokens in short ones, 70 % in some from a quarter of the
    context up, none across a sequence's border."""
    generator = torch.Generator().manual_seed(0)
    short, long = 812, 0.625 * context  # mean lengths
    many = 0.7 * short / (0.3 * long + 0.7 * short)  # of the documents that are long
    ends = [0]
    while ends[-1] < tokens:
        left = context - ends[-1] % context
        wide = torch.rand((), generator=generator).item()
        if torch.rand((), generator=generator).item() < many:
            length = int(context * (0.25 + 0.75 * wide))
        else:
            length = int(torch.empty(()).log_normal_(6.2, 1.0, generator=generator).item()) + 1
        ends.append(ends[-1] + min(length, left, tokens - ends[-1]))
    return ends


def with_fla(qkv: Tensor, decay: attention.Decay, layout: Layout) -> Tensor:
    """In place of `attention.lightning_attention`."""
    from fla.ops.simple_gla import chunk_simple_gla

    q, k, v = torch.nn.functional.silu(qkv)[None].chunk(3, dim=-1)
    gamma = -decay.slope_H111.flatten().float()
    return chunk_simple_gla(q, k, v, g_gamma=gamma, scale=1.0, cu_seqlens=layout.cu_seqlens_device.long())[0][0]


def speed(context: int, kernel: str) -> tuple[float, float]:
    """(tokens/s, MFU) of forward, backward and optimiser step; kernel: ours, fla, torch."""
    config = TrainConfig(
        model=ModelConfig(preset="h100"), device="cuda", dtype="bfloat16", compile=kernel == "ours", threads=0
    )
    tokens = max(TOKENS, context)
    ends = document_ends(tokens, context)
    with world(config) as ranks:
        model = build_model(config, VOCABULARY, 1e4, ranks)
        optimizer = build_optimizer(config, model)
        layout = Layout.of(ends, config.model.block, "cuda")
        if kernel != "ours":
            layout = replace(layout, segments=None)
        token_T = torch.randint(VOCABULARY, (tokens,), device="cuda")

        def step() -> None:
            out = model(token_T, layout, token_T.roll(-1))
            balance = balance_loss(out.routing.count_GE, out.routing.prob_GE, tokens)
            (out.loss_sum / tokens + 0.01 * balance).backward()
            optimizer.step()
            optimizer.zero_grad()

        used = with_fla if kernel == "fla" else attention.lightning_attention
        with patch("trainer.model.lightning_attention", used):
            seconds = median_seconds(step)
        squares = sum((b - a) ** 2 for a, b in pairwise(ends))
        flops = step_flops(config.model, VOCABULARY, tokens, squares)
        return tokens / seconds, flops / seconds / (peak_flops(config, ranks.device) or torch.nan)


def transformers_speed(context: int) -> float:
    """tokens/s of `MiniMaxForCausalLM`, the same size, one whole row of the context per sequence."""
    from transformers import MiniMaxConfig, MiniMaxForCausalLM

    m = ModelConfig(preset="h100")
    layers = ["full_attention" if m.is_softmax(i) else "linear_attention" for i in range(m.layers)]
    config = MiniMaxConfig(
        hidden_size=m.hidden, num_hidden_layers=m.layers, num_attention_heads=m.heads, head_dim=m.head_dim,
        num_key_value_heads=m.kv_heads, intermediate_size=m.ffn, num_local_experts=m.experts, vocab_size=VOCABULARY,
        num_experts_per_tok=m.top_k, layer_types=layers, block_size=m.block, max_position_embeddings=context,
    )  # fmt: skip
    model = MiniMaxForCausalLM(config).to("cuda", torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    rows = torch.randint(VOCABULARY, (TOKENS // context, context), device="cuda")

    def step() -> None:
        model(rows, labels=rows, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return rows.numel() / median_seconds(step)


def median_seconds(step: Callable[[], None]) -> float:
    times = []
    for turn in range(STEPS + 3):
        torch.cuda.synchronize()
        began = time.perf_counter()
        step()
        torch.cuda.synchronize()
        if turn >= 3:
            times.append(time.perf_counter() - began)
    return statistics.median(times)


def measure() -> dict[str, float]:
    figures: dict[str, float] = {}
    for name, context in CONTEXTS.items():
        figures[f"tokens_s_{name}"], figures[f"mfu_{name}"] = speed(context, "ours")
        print(f"  {name}: {figures[f'tokens_s_{name}']:,.0f} tokens/s, MFU {figures[f'mfu_{name}']:.1%}")
    figures["ratio_128k_8k"] = figures["tokens_s_128k"] / figures["tokens_s_8k"]
    kernels = ["torch", *(["fla"] if importlib.util.find_spec("fla") else [])]
    peers: dict[str, Callable[[], float]] = {kernel: lambda kernel=kernel: speed(8192, kernel)[0] for kernel in kernels}
    if importlib.util.find_spec("transformers"):
        peers["transformers"] = lambda: transformers_speed(8192)
    for name, run in peers.items():
        torch.cuda.empty_cache()
        theirs = run()
        figures[f"vs_{name}_model"] = figures["tokens_s_8k"] / theirs
        print(f"  8k with {name}: {theirs:,.0f} tokens/s, ours {figures[f'vs_{name}_model']:.2f} times as fast")
    return figures
