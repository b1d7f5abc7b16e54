"""Layout and exchange chosen together: what ranks need, local layouts, predicted seconds, the decision."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest

from sparring.balance import (
    H200,
    Call,
    Candidate,
    ExpectedTiles,
    GivenTiles,
    LinkCost,
    PlannerState,
    Prediction,
    Statistics,
    choose,
    contiguous,
    expected_tiles,
    from_assignment,
    measure,
    predict,
    programs_of,
    resolve,
    simulate,
    step_of_source,
    striped,
    worker_imbalance,
    zigzag,
)
from sparring.balance.candidates import folded, layouts, local_layouts, runs, work_sorted
from sparring.balance.cost import work_by_rank, work_by_step
from sparring.balance.predict import FORMULAS, step_seconds
from sparring.balance.search import rebalance

BLOCK = 128
ALL = ("ring", "hierarchical", "gather", "pull")


def call_of(nodes=1, exchanges=ALL, machine=H200) -> Call:
    size = BLOCK * 8 * 128 * 2
    return Call(32, 8, 2 * size, 4 * size, exchanges, machine, nodes)


def one_document(num_blocks):
    return (((0, num_blocks * BLOCK),),)


def slashes(num_blocks, distances) -> Statistics:
    """Of a plan in which all heads choose the tiles at these distances, by closed form."""
    rows = np.arange(num_blocks)
    seen = num_blocks - rows
    chosen = np.zeros(num_blocks)
    chosen[distances] = 1
    by_offset = np.array([chosen[: num_blocks - offset].sum() for offset in rows])
    tiles = chosen.cumsum()
    return Statistics(np.ones(num_blocks), chosen * seen, by_offset, np.zeros(num_blocks), tiles)


def window_heavy(num_blocks) -> Statistics:
    """A window and slashes at log-uniform distances, in shares of heads."""
    distance = np.arange(num_blocks)
    share = np.where(distance < num_blocks // 40, 1.0, np.minimum(1, num_blocks / 250 / (distance + 1)))
    seen = num_blocks - distance
    by_offset = share.cumsum()[::-1]
    return Statistics(np.ones(num_blocks), share * seen, by_offset, np.zeros(num_blocks), share.cumsum())


def brute_force(chosen: np.ndarray, layout) -> np.ndarray:
    """chosen: bool [heads, n, n] -> key blocks of each rank that each needs, mean over heads."""
    needed = np.zeros((layout.world, layout.world))
    for rank, held in enumerate(layout.assignment):
        for head in chosen:
            needed[rank] += np.bincount(layout.source_of_block, head[list(held)].any(0), layout.world)
    return needed / len(chosen)


# Needs and work


@pytest.mark.parametrize("name", ["contiguous", "zigzag", "striped", "odd"])
def test_needed_keys_are_those_of_a_plan_that_is_known(name):
    rng = np.random.default_rng(3)
    chosen = np.tril(rng.random((1, 24, 24)) < 0.2)
    odd = from_assignment([[5, 0, 1], [], list(range(6, 24)), [2, 3, 4]], BLOCK)
    layout = {"odd": odd, "contiguous": contiguous(24, 8, BLOCK), "zigzag": zigzag(24, 6, BLOCK)}.get(
        name, striped(24, 6, BLOCK)
    )
    needed = GivenTiles(chosen[0].astype(float)).needed(layout)
    assert np.abs(needed - brute_force(chosen, layout)).max() <= 1e-5 * 24  # shares are rounded to 1e-6


@pytest.mark.parametrize("lengths", [(96,), (30, 50, 16)])
def test_needed_keys_are_predicted_from_statistics(lengths):
    ends = np.cumsum(lengths) * BLOCK
    documents = (tuple((int(e) - n * BLOCK, int(e)) for n, e in zip(lengths, ends, strict=True)),)
    blocks = np.arange(96)
    first = np.repeat(ends // BLOCK - lengths, lengths)
    distance = blocks[:, None] - blocks
    chosen = np.isin(distance, [0, 1, 2, 7, 23]) & (blocks >= first[:, None])
    seen = measure(chosen.astype(float), np.zeros(96), blocks, first)
    tiles = expected_tiles(documents, 96, BLOCK, seen)
    for layout in (contiguous(96, 24, BLOCK), zigzag(96, 24, BLOCK), striped(96, 24, BLOCK, 2)):
        exact = brute_force(chosen[None], layout)
        assert np.abs(tiles.needed(layout) - exact).sum() <= 0.05 * exact.sum()


def test_independent_heads_need_more_keys_together():
    n, heads = 64, 4
    chosen = np.tril(np.random.default_rng(5).random((heads, n, n)) < 0.02)
    union, layout = chosen.any(0)[None], contiguous(n, 16, BLOCK)
    share = np.tril(np.full((n, n), 0.02))
    alone, together = (GivenTiles(share, heads=h).needed(layout).sum() for h in (1, heads))
    exact_alone, exact = brute_force(chosen, layout).sum(), brute_force(union, layout).sum()
    assert abs(alone / exact_alone - 1) < 0.1 and abs(together / exact - 1) < 0.1 and together > 2.5 * alone


@pytest.mark.parametrize("world", [8, 32])
def test_a_sample_of_rows_tells_the_work_of_every_step(world):
    n = 2048  # four times as many tiles as are looked at
    tiles = expected_tiles(one_document(n), n, BLOCK, slashes(n, [0, 1, 2, 3, 40, 41, 300, 777]))
    exact = GivenTiles(tiles.work(np.arange(n)))
    for layout in (contiguous(n, world, BLOCK), zigzag(n, world, BLOCK), striped(n, world, BLOCK)):
        sampled, whole = tiles.by_source(layout), exact.by_source(layout)
        np.testing.assert_allclose(sampled.sum(1), whole.sum(1), rtol=2e-3)
        assert np.abs(sampled - whole).sum() <= 0.06 * whole.sum()


# Layouts


@pytest.mark.parametrize("n, world", [(64, 4), (1000, 8), (96, 32), (49, 7)])
def test_all_layouts_hold_equally_many_blocks(n, world):
    rng = np.random.default_rng(n)
    for by_block in (np.arange(n) + 1.0, rng.random(n), np.ones(n), np.zeros(n), rng.pareto(1, n)):
        tiles = GivenTiles(np.tril(np.full((n, n), 0.1)))
        topology = H200.topology(world)
        some = [*layouts(by_block, world, BLOCK), *local_layouts(by_block, [tiles], BLOCK, topology)]
        for layout in (*some, rebalance(some[0], by_block, [tiles], 0.005)):
            assert set(layout.blocks_per_rank) == {n // world}, layout


def test_folded_is_zigzag_for_dense_work_and_has_two_runs_a_rank():
    dense = np.arange(1024) + 1.0
    fold = folded(dense, 8, BLOCK)
    assert worker_imbalance(work_by_rank(fold, dense)[:, None]) < 1.005
    assert runs(fold) <= 16 == runs(zigzag(1024, 8, BLOCK)) + 1
    flat = np.ones(1024)
    assert runs(folded(flat, 8, BLOCK, 1.025)) == 8  # equal work: contiguous runs


def test_folded_balances_a_window_heavy_plan_and_lets_ranks_see_few_keys():
    """Work within 3 % and at most .6 of a ring's keys in one layout; those that balance as well need all."""
    n, world = 4096, 32
    tiles = expected_tiles(one_document(n), n, BLOCK, window_heavy(n), 2)
    by_block = tiles.sums()
    share = {}
    for layout in (
        folded(by_block, world, BLOCK, 1.025),
        striped(n, world, BLOCK),
        contiguous(n, world, BLOCK),
    ):
        needed = tiles.needed(layout)
        imbalance = worker_imbalance(work_by_rank(layout, by_block)[:, None])
        share[layout.name] = imbalance, (needed.sum() - np.trace(needed)) / (n * (world - 1))
    imbalance, pulled = share["folded(1.025)"]
    assert imbalance <= 1.03 and pulled <= 0.6
    assert share["striped"][1] > 0.9 and share["contiguous"][0] > 1.05


def test_the_search_balances_packed_documents_near_where_they_are():
    n, world = 1024, 16
    ends = np.array([300, 340, 400, 620, 640, 900, 1024])
    documents = (tuple((int(a) * BLOCK, int(b) * BLOCK) for a, b in zip([0, *ends], ends, strict=False)),)
    tiles = expected_tiles(documents, n, BLOCK)
    by_block, start = tiles.sums(), contiguous(n, world, BLOCK)
    found = rebalance(start, by_block, [tiles], 0.01, inner=8, near=0.1)
    before, after = (worker_imbalance(work_by_rank(x, by_block)[:, None]) for x in (start, found))
    assert before > 1.5 and after <= 1.02
    dealt = tiles.needed(work_sorted(by_block, world, BLOCK)).sum()
    assert tiles.needed(found).sum() < 0.6 * dealt


# Predicted seconds


@pytest.mark.parametrize("nodes", [1, 4])
@pytest.mark.parametrize("exchange", FORMULAS)
def test_predicted_seconds_are_close_to_simulated_ones(exchange, nodes):
    """Links fast and slow, work even and uneven: within a sixth, and in the mean within a twelfth."""
    world, rng, errors = 16, np.random.default_rng(7), []
    for slow in (1, 8):
        links = (LinkCost(5e-5, 350e9 / slow), LinkCost(5e-5, 45e9 / slow))
        machine = replace(H200, inside=links[0], between=links[1])
        call = call_of(nodes, machine=machine)
        for spread in (0.0, 0.5):
            layout = striped(2048, world, BLOCK)
            by_source = 8000 * (1 + spread * rng.random((world, world)))
            needed = 128 * rng.random((world, world)) * (exchange == "pull") + 128 * (exchange != "pull")
            blocks = needed * (1 - np.eye(world))
            simulated = 0.0
            work = work_by_step(by_source, np.zeros(world), step_of_source(exchange, world, nodes))
            kernels = zip((machine.forward, machine.backward), (0, call.gradient_bytes), strict=True)
            for program, (kernel, gradient) in zip(programs_of(exchange, world, nodes), kernels, strict=True):
                compute = step_seconds(kernel, call, work, np.full(world, 128.0), BLOCK)
                topology = call.topology(world)
                run = simulate(program, topology, compute, blocks * call.key_bytes, blocks * gradient)
                simulated += float(run.seconds)
            got = predict(exchange, call, layout, by_source, np.zeros(world), needed)
            assert got.compute <= got.seconds * (1 + 1e-6)
            errors.append(got.seconds / simulated - 1)
    assert np.abs(errors).max() <= 1 / 6 and np.abs(errors).mean() <= 1 / 12, errors


@pytest.mark.parametrize("exchange", FORMULAS)
def test_two_batch_rows_take_twice_as_long(exchange):
    """But for latencies and launches, which are few and short."""
    layout, call = striped(8192, 8, BLOCK), call_of(2)
    by_source, needed = np.full((8, 8), 4e5), np.full((8, 8), 500.0)
    one = predict(exchange, call, layout, by_source, np.zeros(8), needed)
    two = predict(exchange, call, layout, 2 * by_source, np.zeros(8), 2 * needed, batch=2)
    assert 1.98 <= two.seconds / one.seconds <= 2


def test_unknown_exchanges_are_refused():
    with pytest.raises(ValueError, match="'broadcast'.*ring, hierarchical, gather, pull"):
        choose(np.eye(8), np.zeros(8), 2, BLOCK, call=call_of(exchanges=("broadcast",)))


# The decision


def decide(n, world, nodes, statistics=None, layout="auto", **options):
    return resolve(layout, one_document(n), n, world, BLOCK, statistics, call=call_of(nodes), **options)


def test_a_window_is_pulled_from_contiguous_neighbours():
    decision = decide(2048, 32, 4, slashes(2048, np.arange(9)))
    assert (decision.layout.name, decision.exchange) == ("contiguous", "pull")
    assert decision.chosen.pulled < 0.01


def test_dense_work_is_balanced_and_goes_round_between_nodes():
    decision = decide(4096, 32, 4)
    assert decision.exchange == "hierarchical"
    assert worker_imbalance(decision.chosen.work) < 1.03
    assert all(c.best is None for c in decision.table if c.layout.name == "contiguous")  # twice the work
    assert np.isinf(decision.table[0].time)


def test_a_given_layout_gets_the_best_exchange_and_a_given_exchange_the_best_layout():
    window = slashes(2048, np.arange(9))
    given = decide(2048, 32, 4, window, layout="contiguous")
    assert (given.layout.name, given.exchange, len(given.table)) == ("contiguous", "pull", 1)
    only = resolve("auto", one_document(2048), 2048, 32, BLOCK, window, call=call_of(4, ("hierarchical",)))
    assert only.exchange == "hierarchical"
    both = resolve("striped", one_document(64), 64, 4, BLOCK, call=call_of(1, ("gather",)))
    assert (both.layout.name, both.exchange, both.table) == ("striped", "gather", ())


def test_hysteresis_keeps_layout_and_exchange_until_another_is_clearly_faster():
    fresh = decide(1024, 8, 1)
    close = 0
    for candidate in fresh.table:
        if candidate.best is None:
            continue
        state = PlannerState(candidate.layout.name, candidate.best.exchange)
        kept = decide(1024, 8, 1, state=state)
        keeps = candidate.time <= 1.03 * fresh.chosen.time
        assert kept.state == (state if keeps else fresh.state)
        close += keeps
    assert 1 < close < len(fresh.table)
    for exchange, seconds in fresh.chosen.others:
        kept = decide(1024, 8, 1, state=PlannerState(fresh.layout.name, exchange))
        if seconds <= 1.03 * fresh.chosen.best.seconds:
            assert kept.layout.name == fresh.layout.name and kept.exchange == exchange
        else:
            assert kept.exchange != exchange or kept.layout.name != fresh.layout.name


def test_unequal_work_must_be_a_quarter_faster():
    layout = contiguous(4, 2, BLOCK)
    even, uneven = np.array([[1.0, 0.0], [1.0, 0.0]]), np.array([[1.1, 0.0], [0.9, 0.0]])
    times = [
        Candidate(layout, work, Prediction("pull", seconds, 0.5)).time
        for work, seconds in ((even, 1.0), (uneven, 0.81), (uneven, 0.79))
    ]
    assert times[2] < times[0] < times[1]


def test_explain_gives_a_reason_for_every_candidate():
    decision = decide(4096, 32, 4)
    text = decision.explain().splitlines()
    rows = dict(zip([c.layout.name for c in decision.table], text[1:], strict=False))
    assert [name for name, row in rows.items() if row.startswith("*")] == [decision.layout.name]
    for name, row in rows.items():
        assert name == decision.layout.name or any(
            why in row for why in ("longer", "as good", "unequal work")
        )
    assert "gather" in text[-1] and "ms of one layer" in text[-2]


@pytest.mark.parametrize("n, world", [(1, 1), (3, 3), (5, 2), (64, 1), (40, 6)])
def test_any_size_can_be_planned(n, world):
    decision = decide(n, world, 1)
    assert decision.layout.num_blocks == n and decision.exchange in ALL


def test_two_processes_decide_alike():
    """Whatever the seed of hashes, the result is the same layout, exchange and table."""
    code = (
        "import numpy as np\n"
        "from sparring.balance import *\n"
        "call = Call(32, 8, 524288, 1048576, ('ring', 'hierarchical', 'gather', 'pull'), H200, 2)\n"
        "chosen = np.tril(np.random.default_rng(0).random((512, 512)) < .1).astype(float)\n"
        "seen = measure(chosen, np.zeros(512), np.arange(512), np.zeros(512, dtype=int))\n"
        "docs = (((0, 20000), (20000, 41000), (41000, 65536)),)\n"
        "d = resolve('auto', docs, 512, 16, 128, seen, call=call)\n"
        "print(d.layout.digest(), d.exchange); print(d.explain())\n"
    )
    results = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(results) == 1 and len(results.pop()) > 200


def test_a_million_tokens_on_64_ranks_are_planned_in_time():
    """The target is 50 ms on one core (benchmarks/balance.py measures it); here it is three times as much."""
    statistics, best = window_heavy(8192), np.inf
    for _ in range(5):
        started = time.process_time()  # others may use the machine
        decision = decide(8192, 64, 8, statistics)
        best = min(best, time.process_time() - started)
    assert best <= 0.15, decision.explain()


def test_expected_tiles_scale_the_work_of_rows_as_it_was_by_depth():
    """A rule such as "the best k" lets early query blocks choose all that they see."""
    n, k = 256, 24
    chosen = np.tril(np.ones((n, n)))
    for row in range(k, n):
        keys = np.random.default_rng(row).permutation(row + 1)[: row + 1 - k]
        chosen[row, keys] = 0
    seen = measure(chosen, np.zeros(n), np.arange(n), np.zeros(n, dtype=int))
    tiles = expected_tiles(one_document(n), n, BLOCK, seen)
    assert isinstance(tiles, ExpectedTiles)
    np.testing.assert_allclose(tiles.sums(), np.minimum(np.arange(n) + 1, k), rtol=1e-3)
