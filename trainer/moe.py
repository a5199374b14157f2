"""The mixture of experts: top-k routing without dropped tokens, its balance loss. Shape suffixes: `attention.py`."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.attention import at_least_float32


class Permute(torch.autograd.Function):
    """Rows in another order. Its gradient is a gather too: quicker than a scatter-add, and always the same bits."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(order, inverse)
        return x[order]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad[ctx.saved_tensors[1]], None, None


class Router(nn.Module):
    def __init__(self, hidden: int, experts: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, hidden))

    def forward(self, x_TD: Tensor) -> Tensor:
        """Each token's probabilities over the experts, in float32 or better. (T, E)."""
        dtype = at_least_float32(x_TD.dtype)
        return F.linear(x_TD.to(dtype), self.weight.to(dtype)).softmax(-1)


class Experts(nn.Module):
    def __init__(self, hidden: int, experts: int, ffn: int):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * ffn, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, ffn))

    def forward(self, x_SD: Tensor, count_E: Tensor) -> Tensor:
        """SwiGLU of rows that are sorted by expert, `count_E` rows for each. (S, D)."""
        if x_SD.is_cuda and x_SD.dtype == torch.bfloat16:
            offset_E = count_E.cumsum(0).to(torch.int32)
            gate_up = torch._grouped_mm(x_SD, self.gate_up_proj.mT, offs=offset_E)
            return torch._grouped_mm(swiglu(gate_up), self.down_proj.mT, offs=offset_E)
        parts = x_SD.split(count_E.tolist())
        return torch.cat(
            [
                F.linear(swiglu(F.linear(x, gate_up)), down)
                for x, gate_up, down in zip(parts, self.gate_up_proj, self.down_proj, strict=True)
            ]
        )


def swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


class MoE(nn.Module):
    """Top-k of E experts: the chosen ones' probabilities, made to sum to 1, weigh their outputs."""

    def __init__(self, hidden: int, experts: int, top_k: int, ffn: int):
        super().__init__()
        self.top_k = top_k
        self.gate = Router(hidden, experts)
        self.experts = Experts(hidden, experts, ffn)

    def forward(self, x_TD: Tensor, real_T: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the output (T, D) and what `balance_loss` needs, padding (`real_T` false) left out: assignments
        per expert (E) and the sum of probabilities per expert (E)."""
        prob_TE = self.gate(x_TD)
        weight_TA, expert_TA = prob_TE.topk(self.top_k, dim=-1)
        weight_TA = weight_TA / weight_TA.sum(-1, keepdim=True)
        order_S = expert_TA.flatten().argsort(stable=True)
        inverse_S = torch.empty_like(order_S).scatter_(0, order_S, torch.arange(len(order_S), device=x_TD.device))
        chosen_TAE = F.one_hot(expert_TA, prob_TE.shape[1])

        x_SD = Permute.apply(x_TD.repeat_interleave(self.top_k, dim=0), order_S, inverse_S)
        y_SD = Permute.apply(self.experts(x_SD, chosen_TAE.sum((0, 1))), inverse_S, order_S)
        out_TD = (y_SD.unflatten(0, (-1, self.top_k)) * weight_TA.to(x_TD.dtype)[:, :, None]).sum(1)

        real_T1 = real_T[:, None]
        return out_TD, (chosen_TAE.sum(1) * real_T1).sum(0), (prob_TE * real_T1).sum(0)


def balance_loss(count_LE: Tensor, prob_LE: Tensor, tokens: int) -> Tensor:
    """Sum over layers of `E * sum_i f_i P_i`: f_i expert i's share of all assignments, P_i its mean probability.

    A layer whose experts share evenly adds 1; `aux_loss` weighs the whole. Unlike transformers, layers are not pooled
    (one layer's favourite would make up for another's), and f is a share: for one layer theirs is `top_k` times this.

    count_LE: over all ranks. prob_LE: sums of probabilities; where they are those of a part (one rank, one
    micro-batch) of the `tokens` that the mean is over, so is the value: the parts' values add up.
    """
    share_LE = count_LE / count_LE.sum(1, keepdim=True).clamp(min=1)
    return count_LE.shape[1] * (share_LE * prob_LE).sum() / tokens
