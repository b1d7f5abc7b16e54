"""What attention by heads is predicted to take: equal work, and the bytes that the engine swaps."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from sparring.balance import (
    H200,
    Call,
    Candidate,
    Decision,
    KernelCost,
    LinkCost,
    PlannerState,
    Prediction,
    contiguous,
    step_of_source,
)
from sparring.balance.by_heads import _by_source, consider_heads, predict_by_heads, swapped
from sparring.balance.cost import work_by_step
from sparring.cp import ContextParallel, run_threads
from sparring.kernels.patterns import Dense

SIZE, BLOCKS, DIM = 16, 32, 64
FREE = LinkCost(latency=0.0, bandwidth=1e30)
KERNEL = KernelCost(tile=1.0, row=0.0, column=0.01, launch=0.0)
MACHINE = replace(H200, block_size=SIZE, dim=DIM, forward=KERNEL, backward=KERNEL, between=FREE, memory=1e30)


def call_of(heads, key_heads, nodes=1, machine=MACHINE) -> Call:
    """In fp32."""
    keys = 2 * SIZE * key_heads * DIM * 4
    return Call(heads, key_heads, keys, keys, ("ring",), machine, nodes)


@pytest.mark.parametrize("nodes", [1, 2, 4])
def test_ranks_of_a_node_share_its_work_equally_and_wait_for_all_swaps(nodes):
    """However unequal it was in a ring; between nodes it is as it was."""
    world, rng = 8, np.random.default_rng(nodes)
    by_source, columns = rng.random((world, world)), rng.random(world)
    exchange = "ring" if nodes == 1 else "hierarchical"
    work = work_by_step(by_source, columns, step_of_source(exchange, world, nodes))
    call, layout = call_of(16, 8, nodes), contiguous(BLOCKS, world, SIZE)
    found = predict_by_heads(call, layout, work)
    expected = work_by_step(by_source, columns, step_of_source("heads x ring", world, nodes))
    slowest = expected.reshape(nodes, world // nodes, -1).mean(1)
    seconds = 2 * 16 * (slowest[:, :-1].sum(1) + 0.01 * SIZE * slowest[:, -1]).max()
    assert found.compute == pytest.approx(seconds, rel=1e-6)
    swaps = sum(MACHINE.inside.seconds(size) for size in swapped(call, layout))
    assert found.seconds >= seconds + swaps - 1e-6
    if nodes == 1:
        assert found.seconds == pytest.approx(seconds + swaps, rel=1e-6)


def test_rounds_of_a_hierarchical_ring_tell_the_work_of_nodes():
    by_source = np.arange(64.0).reshape(8, 8)
    for nodes in (1, 2, 4):
        work = work_by_step(by_source, np.zeros(8), step_of_source("hierarchical", 8, nodes))
        inner = 8 // nodes
        expected = by_source.reshape(nodes, inner, nodes, inner).sum((1, 3))
        assert np.array_equal(_by_source(work, nodes), expected)


@pytest.mark.parametrize("heads,key_heads", [(8, 8), (8, 4), (8, 2), (4, 1)])
def test_swapped_bytes_are_those_of_the_engine(heads, key_heads):
    """But for lse, of which there is one fp32 number for the 64 of an output, and plans."""
    world = 4

    def body(transport):
        options = dict(exchange="heads", layout="zigzag", block_size=SIZE, recall_every=0, count_keys=0)
        cp = ContextParallel(transport, pattern=Dense(), **options)
        shard = cp.shard({"input_ids": torch.zeros(2, SIZE * BLOCKS, dtype=torch.int64)})
        q, k, v = (torch.ones(2, n, shard.local_length, DIM) for n in (heads, key_heads, key_heads))
        leaves = [x.requires_grad_() for x in (q, k, v)]
        cp.attention(*leaves, shard).sum().backward()
        return cp.report().bytes_moved["heads"], shard.layout

    moved, layout = run_threads(world, body)[0]
    sizes = swapped(call_of(heads, key_heads), layout, batch=2)
    assert len(sizes) == 4 and sum(sizes) * world <= moved <= 1.02 * sum(sizes) * world


def decided(bandwidth, in_use=None):
    """With links of so many bytes a second, which swaps for heads wait for and a ring hides."""
    machine = replace(MACHINE, inside=LinkCost(latency=0.0, bandwidth=bandwidth))
    call, layout = call_of(4, 4, machine=machine), contiguous(BLOCKS, 4, SIZE)
    work = np.array([[10.0, 5, 5, 5, 0]] * 3 + [[11.0, 5, 5, 5, 0]])  # by heads 4 x 25.25, in a ring 4 x 26
    seconds = 2 * 4 * 26.0
    candidate = Candidate(layout, work, Prediction("ring", seconds, seconds))
    decision = Decision(layout, (candidate,), PlannerState(), "ring")
    return consider_heads(decision, call, 1, in_use)


def test_what_is_in_use_stays_until_the_other_is_clearly_faster():
    """By heads is 2.9 % faster where links are free, and slower the slower they are."""
    sizes = sum(swapped(call_of(4, 4), contiguous(BLOCKS, 4, SIZE)))
    equal = sizes / (2 * 4 * 0.75)  # as fast as a ring
    for bandwidth, fresh, kept in ((1e30, "ring", "heads"), (0.8 * equal, "ring", "heads")):
        assert decided(bandwidth).exchange == fresh and decided(bandwidth, "heads").exchange == kept
    slow = decided(equal / 10, "heads")
    assert slow.exchange == "ring" and [name for name, _ in slow.chosen.others] == ["heads"]
    assert predict_by_heads(call_of(4, 4), slow.layout, slow.chosen.work).compute == 2 * 4 * 25.25


def test_a_pull_is_left_as_it_is():
    call, layout = call_of(4, 4), contiguous(BLOCKS, 4, SIZE)
    candidate = Candidate(layout, np.ones((4, 4)), Prediction("pull", 1e9, 1e9))
    decision = Decision(layout, (candidate,), PlannerState(), "pull")
    assert consider_heads(decision, call, 1, "heads") is decision
