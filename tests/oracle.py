"""The independent judge: dense fp64 attention under a mask that is written out pair by pair.

It shares no code with the library: the mask is expanded from a plan's public fields by plain Python.
"""

from __future__ import annotations

import torch

from sparring.kernels import Plan


def expand(plan: Plan, heads: int) -> torch.Tensor:
    """bool [B, heads, held tokens, num_tokens], from the definition of a plan, block by block."""
    geometry, size = plan.geometry, plan.geometry.block_size
    batch, total = geometry.batch, geometry.num_tokens
    keys = torch.arange(total)
    mask = torch.zeros(batch, heads, len(geometry.blocks) * size, total, dtype=torch.bool)
    for b in range(batch):
        for h in range(heads):
            tile_head = h // (heads // plan.tiles.shape[1])
            for row, block in enumerate(geometry.blocks):
                chosen = torch.zeros(total, dtype=torch.bool)
                words = plan.tiles[b, tile_head, row].tolist()
                for j in range(geometry.num_blocks):
                    if (words[j // 32] >> (j % 32)) & 1:
                        chosen[j * size : (j + 1) * size] = True
                if plan.columns is not None:
                    head = h // (heads // plan.columns.shape[1])
                    group = 0 if plan.column_group is None else int(plan.column_group[row])
                    columns = plan.columns[b, head, group].tolist()
                    chosen[[c for c in columns if c < total]] = True
                for i in range(size):
                    query = block * size + i
                    seen = (keys >= geometry.lo[b, query]) & (keys <= geometry.hi[b, query])
                    if geometry.prefix_lo is not None:
                        low, high = geometry.prefix_lo[b, query], geometry.prefix_hi[b, query]
                        seen |= (keys >= low) & (keys <= high)
                    mask[b, h, row * size + i] = chosen & seen
    return mask


def attention(q, k, v, mask, dout, dlse, scale=None):
    """fp64 out, lse, dq, dk, dv of dense masked attention. mask: [B, H, Sq, Sk]; lse of empty rows -inf."""
    q, k, v = (x.detach().double().requires_grad_() for x in (q, k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    group = q.shape[1] // k.shape[1]
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k.repeat_interleave(group, 1)) * scale
    alive = mask.any(-1)
    scores = torch.where(mask, scores, -1e300)  # finite: rows without keys must not make NaN
    lse = torch.logsumexp(scores, -1)
    weights = torch.where(mask, torch.exp(scores - lse[..., None]), 0.0)
    out = torch.einsum("bhqk,bhkd->bhqd", weights, v.repeat_interleave(group, 1))
    loss = (out * dout.double()).sum() + (torch.where(alive, lse, 0.0) * dlse.double()).sum()
    dq, dk, dv = torch.autograd.grad(loss, (q, k, v))
    return out.detach(), torch.where(alive, lse, -torch.inf).detach(), dq, dk, dv


def inputs(batch, heads, kv_heads, length, dim, seed=0, dtype=torch.float64):
    """q, k, v, dout, dlse with structure: biased values and peaked scores, so that a lost tile shows."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    q = normal(batch, heads, length, dim) * 1.5
    k = normal(batch, kv_heads, length, dim) * 1.5
    v = normal(batch, kv_heads, length, dim) + 1.0 + torch.arange(length)[:, None] / length
    dout, dlse = normal(batch, heads, length, dim) + 0.5, normal(batch, heads, length)
    return tuple(x.to(dtype) for x in (q, k, v, dout, dlse))


def max_error(actual, expected) -> float:
    """Largest absolute difference; infinities must be in the same places."""
    actual, expected = actual.detach().double(), expected.double()
    same = actual == expected  # covers equal infinities
    difference = torch.where(same, 0.0, (actual - expected).abs())
    return float(difference.max()) if difference.numel() else 0.0


def relative_error(actual, expected) -> float:
    finite = expected[torch.isfinite(expected)]
    return max_error(actual, expected) / max(1e-30, float(finite.double().abs().max()))
