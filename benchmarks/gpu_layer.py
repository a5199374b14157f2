"""The kernels around a layer's matrix products on one GPU for `benchmarks/gpu.py`, and packed softmax attention."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.gpu_kernels import Machine, document_ends, error
from kernels import fused
from kernels.grouped import grouped_linear, swiglu_linear
from trainer.attention import Layout, rotary_angles, softmax_attention

# Tokens of a step, hidden, FFN, experts, heads, key heads, head, half of what is rotated: the preset `h100`
FULL = (32768, 1024, 1024, 16, 8, 2, 128, 32)
CHECKED = (700, *FULL[1:])
TINY = (20, 16, 16, 3, 2, 1, 16, 4)
TOP_K = 2


@dataclass(frozen=True)
class Case:
    """One of the trainer's functions, which takes our kernels, plain PyTorch or, in float64, always the latter."""

    call: Callable[..., Any]
    inputs: list[Tensor]
    elements: float = 0  # least that forward and backward read and write


def cases(machine: Machine, sizes: tuple[int, ...]) -> dict[str, Case]:
    tokens, hidden, ffn, experts, heads, key_heads, size, half = sizes
    random, device = machine.random, machine.device
    torch.manual_seed(0)
    wide, rows = heads * size, tokens * TOP_K
    kind = torch.randint(1, experts + 1, (rows,), device=device)  # expert 0 has no row; the last ones are dropped
    order, inverse = kind.argsort(stable=True), kind.argsort(stable=True).argsort()
    count = kind.bincount(minlength=experts + 1)[:experts]
    layout = Layout.of(document_ends(tokens), 64, device)
    angles = rotary_angles(layout.position_T, 2 * half, 1e4, torch.float32)
    weight = torch.rand(tokens, TOP_K, device=device, requires_grad=True)  # float32, as the router's
    return {
        "gated_norm": Case(
            lambda x, gate, weight: fused.gated_norm(x, gate, weight, 1e-6),
            [random(tokens, wide), random(tokens, wide), random(wide)],
            8 * tokens * wide,
        ),
        "rotate": Case(
            lambda q, k: fused.rotate_both(q, k, *angles),
            [random(tokens, heads, size), random(tokens, key_heads, size)],
            4 * tokens * (heads + key_heads) * size,
        ),
        "spread": Case(
            lambda x: fused.spread(x, order, inverse), [random(tokens, hidden)], 2 * (tokens + rows) * hidden
        ),
        "combine": Case(
            lambda y, weight: fused.combine(y, weight, order, inverse),
            [random(rows, hidden), weight],
            (2 * tokens + 3 * rows) * hidden,
        ),
        "experts": Case(
            lambda x, up, down: swiglu_linear(grouped_linear(x, up, count), down, count),
            [random(rows, hidden), random(experts, 2 * ffn, hidden), random(experts, hidden, ffn)],
        ),
        "softmax_attention": Case(
            lambda q, k, v: softmax_attention(q, k, v, layout),
            [random(tokens, heads, size), *(random(tokens, key_heads, size) for _ in range(2))],
        ),
    }


@contextmanager
def plain() -> Iterator[None]:
    with patch.object(fused, "on_gpu", lambda x: False):
        yield


def errors(machine: Machine) -> dict[str, float]:
    found = {}
    for name, case in cases(machine, CHECKED if machine.real else TINY).items():
        if name == "softmax_attention":  # a library's: its gradients need not have the same bits twice
            wide = [x.detach().double() for x in case.inputs]
            got, wanted = case.call(*case.inputs).double(), case.call(*wide)
            found[name] = ((got - wanted).norm() / wanted.norm()).item()
        else:
            found[name] = error(machine, case.call, case.call, case.inputs)
    kind = torch.randint(17, (70_000 if machine.real else 300,), device=machine.device)
    with plain():
        wanted = fused.sorted_by(kind, 17)
    found["sort"] = float(not all(map(torch.equal, fused.sorted_by(kind, 17), wanted)))
    return found


def times(machine: Machine) -> dict[str, float]:
    """Of forward and backward, in milliseconds."""
    figures: dict[str, float] = {}
    rate, sizes = machine.copied_per_ms(), FULL if machine.real else TINY
    made = cases(machine, sizes)
    del made["softmax_attention"]
    for name, case in made.items():
        figures[f"{name}_ms"] = machine.milliseconds(machine.both_ways(case.call, case.inputs))
        torch._dynamo.reset()
        compiled = torch.compile(case.call, backend="inductor" if machine.real else "aot_eager")
        with plain():
            figures[f"{name}_plain_ms"] = machine.milliseconds(machine.both_ways(case.call, case.inputs))
            figures[f"{name}_compiled_ms"] = machine.milliseconds(machine.both_ways(compiled, case.inputs))
        least = min(figures[f"{name}_plain_ms"], figures[f"{name}_compiled_ms"])
        line = f"  {name}: ours {figures[f'{name}_ms']:.3f} ms, plain {figures[f'{name}_plain_ms']:.3f}, "
        line += f"compiled {figures[f'{name}_compiled_ms']:.3f}"
        if case.elements:
            figures[f"{name}_floor_ms"] = case.elements * case.inputs[0].element_size() / rate
            line += f", memory floor {figures[f'{name}_floor_ms']:.3f}"
        else:
            flops = 18 * case.inputs[0].numel() * sizes[2]
            line += f" ({flops / figures[f'{name}_ms'] / 1e9:.0f} TFLOP/s)"
        print(line + ("" if figures[f"{name}_ms"] < least else "   <- OURS LOSES: take it out"), flush=True)
    kind = torch.randint(sizes[3] + 1, (sizes[0] * TOP_K,), device=machine.device)
    figures["sort_ms"] = machine.milliseconds(lambda: fused.sorted_by(kind, sizes[3] + 1))
    with plain():
        figures["sort_plain_ms"] = machine.milliseconds(lambda: fused.sorted_by(kind, sizes[3] + 1))
    print(f"  sort: ours {figures['sort_ms']:.3f} ms, plain {figures['sort_plain_ms']:.3f}")
    return figures


def attention(machine: Machine) -> dict[str, float]:
    """Forward and backward of the softmax layers' attention; a way that this torch does not have is left out."""
    figures: dict[str, float] = {}
    sizes = FULL if machine.real else TINY
    tokens, heads, key_heads = sizes[0], sizes[4], sizes[5]
    q, k, v = cases(machine, sizes)["softmax_attention"].inputs
    layout = Layout.of(document_ends(tokens), 64, machine.device)

    def grouped(q: Tensor, k: Tensor, v: Tensor) -> Any:
        from torch.nn.attention.varlen import varlen_attn

        cu = layout.cu_seqlens_device
        return varlen_attn(
            q,
            k,
            v,
            cu,
            cu,
            *layout.longest,
            window_size=(-1, 0),
            **({"enable_gqa": True} if heads != key_heads else {}),
        )

    def flex() -> Callable[..., Any]:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        document = torch.bucketize(
            torch.arange(tokens, device=machine.device), layout.cu_seqlens_device[1:].long(), right=True
        )
        mask = create_block_mask(
            lambda b, h, i, j: (i >= j) & (document[i] == document[j]), None, None, tokens, tokens, machine.device
        )
        compiled = torch.compile(flex_attention)
        return lambda *x: compiled(*(y.transpose(0, 1)[None] for y in x), block_mask=mask, enable_gqa=True)

    ways: dict[str, Callable[[], Callable[..., Any]]] = {
        "trainer": lambda: lambda *x: softmax_attention(*x, layout),
        "varlen_gqa": lambda: grouped,
        "flex": flex,
        "one_document": lambda: (
            lambda *x: F.scaled_dot_product_attention(
                *(y.transpose(0, 1)[None] for y in x), is_causal=True, enable_gqa=True
            )
        ),
    }
    for name, make in ways.items():
        try:
            figures[f"attention_{name}_ms"] = machine.milliseconds(machine.both_ways(make(), [q, k, v]))
        except Exception as failure:
            print(f"  {name}: not here, {type(failure).__name__}: {str(failure).splitlines()[0][:150]}")
        else:
            print(f"  {name}: {figures[f'attention_{name}_ms']:.2f} ms", flush=True)
    return figures
