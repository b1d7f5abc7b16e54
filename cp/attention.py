"""The distributed attention: one autograd function that walks a schedule over a transport.

Forward: keys and values travel as the schedule says, the next transfer in flight while the tiles of the
keys at hand are computed; one (out, lse) in full precision is carried through all steps. Backward: keys
travel again, the gradients of each source follow, summed in full precision, and arrive home with the
last hop. Columns are gathered once, before the first step, and computed after the last.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from types import ModuleType

import torch
from torch import Tensor

from ..balance.schedule import Schedule, Transfer
from ..kernels.attention import accumulator_dtype, carried, output_delta
from ..kernels.bound import BoundPlan
from ..kernels.columns import gather_columns, scatter_columns
from .isolated import isolated
from .link import Link
from .transport import Pending, Transport


@dataclass(frozen=True)
class Ring:
    """What one attention call needs of its surroundings.

    transport: a Link where errors should say in which step and layer they happened. sent: bytes sent by this
    rank, by traffic class; counted here.
    """

    transport: Transport
    schedule: Schedule
    steps: ModuleType
    sent: Counter = field(default_factory=Counter)

    @property
    def link(self) -> Link:
        return self.transport if isinstance(self.transport, Link) else Link(self.transport)

    def send(self, link: Link, transfer: Transfer, x: Tensor, shape, what: str) -> tuple[Tensor, Pending]:
        """Starts a transfer; the returned tensor is filled once the pending is waited for."""
        channel = f"outer {what}" if transfer.outer else what
        self.sent[channel] += x.numel() * x.itemsize
        receive = torch.empty(shape, dtype=x.dtype, device=x.device)
        return receive, link.exchange([x], transfer.send_to, [receive], transfer.recv_from, channel)

    def all_reduce(self, phase: str, x: Tensor) -> Pending:
        """Of columns. A ring all-reduce sends 2 (size - 1) / size of the tensor from every rank."""
        size = self.transport.size
        self.sent["columns"] += 2 * (size - 1) * x.numel() * x.itemsize // size
        return self.link.at(phase).all_reduce(x)


def ring_attention(
    q: Tensor, k: Tensor, v: Tensor, bound: BoundPlan, ring: Ring, scale: float
) -> tuple[Tensor, Tensor]:
    """out like q and lse [B, H, S] of this rank's queries against the keys of all ranks.

    q: [B, H, S, D]; k, v: [B, Hk, S, D], S whole blocks in the physical order of the bound plan.
    """
    return _RingAttention.apply(q.contiguous(), k.contiguous(), v.contiguous(), bound, ring, scale)


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, bound: BoundPlan, ring: Ring, scale: float):
        columns = _start_columns(k, v, bound, ring, "forward")
        out, lse = carried(q)
        for i, (step, keys) in enumerate(_keys(k, v, bound, ring, "forward")):
            ring.steps.forward_step(q, *keys, bound, step.source, out, lse, scale, fresh=i == 0)
        if columns is not None:
            ring.steps.forward_columns(q, *_finish_columns(columns), bound, out, lse, scale)
        # Lists are saved like tensors, so that activation checkpointing drops and rebuilds them.
        ctx.bound, lists = bound.split()
        ctx.save_for_backward(q, k, v, out, lse, *lists)
        ctx.ring, ctx.scale = ring, scale
        return out.to(q.dtype), lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout, dlse):
        q, k, v, out, lse, *lists = ctx.saved_tensors  # activation checkpointing runs the model again here
        with isolated(dout.device):
            grads = _backward(q, k, v, out, lse, dout, dlse, ctx.bound.join(lists), ctx.ring, ctx.scale)
        return *grads, None, None, None


def _backward(q, k, v, out, lse, dout, dlse, bound: BoundPlan, ring: Ring, scale: float):
    """dq, dk, dv of this rank from the gradients of out and lse."""
    ring.link.at("backward").enter(q.device)
    columns = _start_columns(k, v, bound, ring, "backward")
    dout = dout.contiguous()
    delta = output_delta(out, dout, dlse)
    dtype = accumulator_dtype(q)
    dq = torch.zeros(q.shape, dtype=dtype, device=q.device)
    shape = _wire_shape(k, bound)
    shares: dict[int, Tensor] = {}  # of this rank, by source
    arriving: dict[tuple[int, bool], list[tuple[Tensor, Pending]]] = defaultdict(list)  # by source, outer

    def summed(source: int, outer: bool) -> Tensor:
        """All that is here of a source, from other nodes too if `outer`; always in the same order."""
        arrived = arriving.pop((source, False), []) + (arriving.pop((source, True), []) if outer else [])
        parts = [shares.pop(source)] if source in shares else []
        for received, pending in arrived:
            pending.wait()
            parts.append(received)
        total, *others = parts
        for other in others:
            total += other
        return total

    hop, hops = 0, sum(len(step.gradients) for step in ring.schedule.backward)
    for step, keys in _keys(k, v, bound, ring, "backward"):
        shares[step.source] = gradient = torch.zeros(shape, dtype=dtype, device=k.device)
        ring.steps.backward_step(
            q, keys[0], keys[1], dout, lse, delta, bound, step.source, dq, *gradient, scale
        )
        for transfer in step.gradients:
            hop += 1
            link = ring.link.at("backward", hop, hops)
            received = ring.send(link, transfer, summed(transfer.sends, transfer.outer), shape, "grads")
            arriving[transfer.receives, transfer.outer].append(received)
    dk, dv = summed(ring.transport.rank, True)[:, :, :, : k.shape[2]]
    if columns is not None:
        ck, cv = _finish_columns(columns)
        dcolumns = torch.zeros(2, *ck.shape, dtype=dtype, device=k.device)
        ring.steps.backward_columns(q, ck, cv, dout, lse, delta, bound, dq, *dcolumns, scale)
        ring.all_reduce("backward", dcolumns).wait()
        scatter_columns(dcolumns[0], bound.plan, dk)
        scatter_columns(dcolumns[1], bound.plan, dv)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _wire_shape(k: Tensor, bound: BoundPlan) -> tuple[int, ...]:
    """Keys and values, or their gradients, as they travel: padded to the largest shard."""
    batch, heads, _, dim = k.shape
    return (2, batch, heads, bound.blocks_per_source * bound.block_size, dim)


def _keys(k: Tensor, v: Tensor, bound: BoundPlan, ring: Ring, phase: str):
    """Yields (step, keys and values [2, B, Hk, n*block, D] of its source), moving them meanwhile."""
    shape, steps = _wire_shape(k, bound), getattr(ring.schedule, phase)
    hop, hops = 0, sum(len(step.keys) for step in steps)
    own = torch.stack((k, v))
    if own.shape[3] < shape[3]:  # a copy only where shards are uneven
        own = torch.nn.functional.pad(own, (0, 0, 0, shape[3] - own.shape[3]))
    held: dict[int, Tensor] = {ring.transport.rank: own}
    arriving: dict[int, Pending] = {}
    for step in steps:
        if step.source in arriving:
            arriving.pop(step.source).wait()
        for transfer in step.keys:
            hop += 1
            link = ring.link.at(phase, hop, hops)
            received = ring.send(link, transfer, held[transfer.sends], shape, "keys")
            held[transfer.receives], arriving[transfer.receives] = received
        yield step, held[step.source]
        del held[step.source]


def _start_columns(k: Tensor, v: Tensor, bound: BoundPlan, ring: Ring, phase: str):
    """Every rank contributes the columns that it holds; the sum with zeros is exact."""
    if bound.columns is None:
        return None
    columns = torch.stack((gather_columns(k, bound.plan), gather_columns(v, bound.plan)))
    return columns, ring.all_reduce(phase, columns)


def _finish_columns(columns) -> tuple[Tensor, Tensor]:
    tensor, pending = columns
    pending.wait()
    return tensor[0], tensor[1]
