"""What holds for every plan, mask, shape and layout (hypothesis): the reference, the carried state, lists."""

from __future__ import annotations

from collections import Counter

import oracle
import pytest
import rings
import tolerance
import torch
from hypothesis import strategies as st
from strategies import Case, cases, holds, sharded_cases

from sparring.balance import contiguous, ring, striped
from sparring.cp import ContextParallel, run_threads
from sparring.kernels import Geometry, Plan, attend, bind, reference
from sparring.kernels.attention import carried, output_delta
from sparring.kernels.columns import gather_columns, scatter_columns

pytestmark = pytest.mark.usefixtures("poisoned")
NAMES = ("out", "lse", "dq", "dk", "dv")


def inputs(case: Case, length: int):
    """q, k, v, dout, dlse and the oracle's pairs; dlse is 0 where the query sees nothing."""
    tensors = oracle.inputs(case.plan.geometry.batch, case.heads, case.kv_heads, length, case.dim)
    pairs = oracle.expand(case.plan, case.heads)[:, :, :length, :length]
    return *tensors[:4], torch.where(pairs.any(-1), tensors[4], 0.0), pairs


@holds(25, 200, case=cases())
def test_reference_and_specification_equal_the_oracle(case):
    q, k, v, dout, dlse, pairs = inputs(case, case.length)
    expected = oracle.attention(q, k, v, pairs, dout, dlse)
    scale = case.dim**-0.5
    spec = case.plan.element_mask()[:, :, : case.length, : case.length]
    for attention in (
        lambda *x: attend(*x, case.plan, impl="reference"),
        lambda *x: reference.attend_dense(*x, spec, scale),
    ):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out, lse = attention(*leaves)
        grads = torch.autograd.grad((out, lse), leaves, (dout, dlse))
        for name, actual, exact in zip(NAMES, (out, lse, *grads), expected, strict=True):
            tolerance.check("fp64", name, actual, exact, 1e-10)


def in_steps(case: Case, key_blocks, order, q, k, v, dout, dlse):
    """out, lse, dq, dk, dv against one source after the other, then the columns, as a ring does it."""
    plan, size, scale = case.plan, case.plan.geometry.block_size, case.dim**-0.5
    bound = bind(plan, key_blocks)
    held = [
        (torch.tensor(blocks).long()[:, None] * size + torch.arange(size)).flatten() for blocks in key_blocks
    ]
    columns = [] if plan.columns is None else [gather_columns(x, plan) for x in (k, v)]
    out, lse = carried(q)
    for i, source in enumerate(order):
        part = [x[:, :, held[source]] for x in (k, v)]
        reference.forward_step(q, *part, bound, source, out, lse, scale, fresh=i == 0)
    if columns:
        reference.forward_columns(q, *columns, bound, out, lse, scale)
    delta = output_delta(out, dout, dlse)
    dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
    for source in order:
        part = [x[:, :, held[source]] for x in (k, v)]
        grads = [torch.zeros_like(x) for x in part]
        reference.backward_step(q, *part, dout, lse, delta, bound, source, dq, *grads, scale)
        dk[:, :, held[source]], dv[:, :, held[source]] = grads
    if columns:
        dcolumns = [torch.zeros_like(x) for x in columns]
        reference.backward_columns(q, *columns, dout, lse, delta, bound, dq, *dcolumns, scale)
        for total, part in zip((dk, dv), dcolumns, strict=True):
            scatter_columns(part, plan, total)
    return out, lse, dq, dk, dv


@st.composite
def sources_in_any_order(draw):
    """A case, its blocks on sources, and an order of the sources in which empty ones come anywhere."""
    case, layout = draw(sharded_cases(longest=200, dims=(16, 32)))
    first, last = draw(st.integers(0, 2)), draw(st.integers(0, 2))
    key_blocks = ((),) * first + layout.assignment + ((),) * last
    return case, key_blocks, draw(st.permutations(range(len(key_blocks))))


@holds(25, 200, drawn=sources_in_any_order())
def test_sources_in_any_order_equal_one_source(drawn):
    """Empty sources first, last or all over change nothing; a query that sees nothing has zeros, not NaN."""
    case, key_blocks, order = drawn
    *tensors, pairs = inputs(case, case.plan.geometry.num_tokens)
    whole = (tuple(range(case.num_blocks)),)
    expected = in_steps(case, whole, [0], *tensors)
    actual = in_steps(case, key_blocks, order, *tensors)
    for name, x, y in zip(NAMES, actual, expected, strict=True):
        finite = y[y.isfinite()].abs()
        tolerance.check("fp64", name, x, y, 1e-12 * max(1.0, float(finite.max()) if len(finite) else 0.0))
    blind = ~pairs.any(-1)
    out, lse, dq, *_ = actual
    assert not out[blind].any() and not dq[blind].any() and (lse[blind] == -torch.inf).all()


class Simulated(torch.autograd.Function):
    """Attention by a ring of threads, forward and backward, as one function of the whole q, k, v."""

    @staticmethod
    def forward(ctx, q, k, v, plan, layout):
        ctx.save_for_backward(q, k, v)
        ctx.plan, ctx.layout = plan, layout
        q, k, v = q.detach(), k.detach(), v.detach()
        return tuple(rings.on_ring(plan, layout, q, k, v, q * 0, q[..., 0] * 0)[:2])

    @staticmethod
    def backward(ctx, dout, dlse):
        tensors = [x.detach() for x in (*ctx.saved_tensors, dout, dlse)]
        return *rings.on_ring(ctx.plan, ctx.layout, *tensors)[2:], None, None


@pytest.mark.parametrize("fast", [True, pytest.param(False, marks=pytest.mark.full)])
@pytest.mark.parametrize("world", [1, 2, 3, 4, 7, 8])
def test_gradients_of_a_ring_are_those_of_finite_differences(world, fast):
    """fast: along random directions only. There are ranks that hold nothing where blocks < world."""
    g, blocks = torch.Generator().manual_seed(world), 5 if fast else 3
    length = 16 * blocks - 7
    geometry = Geometry.causal(1, length, 16, (((0, 30), (30, length)),))
    tiles = torch.rand(1, 2, blocks, blocks, generator=g) < 0.6
    plan = Plan.build(geometry, tiles, torch.randint(0, length, (1, 2, 1, 4), generator=g, dtype=torch.int32))
    layout = (striped if world % 2 else contiguous)(blocks, world, 16)
    q, k, v, *_ = oracle.inputs(1, 2, 1, length, 2)
    leaves = tuple(x.requires_grad_() for x in (q, k, v))
    assert torch.autograd.gradcheck(lambda *x: Simulated.apply(*x, plan, layout), leaves, fast_mode=fast)


def tiles_of(pointer, full, entries, x: int) -> list[tuple[int, bool]]:
    """(entry, is it full) of line x of a list of tiles."""
    start, end = int(pointer[x]), int(pointer[x + 1])
    return [(entry, i < int(full[x])) for i, entry in enumerate(entries[start:end].tolist())]


def walk(bound, source: int, held, columnwise: bool):
    """Yields (batch, mask head, query block, key block, is it full) of a source, by row or by key."""
    rows, slots, sources = bound.plan.geometry.blocks, bound.blocks_per_source, bound.num_sources
    for b in range(bound.plan.geometry.batch):
        for head in range(bound.mask_heads):
            at = b * bound.mask_heads + head
            if columnwise:
                for slot, key in enumerate(held):
                    x = (at * sources + source) * slots + slot
                    for row, full in tiles_of(bound.key_ptr, bound.key_full, bound.key_tiles, x):
                        yield b, head, rows[row], key, full
            else:
                for row, query in enumerate(rows):
                    x = (at * len(rows) + row) * sources + source
                    for slot, full in tiles_of(bound.row_ptr, bound.row_full, bound.row_tiles, x):
                        yield b, head, query, held[slot], full


@holds(25, 500, drawn=sharded_cases(longest=200))
def test_every_tile_is_computed_once_over_ranks_and_steps(drawn):
    """Bit for bit the tiles of the plan, full ones marked so, from the lists by row and their transpose."""
    case, layout = drawn
    geometry = case.plan.geometry
    keys = torch.arange(geometry.num_tokens)
    seen = (keys >= geometry.lo[..., None]) & (keys <= geometry.hi[..., None])
    if geometry.prefix_lo is not None:
        seen |= (keys >= geometry.prefix_lo[..., None]) & (keys <= geometry.prefix_hi[..., None])
    blocks = (case.num_blocks, geometry.block_size)
    full = seen.unflatten(2, blocks).unflatten(1, blocks).all(4).all(2)
    expected = Counter()
    for b, head, query, key in case.plan.tiles_bool().nonzero().tolist():
        expected[b, head, query, key, bool(full[b, query, key])] += 1
    for columnwise in (False, True):
        computed = Counter()
        for rank in range(layout.world):
            bound = bind(case.plan.rows(geometry.select(layout.assignment[rank])), layout.assignment)
            for step in ring(rank, layout.world).forward:
                [source] = step.sources
                computed.update(walk(bound, source, layout.assignment[source], columnwise))
        assert computed == expected


@holds(10, 200, drawn=sharded_cases(longest=300))
def test_unsharding_undoes_sharding(drawn):
    case, layout = drawn
    shape = case.plan.geometry.batch, case.length
    batch = {"input_ids": torch.arange(shape[0] * shape[1]).view(shape) + 5}

    def body(transport):
        cp = ContextParallel(transport, pattern="dense", layout=layout, block_size=layout.block_size)
        shard = cp.shard(batch)
        return [cp.unshard(shard.inputs[name], shard) for name in ("input_ids", "position_ids")]

    for tokens, positions in run_threads(layout.world, body):
        assert torch.equal(tokens, batch["input_ids"])
        assert (positions == torch.arange(case.length)).all()
