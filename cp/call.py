"""One attention call of one layer: its checks, its plan, the attention across ranks, and what is counted."""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..kernels.attention import check_inputs, check_mask_heads, check_scale, steps
from .coverage import count_keys
from .estimate import sampled_recall
from .finite import check_finite
from .heads import sharded_attention
from .isolated import isolated
from .planning import call_shape
from .shard import Shard

if TYPE_CHECKING:
    from .context_parallel import ContextParallel


def attend(
    cp: ContextParallel,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shard: Shard,
    layer: Hashable,
    scale: float | None,
) -> Tensor:
    """See ContextParallel.attention."""
    if not isinstance(shard, Shard):
        raise TypeError(f"shard is a {type(shard).__name__}; pass what cp.shard(batch) returned")
    if shard.cp is not cp:
        raise ValueError("the shard is of another ContextParallel; pass what cp.shard(batch) returned")
    if any(isinstance(x, DTensor) for x in (q, k, v)):
        raise NotImplementedError("q, k or v is a DTensor; pass local tensors, x.to_local()")
    check_inputs(q, k, v, shard.geometry)
    if q.shape[2] != shard.local_length:
        raise ValueError(
            f"q has {q.shape[2]} tokens, this rank holds {shard.local_length} of the sequence; pass "
            "the model shard.inputs, and no cache"
        )
    scale = check_scale(scale, q.shape[3])
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    with isolated(q.device):
        first = _check_call(cp, q, k, shard, layer)
        if cp.debug:
            check_finite({"q": q, "k": k, "v": v}, layer, shard.transport)
        bound = shard.plan(layer, q.detach(), k.detach(), v.detach(), scale)
        check_mask_heads(bound.plan, q.shape[1], k.shape[1])
        shard.record.ran(layer, bound)
        shard.calls.add(call_shape(q, k, bound.plan))
        around = shard.ring(layer, steps(cp.impl, q, cp.block_size, cp.deterministic), first)
        if shard.count_keys:  # before the attention, after which recomputation may stop
            shard.record.keys.setdefault(layer, []).append(count_keys(q, k, v, bound, around, scale))
        out, lse = sharded_attention(q, k, v, bound, around, scale)
        if shard.sample_recall and layer not in shard.record.recall:
            with torch.no_grad():
                shard.record.recall[layer] = sampled_recall(
                    q, k, lse, shard.geometry, shard.link("recall", layer), scale
                )
    return out


def _check_call(cp: ContextParallel, q: Tensor, k: Tensor, shard: Shard, layer: Hashable) -> bool:
    """Ranks prove that they are in the same layer with equal shapes; returns whether they did.

    In every forward, recomputation and backward of the first step with such a call, in debug always.
    Synchronises then. What travels in a ring must have the same size everywhere, and gloo aborts the
    process, or fills tensors with rubbish, where it has not.
    """
    call = {"query heads": q.shape[1], "key heads": k.shape[1], "head dim": q.shape[3], "dtype": q.dtype}
    first = cp.first((layer, *call.values(), shard.transport.size, shard.exchange), shard)
    shard.link("forward", layer, first).enter(q.device, **call)
    return first
