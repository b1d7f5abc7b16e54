"""Runs a pattern across ranks: the fields of each stage travel in one collective per kind."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.patterns.base import Field, Summary
from .transport import Transport


def combine_over(transport: Transport):
    """The `combine` of make_plan for a group: sums and maxima by all-reduce, "gather" by all-gather.

    All results are exact and equal on all ranks: sums are of integers or of disjoint support, and
    fields of one kind and dtype share a message.
    """

    def combine(fields: dict[str, Field]) -> Summary:
        combined = {name: field.tensor for name, field in fields.items() if field.op == "local"}
        kinds: dict[tuple, list[str]] = {}
        for name, field in fields.items():
            if field.op != "local":
                kinds.setdefault((field.op, field.tensor.dtype), []).append(name)
        for (op, _), names in kinds.items():
            flat = torch.cat([fields[name].tensor.flatten() for name in names])
            if op == "gather":
                parts = transport.all_gather(flat)
            else:
                transport.all_reduce(flat, op).wait()
                parts = flat
            sizes = [fields[name].tensor.numel() for name in names]
            for name, part in zip(names, parts.split(sizes, dim=-1), strict=True):
                shape = fields[name].tensor.shape
                combined[name] = part.reshape(len(parts), *shape) if op == "gather" else part.view(shape)
        return combined

    return combine


def sampled_recall(
    q: Tensor, k: Tensor, lse: Tensor, geometry, transport: Transport, scale: float, samples: int = 32
) -> Tensor:
    """fp32 [1]: mean over heads and sampled queries of exp(lse - full lse), the attention that was kept.

    q, k: local; lse: [B, H, S] of the plan. Every rank offers queries spread over its shard; all ranks
    score all of them against their own keys.
    """
    count = max(1, samples // transport.size)
    local = torch.linspace(0, max(0, q.shape[2] - 1), count, device=q.device).long()
    bounds = list(geometry.intervals)
    if q.shape[2] == 0:  # a rank without tokens takes part with queries that see nothing
        q, lse = (torch.nn.functional.pad(x.movedim(2, -1), (0, 1)).movedim(-1, 2) for x in (q, lse))
        bounds = [(lo.new_ones(len(lo), 1), lo.new_zeros(len(lo), 1)) for lo, _ in bounds]

    def everywhere(x: Tensor) -> Tensor:
        return transport.all_gather(x.contiguous())

    rows, kept = everywhere(q[:, :, local].float()), everywhere(lse[:, :, local].float())
    bounds = [(everywhere(lo[:, local]), everywhere(hi[:, local])) for lo, hi in bounds]
    keys = k.float().repeat_interleave(q.shape[1] // k.shape[1], 1)
    at = geometry.positions
    visible = torch.zeros((), dtype=torch.bool, device=q.device)
    for low, high in bounds:
        visible = visible | ((low[..., None] <= at) & (at <= high[..., None]))
    scores = (rows @ keys.mT * scale).masked_fill(~visible[:, :, None], -torch.inf)
    parts = transport.all_gather(scores.logsumexp(-1))
    full = parts.logsumexp(0)
    seen = full > -torch.inf
    share = torch.where(seen, (kept - full.masked_fill(~seen, 0.0)).exp(), 0.0)
    return share.sum() / seen.sum().clamp(min=1)
