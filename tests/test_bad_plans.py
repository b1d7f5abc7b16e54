"""The error contract on one device: bad geometries, plans, patterns, layouts and inputs of attend.

Refused before any kernel starts, with what was given, what is needed and a remedy; and what looks odd but
has a meaning gives the result that the documentation promises.
"""

from __future__ import annotations

import machine
import oracle
import pytest
import tolerance
import torch
from refusals import raises

from sparring.balance import contiguous, from_assignment, ring, striped, zigzag
from sparring.kernels import Geometry, Plan, attend
from sparring.kernels.patterns import Dense, SinkWindow, VerticalSlash, make_plan

SIZE, LENGTH = 16, 40  # padded to 48: three blocks
GEOMETRY = Geometry.causal(1, LENGTH, SIZE)
TILES = torch.ones(1, 1, 3, 3, dtype=torch.bool)
PLAN = Plan.build(GEOMETRY, TILES)


def columns(*positions, dtype=torch.int32):
    return torch.tensor(positions, dtype=dtype).view(1, 1, 1, -1)


def intervals(shape=(1, LENGTH), dtype=torch.int64, device="cpu"):
    return torch.zeros(shape, dtype=dtype, device=device)


# -- geometries ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments,text",
    [
        ((0, 40, 16), "batch size is 0; it needs at least 1 row"),
        (("2", 40, 16), "batch size is 2; it needs at least 1 row"),
        ((1, 40.0, 16), "sequence length is 40.0; attention needs at least 1 token"),
        ((1, 40, 16, (((0, 2.5),),)), "document (0, 2.5) of row 0 is empty..ranges of whole numbers with"),
        ((1, 0, 16), "sequence length is 0; attention needs at least 1 token"),
        ((1, -5, 16), "sequence length is -5; attention needs at least 1 token"),
        ((1, 40, 100), "block_size 100 must be a power of two of at least 16; use 128"),
        ((1, 40, 8), "block_size 8 must be a power of two of at least 16; use 128"),
        ((1, 40, 0), "block_size 0 must be a power of two of at least 16; use 128"),
        ((1, 40, -16), "block_size -16 must be a power of two of at least 16; use 128"),
        ((1, 40, 16.0), "block_size 16.0 must be a power of two of at least 16; use 128"),
        ((1, 40, 16, (((0, 20), (10, 40)),)), "document (10, 40) of row 0 is empty, overlaps..40 tokens; "),
        ((1, 40, 16, (((20, 40), (0, 20)),)), "document (0, 20) of row 0 is empty, overlaps..40 tokens; "),
        ((1, 40, 16, (((0, 20), (0, 20)),)), "document (0, 20) of row 0 is empty, overlaps..40 tokens; "),
        ((1, 40, 16, (((0, 20), (20, 20)),)), "document (20, 20) of row 0 is empty..40 tokens; "),
        ((1, 40, 16, (((0, 0),),)), "document (0, 0) of row 0 is empty..40 tokens; "),
        ((1, 40, 16, (((0, 41),),)), "document (0, 41) of row 0..leaves the 40 tokens; documents are"),
        ((1, 40, 16, (((-3, 4),),)), "document (-3, 4) of row 0..leaves the 40 tokens; documents are"),
        ((2, 40, 16, (((0, 40),), ((0, 41),))), "document (0, 41) of row 1..leaves the 40 tokens; "),
        ((1, 40, 16, ((), ())), "documents of 2 rows for a batch of 1; give one tuple a row"),
        ((1, 40, 16, ()), "documents of 0 rows for a batch of 1; give one tuple a row"),
        ((1, 40, 16, None, (0, 3)), "blocks hold 2 ids..1 of them wrong (first: [3])..3 blocks 0..2"),
        ((1, 40, 16, None, (-1, 0)), "1 of them wrong (first: [-1]); use different int ids of the 3 blocks"),
        ((1, 40, 16, None, (1, 1)), "blocks hold 2 ids, 1 of them different, 0 of them wrong..; use"),
        ((1, 40, 16, None, (0.0, 1.5)), "2 of them wrong (first: [0.0, 1.5]); use different int ids"),
    ],
)
def test_geometries(arguments, text):
    with raises(ValueError, text):
        Geometry.causal(*arguments)


@pytest.mark.parametrize(
    "bounds,error,text",
    [
        (([0], [1]), TypeError, "lo, hi, prefix are ['list', 'list']; use int32 tensors"),
        ((intervals((40,)), intervals((40,))), ValueError, "shapes [(40,), (40,)]; all..[batch, length]"),
        ((intervals(), intervals((1, 41))), ValueError, "shapes [(1, 40), (1, 41)]; all must be the same"),
        (
            (intervals(), intervals(dtype=torch.float32)),
            ValueError,
            "are [torch.int64, torch.float32]; use token positions of torch.int32 or torch.int64",
        ),
        ((intervals(dtype=torch.bool),) * 2, ValueError, "are [torch.bool, torch.bool]; use token positions"),
        ((intervals(), intervals(device="meta")), ValueError, "'cpu'..'meta'..; use one device"),
        ((intervals((0, 40)),) * 2, ValueError, "batch size is 0; it needs at least 1 row"),
        ((intervals((1, 0)),) * 2, ValueError, "sequence length is 0; attention needs at least 1 token"),
        ((intervals(), intervals(), (intervals((1, 9)),) * 2), ValueError, "(1, 9)]; all must be the same"),
        ((intervals(), intervals(), (intervals(),)), ValueError, "shapes [(1, 40), (1, 40), (1, 40)]; all"),
    ],
)
def test_intervals(bounds, error, text):
    lo, hi, *prefix = bounds
    with raises(error, text):
        Geometry.from_intervals(lo, hi, SIZE, *prefix)


def test_padding_to_a_smaller_or_broken_length():
    for tokens in (32, 49):
        with raises(ValueError, f"cannot pad 48 tokens to {tokens}; use a multiple of the block size 16"):
            GEOMETRY.pad_to(tokens)


# -- plans --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments,error,text",
    [
        (([1],), TypeError, "tiles: a list; use a tensor of torch.bool"),
        ((TILES[..., :2],), ValueError, "tiles: shape (1, 1, 3, 2)..held blocks=3, key blocks=3]"),
        ((TILES[:, :, :2],), ValueError, "tiles: shape (1, 1, 2, 3)..held blocks=3, key blocks=3]"),
        ((TILES.expand(2, -1, -1, -1),), ValueError, "tiles: shape (2, 1, 3, 3)..needs [batch=1"),
        ((TILES[0],), ValueError, "tiles: shape (1, 3, 3); this geometry needs [batch=1, mask heads"),
        ((TILES.int(),), ValueError, "tiles: torch.int32; use torch.bool"),
        ((TILES.float(),), ValueError, "tiles: torch.float32; use torch.bool"),
        ((TILES.to("meta"),), ValueError, "tiles: on meta, the geometry on cpu; use one device"),
        ((TILES, [1, 2]), TypeError, "columns: a list; use a tensor of torch.int32"),
        ((TILES, columns(1)[0]), ValueError, "columns: shape (1, 1, 1)..[batch=1, mask heads, groups"),
        ((TILES, columns(1).expand(2, -1, -1, -1)), ValueError, "columns: shape (2, 1, 1, 1)..batch=1"),
        ((TILES, columns(1).float()), ValueError, "columns: torch.float32; use torch.int32 or torch.int64"),
        ((TILES, columns(1).bool()), ValueError, "columns: torch.bool; use torch.int32 or torch.int64"),
        ((TILES, columns(1).to("meta")), ValueError, "columns: on meta, the geometry on cpu; use one device"),
        (
            (TILES, columns(1).expand(-1, -1, 2, -1)),
            ValueError,
            "columns have 2 groups; say which of them each of the 3 query blocks uses by column_group",
        ),
        (
            (TILES, columns(1), torch.zeros(2, dtype=torch.int32)),
            ValueError,
            "column_group: shape (2,); this geometry needs [held blocks=3]",
        ),
        (
            (TILES, columns(1), torch.zeros(3)),
            ValueError,
            "column_group: torch.float32; use torch.int32 or torch.int64",
        ),
        ((TILES, columns(1), [0, 0, 0]), TypeError, "column_group: a list; use a tensor of torch.int32"),
        (
            (TILES, columns(1), torch.tensor([0, 1, 0])),
            ValueError,
            "column_group: 0 to 1; columns have the groups 0 to 0",
        ),
        (
            (TILES, columns(1), torch.tensor([0, -1, 0])),
            ValueError,
            "column_group: -1 to 0; columns have the groups 0 to 0",
        ),
    ],
)
def test_plans(arguments, error, text):
    with raises(error, text):
        Plan.build(GEOMETRY, *arguments)


@pytest.mark.parametrize(
    "tiles,cols,text",
    [
        (PLAN.tiles.long(), None, "tiles: torch.int64; use torch.int32"),
        (PLAN.tiles[..., :0], None, "tiles: shape (1, 1, 3, 0); this geometry needs [..words=1]"),
        (PLAN.tiles | 4, None, "tiles: 2 chosen that no query may see; use Plan.build, which drops them"),
        (PLAN.tiles, columns(1, dtype=torch.int64), "columns: torch.int64; use torch.int32"),
        (PLAN.tiles, columns(0, 49), "columns: positions 0 to 49; use 0 to 47 and 48 for none"),
        (PLAN.tiles, columns(-1, 3), "columns: positions -1 to 3; use 0 to 47 and 48 for none"),
        (PLAN.tiles, columns(3, 2), "columns: not ascending and unique; use Plan.build, which sorts them"),
        (PLAN.tiles, columns(3, 3), "columns: not ascending and unique; use Plan.build, which sorts them"),
    ],
)
def test_plans_made_without_build(tiles, cols, text):
    with raises(ValueError, text):
        Plan(GEOMETRY, tiles, cols)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=machine.needs("gpu"))])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_unsorted_repeated_and_impossible_columns_have_their_meaning(device, dtype):
    """They are sorted, count once and stand for no column; so on a GPU, where nobody looks, as well."""
    far = 2**31 - 1 if dtype == torch.int32 else 2**32 + 5  # must not wrap around to 5
    geometry, tiles = GEOMETRY.to(device), TILES.to(device)
    plan = Plan.build(geometry, tiles, columns(7, 2, 7, -4, 48, far, dtype=dtype).to(device))
    assert plan.columns.tolist() == [[[[2, 7, 48, 48, 48, 48]]]]
    q, k, v, *_ = (x.to(device) for x in oracle.inputs(1, 2, 1, LENGTH, 16, dtype=torch.float32))
    sorted_plan = Plan.build(geometry, tiles, columns(2, 7, 48, 48, 48, 48).to(device))
    assert torch.equal(attend(q, k, v, plan)[0], attend(q, k, v, sorted_plan)[0])


# -- attend and make_plan -----------------------------------------------------------------------------


def tensors(heads=4, kv_heads=2, length=LENGTH, dim=8, batch=1, dtype=torch.float32):
    q = torch.zeros(batch, heads, length, dim, dtype=dtype)
    k = torch.zeros(batch, kv_heads, length, dim, dtype=dtype)
    return [q, k, k.clone()]


def changed(index, change):
    q_k_v = tensors()
    q_k_v[index] = change(q_k_v[index])
    return q_k_v


BAD_TENSORS = [
    ([None, None, None], TypeError, "q is a NoneType; use a tensor"),
    (changed(1, lambda k: k.tolist()), TypeError, "k is a list; use a tensor [batch, heads, sequence"),
    (changed(0, lambda q: q[0]), ValueError, "have 3, 4, 4 dims; all must be [batch, heads, sequence"),
    (changed(2, lambda v: v[..., None]), ValueError, "q, k, v have 4, 4, 5 dims; all must be"),
    (changed(1, lambda k: k.to_sparse()), NotImplementedError, "k is a nested or sparse tensor; only dense"),
    (tensors(heads=10, kv_heads=4), ValueError, "10 query heads are not divisible by 4 key heads; every"),
    (tensors(heads=2, kv_heads=4), ValueError, "2 query heads are not divisible by 4 key heads; every"),
    (tensors(heads=0), ValueError, "0 query heads are not divisible by 2 key heads; every key head"),
    (tensors(kv_heads=0), ValueError, "4 query heads are not divisible by 0 key heads; every key head"),
    (tensors(dim=0), ValueError, "head dim is 0; it needs at least 1 element"),
    (tensors(batch=0), ValueError, "batch 0 of q differs from batch 1 of the plan; plan the same batch"),
    (tensors(batch=2), ValueError, "batch 2 of q differs from batch 1 of the plan; plan the same batch"),
    (
        changed(1, lambda k: k[..., :4]),
        ValueError,
        "q (1, 4, 40, 8), k (1, 2, 40, 4), v (1, 2, 40, 8) do not fit..head dim must agree",
    ),
    (changed(2, lambda v: v[..., :4]), NotImplementedError, "value head dim 4..key head dim 8 (MLA); only"),
    (changed(2, lambda v: v[:, :1]), ValueError, "v (1, 1, 40, 8) do not fit; batch, sequence and head dim"),
    (changed(1, lambda k: k[:, :, :9]), ValueError, "k (1, 2, 9, 8), v (1, 2, 40, 8) do not fit; batch"),
    (changed(1, torch.Tensor.double), ValueError, "torch.float32, torch.float64, torch.float32; all must"),
    (changed(1, lambda k: k.to("meta")), ValueError, "are on cpu, meta, cpu, cpu; use one device"),
    ([x.to("meta") for x in tensors()], ValueError, "are on meta, meta, meta, cpu; use one device"),
    *[
        (
            tensors(dtype=dtype),
            ValueError,
            f"q, k, v are {dtype}..; all must be one of fp16, bf16, fp32, fp64",
        )
        for dtype in (torch.int8, torch.int32, torch.bool, torch.float8_e4m3fn, torch.complex64)
    ],
]


@pytest.mark.parametrize("q_k_v,error,text", BAD_TENSORS)
def test_tensors(q_k_v, error, text):
    """attend, and a pattern that looks at the tensors before it."""
    with raises(error, text):
        attend(*q_k_v, PLAN)
    with raises(error, text):
        make_plan(VerticalSlash(), *q_k_v, GEOMETRY)


@pytest.mark.parametrize(
    "arguments,error,text",
    [
        ({"plan": Dense()}, TypeError, "plan is a Dense; make a Plan, by Plan.build or by make_plan"),
        ({"plan": None}, TypeError, "plan is a NoneType; make a Plan, by Plan.build or by make_plan"),
        ({"impl": "fast"}, ValueError, "impl 'fast' is unknown; use one of auto, reference, triton"),
        ({"impl": None}, ValueError, "impl None is unknown; use one of auto, reference, triton"),
        ({"scale": float("nan")}, ValueError, "scale is nan; use a finite number, or None for 1 / sqrt(8)"),
        ({"scale": float("inf")}, ValueError, "scale is inf; use a finite number, or None for 1 / sqrt(8)"),
        ({"scale": torch.ones(())}, ValueError, "scale is tensor(1.); use a finite number, or None"),
        ({"scale": "1"}, ValueError, "scale is '1'; use a finite number, or None for 1 / sqrt(8)"),
        (
            {"plan": Plan.build(GEOMETRY, TILES.expand(-1, 3, -1, -1))},
            ValueError,
            "the plan has 3 mask heads; use 1, 2 (key heads) or 4 (query)",
        ),
        (
            {"plan": Plan.build(GEOMETRY, TILES[:, :0])},
            ValueError,
            "the plan has 0 mask heads; use 1, 2 (key heads) or 4 (query)",
        ),
        (
            {"plan": Plan.build(GEOMETRY, TILES, columns(1).expand(-1, 3, -1, -1))},
            ValueError,
            "the plan has 3 mask heads; use 1, 2 (key heads) or 4 (query)",
        ),
        (
            {"plan": Plan.build(GEOMETRY.select((0, 2)), TILES[:, :, :2])},
            ValueError,
            "the plan holds 2 of 3 blocks or another order; attend needs all of them in logical order",
        ),
        (
            {"plan": Plan.build(Geometry.causal(1, 50, SIZE), torch.ones(1, 1, 4, 4).bool())},
            ValueError,
            "q has 40 tokens, the plan covers 64 in blocks of 16; build the geometry for length 40",
        ),
    ],
)
def test_attend(arguments, error, text):
    with raises(error, text):
        attend(*tensors(), **{"plan": PLAN} | arguments)


@pytest.mark.parametrize(
    "pattern,q_k_v,error,text",
    [
        ("dense", tensors(length=48), TypeError, "pattern is 'dense'; use an object of a pattern, such as"),
        (Dense, tensors(length=48), TypeError, "use an object of a pattern, such as Dense()"),
        (Dense(), tensors(), ValueError, "q has 40 tokens, the geometry holds 48 in blocks of 16; pad"),
        (
            VerticalSlash(segment=40),
            tensors(length=48),
            ValueError,
            "segment 40 is not a multiple of the block size 16; use 48",
        ),
    ],
)
def test_make_plan(pattern, q_k_v, error, text):
    with raises(error, text):
        make_plan(pattern, *q_k_v, GEOMETRY)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=machine.needs("gpu"))])
@pytest.mark.parametrize("dim", [1, 20, 80, 96])
def test_any_head_dim_works(dim, device):
    """Head dims are padded, not refused; test_triton.py has them in the interpreter and on GPUs in bf16."""
    q, k, v, dout, dlse = oracle.inputs(1, 2, 1, LENGTH, dim)
    mask = oracle.expand(PLAN, 2)[:, :, :LENGTH, :LENGTH]
    expected = oracle.attention(q, k, v, mask, dout, dlse)[0]
    plan = Plan.build(GEOMETRY.to(device), TILES.to(device))
    dtype, tier, bound = torch.float64, "fp64", 1e-10
    if device == "cuda":
        dtype, tier, low = torch.float32, "gpu-fp32", [x.float() for x in (q, k, v)]
        low = torch.nn.functional.scaled_dot_product_attention(*low, attn_mask=mask, enable_gqa=True)
        bound = tolerance.rounding(low, expected, dtype)
    out, _ = attend(*(x.to(device, dtype) for x in (q, k, v)), plan)
    tolerance.check(tier, "out", out.cpu(), expected, bound)


# -- patterns -----------------------------------------------------------------------------------------

NAN = float("nan")


@pytest.mark.parametrize(
    "family,options,text",
    [
        (SinkWindow, {"sink": -1}, "sink is -1; it is a count: use a whole number, 0 or more"),
        (SinkWindow, {"window": -5}, "window is -5; it is a count: use a whole number, 0 or more"),
        (SinkWindow, {"window": NAN}, "window is nan; it is a count: use a whole number, 0 or more"),
        (SinkWindow, {"sink": 1.5}, "sink is 1.5; it is a count: use a whole number, 0 or more"),
        (SinkWindow, {"sink": None}, "sink is None; it is a count: use a whole number, 0 or more"),
        (VerticalSlash, {"top_p": 0.0}, "top_p is 0.0; it is a share of attention in (0, 1]"),
        (VerticalSlash, {"top_p": -0.1}, "top_p is -0.1; it is a share of attention in (0, 1]"),
        (VerticalSlash, {"top_p": 1.5}, "top_p is 1.5; it is a share of attention in (0, 1]"),
        (VerticalSlash, {"top_p": NAN}, "top_p is nan; it is a share of attention in (0, 1]"),
        (VerticalSlash, {"columns": (20, 10)}, "columns is (20, 10); use (fewest, most) with 0 <= fewest"),
        (VerticalSlash, {"columns": (-1, 30)}, "columns is (-1, 30); use (fewest, most) with 0 <= fewest"),
        (VerticalSlash, {"columns": (0, NAN)}, "columns is (0, nan); use (fewest, most) with 0 <= fewest"),
        (VerticalSlash, {"columns": (0, 20.5)}, "columns is 20.5; it is a count: use a whole number"),
        (VerticalSlash, {"columns": 64}, "columns is 64; use (fewest, most) with 0 <= fewest <= most"),
        (VerticalSlash, {"slashes": (3, 2)}, "slashes is (3, 2); use (fewest, most) with 0 <= fewest"),
        (VerticalSlash, {"slashes": (1, 2, 3)}, "slashes is (1, 2, 3); use (fewest, most) with 0 <= fewest"),
        (VerticalSlash, {"columns": (0, 8)}, "sink 16 exceeds the 8 columns a document may have; raise"),
        (VerticalSlash, {"probe": 65}, "probe is 65; use 1 to 64 queries"),
        (VerticalSlash, {"probe": 0}, "probe is 0; use 1 to 64 queries"),
        (VerticalSlash, {"probe": 3.5}, "probe is 3.5; it is a count: use a whole number"),
        (VerticalSlash, {"sink": -2}, "sink is -2; it is a count: use a whole number, 0 or more"),
        (VerticalSlash, {"window": -1}, "window is -1; it is a count: use a whole number, 0 or more"),
        (VerticalSlash, {"segment": 0}, "segment is 0; use a multiple of the block size, or None"),
        (VerticalSlash, {"segment": 16.0}, "segment is 16.0; use a multiple of the block size, or None"),
    ],
)
def test_budgets(family, options, text):
    with raises(ValueError, text):
        family(**options)


@pytest.mark.parametrize(
    "pattern",
    [
        SinkWindow(sink=10**6, window=0),
        SinkWindow(sink=0, window=10**6),
        VerticalSlash(top_p=1.0, columns=(10**6, 10**6), slashes=(10**6, 10**6), window=0),
    ],
)
def test_budgets_beyond_the_sequence_choose_all_of_it(pattern):
    """A budget is a limit: more than there is means all there is."""
    q, k, v, *_ = oracle.inputs(1, 2, 1, 48, 8, dtype=torch.float32)
    plan, everything = (make_plan(x, q, k, v, GEOMETRY) for x in (pattern, Dense()))
    expected = everything.element_mask()[:, :, :LENGTH, :LENGTH]
    actual = plan.element_mask()[:, :, :LENGTH, :LENGTH]
    assert torch.equal(actual, expected.expand_as(actual))


@pytest.mark.parametrize("bad", [NAN, float("inf"), -float("inf")])
def test_plans_of_tensors_that_are_not_finite_are_plans(bad):
    """Estimates turn scores into integers and indices: no NaN may become a tile or column out of range."""
    for place in range(3):
        q_k_v = list(oracle.inputs(1, 2, 1, 48, 8, dtype=torch.float32)[:3])
        q_k_v[place][0, 0, 30:, 3] = bad
        plan = make_plan(VerticalSlash(columns=(2, 4), sink=2, probe=8, window=0), *q_k_v, GEOMETRY)
        assert plan.columns.min() >= 0 and plan.columns.max() <= GEOMETRY.num_tokens
        assert plan.tiles_bool()[..., range(3), range(3)].all()


# -- layouts and schedules ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make,error,text",
    [
        (lambda: from_assignment(((0, 2), (2,)), 16), ValueError, "holds 3 blocks, 2..misses 1..exactly one"),
        (lambda: from_assignment(((0, -1),), 16), ValueError, "holds 2 blocks, 2..misses 1..0..1 to exactly"),
        (lambda: from_assignment(((0, 1.7),), 16), TypeError, "'float' object cannot be interpreted as an"),
        (
            lambda: from_assignment((), 16),
            ValueError,
            "names 0 ranks; give one tuple of blocks for each rank",
        ),
        (lambda: from_assignment(((0,),), 0), ValueError, "block_size is 0; it must be at least 1 token"),
        (lambda: contiguous(4, 0, 16), ValueError, "4 blocks on 0 ranks; it needs 0 blocks and 1 rank at"),
        (lambda: zigzag(4, 0, 16), ValueError, "4 blocks on 0 ranks; it needs 0 blocks and 1 rank at least"),
        (lambda: striped(-1, 2, 16), ValueError, "-1 blocks on 2 ranks; it needs 0 blocks and 1 rank at"),
        (lambda: striped(4, 2, 16, 0), ValueError, "stripe is 0 blocks; it must be at least 1"),
        (lambda: ring(2, 2), ValueError, "rank is 2, world is 2; a ring needs 0 <= rank < world"),
        (lambda: ring(0, 0), ValueError, "rank is 0, world is 0; a ring needs 0 <= rank < world"),
    ],
)
def test_layouts(make, error, text):
    with raises(error, text):
        make()
