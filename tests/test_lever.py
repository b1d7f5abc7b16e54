"""Query blocks that move inside a layer: when they do, that results stay right, and what is reported."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, replace

import gpu_ring
import machine
import numpy as np
import oracle
import poison
import pool
import pytest
import tolerance
import torch
from rings import LAYOUTS, NAMES, Counting, on_ring, whole
from sampling import pairwise
from test_determinism import Late, assert_equal
from test_gloo import whole_ring
from test_gpu_ring import FP32, RESULTS
from test_ring import make_batch
from tiny_models import TinyGPT, assert_same_step, gradients, parallel
from tiny_models import make_batch as tokens_of
from torch.distributed.device_mesh import init_device_mesh
from zoo import SIZE, ZOO

from sparring.balance import EXCHANGES, H200, LinkCost, contiguous, worker_imbalance, zigzag
from sparring.balance.cost import work_by_rank
from sparring.balance.lever import EQUAL, MoveCost, move_blocks, move_cost
from sparring.cp import ContextParallel, run_threads
from sparring.cp.heads import sharded_attention
from sparring.cp.link import Link
from sparring.cp.move import MovedRing, make_move
from sparring.cp.ring import step_blocks
from sparring.kernels import Plan, bind, reference
from sparring.kernels.geometry import EMPTY
from sparring.kernels.patterns import Dense, Pattern, Traits
from sparring.kernels.patterns.base import block_distance

BOUND, HEADS, DIM = 1e-10, (4, 2), 8
FREE = MoveCost(tile=1.0, block=0.0, fixed=0.0)
NO_LINK = LinkCost(latency=0.0, bandwidth=1e30)  # a machine on which moving costs nothing
WIRELESS = replace(H200, inside=NO_LINK, between=NO_LINK, memory=1e30)
pytestmark = pytest.mark.usefixtures("poisoned")


# -- the decision -------------------------------------------------------------------------------------


def drawn(seed, world=8, blocks=256, spread=1.0):
    work = np.random.default_rng(seed).lognormal(3, spread, blocks)
    work[: blocks // world] *= 3
    return work, contiguous(blocks, world, 128)


def imbalances(work, layout, computes):
    """Before and after."""
    after = np.bincount(computes, work, layout.world)
    return [worker_imbalance(load[:, None]) for load in (work_by_rank(layout, work), after)]


@pytest.mark.parametrize("world", [2, 3, 8, 32])
@pytest.mark.parametrize("seed", range(4))
def test_moves_make_work_equal(seed, world):
    work, layout = drawn(seed, world, 64 * world)
    before, after = imbalances(work, layout, move_blocks(work, layout, FREE))
    assert before > 1.3 and after <= EQUAL


@pytest.mark.parametrize("seed", range(20))
def test_moves_never_make_the_slowest_rank_slower_or_cost_more_than_they_save(seed):
    work, layout = drawn(seed, world=4, blocks=4 + seed, spread=2.0)
    for block in (0.0, 5.0, 50.0):
        cost = MoveCost(tile=1.0, block=block, fixed=10.0)
        computes = move_blocks(work, layout, cost)
        if computes is None:
            continue
        loads = [np.bincount(x, work, 4).max() for x in (layout.source_of_block, computes)]
        away = computes != layout.source_of_block
        ends = [np.bincount(x[away], minlength=4).max() for x in (layout.source_of_block, computes)]
        assert loads[1] + 10 + block * max(ends) < loads[0]


def test_few_blocks_move():
    """Rank 0 has 9 blocks of one tile and a block that is just what it has too much."""
    work, layout = np.array([1.0] * 9 + [5.0] + [0.4] * 10), contiguous(20, 2, 128)
    computes = move_blocks(work, layout, FREE)
    assert np.flatnonzero(computes != layout.source_of_block).tolist() == [9]


def test_nothing_moves_where_work_is_equal_or_one_block_is_all():
    layout = zigzag(64, 4, 128)
    assert move_blocks(np.ones(64), layout, FREE) is None
    assert move_blocks(np.arange(64.0), layout, FREE) is None
    assert move_blocks(np.eye(64)[5], layout, FREE) is None
    assert move_blocks(np.zeros(64), layout, FREE) is None


def test_nothing_moves_over_a_slow_link():
    work, layout = drawn(0)
    sizes = dict(nodes=1, held=32, block_size=128, batch=1, heads=32, dim=128, itemsize=2)
    slow = replace(H200, inside=LinkCost(latency=1e-4, bandwidth=1e6))
    assert move_blocks(1e3 * work, layout, move_cost(H200, **sizes)) is not None
    assert move_blocks(1e3 * work, layout, move_cost(slow, **sizes)) is None
    assert move_blocks(1e-3 * work, layout, move_cost(H200, **sizes)) is None  # too little to save


@pytest.mark.parametrize("block,moved", [(0.0, [0, 1]), (2.0, [0]), (6.0, [])])
def test_only_moves_that_pay_are_made(block, moved):
    """10 tiles on one rank, none on the other: without the first block 6 are left, without two 5."""
    work, layout = np.array([4.0] + [1.0] * 6 + [0.0] * 7), contiguous(14, 2, 128)
    computes = move_blocks(work, layout, MoveCost(tile=1.0, block=block, fixed=0.0))
    computes = layout.source_of_block if computes is None else computes
    assert np.flatnonzero(computes != layout.source_of_block).tolist() == moved


# -- the attention ------------------------------------------------------------------------------------


def computed_elsewhere(
    plan, layout, computes, q, k, v, dout, dlse, exchange="ring", nodes=1, wrap=lambda x: x
):
    """out, lse, dq, dk, dv in logical order; computes: the rank that computes each query block."""
    length, world = q.shape[2], layout.world
    tail = plan.geometry.num_tokens - length
    q, k, v, dout = (torch.nn.functional.pad(x, (0, 0, 0, tail)) for x in (q, k, v, dout))
    dlse = torch.nn.functional.pad(dlse, (0, tail))
    visible = (plan.geometry.tile_class != EMPTY).sum((0, 2)).numpy()

    def body(transport):
        geometry = plan.geometry.select(layout.assignment[transport.rank])
        at, sent = geometry.positions, Counter()
        leaves = [x[:, :, at].requires_grad_() for x in (q, k, v)]
        link, schedule = Link(wrap(transport)), EXCHANGES[exchange](transport.rank, world, nodes)
        move = make_move(computes, visible, layout, geometry, transport.rank)
        moved = move.plan(plan.rows(geometry), link, sent)
        expected = plan.rows(geometry.select(move.geometry.blocks))
        assert torch.equal(moved.tiles, expected.tiles)
        assert moved.geometry.num_visible_tiles == expected.geometry.num_visible_tiles
        bound = bind(moved, step_blocks(schedule, layout.assignment))
        tokens = max(layout.blocks_per_rank) * layout.block_size
        ring = MovedRing(link, schedule, reference, tokens, sent, move=move, bound=bound)
        out, lse = sharded_attention(*leaves, None, ring, q.shape[3] ** -0.5)
        grads = torch.autograd.grad((out, lse), leaves, (dout[:, :, at], dlse[:, :, at]))
        return [x.detach() for x in (out, lse, *grads)]

    return whole(run_threads(world, body, nodes=nodes), layout, length)


def case(mask, heads, length=139):
    """The plan, the tensors and what the oracle says of them."""
    plan = ZOO[mask](length, *heads)
    *tensors, dlse = oracle.inputs(1, *heads, length, DIM)
    pairs = oracle.expand(plan, heads[0])[:, :, :length, :length]
    tensors.append(torch.where(pairs.any(-1), dlse, 0.0))
    return plan, tensors, oracle.attention(*tensors[:3], pairs, *tensors[3:])


WAYS = {  # rank that computes each of n blocks on so many ranks
    "anywhere": lambda n, world: np.random.default_rng(0).integers(0, world, n),
    "all on the last rank": lambda n, world: np.full(n, world - 1),
    "in turn": lambda n, world: np.arange(n) % world,
}
SHAPES = [("ring", 1, 2), ("ring", 1, 4), ("gather", 1, 4), ("hierarchical", 2, 4), ("gather", 1, 3)]
MASKS = ["hot_row", "empty_rows", "empty_ranks", "column_groups", "key_head_top_k", "anything", "top_p"]


@pytest.mark.parametrize(
    "mask,shape,heads,layout,way",
    pairwise(MASKS, SHAPES, [(4, 4), (4, 2), (3, 1)], ["zigzag", "first rank empty"], list(WAYS)),
)
def test_it_does_not_matter_where_queries_are_computed(mask, shape, heads, layout, way):
    exchange, nodes, world = shape
    plan, tensors, expected = case(mask, heads)
    held = LAYOUTS[layout](plan.geometry.num_blocks, world, SIZE)
    computes = WAYS[way](plan.geometry.num_blocks, world)
    actual = computed_elsewhere(plan, held, computes, *tensors, exchange=exchange, nodes=nodes)
    for name, x, y in zip(NAMES, actual, expected, strict=True):
        tolerance.check("fp64", name, x, y, BOUND)


def test_queries_that_stay_are_computed_as_before():
    """To the last bit, and gradients of keys too: a move to where queries are already is none."""
    plan, tensors, _ = case("column_groups", HEADS)
    layout = zigzag(plan.geometry.num_blocks, 3, SIZE)
    moved = computed_elsewhere(plan, layout, layout.source_of_block, *tensors)
    assert_equal(moved, on_ring(plan, layout, *tensors))


class Forgetful(Counting):
    """Rank 1 sends nothing but zeros of one kind of message."""

    lost = "grads"

    def all_to_all(self, send, sends, receive, receives, channel):
        if self.rank == 1 and channel == self.lost:
            send = torch.zeros_like(send)
        return super().all_to_all(send, sends, receive, receives, channel)


def test_lost_gradients_are_noticed():
    plan, tensors, expected = case("causal", HEADS)
    layout = zigzag(plan.geometry.num_blocks, 2, SIZE)
    computes = WAYS["anywhere"](plan.geometry.num_blocks, 2)
    actual = computed_elsewhere(plan, layout, computes, *tensors, wrap=Forgetful)
    with pytest.raises(AssertionError, match="values are wrong"):
        for name, x, y in zip(NAMES, actual, expected, strict=True):
            tolerance.check("fp64", name, x, y, BOUND)


# -- as a user has it ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class HotRow(Pattern):
    """One query block chooses all tiles, the others their neighbours and columns of two groups."""

    at: float
    traits = Traits("strict", "none", "block")

    def estimate(self, q, summary, geometry):
        blocks = geometry.num_blocks
        hot = geometry.block_ids[:, None] == int(self.at * blocks)
        tiles = (hot | (block_distance(geometry) < 2)).expand(geometry.batch, 1, -1, -1)
        columns = (
            torch.arange(4, device=geometry.device).view(1, 1, 2, 2).expand(geometry.batch, HEADS[1], -1, -1)
        )
        return Plan.build(geometry, tiles, columns, (geometry.block_ids * 2 >= blocks).int())


UNEQUAL = {0: HotRow(0.7), 1: HotRow(0.4), "default": Dense()}  # layers that no layout fits at once


def unequal(*layers):
    """Of a state: these layers as if seen to be unequal two steps ago."""
    return {"known": [{"statistics": None, "movable": list(map(repr, layers)), "calls": []}]}


def attend(
    transport, layer=0, name="batch 2", machine=WIRELESS, movable=(0, 1), dtype=torch.float64, **options
):
    """out, dq, dk, dv in full order of one layer, its plan and the report."""
    options = {"pattern": UNEQUAL, "block_size": SIZE, "recall_every": 0, "machine": machine} | options
    cp = ContextParallel(transport, **options)
    cp.load_state_dict(cp.state_dict() | unequal(*movable))
    batch = make_batch(name)
    size, length = batch["input_ids"].shape
    shard = cp.shard(batch)
    at, tail = shard.geometry.positions, (0, 0, 0, shard.geometry.num_tokens - length)
    tensors = oracle.inputs(size, *HEADS, length, DIM, dtype=dtype)[:4]
    q, k, v, dout = (torch.nn.functional.pad(x, tail)[:, :, at] for x in tensors)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = cp.attention(*leaves, shard, layer)
    grads = torch.autograd.grad(out, leaves, dout)
    full = [cp.unshard(x, shard, dim=2) for x in (out, *grads)]
    return full, cp.plans(shard)[layer], cp.report(shard)


@pytest.mark.parametrize(
    "world,exchange,layer,name",
    [
        (2, "ring", 0, "batch 2"),
        (4, "ring", 0, "packed"),
        (4, "gather", 1, "batch 2"),
        (4, "hierarchical", 1, "ragged"),
    ],
)
def test_an_unequal_layer_is_made_equal(world, exchange, layer, name):
    """Exact results, the same plan, less on the slowest rank; keys are counted and headers compared."""
    nodes = 2 if exchange == "hierarchical" else 1
    results = run_threads(world, lambda t: attend(t, layer, name, exchange=exchange, debug=True), nodes=nodes)
    stayed = run_threads(
        world, lambda t: attend(t, layer, name, machine=H200, exchange=exchange), nodes=nodes
    )
    plan, (size, length) = stayed[0][1], make_batch(name)["input_ids"].shape
    q, k, v, dout, dlse = oracle.inputs(size, *HEADS, length, DIM)
    mask = oracle.expand(plan, HEADS[0])[:, :, :length, :length]
    out, _, *grads = oracle.attention(q, k, v, mask, dout, dlse * 0)
    for (full, own, report), (_, _, before) in zip(results, stayed, strict=True):
        assert torch.equal(own.tiles, plan.tiles)
        for what, actual, expected in zip(("out", "dq", "dk", "dv"), full, (out, *grads), strict=True):
            tolerance.check("fp64", what, actual, expected, BOUND)
        [(blocks, imbalance)] = report.moved.values()
        assert not before.moved and "query blocks moved" not in str(before)
        assert imbalance == pytest.approx(before.worker_imbalance, rel=1e-12)
        assert report.worker_imbalance < before.worker_imbalance
        assert report.work.sum() == pytest.approx(before.work.sum(), rel=1e-12)
        assert f"query blocks moved: {blocks} in layers {layer}" in str(report)
        assert report.bytes_moved["queries"] > 0 and "queries" not in before.bytes_moved


@pytest.mark.parametrize("options", [{"layout": "zigzag"}, {"exchange": "pull"}, {"movable": ()}], ids=str)
def test_nothing_moves_elsewhere(options):
    """Under a layout of the user's own, where needed blocks are pulled, in layers that were equal."""
    assert not any(report.moved for _, _, report in run_threads(2, lambda t: attend(t, **options)))


def test_a_layer_is_looked_at_two_steps_after_it_was_unequal():
    """Layers that were equal pay no header; a resumed run goes on like one that was not interrupted."""

    def body(transport):
        watched = Counting(transport)

        def step(cp):
            shard = cp.shard(make_batch("even"))
            x = torch.ones(1, 2, shard.local_length, DIM)
            counts = []
            for layer in range(3):
                before = sum(watched.collectives.values())
                cp.attention(x, x, x, shard, layer)
                counts.append(sum(watched.collectives.values()) - before)
            return counts, cp.report(shard).moved

        options = dict(pattern=UNEQUAL, block_size=SIZE, recall_every=0, count_keys=0)
        options |= dict(exchange="ring", machine=WIRELESS)
        cp = ContextParallel(watched, **options)
        seen = [step(cp) for _ in range(3)]
        again = ContextParallel(watched, **options)
        again.load_state_dict(json.loads(json.dumps(cp.state_dict())))
        return seen, step(cp), step(again)

    for seen, on, resumed in run_threads(2, body):
        assert [moved for _, moved in seen[:2]] == [{}, {}]
        assert set(seen[2][1]) == {0, 1}
        assert [headers for headers, _ in seen[1:]] == [[1, 1, 0], [2, 2, 0]]  # of columns, and headers
        assert on[1] == resumed[1] and set(on[1]) == {0, 1}


@pytest.mark.parametrize("how", ["reentrant", "non-reentrant", None])
def test_recomputation_moves_the_same_queries(how):
    batch, _ = tokens_of("whole", 240)

    def run(machine, checkpointing):
        models = [TinyGPT(kv_heads=2, checkpointing=checkpointing) for _ in range(2)]

        def body(transport):
            layers = [("blocks.0.attention", 0), ("blocks.1.attention", 0)]
            pattern = dict(zip(layers, UNEQUAL.values(), strict=False))
            cp = parallel(transport, pattern=pattern, machine=machine)
            cp.load_state_dict(cp.state_dict() | unequal(*layers))
            model = cp.attach(models[transport.rank])
            shard = cp.shard(batch)
            loss = cp.loss(model(**shard.inputs), shard)
            loss.backward()
            cp.sum_gradients(model)
            report = cp.report(shard)
            assert all(seen == promised > 0 for seen, promised in report.keys_by_layer.values())
            return {"loss": loss.item(), "grads": gradients(model), "moved": report.moved}

        return run_threads(2, body)

    results = run(WIRELESS, how)
    assert all(result["moved"] for result in results)
    [expected, _] = run(H200, None)
    assert not expected["moved"]
    assert_same_step(results, expected)


def test_results_do_not_depend_on_when_messages_arrive():
    def run(seed):
        results = run_threads(3, lambda transport: attend(Late(transport, seed), deterministic=True))
        return [(full, plan, report.work, report.moved) for full, plan, report in results]

    expected = run(0)
    assert expected[0][3]
    assert_equal(run(1), expected)


def attend_on_rank():
    return attend(whole_ring())


def test_gloo_equals_threads():
    expected = run_threads(2, attend)
    for (full, _, report), (wanted, _, other) in zip(pool.run(2, attend_on_rank), expected, strict=True):
        assert report.moved == other.moved != {}
        for what, x, y in zip(("out", "dq", "dk", "dv"), full, wanted, strict=True):
            tolerance.check("fp64", what, x, y, BOUND)


# -- on GPUs ------------------------------------------------------------------------------------------


def attend_on_gpu(group, axes=("cp",), sync="default"):
    """Errors of out, dq, dk, dv against one device, relative to the largest value, and the report."""
    pattern = {0: HotRow(0.55)}  # of a document whose end is at .62 of the sequence
    cp = ContextParallel(group, axes, pattern=pattern, recall_every=0, count_keys=0, machine=WIRELESS)
    cp.load_state_dict(cp.state_dict() | unequal(0))
    inputs = gpu_ring.tensors(torch.float32)
    gpu_ring.on_ring(cp, *inputs)  # makes communicators and kernels
    shard, actual = gpu_ring.on_ring(cp, *inputs, sync=sync)
    expected = gpu_ring.one_device(*inputs, cp.plans(shard)[0])
    return [gpu_ring.relative(x, y) for x, y in zip(actual, expected, strict=True)], cp.report(shard)


def on_threads(transport):
    with torch.autograd.set_multithreading_enabled(False):
        return attend_on_gpu(transport)


def on_nccl():
    with poison.poisoned():
        return attend_on_gpu(init_device_mesh("cuda", (2,), mesh_dim_names=("cp",)), sync="error")


def assert_moved(results):
    for errors, report in results:
        assert report.moved and report.worker_imbalance < report.moved[0][1]
        for what, error in zip(RESULTS, errors, strict=True):
            assert error <= FP32, what


@machine.needs("gpu")
@pytest.mark.parametrize("world", [2, 3])
def test_threads_on_one_gpu(world):
    assert_moved(run_threads(world, on_threads))


@machine.needs("two gpus")
def test_nccl_without_host_sync_but_for_the_header():
    assert_moved(pool.run(2, on_nccl, timeout=280, backend="nccl"))
