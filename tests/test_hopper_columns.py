"""Columns on Hopper: the tables say exactly what the plan says, and the kernels compute it.

The tables are checked on the CPU, interpreted in a process of its own, and on a GPU; the kernels on a GPU.
"""

from __future__ import annotations

import interpreted
import machine
import pytest
import tolerance
import torch
from interpreted import INTERPRETED, MARKS, kernels_run
from sampling import pairwise

from sparring.kernels import Geometry, Plan, attend, bind, reference
from sparring.kernels.columns import column_heads, gather_columns
from sparring.kernels.plan import columns_of_rows, tile_of_columns

DEVICE = "cpu" if INTERPRETED else "cuda"
if INTERPRETED:
    from sparring.kernels import hopper_columns_schedule  # noqa: F401  (bound to the interpreter by this import)
SIZE, BLOCKS, LENGTH = 128, 9, 1100  # the last block is ragged
hopper = machine.needs("hopper gpu", "triton compiled")
pytestmark = MARKS

if not INTERPRETED:

    @machine.needs("triton", "numpy < 2.4")
    @pytest.mark.parametrize("marks", ["not full", pytest.param("full", marks=pytest.mark.full)])
    def test_in_a_process_of_its_own(marks):
        interpreted.check(__file__, marks)


def geometry(mask: str, batch: int = 1) -> Geometry:
    i = torch.arange(BLOCKS * SIZE, device=DEVICE).expand(batch, -1)
    if mask == "documents":
        documents = ((0, 300), (300, 301), (301, LENGTH))
        whole = Geometry.causal(batch, LENGTH, SIZE, device=DEVICE, documents=(documents,) * batch)
        return whole.pad_to(BLOCKS * SIZE)
    if mask == "prefix":
        return Geometry.from_intervals(i - 300, i, SIZE, (i * 0, i * 0 + 9))
    blind = (i >= SIZE) & (i < 700)
    return Geometry.from_intervals(torch.where(blind, BLOCKS * SIZE, i * 0), torch.where(blind, -1, i), SIZE)


def random_plan(mask, mask_heads, column_heads, groups, columns, batch=1) -> Plan:
    """Half of the tiles chosen; of the columns some are padding and many lie in chosen tiles."""
    g = torch.Generator(DEVICE).manual_seed(0)
    shape = (batch, mask_heads, BLOCKS, BLOCKS)
    tiles = torch.rand(shape, generator=g, device=DEVICE) < 0.5
    shape = (batch, column_heads, groups, columns)
    chosen = torch.randint(0, BLOCKS * SIZE, shape, generator=g, device=DEVICE)
    group = torch.arange(BLOCKS, device=DEVICE) % groups if groups > 1 else None
    return Plan.build(geometry(mask, batch), tiles, chosen, group)


PLANS = pairwise(
    ["documents", "prefix", "empty rows"],
    [(4, 4), (4, 2), (4, 1)],
    ["all", "key", "one"],  # heads of the tiles
    ["all", "key", "one"],  # heads of the columns
    [1, 3],  # groups
    [1, 127, 128, 129, 600],  # columns
    [1, 2],  # batch
)


def plan_of(mask, heads, of_tiles, of_columns, groups, columns, batch) -> Plan:
    count = dict(zip(("all", "key", "one"), (*heads, 1), strict=True))
    return random_plan(mask, count[of_tiles], count[of_columns], groups, columns, batch)


def expected_elements(bound, heads: int):
    """bool [B, heads, queries, C]: what is to be computed, by the column index of each row."""
    plan = bound.plan
    columns = columns_of_rows(plan.columns, plan.column_group, bound.rows)
    columns = columns.repeat_interleave(heads // columns.shape[1], 1)
    free = ~tile_of_columns(bound.tiles, columns, SIZE) & (columns < plan.geometry.num_tokens)
    seen = torch.zeros((), dtype=torch.bool, device=DEVICE)
    position = columns.repeat_interleave(SIZE, 2)
    for lo, hi in plan.geometry.intervals:
        seen = seen | ((position >= lo[:, None, :, None]) & (position <= hi[:, None, :, None]))
    return free.repeat_interleave(SIZE, 2) & seen, seen


@kernels_run
@pytest.mark.parametrize("mask,heads,of_tiles,of_columns,groups,columns,batch", PLANS)
def test_tables_cover_what_is_seen_once(mask, heads, of_tiles, of_columns, groups, columns, batch):
    """Every visible column lies in one tile of its row and of its list; in clear ones all queries see it."""
    from sparring.kernels.hopper_columns_schedule import row_lists, row_table

    plan = plan_of(mask, heads, of_tiles, of_columns, groups, columns, batch)
    bound = bind(plan, (plan.geometry.blocks,))
    elements, seen = (x.cpu().unflatten(2, (-1, SIZE)) for x in expected_elements(bound, heads[0]))
    table, live = row_table(bound, *heads)
    assert sorted(table[:, 0].tolist()) == list(range(batch * heads[0] * BLOCKS))
    group_of = [0] * BLOCKS if bound.column_group is None else bound.column_group.tolist()
    buffers, listed = column_heads(plan, heads[1]), bound.columns.shape[1]
    for place, item in enumerate(table.tolist()):
        tile, begin, end, above, clear, segment, columns_of, bits = item
        b, h, row = tile // BLOCKS // heads[0], tile // BLOCKS % heads[0], tile % BLOCKS
        where, whole = elements[b, h, row], seen[b, h, row].all(0)
        count = -(-(end - begin) // SIZE)
        assert (count > 0) == (place < int(live)) and clear <= max(count, 0)
        assert segment == (b * buffers + h * buffers // heads[0]) * groups + group_of[row]
        assert columns_of == (b * listed + h * listed // heads[0]) * groups + group_of[row]
        assert bits == (b * bound.mask_heads + h * bound.mask_heads // heads[0]) * BLOCKS + row
        assert not where[:, : max(begin, 0)].any() and not where[:, max(end, 0) :].any()
        for i in range(above, above + clear):
            assert whole[max(begin, end - (i + 1) * SIZE) : end - i * SIZE].all()
    entries, sizes = (x.tolist() for x in row_lists(bound))
    tiles = -(-columns // SIZE)
    for x, (own, (clear, used)) in enumerate(zip(entries, sizes, strict=True)):
        b, h, group, first = (
            x // tiles // groups // listed,
            x // tiles // groups % listed,
            *divmod(x % (tiles * groups), tiles),
        )
        part = slice(first * SIZE, min((first + 1) * SIZE, columns))
        heads_of = slice(h * heads[0] // listed, (h + 1) * heads[0] // listed)
        need = elements[b, heads_of][..., part].any(-1).any(-1).any(0)
        assert clear <= used and len(set(own[:used])) == used
        assert all(group_of[row] == group for row in own[:used])
        assert {row for row in range(BLOCKS) if need[row] and group_of[row] == group} <= set(own[:used])
        assert all(seen[b, heads_of, row][..., part].all() for row in own[:clear])


@kernels_run
@pytest.mark.parametrize(
    "mask,of_tiles,of_columns,groups,columns",
    pairwise(["documents", "prefix", "empty rows"], [1, 2, 4], [1, 2, 4], [1, 3], [1, 600]),
)
def test_columns_are_counted_like_their_pairs(mask, of_tiles, of_columns, groups, columns):
    from sparring.kernels.triton_column_counts import column_counts

    plan = random_plan(mask, of_tiles, of_columns, groups, columns, batch=2)
    outside = plan.column_elements()
    expected = torch.stack((outside.sum(3, dtype=torch.int64), (outside > 0).sum(3)))
    assert torch.equal(column_counts(bind(plan, (plan.geometry.blocks,))), expected)


@kernels_run
@pytest.mark.parametrize("dim", [16, 80, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_output_delta_is_that_of_plain_operations(dim, dtype):
    from sparring.kernels.triton_delta import output_delta

    g = torch.Generator(DEVICE).manual_seed(0)
    out, dout = (torch.randn(2, 3, 77, dim, generator=g, device=DEVICE) for _ in range(2))
    dlse, dout = torch.randn(2, 3, 77, generator=g, device=DEVICE), dout.to(dtype)
    exact = (out.double() * dout.double()).sum(-1) - dlse.double()
    bound = 2.0**-23 * dim * float((out * dout).abs().sum(-1).max())
    tier = "triton-interpreter" if INTERPRETED else "gpu-fp32"
    tolerance.check(tier, "delta", output_delta(out, dout, dlse), exact, bound)


def tensors(plan, heads, dim, dtype):
    """q, ck, cv, dout, out, lse, delta; out and lse as after the tiles, some queries have seen nothing."""
    g = torch.Generator("cuda").manual_seed(1)
    batch = plan.geometry.batch

    def normal(count, mean=0.0):
        shape = (batch, count, BLOCKS * SIZE, dim)
        return torch.randn(shape, generator=g, device="cuda") + mean

    q, k, v, dout = (
        x.to(dtype) for x in (normal(heads[0]), normal(heads[1]), normal(heads[1], 1), normal(heads[0], 0.5))
    )
    out, lse, delta = normal(heads[0], 1), normal(heads[0])[..., 0] + 2, normal(heads[0])[..., 0]
    lse[..., ::3] = -torch.inf
    return q, gather_columns(k, plan), gather_columns(v, plan), dout, out, lse, delta


def forward(steps, q, ck, cv, bound, out, lse, unknown=0.0):
    """out and lse with the columns; `unknown` stands in out where nothing has been seen."""
    out, lse = torch.where(lse[..., None] == -torch.inf, unknown, out), lse.clone()
    steps.forward_columns(q, ck, cv, bound, out, lse, q.shape[3] ** -0.5)
    return torch.where(lse[..., None] == -torch.inf, 0.0, out), lse


def backward(steps, q, ck, cv, dout, lse, delta, bound, held=0.0):
    """dq, dck, dcv beyond what the accumulators held."""
    grads = [torch.full(x.shape, held, dtype=lse.dtype, device="cuda") for x in (q, ck, cv)]
    steps.backward_columns(q, ck, cv, dout, lse, delta, bound, *grads, q.shape[3] ** -0.5)
    return [x - held for x in grads]


def check_columns(plan, heads, dim, dtype):
    from sparring.kernels import hopper_deterministic_steps, hopper_steps, triton_columns

    bound = bind(plan, (plan.geometry.blocks,))
    q, ck, cv, dout, out, lse, delta = tensors(plan, heads, dim, dtype)
    wide = [x.double() for x in (q, ck, cv)]
    exact, exact_lse = forward(reference, *wide, bound, out.double(), lse.double())
    low = forward(triton_columns, q, ck, cv, bound, out, lse)[0]
    found, found_lse = forward(hopper_steps, q, ck, cv, bound, out, lse, torch.nan)
    tolerance.check("gpu-bf16", "out", found, exact, tolerance.rounding(low, exact, dtype))
    tolerance.check("gpu-bf16", "lse", found_lse, exact_lse, 1e-4)
    expected = backward(reference, *wide, dout.double(), exact_lse, delta.double(), bound)
    final = exact_lse.float()
    rough = backward(triton_columns, q, ck, cv, dout, final, delta, bound)
    for steps in (hopper_steps, hopper_deterministic_steps):
        grads = backward(steps, q, ck, cv, dout, final, delta, bound, held=2.0)
        for name, x, y, z in zip(("dq", "dck", "dcv"), grads, expected, rough, strict=True):
            tolerance.check("gpu-bf16", name, x, y, tolerance.rounding(z, y, dtype))


@hopper
@pytest.mark.parametrize("mask,heads,of_tiles,of_columns,groups,columns,batch", PLANS)
def test_kernels_match_the_reference(mask, heads, of_tiles, of_columns, groups, columns, batch):
    plan = plan_of(mask, heads, of_tiles, of_columns, groups, columns, batch)
    check_columns(plan, heads, 128, torch.bfloat16)


@hopper
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [64, 80, 96, 128])
def test_every_head_dim_and_dtype(dim, dtype):
    for mask in ("prefix", "documents"):
        check_columns(random_plan(mask, 2, 4, 1, 600), (4, 2), dim, dtype)


@hopper
def test_whole_attention_with_columns_matches_fp64():
    """Tiles and columns together, through the operator, in both modes."""
    plan = random_plan("prefix", 2, 4, 1, 300)
    g = torch.Generator("cuda").manual_seed(2)
    q, k, v, dout = (
        torch.randn(1, heads, BLOCKS * SIZE, 128, generator=g, device="cuda").bfloat16()
        for heads in (4, 2, 2, 4)
    )
    results = []
    for impl, dtype in (("reference", torch.float64), ("triton", q.dtype), ("hopper", q.dtype)):
        leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        out, _ = attend(*leaves, plan, impl=impl)
        results.append([out, *torch.autograd.grad(out, leaves, dout.to(dtype))])
    for name, y, low, x in zip(("out", "dq", "dk", "dv"), *results, strict=True):
        tolerance.check("gpu-bf16", name, x, y, tolerance.rounding(low, y, q.dtype))


@hopper
def test_columns_repeat_bit_for_bit():
    from sparring.kernels import hopper_steps

    plan = random_plan("documents", 2, 4, 1, 600)
    bound = bind(plan, (plan.geometry.blocks,))
    q, ck, cv, dout, out, lse, delta = tensors(plan, (4, 2), 128, torch.bfloat16)

    def once():
        results = forward(hopper_steps, q, ck, cv, bound, out, lse)
        return *results, *backward(hopper_steps, q, ck, cv, dout, results[1], delta, bound)

    first = once()
    for _ in range(9):
        assert all(torch.equal(x, y) for x, y in zip(once(), first, strict=True))


@hopper
def test_columns_behind_a_row_are_not_read():
    """Causal: NaN in later columns leaves the rows before them as they are."""
    from sparring.kernels import hopper_steps

    plan = random_plan("empty rows", 1, 1, 1, 600)
    bound = bind(plan, (plan.geometry.blocks,))
    q, ck, cv, dout, out, lse, delta = tensors(plan, (4, 2), 128, torch.bfloat16)

    def once():
        results = forward(hopper_steps, q, ck, cv, bound, out, lse)
        return *results, backward(hopper_steps, q, ck, cv, dout, torch.full_like(lse, 3.0), delta, bound)[0]

    expected = once()
    late = (plan.columns >= 6 * SIZE)[..., None]
    ck, cv = (torch.where(late, torch.nan, x) for x in (ck, cv))
    for x, y in zip(once(), expected, strict=True):
        assert torch.equal(x[:, :, : 6 * SIZE], y[:, :, : 6 * SIZE])


@hopper
def test_no_synchronisation_with_the_host():
    from sparring.kernels import hopper_steps

    plan = random_plan("prefix", 2, 2, 3, 300)
    q, ck, cv, dout, out, lse, delta = tensors(plan, (4, 2), 128, torch.bfloat16)

    def once():
        bound = bind(plan, (plan.geometry.blocks,))
        results = forward(hopper_steps, q, ck, cv, bound, out, lse)
        return *results, *backward(hopper_steps, q, ck, cv, dout, results[1], delta, bound)

    once()  # compiles, and fills what the geometry caches
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        once()
    finally:
        torch.cuda.set_sync_debug_mode("default")
