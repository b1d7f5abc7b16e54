"""The distributed attention: one autograd function that walks a schedule over a transport.

Forward: keys and values travel as the schedule says, the next transfer in flight while the tiles of the
keys at hand are computed; one (out, lse) in full precision is carried through all steps. Backward: keys
travel again, the gradients of each source follow, summed in full precision, and arrive home with the
last hop. Columns are gathered once, before the first step, and computed after the last.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from types import ModuleType

import torch
from torch import Tensor

from ..balance.schedule import Schedule, Transfer
from ..kernels.attention import accumulator_dtype, output_delta, start
from ..kernels.bound import BoundPlan
from ..kernels.columns import gather_columns, scatter_columns
from .errors import RingDesyncError
from .transport import Pending, Transport


@dataclass(frozen=True)
class Ring:
    """What one attention call needs of its surroundings.

    header: integers (step, layer, layout) that must agree at every transfer, or None to not check.
    sent: bytes sent by this rank, by traffic class; counted here.
    """

    transport: Transport
    schedule: Schedule
    steps: ModuleType
    header: tuple[int, ...] | None = None
    sent: Counter = field(default_factory=Counter)

    def send(self, transfer: Transfer, x: Tensor, shape, channel: str) -> tuple[Tensor, Pending]:
        """Starts a transfer; the returned tensor is filled once the pending is waited for."""
        self.sent[channel] += x.numel() * x.itemsize
        receive = torch.empty(shape, dtype=x.dtype, device=x.device)
        sent, received, check = [x], [receive], None
        if self.header is not None:
            mine = [*self.header, transfer.sends, *shape, x.dtype.itemsize]
            sent.insert(0, torch.tensor(mine, dtype=torch.int64, device=x.device))
            received.insert(0, torch.full_like(sent[0], -1))
            wanted = [*self.header, transfer.receives, *shape, x.dtype.itemsize]
            check = (received[0], wanted, transfer.recv_from)
        pending = self.transport.exchange(sent, transfer.send_to, received, transfer.recv_from, channel)
        if check is None:
            return receive, pending
        return receive, Pending(lambda: (pending.wait(), self._verify(*check, channel)))

    def count_all_reduce(self, x: Tensor) -> None:
        """A ring all-reduce sends 2 (size - 1) / size of the tensor from every rank."""
        size = self.transport.size
        self.sent["columns"] += 2 * (size - 1) * x.numel() * x.itemsize // size

    def _verify(self, header: Tensor, wanted: list[int], peer: int, channel: str) -> None:
        if header.tolist() != wanted:
            raise RingDesyncError(
                f"rank {self.transport.rank} expected {channel} with header {wanted} from rank {peer}, "
                f"which sent {header.tolist()} (step, layer, layout, source, shape, bytes per element)"
            )


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
        columns = _start_columns(k, v, bound, ring)
        out, lse = start(q)
        for step, keys in _keys(k, v, bound, ring, ring.schedule.forward):
            ring.steps.forward_step(q, keys[0], keys[1], bound, step.source, out, lse, scale)
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
        q, k, v, out, lse, *lists = ctx.saved_tensors
        bound, ring, scale = ctx.bound.join(lists), ctx.ring, ctx.scale
        columns = _start_columns(k, v, bound, ring)
        dout = dout.contiguous()
        delta = output_delta(out, dout, dlse)
        dtype = accumulator_dtype(q)
        dq = torch.zeros(q.shape, dtype=dtype, device=q.device)
        shape = _wire_shape(k, bound)
        arriving: dict[int, tuple[Tensor, Pending]] = {}
        for step, keys in _keys(k, v, bound, ring, ring.schedule.backward):
            gradient = torch.zeros(shape, dtype=dtype, device=k.device)
            ring.steps.backward_step(
                q, keys[0], keys[1], dout, lse, delta, bound, step.source, dq, *gradient, scale
            )
            if step.source in arriving:
                received, pending = arriving.pop(step.source)
                pending.wait()
                gradient += received
            if step.gradients is None:
                own = gradient
            else:
                transfer = step.gradients
                arriving[transfer.receives] = ring.send(transfer, gradient, shape, "grads")
        if ring.transport.rank in arriving:
            own, pending = arriving.pop(ring.transport.rank)
            pending.wait()
        dk, dv = own[:, :, :, : k.shape[2]]
        if columns is not None:
            ck, cv = _finish_columns(columns)
            dcolumns = torch.zeros(2, *ck.shape, dtype=dtype, device=k.device)
            ring.steps.backward_columns(q, ck, cv, dout, lse, delta, bound, dq, *dcolumns, scale)
            ring.count_all_reduce(dcolumns)
            ring.transport.all_reduce(dcolumns).wait()
            scatter_columns(dcolumns[0], bound.plan, dk)
            scatter_columns(dcolumns[1], bound.plan, dv)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None


def _wire_shape(k: Tensor, bound: BoundPlan) -> tuple[int, ...]:
    """Keys and values, or their gradients, as they travel: padded to the largest shard."""
    batch, heads, _, dim = k.shape
    return (2, batch, heads, bound.blocks_per_source * bound.block_size, dim)


def _keys(k: Tensor, v: Tensor, bound: BoundPlan, ring: Ring, steps):
    """Yields (step, keys and values [2, B, Hk, n*block, D] of its source), moving them meanwhile."""
    shape = _wire_shape(k, bound)
    own = torch.stack((k, v))
    if own.shape[3] < shape[3]:  # a copy only where shards are uneven
        own = torch.nn.functional.pad(own, (0, 0, 0, shape[3] - own.shape[3]))
    held: dict[int, Tensor] = {ring.transport.rank: own}
    arriving: dict[int, Pending] = {}
    for step in steps:
        if step.source in arriving:
            arriving.pop(step.source).wait()
        if step.keys is not None:
            transfer = step.keys
            received = ring.send(transfer, held[transfer.sends], shape, "keys")
            held[transfer.receives], arriving[transfer.receives] = received
        yield step, held[step.source]
        del held[step.source]


def _start_columns(k: Tensor, v: Tensor, bound: BoundPlan, ring: Ring):
    """Every rank contributes the columns that it holds; the sum with zeros is exact."""
    if bound.columns is None:
        return None
    columns = torch.stack((gather_columns(k, bound.plan), gather_columns(v, bound.plan)))
    ring.count_all_reduce(columns)
    return columns, ring.transport.all_reduce(columns)


def _finish_columns(columns) -> tuple[Tensor, Tensor]:
    tensor, pending = columns
    pending.wait()
    return tensor[0], tensor[1]
