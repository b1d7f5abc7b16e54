"""cp.report(): imbalances of every layer, what was predicted, bytes against the least that plans need."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from needs import remote_blocks

from sparring.balance import step_of_source
from sparring.cp import ContextParallel, Report, Shard, run_threads
from sparring.kernels import Plan
from sparring.kernels.patterns import Dense, Pattern, Traits
from sparring.kernels.patterns.base import block_distance

SIZE, BLOCKS, WORLD, HEADS, DIM = 16, 12, 4, (4, 2), 8


@dataclass(frozen=True)
class Drawn(Pattern):
    """Tiles drawn at random, for each mask head."""

    seed: int
    mask_heads: int
    traits = Traits("strict", "none", "block")

    def estimate(self, q, summary, geometry):
        generator = torch.Generator().manual_seed(self.seed)
        share = torch.linspace(0.05, 0.6, BLOCKS)  # some key blocks are asked for more often
        tiles = torch.rand(geometry.batch, self.mask_heads, BLOCKS, BLOCKS, generator=generator) < share
        return Plan.build(geometry, tiles[:, :, list(geometry.blocks)])


@dataclass(frozen=True)
class Slashes(Pattern):
    """Fixed block diagonals."""

    distances: tuple[int, ...]
    traits = Traits("strict", "none", "block")

    def estimate(self, q, summary, geometry):
        tiles = sum(block_distance(geometry) == d for d in self.distances).bool()
        return Plan.build(geometry, tiles.expand(geometry.batch, 1, -1, -1))


def run_layers(cp, layers, dtype=torch.float32, batch=2) -> Shard:
    """One step of attention layers, forward and backward."""
    shard = cp.shard({"input_ids": torch.zeros(batch, SIZE * BLOCKS, dtype=torch.int64)})
    for layer in layers:
        q, k, v = (
            torch.ones(batch, h, shard.local_length, DIM, dtype=dtype) for h in (HEADS[0], *HEADS[1:] * 2)
        )
        leaves = [x.requires_grad_() for x in (q, k, v)]
        cp.attention(*leaves, shard, layer).sum().backward()
    return shard


def reports(layers, dtype=torch.float32, nodes=1, **options) -> list[tuple[Report, Shard, dict]]:
    """Report, shard and plans of each rank after one step. layers: {layer: pattern}."""

    def body(transport):
        cp = ContextParallel(
            transport, pattern=layers, block_size=SIZE, recall_every=0, count_keys=0, **options
        )
        shard = run_layers(cp, layers, dtype)
        return cp.report(shard), shard, cp.plans(shard)

    return run_threads(WORLD, body, nodes=nodes)


LAYERS = {"a": Drawn(0, 1), "b": Drawn(1, 2), "c": Drawn(2, 4)}


@pytest.mark.parametrize(("exchange", "nodes"), [("ring", 1), ("hierarchical", 2), ("pull", 1)])
def test_imbalances_of_a_layer_are_those_of_its_plan(exchange, nodes):
    """Tile by tile: the rank of the query block, and the step in which it has the keys."""
    steps = step_of_source(exchange, WORLD, nodes)
    workers = set()
    for report, shard, plans in reports(LAYERS, exchange=exchange, nodes=nodes, layout="zigzag"):
        source = shard.layout.source_of_block
        for layer, plan in plans.items():
            work = np.zeros((WORLD, steps.max() + 2))
            for _, _, query, key in plan.tiles_bool().nonzero().tolist():
                work[source[query], steps[source[query], source[key]]] += 1 / plan.mask_heads
            assert np.allclose(report.work_by_layer[layer], work, rtol=0, atol=1e-9)
            totals, slowest = work.sum(1), work.max(0).sum()
            assert report.worker_imbalance_by_layer[layer] == pytest.approx(
                totals.max() * WORLD / totals.sum()
            )
            assert report.step_imbalance_by_layer[layer] == pytest.approx(slowest * WORLD / totals.sum())
        workers |= set(report.worker_imbalance_by_layer.values())
        assert np.allclose(report.work, sum(report.work_by_layer.values()))
        assert report.worker_imbalance == pytest.approx(report.work.sum(1).max() / report.work.sum(1).mean())
    assert len(workers) == len(LAYERS) and max(workers) > 1.02  # the same on all ranks


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "striped"])
def test_least_bytes_are_counted_and_a_pull_moves_no_more(dtype, layout):
    """Blocks of key heads that live elsewhere: twice as they travel, and gradients in full precision."""
    block, full = 2 * SIZE * DIM, 8 if dtype == torch.float64 else 4
    for report, shard, plans in reports(LAYERS, dtype, exchange="pull", layout=layout):
        blocks = sum(remote_blocks(plan, shard.layout, *HEADS) for plan in plans.values())
        assert report.bytes_least == {
            "keys": 2 * blocks * block * dtype.itemsize,
            "grads": blocks * block * full,
        }
        moved = {name: report.bytes_moved[name] for name in ("keys", "grads")}
        assert moved == report.bytes_least and blocks > 0


def test_least_bytes_do_not_depend_on_the_exchange():
    """And a ring moves more."""
    expected = reports(LAYERS, exchange="pull", layout="striped")[0][0].bytes_least
    for exchange in ("ring", "gather", "heads"):
        for report, *_ in reports(LAYERS, exchange=exchange, layout="striped"):
            assert report.bytes_least == expected
    ring = reports(LAYERS, exchange="ring", layout="striped")[0][0].bytes_moved
    assert ring["keys"] > expected["keys"] and ring["grads"] > expected["grads"]


def steps_of(pattern, count, **options) -> list[Report]:
    def body(transport):
        cp = ContextParallel(
            transport, pattern=pattern, block_size=SIZE, recall_every=0, count_keys=0, **options
        )
        return [cp.report(run_layers(cp, [0, 1])) for _ in range(count)]

    return run_threads(WORLD, body)[0]


def test_prediction_is_what_is_measured_where_plans_stay_the_same():
    """Dense at once, from the documents alone; slashes once the plans of a step are known."""
    [dense] = steps_of(Dense(), 1)
    assert np.allclose(dense.predicted * 2, dense.work)
    first, _, third = steps_of(Slashes((0, 2, 5)), 3)
    assert not np.allclose(first.predicted * 2, first.work, rtol=0.1)
    assert np.allclose(third.predicted * 2, third.work, rtol=1e-3, atol=0.02)


def test_nothing_is_predicted_where_nothing_was_chosen():
    """The layout was given, or does not decide who works."""
    assert steps_of(Dense(), 1, layout="zigzag")[0].predicted is None
    [by_heads] = steps_of(Dense(), 1, exchange="heads")
    assert by_heads.predicted is None and "predicted" not in str(by_heads)


def test_waiting_is_given_as_a_share_of_the_step():
    report = replace(steps_of(Dense(), 1)[0], waited=(1.0, 3.0, 2.0, 2.0), elapsed=8.0)
    assert report.exposed == 0.25
    assert "waited for other ranks: 2.00 s on average, 25.0% of 8.00 s; 1.00 s at least" in str(report)
    assert replace(report, waited=(0.0,), elapsed=0.0).exposed == 0.0


def test_the_text_says_what_was_expected_and_what_was_needed():
    report = steps_of(Slashes((0, 2, 5)), 3)[2]
    work = {0: np.array([[3.0, 0.0], [1.0, 0.0]]), 1: np.array([[1.0, 1.0], [1.0, 1.0]])}
    keys, needed = {"keys": 3 << 20, "grads": 1 << 20}, {"keys": 1 << 20, "grads": 1 << 19}
    report = replace(
        report, work_by_layer=work, predicted=work[1] * 1.25, bytes_moved=keys, bytes_least=needed
    )
    lines = str(report).split("\n")
    assert "imbalance: worker 1.250, step 1.250 (max / mean)" in lines
    assert "  worst layers: worker 1.500 in 0, step 1.500 in 0" in lines
    assert "  predicted: worker 1.000, step 1.000; 5.0 tiles in a layer, measured 4.0" in lines
    assert "MiB moved: keys 3.0, grads 1.0; tiles need at least keys 1.0, grads 0.5" in lines
    assert "worst layers" not in str(replace(report, work_by_layer={0: work[0]}))
