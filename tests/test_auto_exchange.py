"""exchange="auto" end to end: what is chosen when, right results over a change, ranks that agree."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, replace

import oracle
import pool
import pytest
import tolerance
import torch
from test_ring import BOUND
from tiny_models import TinyGPT, assert_same_step, gradients, parallel
from tiny_models import make_batch as tokens_of
from torch.distributed.device_mesh import init_device_mesh

from sparring.balance import H200, Constants, KernelCost, LinkCost
from sparring.cp import ContextParallel, RingDesyncError, run_threads
from sparring.kernels import Plan
from sparring.kernels.patterns import Dense, Pattern, SinkWindow, Traits

SIZE, BLOCKS, HEADS, DIM = 16, 16, (4, 2), 8
LENGTH = SIZE * BLOCKS
# Keys of a rank travel as long as it computes 40 tiles of one head: 45 of a window, 136 of dense work.
KERNEL = KernelCost(tile=1.0, row=0.0, column=0.1, launch=0.0)
SHARE = 2 * HEADS[1] * LENGTH / 4 * DIM * 8  # bytes of the fp64 keys and values of one of four ranks
LINK = LinkCost(latency=0.0, bandwidth=SHARE / 40)
MACHINE = Constants("made up", SIZE, DIM, KERNEL, KERNEL, LINK, LINK, memory=1e30)
WINDOW = SinkWindow(sink=0, window=24)
CHANGING = [WINDOW] * 3 + [Dense()] * 4  # patterns of the steps of a run
CHOSEN = ["ring"] * 2 + ["pull"] * 3 + ["ring"] * 2  # two steps later
pytestmark = pytest.mark.usefixtures("poisoned")


def make(transport, **options) -> ContextParallel:
    options = {"block_size": SIZE, "recall_every": 0, "machine": MACHINE} | options
    return ContextParallel(transport, **options)


def shard_of(cp, pattern=None):
    if pattern is not None:
        cp.patterns["default"] = pattern
    return cp.shard({"input_ids": torch.zeros(1, LENGTH, dtype=torch.int64)})


def attend(cp, shard):
    """out, dq, dk, dv in logical order."""
    at = shard.geometry.positions
    *qkv, dout, _ = oracle.inputs(1, *HEADS, LENGTH, DIM)
    leaves = [x[:, :, at].requires_grad_() for x in qkv]
    out = cp.attention(*leaves, shard)
    grads = torch.autograd.grad(out, leaves, dout[:, :, at])
    return [cp.unshard(x, shard, dim=2) for x in (out, *grads)]


def step(cp, pattern=None):
    """(layout, exchange, explanation), results and plan."""
    shard = shard_of(cp, pattern)
    decision = shard.layout.assignment, shard.exchange, shard.decision.explain()
    return decision, attend(cp, shard), cp.plans(shard)[0]


def assert_right(results, plan):
    q, k, v, dout, dlse = oracle.inputs(1, *HEADS, LENGTH, DIM)
    out, _, *grads = oracle.attention(q, k, v, oracle.expand(plan, HEADS[0]), dout, dlse * 0)
    for what, actual, expected in zip(("out", "dq", "dk", "dv"), results, (out, *grads), strict=True):
        tolerance.check("fp64", what, actual, expected, BOUND)


def chosen(pattern, steps=3, world=4, nodes=1, **options):
    """(layout, exchange) of the last step."""

    def body(transport):
        cp = make(transport, pattern=pattern, **options)
        for _ in range(steps):
            shard = shard_of(cp)
            attend(cp, shard)
        return shard.layout.name, shard.exchange, cp.report(shard), shard.decision

    return run_threads(world, body, nodes=nodes)[0]


@pytest.mark.parametrize("nodes,fixed", [(1, "ring"), (2, "hierarchical")])
def test_windows_are_pulled_and_dense_attention_goes_round(nodes, fixed):
    layout, exchange, report, decision = chosen(WINDOW, nodes=nodes)
    assert (layout, exchange) == ("contiguous", "pull")
    assert f"exchange pull ({decision.why})" in str(report) and f"{fixed} " in decision.why
    assert f"exchange pull: {decision.why}" in decision.explain()
    layout, exchange, report, decision = chosen(Dense(), nodes=nodes)
    assert (layout, exchange, report.exchange) == ("zigzag", fixed, fixed)


def test_the_first_two_steps_are_those_of_a_fixed_exchange():
    for steps in (1, 2):
        _, exchange, report, decision = chosen(WINDOW, steps)
        assert exchange == "ring" and "until attention of two steps before is known" in str(report)
        assert decision.table


@pytest.mark.parametrize(
    "pattern,world,expected", [(WINDOW, 4, "pull"), (Dense(), 8, "ring"), (Dense(), 4, "heads")]
)
def test_a_given_layout_gets_the_best_exchange(pattern, world, expected):
    """Of dense attention the last rank needs all keys, which no pull that is chosen may hold; and it has most
    of the work, but not by heads, where ranks divide them."""
    layout, exchange, _, decision = chosen(pattern, world=world, layout="contiguous")
    assert (layout, exchange, len(decision.table)) == ("contiguous", expected, 1)


def test_a_given_pull_gets_a_layout_in_which_little_moves():
    """Other exchanges move as much in every layout, so that work alone decides."""
    assert chosen(WINDOW, exchange="pull")[:2] == ("contiguous", "pull")
    *_, report, decision = chosen(WINDOW, exchange="ring")
    assert decision.why == "given by the user" == report.why
    assert all(candidate.best is None for candidate in decision.table)


# A machine whose messages are late: a ring has more of them one after the other than swaps for heads.
LATE = replace(MACHINE, inside=LinkCost(latency=1e3, bandwidth=1e30), between=LinkCost(0.0, 1e30))


@pytest.mark.parametrize("world,nodes,expected", [(4, 1, "heads"), (8, 2, "heads x ring")])
def test_heads_are_swapped_for_where_a_ring_takes_longer(world, nodes, expected):
    def body(transport):
        cp = make(transport, machine=LATE, debug=nodes == 1, count_keys=9)
        return [step(cp, pattern) for pattern in [Dense()] * 2 + [WINDOW] * 3]

    for results in run_threads(world, body, nodes=nodes):
        fixed = "hierarchical" if nodes > 1 else "ring"
        seen = [exchange for (_, exchange, _), *_ in results]
        assert seen == [fixed, fixed, expected, expected, "pull"]
        for _, full, plan in results:
            assert_right(full, plan)
        assert f"exchange {expected}" in results[2][0][2] and f"{fixed} " in results[2][0][2]


@dataclass(frozen=True)
class ByHead(Pattern):
    """All tiles, by a plan for every head."""

    traits = Traits("strict", "none", "block")

    def estimate(self, q, summary, geometry):
        tiles = torch.ones(geometry.batch, q.shape[1], len(geometry.blocks), geometry.num_blocks)
        return Plan.build(geometry, tiles.bool())


@pytest.mark.parametrize("pattern,heads", [(ByHead(), HEADS), (Dense(), (6, 2)), (Dense(), (12, 3))], ids=str)
def test_heads_are_not_swapped_for_where_they_are_not_alike_or_cannot_be_shared(pattern, heads):
    """Plans of their own; 6 heads on 4 ranks; 3 key heads on 4 ranks. Some other layer may do."""

    def body(transport):
        cp = make(transport, machine=LATE, pattern={0: pattern, 1: Dense()})
        for _ in range(3):
            shard = shard_of(cp)
            for layer, (h, kv) in enumerate((heads, HEADS)):
                q, k = (torch.ones(1, n, shard.local_length, DIM) for n in (h, kv))
                cp.attention(q, k, k, shard, layer)
        return shard.exchange

    assert run_threads(4, body) == ["ring"] * 4


def test_one_rank_has_nothing_to_choose():
    assert chosen(WINDOW, world=1)[1] == "ring"


def test_a_run_whose_exchange_changes_is_right_in_every_step():
    """Every rank decides alike; headers are compared at all transfers and keys counted in all steps."""

    def body(transport):
        cp = make(transport, debug=True, count_keys=len(CHANGING))
        results = [step(cp, pattern) for pattern in CHANGING]
        assert cp.report().keys_by_layer
        return results

    ranks = run_threads(4, body)
    assert [exchange for (_, exchange, _), *_ in ranks[0]] == CHOSEN
    for results in ranks:
        for (decision, full, plan), (first, *_) in zip(results, ranks[0], strict=True):
            assert decision == first
            assert_right(full, plan)


@pytest.mark.parametrize("cut", [1, 3, 6])
def test_a_resumed_run_decides_like_one_that_was_not_interrupted(cut):
    def body(transport):
        whole, cp = make(transport), make(transport)
        expected = [step(whole, pattern)[0] for pattern in CHANGING]
        before = [step(cp, pattern)[0] for pattern in CHANGING[:cut]]
        again = make(transport)
        again.load_state_dict(json.loads(json.dumps(cp.state_dict())))
        return expected, before + [step(again, pattern)[0] for pattern in CHANGING[cut:]]

    for expected, resumed in run_threads(2, body):
        assert resumed == expected and len({exchange for _, exchange, _ in expected}) == 2


def test_shards_keep_their_exchange_while_others_are_alive():
    """Made one after the other, used in another order, their backwards interleaved."""

    def body(transport):
        cp = make(transport, debug=True)
        for pattern in CHANGING[:4]:
            step(cp, pattern)
        # The second as a batch that is prefetched: while the plans of the one before are not there yet.
        pulled, ring = shard_of(cp, Dense()), shard_of(cp, Dense())
        names = pulled.exchange, ring.exchange
        return names, [(attend(cp, shard), cp.plans(shard)[0]) for shard in (ring, pulled)]

    for names, results in run_threads(4, body):
        assert names == ("pull", "ring")
        for full, plan in results:
            assert_right(full, plan)


def test_recomputation_uses_the_exchange_of_its_shard():
    """The next shard, of another exchange, is made before the backward; gradients are those of a ring."""
    batch, _ = tokens_of("whole", length=8 * SIZE)
    model = TinyGPT(checkpointing="non-reentrant")
    replicas = [copy.deepcopy(model) for _ in range(4)]

    def body(transport, exchange):
        cp = parallel(transport, pattern=WINDOW, exchange=exchange, machine=MACHINE)
        model = cp.attach(replicas[transport.rank + 2 * (exchange == "auto")])
        results, waiting = [], cp.shard(batch)
        for _ in range(4):
            shard = waiting
            loss = cp.loss(model(**shard.inputs), shard)
            waiting = cp.shard(batch)
            model.zero_grad()
            loss.backward()
            cp.sum_gradients(model)
            covered = {len(runs) for runs in shard.record.covered.values()}
            results.append((shard.exchange, covered, {"loss": loss.item(), "grads": gradients(model)}))
        return results

    expected = run_threads(2, lambda transport: body(transport, "ring"))[0]
    for results in run_threads(2, lambda transport: body(transport, "auto")):
        assert [exchange for exchange, *_ in results] == ["ring", "ring", "pull", "pull"]
        for (_, covered, actual), (_, _, wanted) in zip(results, expected, strict=True):
            assert covered == {2}
            assert_same_step([actual], wanted)


def test_ranks_that_choose_differently_are_stopped():
    """Here for want of equal cost constants."""

    def body(transport):
        cp = make(transport, pattern=WINDOW, machine=MACHINE if transport.rank else fast, layout="contiguous")
        for _ in range(3):
            attend(cp, shard_of(cp))

    free = LinkCost(latency=0.0, bandwidth=1e30)
    fast = replace(MACHINE, inside=free, between=free)
    with pytest.raises(RingDesyncError, match="disagree on exchange"):
        run_threads(2, body)


def test_query_blocks_move_only_where_the_exchange_brings_all_keys():
    def body(transport):
        cp = make(transport)
        shards = []
        for pattern in CHANGING:
            shards.append(shard_of(cp, pattern))
            attend(cp, shards[-1])
        return [(shard.exchange, shard.movable is None) for shard in shards]

    assert run_threads(4, body)[0] == [(name, name == "pull") for name in CHOSEN]


def test_heads_of_another_width_take_another_time():
    half = H200.with_dim(64)
    assert (half.forward.tile, half.dim) == (H200.forward.tile / 2, 64)
    assert half.backward.launch == H200.backward.launch and half.inside == H200.inside


def in_nodes():
    axes = ("nodes", "ranks")
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=axes)
    cp = make(mesh, axes=axes)
    return [step(cp, pattern) for pattern in CHANGING]


def test_over_gloo_the_same_is_chosen_and_computed():
    def on_threads(transport):
        cp = make(transport)
        return [step(cp, pattern) for pattern in CHANGING]

    expected = run_threads(4, on_threads, nodes=2)[0]
    assert {exchange for (_, exchange, _), *_ in expected} == {"hierarchical", "pull"}
    for results in pool.run(4, in_nodes):
        for (decision, full, _), (wanted, _, plan) in zip(results, expected, strict=True):
            assert decision == wanted
            assert_right(full, plan)
