"""Attention by heads, and by heads and a ring over nodes: tokens are swapped for heads and back."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cache, partial

import oracle
import pool
import pytest
import test_ring
import tolerance
import torch
from rings import LAYOUTS, NAMES, Wrapped, attend_batch, whole
from sampling import pairwise
from test_coverage import train_step
from test_determinism import Late, assert_equal
from test_gloo import assert_same_attention, attend_in_nodes, attend_once
from test_precision import assert_no_growth, rounded
from test_ring import PATTERNS, make_batch
from tiny_models import TinyGPT, assert_same_step, sharded
from tiny_models import make_batch as tokens_of
from zoo import SIZE, ZOO

from sparring.balance import from_assignment
from sparring.cp import ContextParallel, run_threads
from sparring.cp.heads import sharded_attention, share_heads
from sparring.cp.link import Link
from sparring.cp.part import part_of
from sparring.cp.ring import step_blocks
from sparring.kernels import Plan, bind, reference
from sparring.kernels.patterns import Pattern, Traits
from sparring.kernels.patterns.base import block_distance

BOUND = 1e-10
DIM = 8
HEADS = {"MHA": (8, 8), "GQA": (8, 4), "GQA of two": (8, 2), "MQA": (8, 1)}
pytestmark = pytest.mark.usefixtures("poisoned")


def by_heads(plan, layout, q, k, v, dout, dlse, nodes=1, steps=reference, wrap=lambda x: x):
    """out, lse, dq, dk, dv in logical order of threads on so many nodes; arguments as of rings.on_ring."""
    length = q.shape[2]
    tail = plan.geometry.num_tokens - length
    q, k, v, dout = (torch.nn.functional.pad(x, (0, 0, 0, tail)) for x in (q, k, v, dout))
    dlse = torch.nn.functional.pad(dlse, (0, tail))

    def body(transport):
        geometry = plan.geometry.select(layout.assignment[transport.rank])
        at = geometry.positions
        leaves = [x[:, :, at].requires_grad_() for x in (q, k, v)]
        link, sent = Link(wrap(transport)), Counter()
        shares = share_heads("heads x ring", geometry, layout.assignment, transport)
        shares.check(q.shape[1], k.shape[1])
        own = shares.plan(plan.rows(geometry), link, sent)
        ring = shares.ring(link, bind(own, step_blocks(shares.schedule, shares.held)), steps, sent)
        out, lse = sharded_attention(*leaves, None, ring, q.shape[3] ** -0.5)
        grads = torch.autograd.grad((out, lse), leaves, (dout[:, :, at], dlse[:, :, at]))
        return [x.detach() for x in (out, lse, *grads)]

    return whole(run_threads(layout.world, body, nodes=nodes), layout, length)


def case(mask, heads, length=139):
    """The plan, the tensors and what the oracle says of them."""
    plan = ZOO[mask](length, *heads)
    *tensors, dlse = oracle.inputs(1, *heads, length, DIM)
    pairs = oracle.expand(plan, heads[0])[:, :, :length, :length]
    tensors.append(torch.where(pairs.any(-1), dlse, 0.0))
    return plan, tensors, oracle.attention(*tensors[:3], pairs, *tensors[3:])


def check(mask, heads, shape, layout, wrap=lambda x: x):
    """shape: nodes, and ranks of each."""
    plan, tensors, expected = case(mask, HEADS[heads])
    held = LAYOUTS[layout](plan.geometry.num_blocks, shape[0] * shape[1], SIZE)
    actual = by_heads(plan, held, *tensors, nodes=shape[0], wrap=wrap)
    for name, x, y in zip(NAMES, actual, expected, strict=True):
        tolerance.check("fp64", name, x, y, BOUND)


SHAPES = [(1, 1), (1, 2), (1, 4), (1, 8), (2, 2), (2, 4), (4, 2), (4, 1)]  # nodes, and ranks of each
MASKS = ["causal_document", "key_head_top_k", "column_groups", "anything"]


@pytest.mark.parametrize("mask,heads,shape,layout", pairwise(MASKS, list(HEADS), SHAPES, list(LAYOUTS)))
def test_every_way_to_share_heads(mask, heads, shape, layout):
    """Masks of all heads, of key heads and of query heads; columns of each kind and their groups."""
    check(mask, heads, shape, layout)


@pytest.mark.full
@pytest.mark.parametrize("layout", ["zigzag", "first rank empty"])
@pytest.mark.parametrize("shape", SHAPES[1:])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("mask", [mask for mask in ZOO if mask not in MASKS])
def test_zoo(mask, heads, shape, layout):
    check(mask, heads, shape, layout)


LAYOUT = from_assignment(((5, 0, 11), (), (1, 2, 3, 4, 6, 7, 8), (12, 9, 10)), SIZE)


@pytest.mark.parametrize(
    "pattern,layout,name",
    [
        ("vertical-slash", "auto", "batch 2"),
        ("segments", LAYOUT, "ragged"),
        ("sink-window", "striped", "packed"),
    ],
)
def test_batches(pattern, layout, name):
    """As users call it, headers compared before every message: documents, several rows, uneven shards."""
    test_ring.check(4, PATTERNS[pattern], layout, name, HEADS["GQA of two"], exchange="heads", debug=True)


WAYS = ["heads", ("heads", "ring")]


def attend(exchange, transport, pattern="vertical-slash", dtype=torch.float32, **options):
    """A batch of two rows, 8 query heads and 2 key heads, on one rank of a group."""
    options = {"layout": "striped", "exchange": exchange, "block_size": SIZE} | options
    pattern = PATTERNS.get(pattern, pattern)
    tensors = oracle.inputs(2, 8, 2, 230, DIM, dtype=dtype)[:4]
    return attend_batch(transport, make_batch("batch 2"), *tensors, pattern=pattern, **options)


def on_two_nodes(exchange, **options):
    return run_threads(4, partial(attend, exchange, **options), nodes=2)


def test_plans_are_those_of_a_ring():
    """Bit for bit, and so is what a report says of them; results are equal to rounding."""
    expected = on_two_nodes("ring")
    for one, other in zip(expected * 2, on_two_nodes(WAYS[0]) + on_two_nodes(WAYS[1]), strict=True):
        assert torch.equal(one.plan.tiles, other.plan.tiles)
        assert torch.equal(one.plan.columns, other.plan.columns)
        assert one.report.density_by_layer == other.report.density_by_layer
        assert one.report.recall == pytest.approx(other.report.recall, rel=1e-5)
        for name, x, y in zip(("out", "dq", "dk", "dv"), other.tensors, one.tensors, strict=True):
            tolerance.check("fp32", name, x, y, 2e-6 * float(y.abs().max()))


@pytest.mark.parametrize("exchange", WAYS, ids=str)
def test_bytes_are_counted(exchange):
    """Queries, keys, outputs and lse, and their gradients, each once, but for what a rank keeps."""
    world, nodes, rows, heads, kv_heads = 4, 1 if exchange == "heads" else 2, 2, 8, 2
    inside, blocks = world // nodes, 4
    tokens, share, kv_share = blocks * SIZE * rows, heads // inside, max(1, kv_heads // inside)
    forward = tokens * (2 * share * DIM + 2 * kv_share * DIM + share) * 4
    plan = rows * blocks * 4
    expected = {"heads": world * (inside - 1) * (2 * forward + plan)}
    if nodes == 2:
        keys = 2 * tokens * inside * kv_share * DIM * 4
        expected |= {"outer keys": world * 2 * keys, "outer grads": world * keys}
    for shares in on_two_nodes(exchange, pattern="sink-window"):
        columns = 2 * kv_share * shares.plan.columns.numel() * DIM * 4
        if nodes == 2:
            expected["columns"] = world * 3 * (2 * (nodes - 1) * columns // nodes)
        assert shares.report.bytes_moved == expected


@dataclass(frozen=True)
class Windows(Pattern):
    """Head h sees h + 1 blocks back: heads of very different work."""

    traits = Traits("strict", "none", "block")

    def estimate(self, q, summary, geometry):
        tiles = torch.stack([block_distance(geometry) <= head for head in range(q.shape[1])])
        return Plan.build(geometry, tiles.expand(geometry.batch, -1, -1, -1).contiguous())


@pytest.mark.parametrize("exchange", WAYS, ids=str)
def test_reported_work_is_that_of_the_heads_of_each_rank(exchange):
    """By step, in which the keys of a node are there; a ring of the same layout is far better balanced."""
    nodes, ring = 1 if exchange == "heads" else 2, on_two_nodes("ring", pattern=Windows())
    inside = 4 // nodes
    for shares in on_two_nodes(exchange, pattern=Windows()):
        tiles = shares.plan.tiles_bool().double().sum(0) / 8
        held = [sum(shares.layout.assignment[n * inside : (n + 1) * inside], ()) for n in range(nodes)]
        expected = torch.zeros(4, nodes + 1, dtype=torch.float64)
        for rank in range(4):
            node, place = divmod(rank, inside)
            own = tiles.unflatten(0, (inside, -1))[place].sum(0)[list(held[node])]
            for step in range(nodes):
                expected[rank, step] = own[:, list(held[node - step])].sum()
        assert shares.report.work == pytest.approx(expected.numpy())
        assert shares.report.work.sum() == pytest.approx(ring[0].report.work.sum())
        assert shares.report.worker_imbalance > 1.2 > ring[0].report.worker_imbalance


@pytest.mark.parametrize(
    "exchange", [pytest.param("heads", marks=pytest.mark.full), ("heads", "ring")], ids=str
)
def test_results_do_not_depend_on_when_messages_arrive(exchange):
    """Plans, outputs, gradients and what a report says of them, to the last bit."""
    options = {"deterministic": True, "pattern": "segments"}

    def run(seed):
        body = partial(attend, exchange, **options)
        results = run_threads(4, lambda transport: body(Late(transport, seed)), nodes=2)
        return [(shares.tensors, shares.plan, shares.report.work) for shares in results]

    expected = run(0)
    for seed in range(1, 3):
        assert_equal(run(seed), expected)


@pytest.mark.parametrize(
    "exchange", [pytest.param("heads", marks=pytest.mark.full), ("heads", "ring")], ids=str
)
def test_gloo_equals_threads(exchange):
    args, options = (PATTERNS["segments"], "zigzag", "packed"), {"exchange": exchange, "debug": True}
    expected = run_threads(4, lambda transport: attend_once(transport, *args, **options), nodes=2)
    for mine, threads in zip(pool.run(4, attend_in_nodes, options, *args), expected, strict=True):
        assert_same_attention(mine, threads)


@pytest.mark.parametrize("pattern", ["dense", "vertical-slash"])
def test_every_layer_sees_what_its_plan_promises(pattern):
    """In recomputation too, whose plans are not sent again."""
    for report, runs in train_step(4, test_ring.PATTERNS[pattern], "packed", exchange="heads"):
        assert list(runs.values()) == [2, 2]
        assert all(seen == promised > 0 for seen, promised in report.keys_by_layer.values())


@pytest.mark.parametrize("how", ["reentrant", "non-reentrant"])
def test_recomputation_changes_no_gradient(how):
    batch, _ = tokens_of("packed")
    options = {"pattern": PATTERNS["vertical-slash"], "exchange": "heads"}
    [expected, *_] = sharded(TinyGPT(kv_heads=2), batch, 4, **options)
    assert_same_step(sharded(TinyGPT(kv_heads=2, checkpointing=how), batch, 4, **options), expected)


# -- precision ----------------------------------------------------------------------------------------


class RoughGradients(Wrapped):
    """Gradients travel in half precision."""

    def all_to_all(self, send, sends, receive, receives, channel):
        send = rounded(send) if channel == "grads" else send
        return super().all_to_all(send, sends, receive, receives, channel)


@cache
def half_precision():
    """One key head for 8 query heads: plan, tensors in bf16, exact results, and those of one rank."""
    heads, length = HEADS["MQA"], 512
    plan = ZOO["causal"](length, *heads)
    *tensors, dlse = oracle.inputs(1, *heads, length, DIM, dtype=torch.bfloat16)
    tensors.append(torch.zeros(dlse.shape))
    out, _, *grads = oracle.attention(*tensors[:3], oracle.expand(plan, heads[0]), *tensors[3:])
    return plan, tensors, (out, *grads), through(1, plan, tensors)


def through(world, plan, tensors, **options):
    layout = LAYOUTS["zigzag"](plan.geometry.num_blocks, world, SIZE)
    out, _, *grads = by_heads(plan, layout, *tensors, **options)
    return out, *grads


@pytest.mark.parametrize("nodes", [1, 2])
def test_gradients_of_repeated_key_heads_are_rounded_once(nodes):
    plan, tensors, exact, alone = half_precision()
    assert_no_growth(through(8, plan, tensors, nodes=nodes), alone, exact)
    with pytest.raises(AssertionError, match="dk"):
        assert_no_growth(through(8, plan, tensors, nodes=nodes, wrap=RoughGradients), alone, exact)


# -- the comparison has teeth -------------------------------------------------------------------------


class Forgetful(Wrapped):
    """The gradients of one head do not leave rank 1."""

    def all_to_all(self, send, sends, receive, receives, channel):
        if self.rank == 1 and channel == "grads":
            send = send.clone()
            send[:, :, 0] = 0
        return super().all_to_all(send, sends, receive, receives, channel)


@pytest.mark.parametrize("heads", ["GQA", "MQA"])
@pytest.mark.parametrize("shape", [(1, 4), (2, 2)])
def test_lost_gradients_of_a_head_are_noticed(shape, heads):
    with pytest.raises(AssertionError, match="values are wrong"):
        check("causal", heads, shape, "zigzag", Forgetful)


# -- bad input ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "world,heads,error,text",
    [
        (3, (8, 2), ValueError, "shares 8 query heads among 3 ranks; use a number of ranks that divides"),
        (4, (12, 6), NotImplementedError, "with 6 key heads on 4 ranks; one number must divide the other"),
    ],
)
def test_heads_that_cannot_be_shared_are_refused(world, heads, error, text):
    def body(transport):
        cp = ContextParallel(transport, pattern="dense", exchange="heads", block_size=SIZE)
        shard = cp.shard(make_batch("even"))
        q, k = (torch.zeros(1, n, shard.local_length, DIM) for n in heads)
        with pytest.raises(error, match=text):
            cp.attention(q, k, k, shard)

    run_threads(world, body)


# -- parts of a group ---------------------------------------------------------------------------------


def in_parts(transport):
    """What two ranks of the same place on three nodes get of each other, and their global ranks."""
    places = tuple(range(transport.rank % 2, 6, 2))
    part, mine = part_of(transport, places), torch.tensor([2.0**transport.rank] * 5)
    total, most, nothing = mine.clone(), mine.clone(), torch.zeros(0)
    for x, op in ((total, "sum"), (most, "max"), (nothing, "sum")):
        part.all_reduce(x, op).wait()
    after, before = (part.rank + 1) % 3, (part.rank - 1) % 3
    received = torch.zeros(5)
    part.exchange([mine], after, [received], before, "keys").wait()
    return part.ranks, total, most, part.all_gather(mine)[:, 0], received[0]


def test_parts_are_groups_of_their_own():
    for rank, (ranks, total, most, gathered, received) in enumerate(run_threads(6, in_parts)):
        values = [2.0 ** (rank % 2 + 2 * node) for node in range(3)]
        assert ranks == tuple(range(rank % 2, 6, 2))
        assert total.tolist() == [sum(values)] * 5 and most.tolist() == [max(values)] * 5
        assert gathered.tolist() == values and received == values[rank // 2 - 1]


def test_a_part_of_all_ranks_is_the_group_and_one_rank_is_alone():
    def body(transport):
        assert part_of(transport, (0, 1)) is transport
        assert part_of(transport, (transport.rank,)).ranks == (transport.rank,)

    run_threads(2, body)
