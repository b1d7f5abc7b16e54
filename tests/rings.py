"""Rings of threads as tests need them: over a given plan, or from a batch as a user has it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sparring.balance import EXCHANGES, Layout, contiguous, from_assignment, striped, zigzag
from sparring.cp import ContextParallel, run_threads
from sparring.cp.attention import ring_attention
from sparring.cp.hops import share_hops
from sparring.cp.link import Link
from sparring.cp.pull import Pull, exchange_needs
from sparring.cp.report import Report
from sparring.cp.ring import Ring, step_blocks
from sparring.cp.transport import Transport
from sparring.cp.windows import Window
from sparring.kernels import Plan, bind, reference

NAMES = ("out", "lse", "dq", "dk", "dv")


def first_rank_empty(blocks: int, world: int, size: int) -> Layout:
    """All blocks on the other ranks, dealt backwards."""
    others = max(1, world - 1)
    dealt = [tuple(range(blocks))[::-1][rank::others] for rank in range(others)]
    return from_assignment([(), *dealt] if world > 1 else dealt, size)


LAYOUTS: dict[str, Callable] = {
    "contiguous": contiguous,
    "zigzag": zigzag,
    "striped": striped,
    "first rank empty": first_rank_empty,
}


class Wrapped:
    """A transport that subclasses watch or disturb."""

    def __init__(self, inner: Transport):
        self.inner = inner
        self.rank, self.size, self.ranks, self.nodes = inner.rank, inner.size, inner.ranks, inner.nodes

    def exchange(self, send, send_to, receive, recv_from, channel):
        return self.inner.exchange(send, send_to, receive, recv_from, channel)

    def all_to_all(self, send, sends, receive, receives, channel):
        return self.inner.all_to_all(send, sends, receive, receives, channel)

    def one_sided(self, device):
        return self.inner.one_sided(device)

    def publish(self, x, rows, channel):
        return self.inner.publish(x, rows, channel)

    def all_reduce(self, x, *options):
        return self.inner.all_reduce(x, *options)

    def all_gather(self, x, *options):
        return self.inner.all_gather(x, *options)


class Counting(Wrapped):
    """Counts messages and their bytes by channel, and collectives by kind."""

    def __init__(self, inner: Transport):
        super().__init__(inner)
        self.messages, self.bytes, self.collectives = Counter(), Counter(), Counter()

    def exchange(self, send, send_to, receive, recv_from, channel):
        self.messages[channel] += 1
        self.bytes[channel] += sum(x.numel() * x.itemsize for x in send)
        return super().exchange(send, send_to, receive, recv_from, channel)

    def all_to_all(self, send, sends, receive, receives, channel):
        self.messages[channel] += 1
        self.bytes[channel] += send.numel() * send.itemsize
        return super().all_to_all(send, sends, receive, receives, channel)

    def publish(self, x, rows, channel):
        self.messages[channel] += 1
        return CountedWindow(super().publish(x, rows, channel), self.bytes, channel)

    def all_reduce(self, x, *options):
        self.collectives["all_reduce"] += 1
        return super().all_reduce(x, *options)

    def all_gather(self, x, *options):
        self.collectives["all_gather"] += 1
        return super().all_gather(x, *options)


@dataclass(frozen=True)
class CountedWindow:
    """Counts the bytes that are read from a window."""

    inner: Window
    bytes: Counter
    channel: str

    def read(self, reads):
        self.bytes[self.channel] += sum(target.numel() * target.itemsize for target, _, _ in reads)
        return self.inner.read(reads)


def on_ring(
    plan,
    layout,
    q,
    k,
    v,
    dout,
    dlse,
    exchange="ring",
    steps=reference,
    wrap=lambda x: x,
    nodes=1,
    drop=False,
    debug=False,
):
    """out, lse, dq, dk, dv in logical order from a ring of threads that walks the given plan.

    plan: of the whole sequence. layout: of all its blocks. q, k, v, dout, dlse: [B, H, S, ...] of the S
    tokens before padding. steps: what computes. wrap: what every rank puts around its transport. nodes:
    that the ranks lie on. drop: hops that nobody needs. debug: headers are compared.
    """
    length, world = q.shape[2], layout.world
    tail = plan.geometry.num_tokens - length
    q, k, v, dout = (torch.nn.functional.pad(x, (0, 0, 0, tail)) for x in (q, k, v, dout))
    dlse = torch.nn.functional.pad(dlse, (0, tail))

    def body(transport):
        geometry = plan.geometry.select(layout.assignment[transport.rank])
        at = geometry.positions
        leaves = [x[:, :, at].requires_grad_() for x in (q, k, v)]
        own, held = plan.rows(geometry), layout.assignment
        schedule = EXCHANGES[exchange](transport.rank, world, nodes)
        transport = Link(wrap(transport), debug=debug)
        parts = (transport, schedule, steps, max(layout.blocks_per_rank) * layout.block_size)
        if exchange == "pull":
            needs = exchange_needs(own, held, schedule, transport, k.shape[1])
            bound, around = needs.bind(own), Pull(*parts, needs=needs)
        else:
            bound, sent = bind(own, step_blocks(schedule, held)), Counter()
            hops = share_hops(bound, schedule, transport, sent) if drop else None
            around = Ring(*parts, sent, hops)
        out, lse = ring_attention(*leaves, bound, around, q.shape[3] ** -0.5)
        grads = torch.autograd.grad((out, lse), leaves, (dout[:, :, at], dlse[:, :, at]))
        return [x.detach() for x in (out, lse, *grads)]

    return whole(run_threads(world, body, timeout=120, nodes=nodes), layout, length)


@dataclass(frozen=True)
class Shares:
    """One attention on one rank: its parts of out, dq, dk, dv; the rest as every rank has it."""

    tensors: list[Tensor]
    layout: Layout
    plan: Plan
    report: Report


def attend_batch(transport, batch, q, k, v, dout, layer=0, **options) -> Shares:
    """Forward and backward of one attention on this rank, as a user calls it. q, ...: of all S tokens."""
    cp = ContextParallel(transport, **options)
    shard = cp.shard(batch)
    at, tail = shard.geometry.positions, shard.geometry.num_tokens - shard.length
    local = [torch.nn.functional.pad(x, (0, 0, 0, tail))[:, :, at] for x in (q, k, v, dout)]
    leaves = [x.requires_grad_() for x in local[:3]]
    out = cp.attention(*leaves, shard, layer)
    grads = torch.autograd.grad(out, leaves, local[3])
    return Shares([out.detach(), *grads], shard.layout, cp.plans(shard)[layer], cp.report(shard))


def whole(parts: list[list[Tensor]], layout: Layout, length: int) -> list[Tensor]:
    """Tensors [B, H, S, ...] in logical order from the shares of all ranks."""
    inverse = torch.from_numpy(layout.inverse).to(parts[0][0].device)
    return [torch.cat(part, 2)[:, :, inverse][:, :, :length] for part in zip(*parts, strict=True)]
