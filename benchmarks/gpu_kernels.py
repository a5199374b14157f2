"""Lightning attention on one GPU for `benchmarks/gpu.py`: errors, times beside peers, variants; what sections share."""

import importlib.util
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from kernels import lightning_attention as kernel
from kernels.lightning_chunks import slopes

SHAPES = {"lightning_b2_ms": (2, 16384, 16), "lightning_b1_ms": (1, 8192, 96)}  # sequences, tokens of each, heads
# chunk, segment, width, warps, stages
VARIANTS = [
    (64, 512, 64, 4, 2), (64, 512, 64, 4, 1), (64, 512, 64, 8, 2), (64, 512, 128, 8, 2), (64, 512, 128, 8, 1),
    (128, 512, 64, 8, 2), (64, 256, 64, 4, 2), (64, 1024, 64, 4, 2),
]  # fmt: skip
NAMES = ("CHUNK", "SEGMENT", "WIDTH", "WARPS", "STAGES")


@dataclass(frozen=True)
class Machine:
    """A GPU; or the CPU for a rehearsal: kernels interpreted, little data, times that mean nothing."""

    device: str

    @property
    def real(self) -> bool:
        return self.device == "cuda"

    @property
    def head(self) -> int:
        return 128 if self.real else 16

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.real else torch.float32  # the interpreter's bfloat16 products are wrong

    @property
    def bound(self) -> float:
        return 2e-2 if self.real else 1e-4

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=self.dtype).requires_grad_()

    def milliseconds(self, action: Callable[[], object]) -> float:
        """The median."""
        if not self.real:
            began = time.perf_counter()
            action()
            return 1e3 * (time.perf_counter() - began)
        from triton.testing import do_bench

        return do_bench(action, warmup=50, rep=300, return_mode="median")

    def both_ways(self, call: Callable[..., Any], inputs: Sequence[Tensor]) -> Callable[[], None]:
        """Forward and backward, under random gradients."""
        grads = [torch.randn_like(x) for x in outputs(call(*inputs))]

        def action() -> None:
            for x in inputs:
                x.grad = None
            torch.autograd.backward(outputs(call(*inputs)), grads)

        return action

    def copied_per_ms(self) -> float:
        """Bytes read and written by a copy."""
        source = torch.empty(1 << (29 if self.real else 12), device=self.device, dtype=torch.uint8)
        target = torch.empty_like(source)
        return 2 * source.numel() / self.milliseconds(lambda: target.copy_(source))


def outputs(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else result


def error(machine: Machine, call: Callable[..., Any], exact: Callable[..., Any], inputs: Sequence[Tensor]) -> float:
    """The largest relative error of outputs and gradients beside `exact` in float64; nan where two runs differ."""
    wide = [x.detach().double().requires_grad_() for x in inputs]
    grads = [torch.randn_like(x) for x in outputs(call(*inputs))]
    runs = []
    for _ in range(2):
        out = outputs(call(*inputs))
        runs.append([*out, *torch.autograd.grad(out, inputs, grads)])
    if not all(map(torch.equal, *runs)):
        return float("nan")
    wanted = outputs(exact(*wide))
    theirs = [*wanted, *torch.autograd.grad(wanted, wide, [g.double() for g in grads])]
    return max(((a.double() - b).norm() / b.norm()).item() for a, b in zip(runs[0], theirs, strict=True))


def lightning_error(machine: Machine) -> float:
    """Documents of one segment and of several, partial chunks, with and without states and SiLU."""
    torch.manual_seed(0)
    worst = []
    for number, lengths in enumerate(([1500], [1, 63, 64, 65, 700], [512, 513]) if machine.real else ([90], [1, 40])):
        ends = [0, *accumulate(lengths)]
        segments = kernel.Segments.of(ends, machine.device)
        slope, silu = slopes(4, 1, 8).float().to(machine.device), bool(number % 2)
        qkv = (machine.random(ends[-1], 4, 3 * machine.head).detach() / 4).requires_grad_()
        initial = torch.randn(4, machine.head, machine.head, device=machine.device, requires_grad=True)
        worst.append(
            error(
                machine,
                lambda x, s, silu=silu, slope=slope, own=segments: kernel.lightning_attention(x, slope, own, s, silu),
                lambda x, s, silu=silu, slope=slope, ends=ends: dense(x, slope.double(), ends, s, silu),
                [qkv, initial],
            )
        )
    return max(worst)


def dense(qkv: Tensor, slope: Tensor, ends: list[int], initial: Tensor, silu: bool) -> tuple[Tensor, Tensor]:
    """Lightning attention by its whole matrix of decays."""
    qkv = torch.nn.functional.silu(qkv) if silu else qkv
    place = torch.arange(len(qkv), device=qkv.device)
    document = torch.bucketize(place, torch.tensor(ends[1:], device=qkv.device), right=True)
    apart = place[:, None] - place
    seen = (apart >= 0) & (document[:, None] == document)
    decays = torch.exp(-slope[:, None, None] * apart.clamp(min=0)) * seen
    q, k, v = (x.transpose(0, 1) for x in qkv.chunk(3, dim=2))
    into = torch.exp(-slope[:, None] * (place + 1)) * (document == 0)  # the initial state reaches the first document
    out = (q @ k.mT * decays) @ v + into[:, :, None] * (q @ initial)
    final = (k * decays[:, -1, :, None]).mT @ v
    if len(ends) == 2:
        final = final + torch.exp(-slope * ends[1])[:, None, None] * initial
    return out.transpose(0, 1), final


def ours(machine: Machine, ends: list[int], heads: int) -> Callable[[], None]:
    """Forward and backward."""
    slope, segments = slopes(heads, 1, 8).float().to(machine.device), kernel.Segments.of(ends, machine.device)
    return machine.both_ways(
        lambda qkv: kernel.lightning_attention(qkv, slope, segments)[0],
        [machine.random(ends[-1], heads, 3 * machine.head)],
    )


def with_fla(machine: Machine, sequences: int, tokens: int, heads: int) -> Callable[[], None]:
    from fla.ops.simple_gla import chunk_simple_gla

    gamma = -slopes(heads, 1, 8).float().to(machine.device)
    return machine.both_ways(
        lambda q, k, v: chunk_simple_gla(q, k, v, g_gamma=gamma, scale=1.0)[0],
        [machine.random(sequences, tokens, heads, machine.head) for _ in range(3)],
    )


def lightning(machine: Machine) -> dict[str, float]:
    figures: dict[str, float] = {}
    rate = machine.copied_per_ms()
    for name, (sequences, tokens, heads) in SHAPES.items() if machine.real else {"lightning_b2_ms": (2, 40, 1)}.items():
        figures[name] = machine.milliseconds(ours(machine, [i * tokens for i in range(sequences + 1)], heads))
        # q, k, v, o of the forward pass; q, k, v, do and three gradients of the backward pass: each once
        floor = 11 * 2 * sequences * tokens * heads * machine.head / rate
        line = (
            f"  B{sequences} T{tokens} H{heads} D{machine.head}: ours {figures[name]:.2f} ms, memory floor {floor:.2f}"
        )
        if machine.real and importlib.util.find_spec("fla"):
            theirs = machine.milliseconds(with_fla(machine, sequences, tokens, heads))
            ratio = theirs / figures[name]
            figures["vs_fla_kernel"] = min(figures.get("vs_fla_kernel", ratio), ratio)
            line += f", fla {theirs:.2f} ({ratio:.2f} times ours)"
        print(line)
    tokens, heads = (32768, 16) if machine.real else (50, 1)
    one = machine.milliseconds(ours(machine, [0, tokens], heads))
    packed = machine.milliseconds(ours(machine, document_ends(tokens), heads))
    print(f"  {tokens:,} tokens in one document {one:.2f} ms, packed {packed:.2f} ms")
    return figures | {"varlen_ratio": packed / one}


def variants(machine: Machine) -> dict[str, float]:
    """Forward and backward at the first shape; the module's constants as they are come first."""
    usual = tuple(getattr(kernel, name) for name in NAMES)
    figures: dict[str, float] = {}
    sequences, tokens, heads = SHAPES["lightning_b2_ms"] if machine.real else (1, 40, 1)
    try:
        for variant in dict.fromkeys([usual, *VARIANTS]) if machine.real else [usual]:
            for name, value in zip(NAMES, variant, strict=True):
                setattr(kernel, name, value)
            said = "_".join(map(str, variant))
            try:
                spent = machine.milliseconds(ours(machine, [i * tokens for i in range(sequences + 1)], heads))
            except Exception as failure:  # too much shared memory, say: the next one may do
                print(f"  {said}: fails, {str(failure).splitlines()[0]}")
                continue
            figures[f"lightning_{said}_ms"] = spent
            print(f"  chunk, segment, width, warps, stages {said}: {spent:.2f} ms", flush=True)
    finally:
        for name, value in zip(NAMES, usual, strict=True):
            setattr(kernel, name, value)
    return figures


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
