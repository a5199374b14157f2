"""Cross-entropy of the head's logits, a chunk of tokens at a time: tokens x vocabulary never exist at once."""

from typing import Any

import torch
from torch import Tensor

CHUNK = 256  # tokens whose logits exist at one time


def head_loss(x_TD: Tensor, weight_VD: Tensor, target_T: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(sum over targets, differentiable; each token's loss (T); whether its target has the largest logit (T)).

    Loss and hit are 0 where the target is -100, and for reporting only. Float32 or better.
    """
    return HeadLoss.apply(x_TD, weight_VD, target_T, torch.is_grad_enabled())


class HeadLoss(torch.autograd.Function):
    """The gradient is taken in the forward pass, where the logits are: the backward pass only scales it."""

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, weight_VD: Tensor, target_T: Tensor, needed: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        nll_T = x_TD.new_zeros(len(x_TD), dtype=wide)
        hit_T = torch.zeros_like(target_T, dtype=torch.bool)
        grad_TD = torch.empty_like(x_TD) if needed else None
        grad_VD = torch.zeros_like(weight_VD, dtype=wide) if needed else None
        buffer_V = x_TD.new_empty(min(CHUNK, len(x_TD)), len(weight_VD))
        for start in range(0, len(x_TD), CHUNK):
            part = slice(start, start + CHUNK)
            x_D, target = x_TD[part], target_T[part, None]
            real, target = target >= 0, target.clamp(min=0)
            logits_V = torch.mm(x_D, weight_VD.T, out=buffer_V[: len(x_D)]).to(wide)
            wanted, top = logits_V.gather(1, target), logits_V.amax(1, keepdim=True)
            hit_T[part] = ((wanted == top) & real)[:, 0]
            exp_V = logits_V.sub_(top).exp_()  # in place from here on: new memory costs more than the arithmetic
            total = exp_V.sum(1, keepdim=True)
            nll_T[part] = torch.where(real, total.log() + top - wanted, 0)[:, 0]
            if grad_TD is not None and grad_VD is not None:
                grad_V = exp_V.mul_(real / total).scatter_add_(1, target, -real.to(wide)).to(x_TD.dtype)
                torch.mm(grad_V, weight_VD, out=grad_TD[part])
                grad_VD += grad_V.T @ x_D
        if needed:
            ctx.save_for_backward(grad_TD, grad_VD)
            ctx.dtype = weight_VD.dtype
        ctx.mark_non_differentiable(nll_T, hit_T)
        return nll_T.sum(), nll_T, hit_T

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_TD, grad_VD = ctx.saved_tensors
        return grad_TD * grad.to(grad_TD.dtype), (grad_VD * grad).to(ctx.dtype), None, None
