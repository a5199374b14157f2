"""What training costs: floating-point operations by the usual convention, and memory per device."""

import contextlib
import os
import resource
from collections.abc import Iterator

import torch

from dataprep.storage import UserError
from kernels.head_loss import CHUNK
from trainer.config import ModelConfig, TrainConfig

PEAK = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12}  # dense bfloat16, by the name of the device


def step_flops(config: ModelConfig, vocabulary: int, tokens: int, squares: int) -> float:
    """Forward and backward FLOPs of `tokens` real tokens whose documents' squared lengths sum to `squares`.

    Megatron-LM's convention: 6 per active matrix parameter and token, causal attention halved, the lightning layers'
    state counted; padding and what is computed again are not.
    """
    width, kv_width = config.heads * config.head_dim, config.kv_heads * config.head_dim
    softmax = sum(config.is_softmax(i) for i in range(config.layers))
    lightning = config.layers - softmax
    moe = config.hidden * (3 * config.top_k * config.ffn + config.experts)
    matrices = (
        config.layers * moe
        + softmax * config.hidden * 2 * (width + kv_width)
        + lightning * config.hidden * 5 * width
        + vocabulary * config.hidden
    )
    return (6 * matrices + 12 * lightning * width * config.head_dim) * tokens + 6 * softmax * width * squares


def peak_flops(config: TrainConfig, device: torch.device) -> float | None:
    """Of one device; None where it is not known."""
    if config.peak_tflops:
        return config.peak_tflops * 1e12
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for known, peak in PEAK.items() if known in name), None)


def memory_used(device: torch.device) -> float:
    """GB: the most that this process has held, on the GPU if it has one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def memory_needed(config: TrainConfig, vocabulary: int, context: int, parameters: int, ranks: int) -> dict[str, float]:
    """GB per device: `state` (weights, gradient, two moments), `gathered` (FSDP's whole matrices), `activations`.

    The state is exact; the activations of `micro_tokens` (or one sequence) are an estimate.
    """
    m = config.model
    wide = 8 if config.dtype == "float64" else 4
    narrow = {"float64": 8, "float32": 4, "bfloat16": 2}[config.dtype]
    width = m.heads * m.head_dim
    most = min(config.micro_tokens, max(config.batch_tokens, *config.batch_marks.values(), 0))
    tokens = max(context, most // context * context)
    ep, etp = config.parallel.ep, config.parallel.etp
    expert = m.top_k * (2 * m.hidden * etp + 3 * m.ffn)
    softmax = sum(map(m.is_softmax, range(m.layers)))
    per_token = {
        "none": m.layers * (8 * m.hidden + 12 * width + 2 * m.heads * m.block + expert + m.top_k * m.ffn),
        "selective": m.layers * (4 * m.hidden + 7 * width + m.heads * m.block + expert),
        "full": m.layers * m.hidden + softmax * width + 8 * m.hidden + 12 * width + 2 * expert,
    }[config.checkpointing]
    ends = vocabulary * m.hidden
    elsewhere = 3 * m.experts * m.ffn * m.hidden * (1 - 1 / (ep * etp))  # of a layer's experts, never gathered here
    layer = (parameters - 2 * ends) / m.layers - elsewhere
    return {
        "state": 4 * wide * parameters / ranks / 1e9,
        "gathered": narrow * (2 * ends + 2 * layer) / 1e9 if ranks > 1 else 0.0,
        "activations": (narrow * per_token * tokens + wide * (vocabulary * 2 * CHUNK + ends)) / 1e9,
    }


def check_memory(needed: dict[str, float], device: torch.device) -> None:
    """Raises UserError where the state alone, which is certain, is more than the device has."""
    if device.type == "cuda":
        there = torch.cuda.get_device_properties(device).total_memory / 1e9
    else:
        there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
        there /= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if needed["state"] > there:
        raise UserError(
            f"not enough memory: weights, gradients and moments take {needed['state']:,.1f} GB per worker, the "
            f"device has {there:,.1f}; train on more workers (train.workers) or choose a smaller train.model"
        )


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """An allocation that failed, as a UserError."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        refused = "can't allocate memory" in str(error) or "not enough memory" in str(error)
        if refused or isinstance(error, torch.OutOfMemoryError | MemoryError):
            raise UserError(
                "not enough memory for a step; lower train.micro_tokens, set train.checkpointing to selective or full, "
                "or train on more workers"
            ) from error
        raise
