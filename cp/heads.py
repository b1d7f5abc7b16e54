"""Heads: ranks swap their share of the tokens for a share of the heads, attend, and swap back.

DeepSpeed-Ulysses (arXiv 2309.14509): one all-to-all gives every rank all tokens of its heads, one brings the
outputs home. Where there are fewer key heads than ranks, several ranks have the same one. With a ring (USP,
arXiv 2405.07719) ranks of one node swap, and the keys of each head go round the nodes.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from types import ModuleType

import torch
from torch import Tensor

from ..balance.schedule import HEADS, HEADS_RING, Schedule, schedule_of
from ..kernels.bound import BoundPlan
from ..kernels.columns import column_counts
from ..kernels.geometry import Geometry
from ..kernels.plan import Plan
from .attention import backward, forward, ring_attention
from .isolated import isolated
from .link import Link
from .move import MovedRing, moved_attention
from .part import part_of
from .ring import Ring
from .swap import Swap, shares_of
from .transport import Transport


@dataclass(frozen=True, eq=False)
class HeadShares:
    """Who has which tokens and heads; the same for all layers of a shard.

    inside: places in the group of the ranks that swap, those of a node. across: of the ranks that have the
    heads of this one, a rank of each node. blocks: how many each rank inside holds. held: the blocks of each
    node. geometry: of this node's. schedule: between nodes.
    """

    inside: tuple[int, ...]
    across: tuple[int, ...]
    blocks: tuple[int, ...]
    held: tuple[tuple[int, ...], ...]
    geometry: Geometry
    schedule: Schedule

    def check(self, heads: int, kv_heads: int) -> None:
        """ValueError, NotImplementedError unless the ranks inside can share the heads equally."""
        size = len(self.inside)
        if heads % size:
            raise ValueError(
                f"exchange 'heads' shares {heads} query heads among {size} ranks; use a number of ranks that "
                "divides them, exchange=('heads', 'ring') with fewer on the inner axis, or exchange='ring'"
            )
        if kv_heads % size and size % kv_heads:
            raise NotImplementedError(
                f"exchange 'heads' with {kv_heads} key heads on {size} ranks; one number must divide the "
                "other, or use exchange='ring'"
            )

    def plan(self, plan: Plan, link: Link, sent: Counter) -> Plan:
        """The plan of this rank's heads for all blocks inside, from the plans of all heads for own blocks."""
        swap, group, columns = self.swap(link.at("plan"), sent), None, plan.columns
        tiles = swap.to_heads(plan.tiles, 1)
        if plan.column_group is not None:
            group = swap.to_heads(plan.column_group[None, None, :, None], 1)()[0, 0, :, 0]
        if columns is not None:
            columns = shares_of(columns, swap.link.size)[:, swap.link.rank].contiguous()
        return Plan(self.geometry, tiles(), columns, group)

    def work(self, bound: BoundPlan, heads: int) -> Tensor:
        """float64 [steps + 1]: this rank's work in tiles, mean over all `heads`; that of columns last."""
        plan, share = bound.plan, heads // len(self.inside)
        columns = bound.work.new_zeros(1)
        if plan.columns is not None:
            used = column_counts(bound)[1]
            columns += used.sum().double() * (share // used.shape[1]) / (bound.block_size * heads)
        return torch.cat((bound.work.sum(0) * (share / heads), columns))

    def swap(self, link: Link, sent: Counter) -> Swap:
        return Swap(_among(link, self.inside), self.blocks, sent)

    def ring(self, link: Link, bound: BoundPlan, steps: ModuleType, sent: Counter) -> HeadRing:
        """What one call needs of its surroundings. bound: the plan of own heads, to the schedule's steps."""
        tokens = bound.block_size * max(1, *map(len, self.held))
        return HeadRing(link, self.schedule, steps, tokens, sent, shares=self, bound=bound)


def share_heads(
    exchange: str, geometry: Geometry, assignment: tuple[tuple[int, ...], ...], transport: Transport
) -> HeadShares | None:
    """None unless the exchange is by heads. assignment: the blocks of every rank of the transport."""
    if exchange not in (HEADS, HEADS_RING):
        return None
    nodes = transport.nodes if exchange == HEADS_RING else 1
    size = transport.size // nodes
    node, place = divmod(transport.rank, size)
    ranks = [range(first, first + size) for first in range(0, transport.size, size)]
    held = tuple(sum((assignment[rank] for rank in of_node), ()) for of_node in ranks)
    return HeadShares(
        inside=tuple(ranks[node]),
        across=tuple(of_node[place] for of_node in ranks),
        blocks=tuple(len(assignment[rank]) for rank in ranks[node]),
        held=held,
        geometry=geometry.select(held[node]),
        schedule=schedule_of("hierarchical", node, nodes, nodes),
    )


@dataclass(frozen=True)
class HeadRing(Ring):
    """What one call by heads needs. transport: to all ranks. bound: the plan of own heads."""

    shares: HeadShares = field(kw_only=True)
    bound: BoundPlan | None = field(kw_only=True)

    def swap(self, phase: str) -> Swap:
        return self.shares.swap(self.link.at(phase), self.sent)

    @property
    def across(self) -> Ring:
        """What is left to do once tokens are swapped for heads."""
        link = _among(self.link, self.shares.across)
        return Ring(link, self.schedule, self.steps, self.tokens, self.sent)


def sharded_attention(
    q: Tensor, k: Tensor, v: Tensor, bound: BoundPlan, ring: Ring, scale: float
) -> tuple[Tensor, Tensor]:
    """As `ring_attention`; by heads in a HeadRing, with queries of other ranks in a MovedRing.

    Both have a bound plan of their own.
    """
    if isinstance(ring, HeadRing):
        return _HeadAttention.apply(q, k, v, ring, scale)
    if isinstance(ring, MovedRing):
        return moved_attention(q, k, v, ring, scale)
    return ring_attention(q, k, v, bound, ring, scale)


class _HeadAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, ring: HeadRing, scale: float):
        ctx.scale, ctx.kv_heads, ctx.ring = scale, k.shape[1], replace(ring, bound=None)
        swap, rows = ring.swap("forward"), ring.bound.block_size
        arriving = swap.to_heads(q, rows), swap.to_heads(torch.cat((k, v), 3), rows)
        q, (k, v) = arriving[0](), _halves(arriving[1]())
        out, lse = forward(q, k, v, ring.bound, ring.across, scale)
        ctx.bound, lists = ring.bound.split()  # saved as in a ring
        ctx.save_for_backward(q, k, v, out, lse, *lists)
        arriving = swap.to_tokens(out.to(q.dtype), rows), swap.to_tokens(lse[..., None], rows)
        return arriving[0](), arriving[1]()[..., 0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout, dlse):
        q, k, v, out, lse, *lists = ctx.saved_tensors  # activation checkpointing runs the model again here
        ring, bound = ctx.ring, ctx.bound.join(lists)
        with isolated(dout.device):
            ring.link.at("backward").enter(dout.device)
            swap, rows = ring.swap("backward"), bound.block_size
            arriving = swap.to_heads(dout, rows, "grads"), swap.to_heads(dlse[..., None], rows, "grads")
            dout, dlse = arriving[0](), arriving[1]()[..., 0]
            dq, dk, dv = backward(q, k, v, out, lse, dout, dlse, bound, ring.across, ctx.scale)
            dkeys = torch.cat((dk, dv), 3)
            if k.shape[1] * len(ring.shares.inside) == ctx.kv_heads:  # otherwise there is still to be added
                dkeys = dkeys.to(k.dtype)
            arriving = swap.to_tokens(dq.to(q.dtype), rows, "grads"), swap.to_tokens(dkeys, rows, "grads")
            dkeys = arriving[1]().unflatten(1, (ctx.kv_heads, -1)).sum(2)  # by the ranks with the same head
            return arriving[0](), *_halves(dkeys.to(k.dtype)), None, None


def _halves(x: Tensor) -> Tensor:
    """[B, H, S, 2 D] -> [2, B, H, S, D]"""
    return x.unflatten(3, (2, -1)).movedim(3, 0).contiguous()


def _among(link: Link, places: tuple[int, ...]) -> Link:
    """To some ranks of the group alone."""
    return replace(link, transport=part_of(link.transport, places), entry=False)
