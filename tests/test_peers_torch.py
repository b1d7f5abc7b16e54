"""PyTorch's tests of context parallelism: how much is sent, and its ways to deal blocks to ranks."""

from __future__ import annotations

import oracle
import peers
import pytest
import torch
from rings import Counting, attend_batch, whole

from sparring.balance import from_assignment
from sparring.cp import ContextParallel, run_threads
from sparring.kernels.patterns import Dense

pytestmark = pytest.mark.usefixtures("poisoned")
FULL = pytest.mark.full


@pytest.mark.parametrize(
    "world,dtype",
    [
        (2, torch.float32),
        (4, torch.bfloat16),
        *(pytest.param(8, dtype, marks=FULL) for dtype in (torch.float32, torch.bfloat16)),
    ],
)
def test_counts(world, dtype):
    """P - 1 messages forward, 3 P - 3 in all, each of one shard; gradients in fp32; no collectives."""
    q, k, v, dout, _ = oracle.inputs(8, 8, 8, 64 * world, 32, dtype=dtype)
    ids = {"input_ids": torch.zeros(8, 64 * world, dtype=torch.int64)}

    def body(transport):
        watched = Counting(transport)
        options = dict(pattern="dense", layout="zigzag", block_size=16)
        cp = ContextParallel(watched, **options, recall_every=0, count_keys=0)  # nothing that costs messages
        at = cp.shard(ids).geometry.positions
        leaves = [x[:, :, at].requires_grad_() for x in (q, k, v)]
        cp.attention(*leaves, cp.shard(ids))  # in the first step of a layer ranks also prove that they agree
        shard, counts = cp.shard(ids), []
        for counter in (watched.messages, watched.bytes, watched.collectives):
            counter.clear()
        out = cp.attention(*leaves, shard)
        counts.append((dict(watched.messages), dict(watched.bytes)))
        torch.autograd.grad(out, leaves, dout[:, :, at])
        counts.append((dict(watched.messages), dict(watched.bytes)))
        return counts, dict(watched.collectives), cp.report(shard).bytes_moved

    share = 2 * 8 * 8 * 64 * 32  # elements of K and V of one rank
    results = run_threads(world, body)
    for (forward, both), collectives, _ in results:
        assert forward == ({"keys": world - 1}, {"keys": (world - 1) * share * dtype.itemsize})
        assert both[0] == {"keys": 2 * (world - 1), "grads": world - 1}
        assert sum(both[0].values()) == 3 * world - 3
        assert both[1] == {"keys": 2 * (world - 1) * share * dtype.itemsize, "grads": (world - 1) * share * 4}
        assert collectives == {}
    moved = results[0][2]
    assert moved == {
        "keys": 2 * world * (world - 1) * share * dtype.itemsize,
        "grads": world * (world - 1) * share * 4,
    }


def head_tail(blocks, world):
    """Ranks take blocks in turn, forth and back."""
    ranks = [[] for _ in range(world)]
    for block in blocks:
        place = (block - blocks.start) % (2 * world)
        ranks[min(place, 2 * world - 1 - place)].append(block)
    return ranks


def by_document(mask, world):
    """Head and tail of every document for itself."""
    edges = [start // 16 for start, _ in mask.documents[0]] + [mask.length // 16]
    parts = [head_tail(range(*pair), world) for pair in zip(edges[:-1], edges[1:], strict=True)]
    return [sum((part[rank] for part in parts), []) for rank in range(world)]


def by_work(mask, world):
    """PTRR: blocks by the number of visible pairs, the most first, dealt round robin."""
    work = mask.pairs(torch.arange(mask.length))[0, 0].sum(1).unflatten(0, (-1, 16)).sum(1)
    order = work.argsort(descending=True, stable=True).tolist()
    return [order[rank::world] for rank in range(world)]


LAYOUTS = {
    "head-tail": lambda mask, world: head_tail(range(mask.length // 16), world),
    "head-tail of each document": by_document,
    "PTRR": by_work,
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("world", [pytest.param(2, marks=FULL), 4, pytest.param(8, marks=FULL)])
def test_layouts(world, name):
    mask = peers.packed(64 * world, 64, 112, batch=8)
    held = from_assignment(LAYOUTS[name](mask, world), 16)
    tensors = oracle.inputs(8, 8, 8, mask.length, 32)[:4]
    options = dict(pattern=Dense(), layout=held, block_size=16, recall_every=0, count_keys=0)
    shares = run_threads(world, lambda x: attend_batch(x, mask.batch(), *tensors, **options))
    rows = torch.arange(mask.length)
    actual = whole([share.tensors for share in shares], held, mask.length)
    peers.judge(rows, mask.pairs(rows), tensors, actual)
