"""Hops that nobody needs: which they are, that they are dropped, and that nothing else changes by it."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import replace

import numpy as np
import oracle
import pool
import pytest
import tolerance
import torch
from rings import LAYOUTS, NAMES, Counting, on_ring
from sampling import pairwise
from test_determinism import Late, assert_equal
from test_gloo import whole_ring
from test_lever import UNEQUAL, WIRELESS
from test_step_report import Drawn, Slashes
from tiny_models import TinyGPT, assert_same_step, gradients, parallel
from tiny_models import make_batch as tokens_of
from zoo import SIZE, ZOO

import sparring.cp.hops
from sparring.balance import EXCHANGES, contiguous, from_assignment
from sparring.balance.hops import Live, live_hops
from sparring.cp import ContextParallel, run_threads
from sparring.kernels import Geometry, Plan
from sparring.kernels.patterns import Dense
from sparring.kernels.patterns.base import block_distance

BOUND, HEADS, DIM, LENGTH = 1e-10, (4, 2), 8, 139
RINGS = {
    "ring 2": ("ring", 2, 1),
    "ring 3": ("ring", 3, 1),
    "ring 8": ("ring", 8, 1),
    "2 x 2": ("hierarchical", 4, 2),
    "2 x 4": ("hierarchical", 8, 2),
    "3 x 2": ("hierarchical", 6, 3),
    "4 x 1": ("hierarchical", 4, 4),
}
pytestmark = pytest.mark.usefixtures("poisoned")


# -- which hops ---------------------------------------------------------------------------------------


def drawn(world: int, seed: int, share: float) -> np.ndarray:
    return np.random.default_rng(seed).random((world, world)) < share


@pytest.mark.parametrize("share", [0.05, 0.3])
@pytest.mark.parametrize("ring", RINGS)
def test_live_hops_bring_all_that_is_needed_and_no_more(ring, share):
    """All ranks walk their schedules at once, as a transport would match their messages."""
    exchange, world, nodes = RINGS[ring]
    for seed in range(4):
        live = live_hops(exchange, drawn(world, seed, share), nodes)
        walk_keys(exchange, world, nodes, live)
        walk_gradients(exchange, world, nodes, live)


def matched(exchange, world, nodes, phase, what, moves):
    """For every step and transfer in it: {rank: transfer} of those that send; what they do must match."""
    schedules = [EXCHANGES[exchange](rank, world, nodes) for rank in range(world)]
    for steps in zip(*(getattr(schedule, phase) for schedule in schedules), strict=True):
        for transfers in zip(*(getattr(step, what) for step in steps), strict=True):
            does = [moves(rank, transfer) for rank, transfer in enumerate(transfers)]
            sent = {(r, t.send_to, t.sends) for r, t in enumerate(transfers) if does[r][0]}
            got = {(t.recv_from, r, t.receives) for r, t in enumerate(transfers) if does[r][1]}
            assert sent == got
            yield sorted(sent)


def walk_keys(exchange, world, nodes, live: Live):
    for phase in ("forward", "backward"):
        holds, useful = {(rank, rank) for rank in range(world)}, set()
        hops = list(matched(exchange, world, nodes, phase, "keys", live.keys_move))
        for hop in hops:
            assert all((sender, source) in holds for sender, _, source in hop)
            holds |= {(receiver, source) for _, receiver, source in hop}
        needed = {(r, s) for r, s in np.argwhere(live.computes).tolist()}
        assert needed <= holds
        for hop in reversed(hops):
            useful |= {(sender, source) for sender, receiver, source in hop if (receiver, source) in needed}
            needed |= useful
        assert holds <= needed


def walk_gradients(exchange, world, nodes, live: Live):
    """Every share comes home once; no message is empty."""
    shares = defaultdict(Counter)
    for rank, source in np.argwhere(live.computes).tolist():
        shares[rank, source][rank] = 1
    for hop in matched(exchange, world, nodes, "backward", "gradients", live.gradients_move):
        for sender, receiver, source in hop:
            moving = shares.pop((sender, source))
            assert moving and max(moving.values()) == 1
            shares[receiver, source] += moving
    for source in range(world):
        assert shares.pop((source, source)) == Counter(np.flatnonzero(live.computes[:, source]).tolist())
    assert not shares


def test_where_everybody_needs_everything_no_hop_is_dead():
    for exchange, world, nodes in RINGS.values():
        assert live_hops(exchange, np.ones((world, world), dtype=bool), nodes).all
        assert not live_hops(exchange, np.eye(world, dtype=bool), nodes).all


# -- bytes --------------------------------------------------------------------------------------------


def window(blocks: int, reach: int, heads: int = 1) -> Plan:
    """Each query block sees itself and `reach` blocks before it."""
    geometry = Geometry.causal(1, blocks * SIZE, SIZE)
    distance = block_distance(geometry)
    return Plan.build(geometry, ((distance >= 0) & (distance <= reach)).expand(1, heads, -1, -1))


def counted(plan, layout, **options) -> Counter:
    """Messages of all ranks by channel."""
    wraps = []

    def wrap(transport):
        wraps.append(Counting(transport))
        return wraps[-1]

    length = plan.geometry.num_tokens
    on_ring(plan, layout, *oracle.inputs(1, *HEADS, length, DIM), wrap=wrap, **options)
    shard = 2 * HEADS[1] * max(layout.blocks_per_rank) * SIZE * DIM * 8  # keys and values in fp64
    for each in wraps:
        assert all(size % shard == 0 for size in each.bytes.values())
    return sum((Counter({c: n // shard for c, n in each.bytes.items()}) for each in wraps), Counter())


@pytest.mark.parametrize("world", [4, 8])
def test_of_a_window_most_hops_are_dropped(world):
    """Each rank needs the keys of the one before: one hop for each, and the way home for their gradients."""
    plan, layout = window(2 * world, 2), contiguous(2 * world, world, SIZE)
    all_hops, made = counted(plan, layout), counted(plan, layout, drop=True)
    assert all_hops == {"keys": 2 * world * (world - 1), "grads": world * (world - 1)}
    assert made == {"keys": world + world - 1, "grads": (world - 1) ** 2}  # the first hop is always made
    assert made.total() < 0.5 * all_hops.total()


def test_between_nodes_a_window_crosses_once():
    """3 nodes of 2: of outer hops the first is made; in the backward two are needed, and the ways home."""
    plan, layout = window(12, 2), contiguous(12, 6, SIZE)
    options = dict(exchange="hierarchical", nodes=3)
    all_hops, made = counted(plan, layout, **options), counted(plan, layout, drop=True, **options)
    assert all_hops == {"keys": 2 * 18, "outer keys": 2 * 12, "grads": 18, "outer grads": 12}
    # Ranks 2 and 4 need the keys of ranks 1 and 3, which come to ranks 3 and 5, and on inside their nodes.
    assert made == {"keys": 6 + 2 + 3 + 2, "outer keys": 6 + 2, "grads": 3 + 2, "outer grads": 2 * 2}


@pytest.mark.parametrize("ring", ["ring 3", "2 x 4"])
def test_where_all_keys_are_needed_every_hop_is_made(ring):
    exchange, world, nodes = RINGS[ring]
    plan, layout = ZOO["full"](2 * world * SIZE, *HEADS), contiguous(2 * world, world, SIZE)
    options = dict(exchange=exchange, nodes=nodes)
    assert counted(plan, layout, **options) == counted(plan, layout, drop=True, **options)


# -- results ------------------------------------------------------------------------------------------

SPARSE = ["causal_document", "causal_window", "key_head_top_k", "column_groups", "hot_row", "empty_rows"]


@pytest.mark.parametrize("mask,ring,layout", pairwise(SPARSE, list(RINGS), list(LAYOUTS)))
def test_results_are_those_of_the_whole_ring_bit_for_bit(mask, ring, layout):
    """Headers of all transfers are compared too; the oracle agrees."""
    exchange, world, nodes = RINGS[ring]
    plan = ZOO[mask](LENGTH, *HEADS)
    layout = LAYOUTS[layout](plan.geometry.num_blocks, world, SIZE)
    *tensors, dlse = oracle.inputs(1, *HEADS, LENGTH, DIM)
    pairs = oracle.expand(plan, HEADS[0])[:, :, :LENGTH, :LENGTH]
    tensors.append(torch.where(pairs.any(-1), dlse, 0.0))
    options = dict(exchange=exchange, nodes=nodes)
    whole = on_ring(plan, layout, *tensors, **options)
    assert_equal(on_ring(plan, layout, *tensors, drop=True, debug=True, **options), whole)
    expected = oracle.attention(*tensors[:3], pairs, *tensors[3:])
    for name, x, y in zip(NAMES, whole, expected, strict=True):
        tolerance.check("fp64", name, x, y, BOUND)


@pytest.mark.parametrize("ring", ["ring 8", "3 x 2"])
def test_results_do_not_depend_on_when_messages_arrive(ring):
    exchange, world, nodes = RINGS[ring]
    plan = window(2 * world, 3, HEADS[0])
    layout = LAYOUTS["striped"](2 * world, world, SIZE)
    tensors = oracle.inputs(1, *HEADS, plan.geometry.num_tokens, DIM, dtype=torch.float32)
    options = dict(exchange=exchange, nodes=nodes)
    expected = on_ring(plan, layout, *tensors, **options)
    for seed in range(3):
        late = on_ring(plan, layout, *tensors, wrap=lambda x, s=seed: Late(x, s), drop=True, **options)
        assert_equal(late, expected)


def forgetful(cells_of):
    """live_hops that thinks of one pair (rank, source) that the rank needs nothing."""

    def live(exchange, cells, nodes=1):
        cells = cells.copy()
        cells[cells_of] = False
        return live_hops(exchange, cells, nodes)

    return live


def test_a_needed_hop_that_is_dropped_is_noticed(monkeypatch):
    """By the oracle here, by the count of keys below."""
    plan, layout = window(8, 2), contiguous(8, 4, SIZE)
    tensors = oracle.inputs(1, *HEADS, plan.geometry.num_tokens, DIM)
    expected = oracle.attention(*tensors[:3], oracle.expand(plan, HEADS[0]), *tensors[3:])
    monkeypatch.setattr(sparring.cp.hops, "live_hops", forgetful((2, 1)))
    actual = on_ring(plan, layout, *tensors, drop=True)
    with pytest.raises(AssertionError, match="values are wrong"):
        tolerance.check("fp64", "out", actual[0], expected[0], BOUND)


# -- as a user has it ---------------------------------------------------------------------------------

NEAR = Slashes((0, 1))
OPTIONS = dict(exchange="ring", layout="contiguous", block_size=SIZE, recall_every=0)
BATCH = {"input_ids": torch.zeros(2, SIZE * 12, dtype=torch.int64)}


def step_of(cp: ContextParallel, layers=(0,), dtype=torch.float64):
    """out, dq, dk, dv of every layer on this rank, and the report."""
    shard, found = cp.shard(BATCH), []
    for seed, layer in enumerate(layers):
        generator = torch.Generator().manual_seed(seed)
        shapes = [(2, h, SIZE * 12, DIM) for h in (HEADS[0], *HEADS[1:] * 2, HEADS[0])]
        at = shard.geometry.positions
        q, k, v, dout = (torch.randn(*s, generator=generator, dtype=dtype)[:, :, at] for s in shapes)
        leaves = [x.requires_grad_() for x in (q, k, v)]
        out = cp.attention(*leaves, shard, layer)
        found.append([out.detach(), *torch.autograd.grad(out, leaves, dout)])
    return found, cp.report(shard)


def steps_of(pattern, count=3, layers=(0,), world=4, nodes=1, expect=(), **options):
    """Of every rank the results of `count` steps. expect: layers taken to have dead hops from the start."""

    def body(transport):
        cp = ContextParallel(transport, pattern=pattern, **OPTIONS | options)
        cp.machine = WIRELESS
        dead = tuple((cp.exchange, repr(layer)) for layer in expect)
        cp._planning.known = replace(cp._planning.known, dead_hops=dead)
        return [step_of(cp, layers) for _ in range(count)]

    return run_threads(world, body, nodes=nodes)


@pytest.mark.parametrize(("exchange", "nodes"), [("ring", 1), ("hierarchical", 2)])
def test_hops_are_dropped_two_steps_after_nobody_needed_them(exchange, nodes):
    """With equal results; a layer that needs all keys pays no header, nor does any before."""
    both = {0: NEAR, 1: Dense()}
    options = dict(layers=(0, 1), exchange=exchange, nodes=nodes, layout="striped")
    for first, second, third in steps_of(both, **options):
        assert_equal(second[0], first[0])
        assert_equal(third[0], first[0])
        assert [report.headers for _, report in (first, second, third)] == [0, 0, 1]
        assert "headers" not in str(second[1]) and "waited for headers: 1 times" in str(third[1])
        before, after = second[1].bytes_moved, third[1].bytes_moved
        assert after.pop("needs") == 4 * 2 * 3 * 16 // 4
        assert before.keys() == after.keys() and all(after[name] <= before[name] for name in after)
        assert after["keys"] < before["keys"]  # gradients of neighbours take the whole way round
        assert second[1].bytes_least == third[1].bytes_least
        assert sum(third[1].bytes_least.values()) <= sum(after.values())


@pytest.mark.parametrize("exchange", ["gather", "pull", "heads"])
def test_exchanges_without_hops_pay_no_table(exchange):
    for *_, last in steps_of(NEAR, exchange=exchange):
        assert last[1].headers == (1 if exchange == "pull" else 0)


def test_steps_without_a_backward_drop_nothing():
    """NCCL makes communicators when all ranks first use them at once."""

    def body(transport):
        cp = ContextParallel(transport, pattern=NEAR, **OPTIONS)
        for _ in range(3):
            shard = cp.shard(BATCH)
            x = torch.ones(2, 2, shard.local_length, DIM)
            cp.attention(x, x, x, shard)
        return cp.report(shard).headers

    assert run_threads(2, body) == [0, 0]


UNEVEN = from_assignment(((5, 0, 11), (), (1, 2, 3, 4, 6, 7, 8), (9, 10)), SIZE)


@pytest.mark.parametrize("nodes", [1, 2])
@pytest.mark.parametrize(
    "pattern,layout", [(Drawn(0, 4), "zigzag"), (NEAR, UNEVEN), (Drawn(1, 1), UNEVEN), (NEAR, "striped")]
)
def test_uneven_shards_and_plans_of_every_head(pattern, layout, nodes):
    """Keys are counted in every step, headers compared at every transfer."""
    options = dict(layout=layout, nodes=nodes, exchange="hierarchical" if nodes > 1 else "ring", count=1)
    expected = steps_of(pattern, **options)
    dropped = steps_of(pattern, expect=(0,), count_keys=1, debug=True, **options)
    for [one], [other] in zip(dropped, expected, strict=True):
        assert_equal(one[0], other[0])
        assert one[1].headers == 1 and other[1].headers == 0
        assert one[1].bytes_moved["keys"] <= 2 * other[1].bytes_moved["keys"]


def test_the_count_of_keys_finds_a_needed_hop_that_was_dropped(monkeypatch):
    monkeypatch.setattr(sparring.cp.hops, "live_hops", forgetful((2, 1)))
    with pytest.raises(RuntimeError, match="queries saw"):
        steps_of(NEAR, count=1, expect=(0,), count_keys=1)


@pytest.mark.parametrize(("exchange", "nodes"), [("ring", 1), ("hierarchical", 2)])
def test_the_table_is_of_the_plan_after_query_blocks_have_moved(exchange, nodes):
    """Queries that came to a rank need other keys than those that it held."""

    def run(expect):
        def body(transport):
            cp = ContextParallel(
                transport,
                pattern=UNEQUAL[0],
                block_size=SIZE,
                exchange=exchange,
                recall_every=0,
                count_keys=1,
            )
            cp.machine = cp._planning.machine = WIRELESS
            known = replace(cp._planning.known, movable=("0",), dead_hops=expect)
            cp._planning.known = known
            return step_of(cp)

        return run_threads(4, body, nodes=nodes)

    for (found, report), (wanted, other) in zip(run(((exchange, "0"),)), run(()), strict=True):
        assert_equal(found, wanted)
        assert report.moved == other.moved != {}
        assert report.headers == other.headers + 1


@pytest.mark.parametrize("how", ["reentrant", "non-reentrant"])
def test_recomputation_drops_the_same_hops_and_waits_no_second_time(how):
    batch, _ = tokens_of("whole", 240)

    def run(dead, checkpointing):
        models = [TinyGPT(kv_heads=2, checkpointing=checkpointing) for _ in range(4)]

        def body(transport):
            layers = [("blocks.0.attention", 0), ("blocks.1.attention", 0)]
            cp = parallel(transport, pattern=NEAR, layout="contiguous")
            dead_hops = tuple(("ring", repr(layer)) for layer in layers) if dead else ()
            cp._planning.known = replace(cp._planning.known, dead_hops=dead_hops)
            model = cp.attach(models[transport.rank])
            shard = cp.shard(batch)
            loss = cp.loss(model(**shard.inputs), shard)
            loss.backward()
            cp.sum_gradients(model)
            report = cp.report(shard)
            return {"loss": loss.item(), "grads": gradients(model), "headers": report.headers}

        return run_threads(4, body)

    results, [expected, *_] = run(True, how), run(False, None)
    assert [result["headers"] for result in results] == [2] * 4
    assert_same_step(results, expected)


def on_gloo():
    cp = ContextParallel(whole_ring(), pattern=NEAR, **OPTIONS)
    return [(found, report.bytes_moved, report.headers) for found, report in (step_of(cp) for _ in range(3))]


def test_gloo_equals_threads():
    expected = steps_of(NEAR, world=4)
    for mine, wanted in zip(pool.run(4, on_gloo), expected, strict=True):
        for (found, moved, headers), (other, report) in zip(mine, wanted, strict=True):
            assert (moved, headers) == (report.bytes_moved, report.headers)
            assert_equal(found, other)
