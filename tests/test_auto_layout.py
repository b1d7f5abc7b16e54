"""layout="auto" end to end: it follows documents at once and plans with a lag of two steps."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from sparring.balance import H200, KernelCost, step_of_source, work_matrices
from sparring.cp import ContextParallel, run_threads
from sparring.kernels import Plan
from sparring.kernels.patterns import Dense, Pattern, Traits
from sparring.kernels.patterns.base import block_distance

SIZE, BLOCKS = 16, 64
LENGTH = SIZE * BLOCKS
# A machine whose kernels take so long that links hardly count, whatever the sizes.
KERNEL = KernelCost(tile=1.0, row=0.0, column=1 / 128, launch=0.0)
SLOW = replace(H200, forward=KERNEL, backward=KERNEL)


@dataclass(frozen=True)
class Clustered(Pattern):
    """A run of hot key blocks that every query chooses."""

    first: int
    last: int
    traits = Traits("strict", "none", "block")

    def estimate(self, q, summary, geometry):
        keys = torch.arange(geometry.num_blocks)
        hot = (keys >= self.first) & (keys < self.last)
        return Plan.build(geometry, hot.expand(geometry.batch, 1, len(geometry.blocks), -1))


@dataclass(frozen=True)
class Slashes(Pattern):
    """Fixed block diagonals."""

    distances: tuple[int, ...]
    traits = Traits("strict", "none", "block")

    def estimate(self, q, summary, geometry):
        distance = block_distance(geometry)
        tiles = sum(distance == d for d in self.distances).bool()
        return Plan.build(geometry, tiles.expand(geometry.batch, 1, -1, -1))


ON_A_RING = {"exchange": "ring"}


def batch(kind: str) -> dict:
    tokens = torch.arange(LENGTH)
    documents = {
        "one": torch.zeros_like(tokens),
        "packed": tokens // 100,
        "half": torch.where(tokens < LENGTH // 2, 0, 1 + tokens // 20),
    }[kind]
    return {"input_ids": tokens[None], "document_ids": documents[None]}


def step(cp, kind):
    shard = cp.shard(batch(kind))
    q = torch.ones(1, 2, shard.local_length, 16)
    cp.attention(q, q, q, shard)
    return shard


def layouts(pattern, kinds, world=4):
    """(layout, measured step imbalance) of each step; equal on all ranks."""

    def body(transport):
        cp = ContextParallel(transport, pattern=pattern, block_size=SIZE, recall_every=0, **ON_A_RING)
        seen = []
        for kind in kinds:
            shard = step(cp, kind)
            seen.append((shard.layout.name, cp.report(shard).step_imbalance))
        return seen

    results = run_threads(world, body)
    assert all(result == results[0] for result in results)
    return results[0]


def test_documents_change_the_layout():
    """Without any statistics: one document, then packed ones, then half a document and small ones."""
    names = [name for name, _ in layouts(Dense(), ["one", "packed", "half"])]
    assert names == ["zigzag", "striped", "work-sorted"]


def test_clustered_columns_change_the_layout():
    """Hot key blocks make the default layout twice as slow; seen at step 0, answered at step 2."""
    seen = layouts(Clustered(4, 12), ["one"] * 4)
    assert [name for name, _ in seen] == ["zigzag", "zigzag", "striped", "striped"]
    assert seen[1][1] > 2 and seen[2][1] < 1.1
    assert layouts(Clustered(16, 32), ["one"] * 3)[2][0] == "work-sorted"


def test_slashes_change_the_layout():
    seen = layouts(Slashes((0, 3, 7, 9, 20)), ["one"] * 3)
    assert [name for name, _ in seen] == ["zigzag", "zigzag", "striped"]
    assert seen[2][1] < 1.05 < seen[0][1]


@pytest.mark.parametrize(
    ("exchange", "nodes"), [("ring", 1), ("hierarchical", 2), ("gather", 1), ("pull", 1)]
)
def test_reported_work_is_that_of_the_plan_by_rank_and_step(exchange, nodes):
    def body(transport):
        pattern, options = Slashes((0, 3, 7, 9, 20)), dict(block_size=SIZE, recall_every=0)
        cp = ContextParallel(transport, pattern=pattern, layout="striped", exchange=exchange, **options)
        shard = step(cp, "half")
        return cp.report(shard).work, shard.layout, cp.plans(shard)[0].tiles_bool()

    steps = step_of_source(exchange, 4, nodes)
    assert (exchange == "ring") == np.array_equal(steps, step_of_source("ring", 4))
    for work, layout, tiles in run_threads(4, body, nodes=nodes):
        [expected] = work_matrices([layout], tiles[0, 0].double().numpy(), np.zeros(BLOCKS), steps)
        assert np.array_equal(work, expected) and len({tuple(row) for row in expected}) > 1


def test_resumed_planner_decides_like_the_uninterrupted_one():
    """state_dict between steps holds all that the next decisions need, as plain JSON."""
    pattern, kinds = Clustered(4, 12), ["one", "packed", "one", "one", "one"]
    for cut in range(1, 5):

        def body(transport, cut=cut):
            cp = ContextParallel(transport, pattern=pattern, block_size=SIZE, recall_every=0, **ON_A_RING)
            for kind in kinds[:cut]:
                step(cp, kind)
            state = json.loads(json.dumps(cp.state_dict()))
            again = ContextParallel(transport, pattern=pattern, block_size=SIZE, recall_every=0, **ON_A_RING)
            again.load_state_dict(state)
            return [step(again, kind).layout.name for kind in kinds[cut:]]

        expected = [name for name, _ in layouts(pattern, kinds, 2)]
        assert run_threads(2, body)[0] == expected[cut:]
