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
    held = [block * size + i for block in geometry.blocks for i in range(size)]
    tiles, columns = plan.tiles.tolist(), None if plan.columns is None else plan.columns.tolist()
    mask = torch.zeros(batch, heads, len(held), total, dtype=torch.bool)
    for b in range(batch):
        seen = (keys >= geometry.lo[b, held, None]) & (keys <= geometry.hi[b, held, None])
        if geometry.prefix_lo is not None:
            low, high = geometry.prefix_lo[b, held, None], geometry.prefix_hi[b, held, None]
            seen |= (keys >= low) & (keys <= high)
        for h in range(heads):
            tile_head = h // (heads // len(tiles[b]))
            for row in range(len(geometry.blocks)):
                chosen = torch.zeros(total, dtype=torch.bool)
                for j in range(geometry.num_blocks):
                    if (tiles[b][tile_head][row][j // 32] >> (j % 32)) & 1:
                        chosen[j * size : (j + 1) * size] = True
                if columns is not None:
                    column_head = h // (heads // len(columns[b]))
                    group = 0 if plan.column_group is None else int(plan.column_group[row])
                    chosen[[c for c in columns[b][column_head][group] if c < total]] = True
                mask[b, h, row * size : (row + 1) * size] = chosen
        mask[b] &= seen
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
