"""The distributed attention: one autograd function that walks a schedule over a transport.

Forward: keys and values travel as the schedule says, the next transfer in flight while the tiles of the
keys at hand are computed; one (out, lse) in full precision is carried through all steps. Backward: keys
travel again, the gradients of each source follow, summed in full precision, and arrive home with the
last hop. Columns are gathered once, before the first step, and computed after the last.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.attention import carried, output_delta
from ..kernels.bound import BoundPlan
from ..kernels.columns import gather_columns, scatter_columns
from .isolated import isolated
from .ring import Ring, accumulators


def ring_attention(
    q: Tensor, k: Tensor, v: Tensor, bound: BoundPlan, ring: Ring, scale: float
) -> tuple[Tensor, Tensor]:
    """out like q and lse [B, H, S] of this rank's queries against the keys of all ranks.

    q: [B, H, S, D]; k, v: [B, Hk, S, D], S whole blocks in the order of the plan's geometry. bound: to the
    steps of the ring's schedule, one source each.
    """
    return _RingAttention.apply(q.contiguous(), k.contiguous(), v.contiguous(), bound, ring, scale)


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, bound: BoundPlan, ring: Ring, scale: float):
        out, lse = forward(q, k, v, bound, ring, scale)
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
            grads = backward(q, k, v, out, lse, dout, dlse, ctx.bound.join(lists), ctx.ring, ctx.scale)
        return *(x.to(q.dtype) for x in grads), None, None, None


def forward(q, k, v, bound: BoundPlan, ring: Ring, scale: float) -> tuple[Tensor, Tensor]:
    """out and lse of this rank in full precision."""
    columns = _start_columns(k, v, bound, ring, "forward")
    out, lse = carried(q)
    for step, keys in ring.keys(k, v, "forward"):
        if keys is not None:
            ring.steps.forward_step(q, *keys, bound, step, out, lse, scale, fresh=step == 0)
    if columns is not None:
        ring.steps.forward_columns(q, *_arrived(columns), bound, out, lse, scale)
    return out, lse


def backward(q, k, v, out, lse, dout, dlse, bound: BoundPlan, ring: Ring, scale: float):
    """dq, dk, dv of this rank in full precision from the gradients of out and lse."""
    ring.link.at("backward").enter(q.device)
    columns = _start_columns(k, v, bound, ring, "backward")
    dout = dout.contiguous()
    gradients = ring.gradients(k)
    for step, keys in ring.keys(k, v, "backward"):
        if step < 0:  # the first keys are on their way
            delta = output_delta(out, dout, dlse)
            dq = accumulators(q)
            continue
        gradient = None
        if keys is not None:
            gradient = accumulators(keys)
            ring.steps.backward_step(q, *keys, dout, lse, delta, bound, step, dq, *gradient, scale)
        gradients.add(step, gradient)
    if columns is not None:
        kept = _arrived(columns)
        dcolumns = accumulators(kept)
        ring.steps.backward_columns(q, *kept, dout, lse, delta, bound, dq, *dcolumns, scale)
        summed = ring.all_reduce("backward", dcolumns)
    dk, dv = gradients.total()
    if columns is not None:
        summed.wait()
        own = _own_blocks(k, bound)
        scatter_columns(dcolumns[0], bound.plan, dk, own)
        scatter_columns(dcolumns[1], bound.plan, dv, own)
    return dq, dk, dv


def _start_columns(k: Tensor, v: Tensor, bound: BoundPlan, ring: Ring, phase: str):
    """Every rank contributes the columns that it holds; the sum with zeros is exact."""
    if bound.columns is None:
        return None
    own = _own_blocks(k, bound)
    columns = torch.stack([gather_columns(x, bound.plan, own) for x in (k, v)])
    return columns, ring.all_reduce(phase, columns)


def _own_blocks(k: Tensor, bound: BoundPlan) -> Tensor:
    """int64: logical blocks of k, which is the first source; queries may be of other blocks."""
    return bound.key_base[: k.shape[2] // bound.block_size].long() // bound.block_size


def _arrived(columns) -> Tensor:
    """[2, B, Hb, groups, C, D]"""
    tensor, pending = columns
    pending.wait()
    return tensor
