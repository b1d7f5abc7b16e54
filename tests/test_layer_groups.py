"""Layers are planned for in groups: what their sum hides, and what ranks keep of them."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_auto_layout import BLOCKS, LENGTH, SIZE, Slashes, batch

from sparring.balance import (
    H200,
    Call,
    Decision,
    GivenTiles,
    Layers,
    LinkCost,
    Statistics,
    choose,
    choose_for,
    expected_layers,
    predict,
    striped,
)
from sparring.balance.predict import FORMULAS
from sparring.cp import ContextParallel, run_threads

BLOCK, WORLD, N = 128, 8, 256


def call_of(bandwidth: float, nodes: int = 1, exchanges=("ring", "gather", "pull")) -> Call:
    """On a machine where column work costs what that of tiles costs."""
    kernels = [replace(k, column=k.tile / BLOCK, row=0.0) for k in (H200.forward, H200.backward)]
    machine = replace(H200, forward=kernels[0], backward=kernels[1], inside=LinkCost(5e-5, bandwidth))
    size = BLOCK * 8 * 128 * 2
    return Call(32, 8, 2 * size, 4 * size, exchanges, machine, nodes)


def test_a_layout_is_not_chosen_by_work_that_only_the_sum_of_layers_balances():
    """Tiles of one half of the layers grow along the sequence, columns of the other half shrink."""
    rows, call = np.arange(N), call_of(5e9)
    dense, falling = np.tril(np.ones((N, N))), N + 1.0 - rows
    window = dense * (rows[:, None] - rows < 2)
    groups = [Layers(GivenTiles(dense), np.zeros(N), 0.5), Layers(GivenTiles(window), falling, 0.5)]
    summed = choose((dense + window) / 2, falling / 2, WORLD, BLOCK, call=call)
    apart = choose_for(groups, WORLD, BLOCK, call=call)

    def seconds(decision: Decision) -> float:
        """Of each half on its own."""
        alone = [replace(group, share=1.0) for group in groups]
        only = replace(call, exchanges=(decision.exchange,))
        runs = [choose_for([group], WORLD, BLOCK, call=only, known=[decision.layout]) for group in alone]
        return sum(run.chosen.best.seconds for run in runs)

    assert (summed.layout.name, apart.layout.name) == ("contiguous", "zigzag")
    assert seconds(apart) < 0.96 * seconds(summed)
    assert apart.chosen.best.seconds == pytest.approx(seconds(apart) / 2)


def test_equal_groups_are_planned_like_one():
    rng = np.random.default_rng(0)
    tiles, columns = GivenTiles(np.tril(rng.random((N, N)))), rng.random(N)
    one = choose_for([Layers(tiles, columns)], WORLD, BLOCK, call=call_of(1e11))
    two = choose_for(
        [Layers(tiles, columns, share) for share in (0.25, 0.75)], WORLD, BLOCK, call=call_of(1e11)
    )
    assert one.layout == two.layout and one.exchange == two.exchange
    for a, b in zip(one.table, two.table, strict=True):
        assert a.time == pytest.approx(b.time) and np.allclose(a.work, b.work)


@pytest.mark.parametrize("nodes", [1, 2])
@pytest.mark.parametrize("exchange", FORMULAS)
def test_the_prediction_of_groups_is_the_mean_of_theirs(exchange, nodes):
    rng, layout = np.random.default_rng(1), striped(N, WORLD, BLOCK)
    call, shares = call_of(1e11, nodes, tuple(FORMULAS)), np.array([0.5, 0.3, 0.2])
    work = [rng.random((3, WORLD, WORLD)) * 900, rng.random((3, WORLD)), rng.random((3, WORLD, WORLD)) * 32]
    each = [predict(exchange, call, layout, *(x[i] for x in work)) for i in range(3)]
    both = predict(exchange, call, layout, *work, 1, shares)
    assert both.seconds == pytest.approx(shares @ [one.seconds for one in each], abs=3e-9)
    assert both.compute == pytest.approx(shares @ [one.compute for one in each], abs=3e-9)


def test_groups_have_statistics_and_shares_of_their_own():
    rng = np.random.default_rng(2)
    parts = [Statistics.from_vector(rng.random(5 * 16)) for _ in range(3)]
    groups = Statistics.from_vector(np.stack([part.to_vector() for part in parts]))
    again = Statistics.from_vector(np.array(json.loads(json.dumps(groups.to_vector().tolist()))))
    for part, group in zip(parts, again.by_group(), strict=True):
        np.testing.assert_array_equal(part.to_vector(), group.to_vector())
    layers = expected_layers((((0, 16 * SIZE),),), 16, SIZE, again)
    rows = np.array([part.rows_by_depth.sum() for part in parts])
    np.testing.assert_allclose([group.share for group in layers], rows / rows.sum())
    (alone,) = parts[0].by_group()
    np.testing.assert_array_equal(alone.to_vector(), parts[0].to_vector())


def test_ranks_sum_up_consecutive_layers_in_at_most_four_groups():
    distances = [(0,), (0, 1), (0, 2), (0, 3), (0, 5), (0, 7)]
    pattern = {f"layer {i}": Slashes(each) for i, each in enumerate(distances)}

    def body(transport):
        cp = ContextParallel(transport, pattern=pattern, layout="striped", block_size=SIZE, recall_every=0)
        shard = cp.shard(batch("one"))
        q = torch.ones(1, 2, shard.local_length, 16)
        for layer in pattern:
            cp.attention(q, q, q, shard, layer)
        return shard.record.statistics(transport, SIZE)

    statistics = run_threads(4, body)
    for each in statistics[1:]:
        np.testing.assert_array_equal(each.to_vector(), statistics[0].to_vector())
    found = statistics[0].by_group()
    expected = [(0, 0, 1), (0, 2, 0, 3), (0, 5), (0, 7)]
    assert LENGTH == BLOCKS * SIZE and len(found) == 4
    for group, chosen in zip(found, expected, strict=True):
        tiles = np.bincount(chosen, minlength=BLOCKS) * (BLOCKS - np.arange(BLOCKS))
        np.testing.assert_allclose(group.chosen_by_distance, tiles)
        assert group.rows_by_depth.sum() == BLOCKS * chosen.count(0)
