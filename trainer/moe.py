"""The mixture of experts: top-k routing, token drop, expert parallelism, balance loss. Suffixes: `attention.py`.

Whatever is not linear in the batch - capacity, drops, the balance loss - is a function of a *routing group*: a fixed
number of consecutive sequences of the global batch. So no micro-batch, accumulation or mesh changes what is computed;
ranks that share a group (context parallelism) exchange what it takes. Padding is neither routed nor counted.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import GroupName, _resolve_process_group
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from kernels.fused import combine, inverted, sorted_by, spread, tally
from kernels.grouped import grouped_linear, swiglu_linear
from trainer.attention import Layout
from trainer.collectives import AllToAll, all_gather
from trainer.config import ModelConfig


class Routing(NamedTuple):
    """What became of the tokens of one layer (or, stacked, of all: then with L in front)."""

    count_GE: Tensor  # assignments per routing group and expert, before drops
    prob_GE: Tensor  # sums of routing probabilities, with gradient
    load_E: Tensor  # assignments per expert that were computed
    entropy: Tensor  # of the routing probabilities, in nats, summed over tokens


class Router(nn.Module):
    def __init__(self, hidden: int, experts: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, hidden))

    def forward(self, x_TD: Tensor) -> Tensor:
        """Each token's probabilities over the experts, in float32 or better. (T, E)."""
        dtype = torch.promote_types(x_TD.dtype, torch.float32)
        return F.linear(x_TD.to(dtype), self.weight.to(dtype)).softmax(-1)


class Experts(nn.Module):
    """All experts, or with expert parallelism this rank's equal share of them, or of their width F."""

    def __init__(self, hidden: int, experts: int, ffn: int):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2, ffn, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, ffn))

    def forward(self, x_SD: Tensor, count_E: Tensor) -> Tensor:
        """SwiGLU of rows that are sorted by expert, `count_E` rows for each; zero for rows beyond those. (S, D)."""
        gate_up_E2FD, down_EDF = (
            w.to_local() if isinstance(w, DTensor) else w for w in (self.gate_up_proj, self.down_proj)
        )
        return swiglu_linear(grouped_linear(x_SD, gate_up_E2FD.flatten(1, 2), count_E), down_EDF, count_E)


class MoE(nn.Module):
    """Top-k of E experts: the chosen ones' probabilities, made to sum to 1, weigh their outputs.

    An assignment that is dropped adds nothing, and the token's other weights stay as they are.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.gate = Router(config.hidden, config.experts)
        self.experts = Experts(config.hidden, config.experts, config.ffn)
        self.ep: DeviceMesh | None = None  # the ranks that share out the experts,
        self.etp = 1  # so many of them in a row have slices of the same experts
        self.peers: DeviceMesh | None = None  # all expert-parallel groups that see one batch: for `ep_group`

    def forward(self, x_TD: Tensor, layout: Layout) -> tuple[Tensor, Routing]:
        top_k, capacity = self.config.top_k, self.config.capacity
        prob_TE = self.gate(x_TD)
        mesh = {"none": None, "group": layout.cp, "ep_group": self.peers}[capacity]
        expert_TA, order_S, inverse_S, load_E, count_GE = route(
            prob_TE.detach(), layout.group_T, len(layout.member_GT), top_k, capacity, self.config.capacity_factor,
            "" if mesh is None else mesh.get_group().group_name,
        )  # fmt: skip
        weight_TA = prob_TE.gather(1, expert_TA)
        weight_TA = weight_TA / weight_TA.sum(-1, keepdim=True)

        x_SD = spread(x_TD, order_S, inverse_S)
        y_SD = self.experts(x_SD, load_E) if self.ep is None else self.exchanged(x_SD, load_E, self.ep.get_group())
        out_TD = combine(y_SD, weight_TA, order_S, inverse_S)

        entropy = (torch.special.entr(prob_TE.detach()).sum(1) * (layout.group_T >= 0)).sum()
        return out_TD, Routing(count_GE, layout.member_GT.to(prob_TE.dtype) @ prob_TE, load_E, entropy)

    @torch.compiler.disable
    def exchanged(self, x_SD: Tensor, load_E: Tensor, group: dist.ProcessGroup) -> Tensor:
        """Expert parallelism: every row to the ranks that have its expert, and the sum of their results. (S, D).

        SwiGLU is elementwise in F and the product after it a sum over F: so slices of an expert add up to it.
        """
        blocks = group.size() // self.etp
        load_RE = load_E.view(blocks, -1).repeat_interleave(self.etp, 0)  # from here on E counts one rank's experts
        arriving_RE = torch.empty_like(load_RE)
        dist.all_to_all_single(arriving_RE, load_RE, group=group)
        send, receive = torch.stack([load_RE.sum(1), arriving_RE.sum(1)]).tolist()

        rows = send[:: self.etp]  # for each block of experts
        y_SD = x_SD[: sum(rows)]
        if self.etp > 1:
            y_SD = torch.cat([part_SD for part_SD in y_SD.split(rows) for _ in range(self.etp)])
        y_SD = AllToAll.apply(y_SD, send, receive, group)
        expert_RE = torch.arange(arriving_RE.shape[1], device=x_SD.device).expand_as(arriving_RE)
        expert_S = expert_RE.flatten().repeat_interleave(arriving_RE.flatten(), output_size=sum(receive))
        order_S, inverse_S, load_E = sorted_by(expert_S, arriving_RE.shape[1])
        y_SD = self.experts(spread(y_SD, order_S, inverse_S), load_E)
        y_SD = AllToAll.apply(spread(y_SD, inverse_S, order_S), receive, send, group)
        if self.etp > 1:
            parts = y_SD.split([n * self.etp for n in rows])
            y_SD = torch.cat([part_SD.unflatten(0, (self.etp, -1)).sum(0) for part_SD in parts])
        return F.pad(y_SD, (0, 0, 0, len(x_SD) - len(y_SD)))


@torch.library.custom_op("trivium::route", mutates_args=())
def route(
    prob_TE: Tensor, group_T: Tensor, groups: int, top_k: int, capacity: str, factor: float, process_group: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Which expert computes what: all that is decided and has no gradient, in one operator.

    Activation checkpointing saves its outputs (`recompute.py`), so that recomputation cannot decide otherwise.

    group_T: the token's routing group, -1: padding. Returns each token's experts, best first (T, A); the order of the
    T * A assignments by expert, those not computed last, and its inverse (S); the number computed per expert (E); and
    all assignments per group and expert (G, E).
    """
    experts = prob_TE.shape[1]
    weight_TA, expert_TA = prob_TE.topk(top_k, dim=-1)
    weight_TA = weight_TA / weight_TA.sum(-1, keepdim=True)
    group_TA = group_T[:, None].expand_as(expert_TA)
    kept_TA = real_TA = group_TA >= 0
    count_GE = tally(torch.where(real_TA, group_TA * experts + expert_TA, groups * experts), groups * experts)
    count_GE = count_GE.view(groups, experts)

    ranks = _resolve_process_group(GroupName(process_group)) if process_group else None
    if capacity == "group":
        weight, expert, group = (all_gather(x, ranks) if ranks else x for x in (weight_TA, expert_TA, group_TA))
        tokens_G = tally(group[:, 0] % (groups + 1), groups)
        limit_GE = allowance(tokens_G, top_k, experts, factor)[:, None].expand(-1, experts)
        kept_TA = heaviest(weight, expert, group, limit_GE)
        if ranks:
            kept_TA = kept_TA.view(ranks.size(), *expert_TA.shape)[ranks.rank()]
    elif capacity == "ep_group":
        limit_1E = allowance(real_TA[:, 0].sum(), top_k, experts, factor).expand(1, experts)
        if ranks:
            both_R2E = all_gather(torch.stack([count_GE.sum(0), limit_1E[0]])[None], ranks)
            limit_1E = shared_allowance(*both_R2E.unbind(1))[ranks.rank(), None]
        kept_TA = heaviest(weight_TA, expert_TA, torch.where(real_TA, 0, -1), limit_1E)

    order_S, inverse_S, load_E = sorted_by(torch.where(kept_TA, expert_TA, experts).flatten(), experts + 1)
    return expert_TA, order_S, inverse_S, load_E[:experts].clone(), count_GE


@route.register_fake
def _(prob_TE, group_T, groups, top_k, capacity, factor, process_group):
    def new(*shape: int) -> Tensor:
        return group_T.new_empty(shape)

    tokens, experts = prob_TE.shape
    return (
        new(tokens, top_k), new(tokens * top_k), new(tokens * top_k), new(experts), new(groups, experts)
    )  # fmt: skip


def allowance(tokens: Tensor, top_k: int, experts: int, factor: float) -> Tensor:
    """The capacity of one expert: `factor` times its even share of these tokens' assignments, rounded up."""
    return (tokens.double() * top_k * factor / experts).ceil().long()


def heaviest(weight_TA: Tensor, expert_TA: Tensor, group_TA: Tensor, limit_GE: Tensor) -> Tensor:
    """Of each group's assignments to each expert, the `limit_GE` with the highest weights; ties by position."""
    key_S = torch.where(group_TA >= 0, group_TA * limit_GE.shape[1] + expert_TA, limit_GE.numel()).flatten()
    order_S = weight_TA.flatten().argsort(descending=True, stable=True)
    order_S = order_S[key_S[order_S].argsort(stable=True)]
    sorted_S = key_S[order_S]
    place_S = torch.arange(len(key_S), device=key_S.device) - torch.searchsorted(sorted_S, sorted_S)
    kept_S = place_S < F.pad(limit_GE.flatten(), (0, 1))[sorted_S]
    return kept_S[inverted(order_S)].view_as(expert_TA)


def shared_allowance(count_RE: Tensor, own_RE: Tensor) -> Tensor:
    """The paper's global router: what some ranks leave of an expert's capacity goes to those that want more, in order
    of rank. So no rank drops more than it would alone. It depends on the mesh, unlike all else here."""
    spare_E = (own_RE - count_RE).clamp(min=0).sum(0)
    excess_RE = (count_RE - own_RE).clamp(min=0)
    before_RE = excess_RE.cumsum(0) - excess_RE
    return own_RE + torch.minimum((spare_E - before_RE).clamp(min=0), excess_RE)


def balance_loss(count_LGE: Tensor, prob_LGE: Tensor, tokens: int) -> Tensor:
    """Sum over layers of the mean over routing groups of `E * sum_i f_i P_i`: f_i expert i's share of the group's
    assignments (before drops), P_i its mean probability. Groups weigh as many of the `tokens` as they hold.

    A layer whose experts share evenly adds 1; `aux_loss` weighs the whole. Unlike transformers, layers are not pooled
    (one layer's favourite would make up for another's), and f is a share: for one layer theirs is `top_k` times this.

    count_LGE: of whole groups. prob_LGE: sums of probabilities; where they are those of a part of a group, or of some
    of the groups, so is the value: the values of all ranks and micro-batches add up.
    """
    share_LGE = count_LGE / count_LGE.sum(2, keepdim=True).clamp(min=1)
    return count_LGE.shape[2] * (share_LGE * prob_LGE).sum() / tokens


def router_metrics(load_LE: Tensor, entropy_L: Tensor, tokens: int, top_k: int) -> dict[str, Any]:
    """`expert_load`: each expert's share of its layer's work, times E (1: even), per layer; `drop_rate`: assignments
    that were dropped, of all; `router_entropy`: nats per token. Of sums over ranks; `tokens`: how many were routed."""
    share_LE = load_LE / load_LE.sum(1, keepdim=True).clamp(min=1) * load_LE.shape[1]
    return {
        "expert_load": [[round(x, 3) for x in row] for row in share_LE.tolist()],
        "drop_rate": 1 - load_LE.sum().item() / max(1, tokens * top_k * len(load_LE)),
        "router_entropy": entropy_L.sum().item() / max(1, tokens * len(entropy_L)),
    }
