"""GPU kernels and the trainer on one GPU, beside their peers: `python -m benchmarks.gpu --json FILE`.

Under ten minutes. Sections: correctness (against float64), kernels (lightning attention beside flash-linear-attention's
`chunk_simple_gla` and the memory floor), model (tokens/s and MFU of the `h100` preset). Each runs alone with
--section; figures merge into the one JSON file. A peer that is not installed is left out.
"""

import argparse
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import gpu_model
from kernels.lightning_attention import Segments, lightning_attention
from trainer.attention import slopes

SHAPES = {"lightning_b2_ms": (2, 16384, 16), "lightning_b1_ms": (1, 8192, 96)}  # sequences, tokens of each, heads
SIZE = 128


def correctness() -> dict[str, float]:
    """Relative error of output and gradients in bfloat16; a run whose kernels are wrong ends here."""
    torch.manual_seed(0)
    worst = 0.0
    for lengths in ([1500], [1, 63, 64, 65, 700], [512, 513]):
        cu_seqlens = [0, *torch.tensor(lengths).cumsum(0).tolist()]
        qkv = (torch.randn(cu_seqlens[-1], 4, 3 * SIZE, device="cuda") / 4).bfloat16().requires_grad_()
        slope = slopes(4, 1, 8).float().cuda()
        out, _ = lightning_attention(qkv, slope, Segments.of(cu_seqlens, "cuda"))
        grad = torch.randn_like(out)
        out.backward(grad)
        exact = qkv.detach().double().requires_grad_()
        wanted = dense(exact, slope.double(), cu_seqlens)
        wanted.backward(grad.double())
        assert qkv.grad is not None and exact.grad is not None
        for ours, theirs in ((out, wanted), (qkv.grad, exact.grad)):
            worst = max(worst, ((ours.double() - theirs).norm() / theirs.norm()).item())
    print(f"  lightning attention, bfloat16 against float64: largest relative error {worst:.1e}")
    if worst > 2e-2:
        raise SystemExit("the kernels are wrong: no timing would mean anything")
    return {"lightning_error": worst}


def dense(qkv: Tensor, slope: Tensor, cu_seqlens: list[int]) -> Tensor:
    """Lightning attention by its whole matrix of decays."""
    place = torch.arange(len(qkv), device=qkv.device)
    document = torch.bucketize(place, torch.tensor(cu_seqlens[1:], device=qkv.device), right=True)
    apart = place[:, None] - place
    seen = (apart >= 0) & (document[:, None] == document)
    decays = torch.exp(-slope[:, None, None] * apart.clamp(min=0)) * seen
    q, k, v = (x.transpose(0, 1) for x in qkv.chunk(3, dim=2))
    return ((q @ k.mT * decays) @ v).transpose(0, 1)


def milliseconds(action: Callable[[], object]) -> float:
    from triton.testing import do_bench

    return do_bench(action, warmup=50, rep=300, return_mode="median")


def ours(cu_seqlens: list[int], heads: int) -> Callable[[], object]:
    """Forward and backward."""
    qkv = torch.randn(cu_seqlens[-1], heads, 3 * SIZE, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    slope, segments = slopes(heads, 1, 8).float().cuda(), Segments.of(cu_seqlens, "cuda")
    grad = torch.randn(cu_seqlens[-1], heads, SIZE, device="cuda", dtype=torch.bfloat16)

    def action() -> None:
        qkv.grad = None
        lightning_attention(qkv, slope, segments)[0].backward(grad)

    return action


def with_fla(sequences: int, tokens: int, heads: int) -> Callable[[], object]:
    from fla.ops.simple_gla import chunk_simple_gla

    shape = (sequences, tokens, heads, SIZE)
    q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    gamma, grad = -slopes(heads, 1, 8).float().cuda(), torch.randn(shape, device="cuda", dtype=torch.bfloat16)

    def action() -> None:
        q.grad = k.grad = v.grad = None
        chunk_simple_gla(q, k, v, g_gamma=gamma, scale=1.0)[0].backward(grad)

    return action


def floor_milliseconds(elements: int) -> float:
    """What reading and writing the eleven tensors of forward and backward once takes, at the speed of a copy."""
    source = torch.empty(1 << 29, device="cuda", dtype=torch.uint8)
    target = torch.empty_like(source)
    bytes_per_ms = 2 * source.numel() / milliseconds(lambda: target.copy_(source))
    return 11 * 2 * elements / bytes_per_ms


def kernels() -> dict[str, float]:
    figures: dict[str, float] = {}
    for name, (sequences, tokens, heads) in SHAPES.items():
        figures[name] = milliseconds(ours([i * tokens for i in range(sequences + 1)], heads))
        floor = floor_milliseconds(sequences * tokens * heads * SIZE)
        line = f"  B{sequences} T{tokens} H{heads} D{SIZE}: ours {figures[name]:.2f} ms, memory floor {floor:.2f}"
        if importlib.util.find_spec("fla"):
            theirs = milliseconds(with_fla(sequences, tokens, heads))
            ratio = theirs / figures[name]
            figures["vs_fla_kernel"] = min(figures.get("vs_fla_kernel", ratio), ratio)
            line += f", fla {theirs:.2f} ({ratio:.2f} times ours)"
        print(line)
    one = milliseconds(ours([0, 32768], 16))
    packed = milliseconds(ours(gpu_model.document_ends(32768), 16))
    print(f"  32,768 tokens in one document {one:.2f} ms, packed {packed:.2f} ms")
    return figures | {"varlen_ratio": packed / one}


SECTIONS = {"correctness": correctness, "kernels": kernels, "model": gpu_model.measure}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--section", choices=SECTIONS, action="append", help="only this one; may be given repeatedly")
    parser.add_argument("--json", help="merge the figures into this file")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.gpu needs a GPU, and torch finds none here")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; takes under ten minutes")
    for name in arguments.section or SECTIONS:
        print(name)
        figures = SECTIONS[name]()
        if arguments.json:
            path = Path(arguments.json)
            before = json.loads(path.read_text()) if path.exists() else {}
            path.write_text(json.dumps(before | figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
