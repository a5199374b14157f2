"""Whole-model speed on one GPU for `benchmarks/gpu.py`: the `h100` preset, dropless, on packed random documents."""

import gc
import importlib.util
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any, Literal
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.gpu_kernels import Machine, document_ends
from benchmarks.gpu_layer import plain
from kernels.lightning_attention import Segments
from trainer import recompute
from trainer.attention import Layout
from trainer.config import ModelConfig, TrainConfig
from trainer.cost import memory_needed, peak_flops, step_flops
from trainer.model import parameter_counts
from trainer.moe import balance_loss
from trainer.parallel import build_model, build_optimizer, world

TOKENS = 32_768  # of a step, or one sequence where that is longer
CONTEXTS = {"8k": 8192, "32k": 32_768, "128k": 131_072}
STEPS = 8
Checkpointing = Literal["none", "selective", "full"]
KEPT: tuple[Checkpointing, ...] = ("none", "selective", "full")


def vocabulary(machine: Machine) -> int:
    return 65_536 if machine.real else 50


def configuration(machine: Machine, checkpointing: Checkpointing) -> TrainConfig:
    if machine.real:
        model = ModelConfig(preset="h100")
        return TrainConfig(model=model, device="cuda", dtype="bfloat16", compile=True, checkpointing=checkpointing)
    model = ModelConfig(layers=2, softmax_every=2, hidden=16, head_dim=16, rotary_dim=8, ffn=16)
    return TrainConfig(model=model, compile=True, checkpointing=checkpointing)


@contextmanager
def with_fla(ends: list[int], device: str) -> Iterator[None]:
    """Its kernel in place of ours. It parts the graph of every layer: torch.compile gets what lies between."""
    from fla.ops.simple_gla import chunk_simple_gla

    cu_seqlens = torch.tensor(ends, device=device)

    def kernel(qkv: Tensor, slope: Tensor, segments: Segments, initial: None = None, silu: bool = False) -> Any:
        q, k, v = torch.nn.functional.silu(qkv)[None].chunk(3, dim=-1)
        return chunk_simple_gla(q, k, v, g_gamma=-slope, scale=1.0, cu_seqlens=cu_seqlens)[0][0], None

    real = torch.compile
    with (
        patch("kernels.lightning_attention.lightning_attention", kernel),
        patch.object(torch, "compile", lambda f, **how: real(f, **(how | {"fullgraph": False}))),
    ):
        yield


def speed(machine: Machine, context: int, part: str, checkpointing: Checkpointing) -> tuple[float, float]:
    """(tokens/s, MFU) of forward, backward and optimiser step; part: ours; fla: with its kernel for lightning
    attention; torch: with plain PyTorch for it; plain: with plain PyTorch for all else."""
    config = configuration(machine, checkpointing)
    tokens = max(TOKENS, context) if machine.real else 40
    ends = document_ends(tokens, context)
    torch._dynamo.reset()
    with ExitStack() as stack:
        ranks = stack.enter_context(world(config))
        if part == "fla":
            stack.enter_context(with_fla(ends, machine.device))
        if part == "plain":
            stack.enter_context(plain())
        if not machine.real:
            stack.enter_context(patch.object(recompute, "BACKEND", "aot_eager"))
        model = build_model(config, vocabulary(machine), 1e4, ranks)
        optimizer = build_optimizer(config, model)
        layout = Layout.of(ends, config.model.block, machine.device)
        layout = replace(layout, segments=None if part == "torch" else Segments.of(ends, machine.device))
        token_T = torch.randint(vocabulary(machine), (tokens,), device=machine.device)

        def step() -> None:
            out = model(token_T, layout, token_T.roll(-1))
            balance = balance_loss(out.routing.count_GE, out.routing.prob_GE, tokens)
            (out.loss_sum / tokens + 0.01 * balance).backward()
            optimizer.step()
            optimizer.zero_grad()

        seconds = median_seconds(machine, step)
        squares = sum((b - a) ** 2 for a, b in pairwise(ends))
        flops = step_flops(config.model, vocabulary(machine), tokens, squares)
        return tokens / seconds, flops / seconds / (peak_flops(config, ranks.device) or torch.nan)


def least_checkpointing(machine: Machine, context: int) -> Checkpointing:
    """What is estimated to fit."""
    if not machine.real:
        return "selective"
    room = 0.8 * torch.cuda.get_device_properties(0).total_memory / 1e9
    for how in KEPT:
        config = configuration(machine, how).model_copy(update={"micro_tokens": max(TOKENS, context)})
        parameters = parameter_counts(config.model, vocabulary(machine))[0]
        config = config.model_copy(update={"batch_tokens": max(TOKENS, context)})
        if sum(memory_needed(config, vocabulary(machine), context, parameters, 1).values()) < room:
            return how
    return "full"


def fitting(machine: Machine, context: int, part: str) -> tuple[float, float, str]:
    """`speed`, with as little computed again as the memory allows, and how that was."""
    first = KEPT.index(least_checkpointing(machine, context))
    for how in KEPT[first:]:
        try:
            return *speed(machine, context, part, how), how
        except torch.OutOfMemoryError:
            print(f"  {part} at {context:,}: checkpointing {how} does not fit")
        finally:
            release(machine)
    raise SystemExit(f"{part} at {context:,} does not fit this GPU")


def release(machine: Machine) -> None:
    gc.collect()
    if machine.real:
        torch.cuda.empty_cache()


def transformers_speed(machine: Machine, context: int) -> float:
    """tokens/s of `MiniMaxForCausalLM`, the same size, whole rows of the context; as many as fit."""
    from transformers import MiniMaxConfig, MiniMaxForCausalLM

    m = configuration(machine, "none").model
    layers = ["full_attention" if m.is_softmax(i) else "linear_attention" for i in range(m.layers)]
    config = MiniMaxConfig(
        hidden_size=m.hidden, num_hidden_layers=m.layers, num_attention_heads=m.heads, head_dim=m.head_dim,
        num_key_value_heads=m.kv_heads, intermediate_size=m.ffn, num_local_experts=m.experts,
        vocab_size=vocabulary(machine), num_experts_per_tok=m.top_k, layer_types=layers, block_size=m.block,
        max_position_embeddings=context, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = MiniMaxForCausalLM(config).to(machine.device, machine.dtype)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    most = max(1, TOKENS // context) if machine.real else 1
    for rows in (most >> n for n in range(most.bit_length())):
        token = torch.randint(vocabulary(machine), (rows, context), device=machine.device)

        def step(token: Tensor = token) -> None:
            model(token, labels=token, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        try:
            return token.numel() / median_seconds(machine, step)
        except torch.OutOfMemoryError:
            print(f"  transformers: {rows} rows do not fit")
            optimizer.zero_grad()
            release(machine)
    raise SystemExit("transformers' model does not fit this GPU")


def median_seconds(machine: Machine, step: Callable[[], None]) -> float:
    times = []
    for turn in range(STEPS + 3 if machine.real else 1):
        began = time.perf_counter()
        step()
        if machine.real:
            torch.cuda.synchronize()
        if turn >= 3 or not machine.real:
            times.append(time.perf_counter() - began)
    return statistics.median(times)


def measure(machine: Machine) -> dict[str, float]:
    figures: dict[str, float] = {}
    for name, context in CONTEXTS.items() if machine.real else {"8k": 40}.items():
        figures[f"tokens_s_{name}"], figures[f"mfu_{name}"], how = fitting(machine, context, "ours")
        print(f"  {name}: {figures[f'tokens_s_{name}']:,.0f} tokens/s, MFU {figures[f'mfu_{name}']:.1%}, ", end="")
        print(f"checkpointing {how}", flush=True)
    if "tokens_s_128k" in figures:
        figures["ratio_128k_8k"] = figures["tokens_s_128k"] / figures["tokens_s_8k"]
    context = CONTEXTS["8k"] if machine.real else 40
    parts = ["plain", "torch", *(["fla"] if machine.real and importlib.util.find_spec("fla") else [])]
    peers: dict[str, Callable[[], float]] = {
        part: lambda part=part: fitting(machine, context, part)[0] for part in parts
    }
    if importlib.util.find_spec("transformers"):
        peers["transformers"] = lambda: transformers_speed(machine, context)
    for name, run in peers.items():
        try:
            theirs = run()
        except Exception as failure:  # a peer's own: the others are still to be measured
            print(f"  8k with {name}: fails, {type(failure).__name__}: {str(failure).splitlines()[0][:150]}")
            continue
        finally:
            release(machine)
        figures[f"vs_{name}_model"] = figures["tokens_s_8k"] / theirs
        print(
            f"  8k with {name}: {theirs:,.0f} tokens/s, ours {figures[f'vs_{name}_model']:.2f} times as fast",
            flush=True,
        )
    return figures
