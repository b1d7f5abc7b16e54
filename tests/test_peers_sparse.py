"""Sparse methods of other projects at their shapes: who sees whom is chosen from values, per head.

VerticalSlash is ours; the others are written down here and walk the ring as given plans.
"""

from __future__ import annotations

import oracle
import peers
import pytest
import torch
from rings import LAYOUTS, attend_batch, on_ring, whole

from sparring.cp import run_threads
from sparring.kernels import Geometry, Plan
from sparring.kernels.patterns import VerticalSlash, make_plan

pytestmark = pytest.mark.usefixtures("poisoned")
FULL = pytest.mark.full
VERTICAL_SLASH = [
    (1024, 1, 128, 0.9, 4),
    (1024, 4, 64, 0.95, 4),
    *(
        pytest.param(length, *heads, sparsity, 8, marks=FULL)
        for length in (2048, 4096, 8192)
        for heads in ((1, 128), (4, 64))
        for sparsity in (0.9, 0.95)
    ),
]


def judge_plan(plan, heads, tensors, actual):
    """Like judge, for rows of some whole blocks; dout must be zero outside of them."""
    blocks, rows = judged_blocks(plan.geometry)
    part = Plan(
        plan.geometry.select(tuple(blocks.tolist())),
        plan.tiles[:, :, blocks].contiguous(),
        plan.columns,
        None if plan.column_group is None else plan.column_group[blocks],
    )
    peers.judge(rows, oracle.expand(part, heads), tensors, actual)


def judged_blocks(geometry):
    """Eight blocks, the first and the last among them, and their tokens."""
    size = geometry.block_size
    blocks = torch.linspace(0, geometry.num_blocks - 1, 8).long().unique()
    return blocks, (blocks[:, None] * size + torch.arange(size)).flatten()


def sparse_inputs(geometry, heads, kv_heads, dim):
    """Every fifth block of keys is hot, each head has its own: there is something to choose."""
    q, k, v, drawn, _ = oracle.inputs(1, heads, kv_heads, geometry.num_tokens, dim)
    hot = (torch.arange(geometry.num_blocks) + torch.arange(kv_heads)[:, None]) % 5 == 0
    k = k * torch.where(hot, 3.0, 0.3).repeat_interleave(geometry.block_size, 1)[..., None]
    dout, rows = torch.zeros_like(drawn), judged_blocks(geometry)[1]
    dout[:, :, rows] = drawn[:, :, rows]
    return q, k, v, dout


@pytest.mark.parametrize("length,kv_heads,dim,sparsity,world", VERTICAL_SLASH)
def test_mtraining_vertical_slash(length, kv_heads, dim, sparsity, world):
    """128K to 512K / 64, blocks of 16: the density, the plan of one process bit for bit, the oracle."""
    share = 1 - sparsity
    slashes, columns = round(share * length / 16 / 3), round(share * length / 3)
    pattern = VerticalSlash(slashes=(slashes, slashes), columns=(columns, columns), sink=4, window=0)
    geometry = Geometry.causal(1, length, 16)
    q, k, v, dout = sparse_inputs(geometry, 4, kv_heads, dim)
    batch = {"input_ids": torch.zeros(1, length, dtype=torch.int64)}
    options = dict(pattern=pattern, layout="striped", block_size=16, count_keys=0)
    shares = run_threads(world, lambda x: attend_batch(x, batch, q, k, v, dout, **options))
    plan, alone = shares[0].plan, make_plan(pattern, q, k, v, geometry)
    assert torch.equal(plan.tiles, alone.tiles) and torch.equal(plan.columns, alone.columns)
    assert share / 2 < shares[0].report.density < share * 1.5
    actual = whole([x.tensors for x in shares], shares[0].layout, length)
    judge_plan(alone, 4, (q, k, v, dout), actual)


def fewest(weights, share):
    """bool: the largest entries of each row that hold `share` of its sum."""
    value, order = weights.sort(-1, descending=True)
    kept = value.cumsum(-1) - value < share * value.sum(-1, keepdim=True)
    return torch.zeros_like(kept).scatter_(-1, order, kept)


def xattention(q, k, geometry, stride, threshold):
    """The fewest tiles that hold `threshold` of the scores, which antidiagonals of their squares estimate."""
    q, k = q.unflatten(2, (-1, stride)).flip(3).flatten(3), k.unflatten(2, (-1, stride)).flatten(3)
    scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT / q.shape[3] ** 0.5
    future = torch.ones(scores.shape[2:], dtype=torch.bool).triu(1)
    weights = scores.masked_fill(future, -torch.inf).softmax(-1)
    per_block = geometry.block_size // stride
    weights = weights.unflatten(3, (-1, per_block)).sum(4).unflatten(2, (-1, per_block)).sum(3)
    return Plan.build(geometry, fewest(weights, threshold))


def top(scores, count):
    """bool: the best `count` causal blocks of each row, its own among them."""
    blocks = scores.shape[-1]
    later, own = torch.ones(blocks, blocks).triu(1).bool(), torch.eye(blocks, dtype=torch.bool)
    scores = scores.masked_fill(later, -torch.inf).masked_fill(own, torch.inf)
    chosen = scores.topk(min(count, blocks), -1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, chosen, True) & ~later


def moba(q, k, geometry, count):
    """The chunks whose mean key the mean query of a block likes best, for each query head."""
    q, k = (x.unflatten(2, (-1, geometry.block_size)).mean(3) for x in (q, k))
    return Plan.build(geometry, top(q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT, count))


def m3(q, k, geometry, count):
    """The blocks with the best single score, for each key head."""
    scores = q.unflatten(1, (k.shape[1], -1)).flatten(2, 3) @ k.mT  # queries of all heads in turn
    size, blocks = geometry.block_size, geometry.num_blocks
    scores = scores.unflatten(3, (blocks, size)).amax(4)
    return Plan.build(geometry, top(scores.unflatten(2, (-1, blocks, size)).amax((2, 4)), count))


def check_plan(plan, world, layout, tensors):
    held = LAYOUTS[layout](plan.geometry.num_blocks, world, plan.geometry.block_size)
    out, _, *grads = on_ring(plan, held, *tensors, torch.zeros(tensors[0].shape[:3], dtype=torch.float64))
    judge_plan(plan, tensors[0].shape[1], tensors, (out, *grads))


@pytest.mark.parametrize(
    "kv_heads,stride,threshold",
    [
        (1, 16, 0.9),
        (4, 32, 0.95),
        *(pytest.param(*x, marks=FULL) for x in ((1, 16, 0.95), (1, 32, 0.9), (4, 16, 0.9), (4, 16, 0.95))),
    ],
)
def test_mtraining_xattention(kv_heads, stride, threshold):
    """128K / 64, blocks of 128 as they are."""
    geometry = Geometry.causal(1, 2048, 128)
    q, k, v, dout = sparse_inputs(geometry, 4, kv_heads, 64)
    plan = xattention(q, k, geometry, stride, threshold)
    assert 0.1 < plan.tiles_bool().sum() / (4 * geometry.num_visible_tiles) < 0.9
    check_plan(plan, 4, "zigzag", (q, k, v, dout))


@pytest.mark.parametrize(
    "length,chunk,count,world",
    [
        (1024, 16, 8, 4),
        *(pytest.param(2048, 16, count, 8, marks=FULL) for count in (8, 16)),
        *(pytest.param(4096, 32, count, 3, marks=FULL) for count in (8, 16)),
    ],
)
def test_mtraining_moba(length, chunk, count, world):
    """16K and 32K tokens, chunks of 128 and 256, top 8 and 16: lengths and chunks / 8."""
    geometry = Geometry.causal(1, length, chunk)
    q, k, v, dout = sparse_inputs(geometry, 4, 1, 64)
    plan = moba(q, k, geometry, count)
    assert plan.tiles_bool()[0, :, -1].sum(-1).tolist() == [count] * 4
    check_plan(plan, world, "striped", (q, k, v, dout))


@pytest.mark.parametrize("world", [2, 4, pytest.param(8, marks=FULL)])
def test_automodel_m3(world):
    """256 x cp tokens, 4:2 heads, top 2 of blocks of 128 for each key head, packed, with the backward."""
    length = 256 * world
    documents = (((0, length // 3), (length // 3, length - 70), (length - 70, length)),)
    geometry = Geometry.causal(1, length, 128, documents)
    q, k, v, dout = sparse_inputs(geometry, 4, 2, 64)
    plan = m3(q, k, geometry, 2)
    assert not torch.equal(plan.tiles[:, 0], plan.tiles[:, 1])
    check_plan(plan, world, "contiguous", (q, k, v, dout))
