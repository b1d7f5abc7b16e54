"""attend (reference implementation) against the fp64 oracle: forward, lse and every gradient."""

from __future__ import annotations

import itertools

import oracle
import pytest
import tolerance
import torch

from sparring.kernels import Geometry, Plan, attend
from sparring.kernels.geometry import EMPTY, FULL, PARTIAL

BOUND = 1e-10
pytestmark = pytest.mark.usefixtures("poisoned")


def random_plan(geometry, mask_heads, column_heads=0, groups=1, density=0.4, count=9, seed=1):
    g = torch.Generator().manual_seed(seed)
    rows = len(geometry.blocks)
    tiles = torch.rand(geometry.batch, mask_heads, rows, geometry.num_blocks, generator=g) < density
    columns = group = None
    if column_heads:
        shape = (geometry.batch, column_heads, groups, count)
        columns = torch.randint(0, geometry.num_tokens + 4, shape, generator=g)
        group = torch.arange(rows) % groups if groups > 1 else None
    return Plan.build(geometry, tiles, columns, group)


def compare(plan, heads, kv_heads, length, dim=16, bound=BOUND, **kwargs):
    geometry = plan.geometry
    q, k, v, dout, dlse = oracle.inputs(geometry.batch, heads, kv_heads, length, dim)
    mask = oracle.expand(plan, heads)[:, :, :length, :length]
    dlse = torch.where(mask.any(-1), dlse, 0.0)
    expected = oracle.attention(q, k, v, mask, dout, dlse)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out, lse = attend(*leaves, plan, **kwargs)
    grads = torch.autograd.grad((out, lse), leaves, (dout, dlse))
    for name, actual, reference in zip("out lse dq dk dv".split(), (out, lse, *grads), expected, strict=True):
        tolerance.check("fp64", name, actual, reference, bound)


DOCUMENTS = (((0, 20), (20, 21), (21, 90)), ((3, 50), (60, 87)))


def geometries():
    window = torch.arange(90).expand(2, -1)
    lo, hi = (window - 24).clamp(min=0), window
    return {
        "causal": Geometry.causal(2, 96, 16),
        "ragged": Geometry.causal(2, 90, 16),
        "packed": Geometry.causal(2, 90, 16, DOCUMENTS),
        "full": Geometry.from_intervals(torch.zeros_like(window), torch.full_like(window, 89), 16),
        "window": Geometry.from_intervals(lo, hi, 16),
        "sink": Geometry.from_intervals(lo, hi, 16, (torch.zeros_like(lo), torch.full_like(lo, 3))),
    }


@pytest.mark.parametrize("mask_heads", [1, 2, 4])
@pytest.mark.parametrize("column_heads,groups", [(0, 1), (1, 1), (2, 3), (4, 1)])
@pytest.mark.parametrize("name", list(geometries()))
def test_matches_oracle(name, column_heads, groups, mask_heads):
    geometry = geometries()[name]
    length = 96 if name == "causal" else 90
    compare(random_plan(geometry, mask_heads, column_heads, groups), 4, 2, length, impl="reference")


@pytest.mark.parametrize("heads,kv_heads", [(3, 3), (6, 1), (6, 2)])
def test_head_groupings(heads, kv_heads):
    geometry = Geometry.causal(1, 80, 16)
    for mask_heads in {1, kv_heads, heads}:
        compare(random_plan(geometry, mask_heads, heads), heads, kv_heads, 80, impl="reference")


def test_one_token():
    compare(random_plan(Geometry.causal(1, 1, 16), 1), 2, 2, 1, impl="reference")


def test_element_mask_matches_oracle_expansion():
    for name, geometry in geometries().items():
        plan = random_plan(geometry, 2, 4, 2)
        assert torch.equal(plan.element_mask(), oracle.expand(plan, 4)), name


def test_classes_of_tiles_are_exact():
    """Intervals that begin and end at every place in a block: nothing, all or a part of a tile is visible."""
    at = torch.arange(96)
    for back, ahead in itertools.product(range(40), (0, 1, 15, 16, 17)):
        geometry = Geometry.from_intervals(at[None] - back, at[None] + ahead, 16)
        seen = (at >= at[:, None] - back) & (at <= at[:, None] + ahead)
        count = seen.view(6, 16, 6, 16).sum((1, 3))
        expected = torch.where(count == 0, EMPTY, torch.where(count == 256, FULL, PARTIAL))
        assert torch.equal(geometry.tile_class[0], expected.to(torch.int8)), (back, ahead)


def test_the_diagonal_tile_is_always_chosen():
    geometry = Geometry.causal(2, 90, 16, DOCUMENTS).select((4, 1, 0))
    plan = Plan.build(geometry, torch.zeros(2, 3, 3, 6, dtype=torch.bool))
    assert torch.equal(plan.tiles_bool(), torch.eye(6, dtype=torch.bool)[[4, 1, 0]].expand(2, 3, 3, 6))


@pytest.mark.parametrize("back,ahead", [(40, 0), (40, 40), (0, 17)])
def test_columns_are_seen_from_the_first_visible_one_to_the_last(back, ahead):
    """Every token is a column, so one lies at each end of each query's interval, outside chosen tiles too."""
    at = torch.arange(96)[None]
    geometry = Geometry.from_intervals(at - back, at + ahead, 16)
    none = torch.zeros(1, 1, 6, 6, dtype=torch.bool)
    compare(Plan.build(geometry, none, at[:, None, None]), 2, 1, 96, impl="reference")


def test_columns_and_tiles_beyond_the_first_word_of_the_bitmask():
    geometry = Geometry.causal(1, 40 * 16, 16)
    compare(random_plan(geometry, 1, 1, count=30), 1, 1, 40 * 16, impl="reference")


def test_a_dropped_tile_is_noticed():
    """Every tile of a small plan matters: without it some output moves far beyond the bound."""
    geometry = Geometry.causal(1, 64, 16)
    plan = random_plan(geometry, 1, density=0.7)
    q, k, v, dout, dlse = oracle.inputs(1, 2, 1, 64, 16)
    out, _ = attend(q, k, v, plan, impl="reference")
    tiles = plan.tiles_bool()
    for row, block in (tiles[0, 0]).nonzero().tolist():
        if row == block:
            continue
        less = tiles.clone()
        less[0, 0, row, block] = False
        other, _ = attend(q, k, v, Plan.build(geometry, less), impl="reference")
        assert oracle.max_error(out, other) > 1e6 * BOUND


def test_gradcheck():
    geometry = Geometry.causal(1, 40, 16)
    plan = random_plan(geometry, 2, 2)
    q, k, v, *_ = oracle.inputs(1, 2, 1, 40, 4)
    leaves = tuple(x.requires_grad_() for x in (q, k, v))
    assert torch.autograd.gradcheck(lambda *x: attend(*x, plan, impl="reference"), leaves)


def test_counts_are_exact():
    """visible_elements and column_elements add up to the element mask."""
    for name, geometry in geometries().items():
        plan = random_plan(geometry, 2, 4, 2)
        tiles = plan.tiles_bool() * geometry.visible_elements[:, None]
        tiles = tiles.repeat_interleave(2, 1).sum((2, 3)) + plan.column_elements().sum((2, 3))
        assert torch.equal(tiles, oracle.expand(plan, 4).sum((2, 3))), name


@pytest.mark.parametrize(
    "change,error,words",
    [
        (dict(q=(1, 3, 32, 16)), ValueError, "3 query heads.*2 key heads"),
        (dict(k=(1, 2, 16, 16)), ValueError, "do not fit"),
        (dict(v=(1, 2, 32, 8)), NotImplementedError, "MLA"),
        (dict(dtype=torch.int32), ValueError, "fp16, bf16, fp32"),
        (dict(q=(1, 4, 50, 16), k=(1, 2, 50, 16), v=(1, 2, 50, 16)), ValueError, "50 tokens.*32"),
    ],
)
def test_bad_inputs(change, error, words):
    shapes = dict(q=(1, 4, 32, 16), k=(1, 2, 32, 16), v=(1, 2, 32, 16)) | change
    dtype = shapes.pop("dtype", torch.float32)
    tensors = [torch.zeros(shapes[name], dtype=dtype) for name in "qkv"]
    geometry = Geometry.causal(1, 32, 16)
    plan = Plan.build(geometry, torch.ones(1, 1, 2, 2, dtype=torch.bool))
    with pytest.raises(error, match=words):
        attend(*tensors, plan)


def test_bad_geometry_and_plan():
    with pytest.raises(ValueError, match="length is 0"):
        Geometry.causal(1, 0)
    with pytest.raises(ValueError, match="power of two"):
        Geometry.causal(1, 10, 100)
    with pytest.raises(ValueError, match=r"\(5, 5\)"):
        Geometry.causal(1, 10, 16, (((0, 5), (5, 5)),))
    geometry = Geometry.causal(1, 32, 16)
    with pytest.raises(ValueError, match="key blocks=2"):
        Plan.build(geometry, torch.ones(1, 1, 2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="3 groups"):
        Plan.build(geometry, torch.ones(1, 1, 2, 2, dtype=torch.bool), torch.zeros(1, 1, 3, 4).int())
    plan = Plan.build(geometry, torch.ones(1, 3, 2, 2, dtype=torch.bool))
    q, k, v, *_ = oracle.inputs(1, 4, 2, 32, 16)
    with pytest.raises(ValueError, match="3 mask heads"):
        attend(q, k, v, plan)


def test_intervals_end_with_the_sequence():
    """Keys beyond the last token do not exist, whatever an interval says: padding is never attended to."""
    far = torch.full((1, 20), 1000)
    geometry = Geometry.from_intervals(far * 0 - 5, far, 16, (far * 0, far))
    compare(Plan.build(geometry, torch.ones(1, 1, 2, 2, dtype=torch.bool)), 2, 1, 20)
    assert int(geometry.visible_elements.sum()) == 20 * 20
