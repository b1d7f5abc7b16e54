"""The planner on small plans of benchmarks/balance_zoo.py; benchmarks/balance.py has large ones."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import pytest

BLOCKS, BLOCK, DENSITY = 1024, 128, 0.25


@pytest.fixture(scope="module")
def benchmark_modules():
    patch = pytest.MonkeyPatch()
    patch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    yield importlib.import_module("balance"), importlib.import_module("balance_zoo")
    patch.undo()


KINDS = (
    "sinks + window",
    "vertical-slash",
    "clustered columns",
    "log-uniform slashes",
    "XAttention-like",
    "MoBA-like",
    "packed documents",
    "mixed heads",
)


@pytest.fixture(scope="module", params=KINDS)
def case(request, benchmark_modules):
    """A plan, what the planner knows that knows it, and the statistics of another step."""
    balance, zoo = benchmark_modules
    assert set(KINDS) == set(zoo.KINDS)
    earlier, plan = (zoo.draw(request.param, BLOCKS, DENSITY, BLOCK, seed) for seed in (0, 1))
    seen = balance.statistics_of(plan)
    known = balance.Known(plan, balance.expected_tiles(plan.documents, BLOCKS, BLOCK, seen, 2))
    return balance, plan, known, balance.statistics_of(earlier)


def evaluate(case, world: int) -> dict:
    balance, plan, known, earlier = case
    return balance.evaluate(plan, known, earlier, balance.call_of(balance.H200, BLOCK, world // 8), world)


def test_inside_a_node_no_baseline_is_faster(case):
    """By more than predictions are wrong; planning from another step does not make it much slower."""
    row = evaluate(case, 8)
    assert row["worker"] <= 1.03 and row["over_baseline"] <= 1.03
    assert (
        row["lagged_efficiency"] >= row["schedule_efficiency"] - 0.15
    )  # the mean is measured on large plans


def test_work_is_equal_on_two_nodes(case):
    row = evaluate(case, 16)
    assert row["worker"] <= 1.03
    if case[1].name in case[0].STATIC:  # columns stay out of the ring
        assert row["ring_step"] <= 1.05


def test_a_drawn_plan_counts_what_it_says(case):
    """Work and needs by rank, against the rows of the plan themselves."""
    balance, plan, _, _ = case
    layout = balance.fixed("zigzag", BLOCKS, 8, BLOCK)
    owner, by_source = layout.source_of_block, plan.by_source(layout)
    for rank in (0, 5):
        mine = plan.counts[owner == rank] / balance.HEADS
        np.testing.assert_allclose(by_source[rank], np.bincount(owner, mine.sum(0), 8))
    keys = np.unpackbits(plan.needs.view(np.uint8), axis=2, bitorder="little")[:, :, :BLOCKS]
    assert np.array_equal(keys.any(0), plan.counts > 0)
    for rank in (0, 5):
        needed = keys[:, owner == rank].any(1).mean(0)
        np.testing.assert_allclose(plan.needed(layout)[rank], np.bincount(owner, needed, 8))
    own_node = plan.needed_by_nodes(layout, 1)
    assert own_node.shape == (1,) and own_node[0] == 0
