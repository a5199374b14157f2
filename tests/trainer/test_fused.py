"""The decoder as a GPU trains it - our kernels, compiled, checkpointed - interpreted, beside plain PyTorch."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from kernels import fused
from kernels.lightning_attention import Segments
from trainer import recompute
from trainer.attention import Layout
from trainer.config import ModelConfig, TrainConfig
from trainer.model import Decoder, initialise

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def step(model, layout):
    """Each token's loss and the gradients of one pass over tokens of two routing groups, some of them padding."""
    model.zero_grad()
    token = torch.arange(len(layout.position_T), device=DEVICE) % 50
    out = model(token, layout, token.roll(-1))
    (out.loss_sum + out.routing.prob_GE.square().sum()).backward()
    return out.nll_T.detach(), {name: p.grad for name, p in model.named_parameters()}


def test_all_kernels_together_are_the_plain_decoder(monkeypatch):
    config = ModelConfig(layers=2, softmax_every=2, hidden=32, capacity="group", capacity_factor=0.7)
    model = Decoder(config, 50, 1e4).to(DEVICE)
    initialise(model, 0)
    ends = [0, 20, 21, 48]
    group = torch.tensor([0] * 24 + [1] * 20 + [-1] * 4)
    layout = replace(Layout.of(ends, 64, DEVICE, group, 2), segments=None)
    monkeypatch.setattr(fused, "on_gpu", lambda x: False)
    wanted, gradients = step(model, layout)

    monkeypatch.setattr(fused, "on_gpu", lambda x: True)
    monkeypatch.setattr(recompute, "BACKEND", "aot_eager")
    recompute.prepare(model, TrainConfig(model=config, checkpointing="selective", compile=True))
    found, ours = step(model, replace(layout, segments=Segments.of(ends, DEVICE)))
    assert (found - wanted).norm() <= 1e-5 * wanted.norm()
    for name, gradient in gradients.items():
        assert (ours[name] - gradient).norm() <= 1e-4 * gradient.norm(), name
