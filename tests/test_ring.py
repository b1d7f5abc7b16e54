"""In-process rings against the fp64 oracle: forward, lse by way of out, and every gradient."""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from dataclasses import replace

import oracle
import pytest
import tolerance
import torch
from sampling import pairwise

from sparring.balance import from_assignment
from sparring.cp import ContextParallel, run_threads
from sparring.kernels import Plan
from sparring.kernels.patterns import Dense, SinkWindow, VerticalSlash

BOUND = 1e-10
SIZE = 16
pytestmark = pytest.mark.usefixtures("poisoned")
PATTERNS = {
    "dense": Dense(),
    "sink-window": SinkWindow(sink=5, window=20),
    "vertical-slash": VerticalSlash(top_p=0.6, columns=(3, 12), slashes=(1, 4), probe=8, sink=2, window=0),
    "segments": VerticalSlash(
        top_p=0.6, columns=(3, 12), slashes=(1, 4), probe=8, sink=2, window=0, segment=48
    ),
}
BATCHES = {
    "even": (1, 256, None),
    "ragged": (1, 203, None),
    "packed": (1, 250, (((0, 90), (90, 91), (91, 200), (200, 250)),)),
    "batch 2": (2, 230, (((0, 100), (110, 230)), ((10, 180),))),  # padding between documents too
}
HEADS = {"MHA": (2, 2), "GQA": (4, 2), "MQA": (3, 1)}


def make_batch(name):
    """A batch whose document_ids and attention_mask say what BATCHES says."""
    size, length, documents = BATCHES[name]
    batch = {"input_ids": torch.arange(size * length).view(size, length)}
    if documents:
        batch["document_ids"] = torch.zeros(size, length, dtype=torch.int64)
        batch["attention_mask"] = torch.zeros(size, length, dtype=torch.int64)
        for row, ranges in enumerate(documents):
            for number, (start, end) in enumerate(ranges):
                batch["document_ids"][row, start:end] = number + 1
                batch["attention_mask"][row, start:end] = 1
    return batch


def run_ring(world, pattern, layout, batch, heads, dim=8, dtype=torch.float64, **options):
    """Runs one attention on `world` threads; returns full-order results and the full plan."""
    size, length = batch["input_ids"].shape
    tensors = oracle.inputs(size, *heads, length, dim, dtype=dtype)

    def body(transport):
        cp = ContextParallel(transport, pattern=pattern, layout=layout, block_size=SIZE, **options)
        shard = cp.shard(batch)
        at = shard.geometry.positions
        pad = (0, 0, 0, shard.geometry.num_tokens - length)
        local = [torch.nn.functional.pad(x, pad)[:, :, at] for x in tensors[:4]]
        q, k, v = (x.requires_grad_() for x in local[:3])
        out = cp.attention(q, k, v, shard)
        grads = torch.autograd.grad(out, (q, k, v), local[3])
        assert all(torch.isfinite(x).all() for x in (out, *grads))
        full = [cp.unshard(x, shard, dim=2) for x in (out, *grads)]
        return full, cp.plans(shard)[0], cp.report(shard)

    return tensors, run_threads(world, body, timeout=60)


def check(world, pattern, layout, name, heads, bound=BOUND, **options):
    batch = make_batch(name)
    length = batch["input_ids"].shape[1]
    (q, k, v, dout, dlse), results = run_ring(world, pattern, layout, batch, heads, **options)
    plan = results[0][1]
    mask = oracle.expand(plan, heads[0])[:, :, :length, :length]
    out, _, *grads = oracle.attention(q, k, v, mask, dout, dlse * 0)
    for full, other, _ in results:
        assert torch.equal(other.tiles, plan.tiles)
        for what, actual, expected in zip(("out", "dq", "dk", "dv"), full, (out, *grads), strict=True):
            tolerance.check("fp64", what, actual, expected, bound)
    return results


LAYOUTS = ["contiguous", "zigzag", "striped", "auto"]


@pytest.mark.parametrize(
    "world,pattern,layout,name,heads",
    pairwise([1, 2, 3, 4, 8], list(PATTERNS), LAYOUTS, list(BATCHES), list(HEADS)),
)
def test_ring_matches_oracle(world, pattern, layout, name, heads):
    check(world, PATTERNS[pattern], layout, name, HEADS[heads])


def test_uneven_shards():
    """A layout of one's own may give ranks different numbers of blocks, even none."""
    layout = from_assignment(((5, 0, 11), (), (1, 2, 3, 4, 6, 7, 8), (12, 9, 10)), SIZE)
    for pattern in PATTERNS.values():
        check(4, pattern, layout, "ragged", (4, 2))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_plans_do_not_depend_on_ranks_or_layout(pattern):
    """Bit for bit the same plan for the same q, k, v: fp32, every W and layout."""
    batch, plans = make_batch("packed"), []
    for world, layout in itertools.product((1, 2, 3, 8), LAYOUTS):
        _, results = run_ring(world, PATTERNS[pattern], layout, batch, (4, 2), dtype=torch.float32)
        plans.append(results[0][1])
    for plan in plans[1:]:
        blocks = plans[0].geometry.num_blocks  # W pads to other lengths; padding chooses nothing
        tiles = plan.tiles_bool()
        assert torch.equal(tiles[:, :, :blocks, :blocks], plans[0].tiles_bool())
        assert not tiles[:, :, blocks:].any()
        if plan.columns is not None:
            a, b = (p.columns.masked_fill(p.columns >= 250, 10**6) for p in (plan, plans[0]))
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["even", "packed"])
@pytest.mark.parametrize("world,layout", [(1, "contiguous"), (3, "striped")])
@pytest.mark.parametrize("pattern", ["dense", "sink-window", "vertical-slash", "segments"])
def test_causality_of_values(pattern, world, layout, name):
    """With the plan held fixed, tokens >= t never change outputs < t, to the last bit."""
    batch, cut = make_batch(name), 130
    size, length = batch["input_ids"].shape
    q, k, v, *_ = oracle.inputs(size, 4, 2, length, 8, dtype=torch.float32)
    changed = [torch.where(torch.arange(length)[:, None] < cut, x, x.flip(2) + 1) for x in (q, k, v)]

    def body(transport, plans=None):
        cp = ContextParallel(transport, pattern=PATTERNS[pattern], layout=layout, block_size=SIZE)
        outs = []
        for tensors in ((q, k, v), changed):
            with cp.replay(plans) if plans else nullcontext():
                shard = cp.shard(batch)
            at, extra = shard.geometry.positions, shard.geometry.num_tokens - length
            local = [torch.nn.functional.pad(x, (0, 0, 0, extra))[:, :, at] for x in tensors]
            outs.append(cp.unshard(cp.attention(*local, shard), shard, dim=2))
            plans = plans or cp.plans(shard)
        return outs

    for before, after in run_threads(world, body):
        assert torch.equal(before[:, :, :cut], after[:, :, :cut])
        assert not torch.equal(before[:, :, cut:], after[:, :, cut:])


def selection_moves(pattern, cut, probe_from):
    """Do outputs before `cut` change when tokens from `probe_from` on change, plans estimated anew?"""
    batch = make_batch("even")
    q, k, v, *_ = oracle.inputs(1, 4, 2, 256, 8, dtype=torch.float32)
    late = torch.arange(256)[:, None] >= probe_from
    outs = []
    for tensors in ((q, k, v), [torch.where(late, x.flip(2) * 3 + 1, x) for x in (q, k, v)]):
        cp = ContextParallel(None, pattern=pattern, layout="contiguous", block_size=SIZE)
        outs.append(cp.attention(*tensors, cp.shard(batch)))
    return not torch.equal(outs[0][:, :, :cut], outs[1][:, :, :cut])


def test_causality_of_selection():
    """Strict and segment-causal patterns never look ahead; the end of a document may choose for all."""
    for name in ("dense", "sink-window"):
        assert PATTERNS[name].traits.causality == "strict"
        assert not selection_moves(PATTERNS[name], 130, 130)
    assert PATTERNS["vertical-slash"].traits.causality == "noncausal"
    assert selection_moves(PATTERNS["vertical-slash"], 200, 200)
    assert PATTERNS["segments"].traits.causality == "block"
    assert not selection_moves(PATTERNS["segments"], 144, 144)  # a border of its 48-token segments
    assert selection_moves(PATTERNS["segments"], 180, 180)


def test_a_lost_tile_is_noticed():
    """The comparison has teeth: with one tile less in the plan the result is far beyond the bound."""
    (q, k, v, dout, dlse), results = run_ring(
        2, PATTERNS["vertical-slash"], "zigzag", make_batch("even"), (4, 2)
    )
    plan = results[0][1]
    tiles = plan.tiles_bool().clone()
    b, h, row, block = tiles.tril(-1).nonzero()[-1].tolist()
    tiles[b, h, row, block] = False
    mask = oracle.expand(Plan.build(plan.geometry, tiles, plan.columns), 4)
    out, _, *grads = oracle.attention(q, k, v, mask, dout, dlse * 0)
    for actual, expected in zip(results[0][0], (out, *grads), strict=True):
        assert oracle.max_error(actual, expected) > 1e6 * BOUND


def test_density_counts_are_exact():
    """Reported density and density_tiles are those of the element mask."""
    for pattern in PATTERNS.values():
        batch = make_batch("batch 2")
        _, results = run_ring(3, pattern, "striped", batch, (4, 2))
        plan, report = results[0][1:]
        visible = plan.geometry.visible_elements.sum().item() * 4
        assert report.density == pytest.approx(oracle.expand(plan, 4).sum().item() / visible, rel=1e-12)
        tiles = oracle.expand(replace(plan, columns=None, column_group=None), 4)
        assert report.density_tiles == pytest.approx(tiles.sum().item() / visible, rel=1e-12)


def test_recall_is_that_of_the_oracle():
    """Dense keeps everything; a sparse plan keeps what the oracle says, on the sampled queries."""
    batch = make_batch("even")
    _, results = run_ring(2, PATTERNS["dense"], "zigzag", batch, (4, 2))
    assert results[0][2].recall == pytest.approx(1.0, abs=1e-5)
    (q, k, *_), results = run_ring(1, PATTERNS["vertical-slash"], "contiguous", batch, (4, 2))
    scores = (q @ k.repeat_interleave(2, 1).mT) * 8**-0.5
    full = scores.masked_fill(~torch.ones(256, 256).tril().bool(), -torch.inf).logsumexp(-1)
    kept = scores.masked_fill(~oracle.expand(results[0][1], 4), -torch.inf).logsumexp(-1)
    rows = torch.linspace(0, 255, 32).long()
    assert results[0][2].recall == pytest.approx((kept - full).exp()[:, :, rows].mean().item(), abs=1e-5)
