"""Hypothesis strategies for what attention is given: shapes, documents, masks, plans, layouts."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparring.balance import Layout, from_assignment
from sparring.kernels import Geometry, Plan


def holds(few: int, many: int, **strategies):
    """A test that its body holds for `few` examples in `make test`, for `many` in `make test-full`."""

    def decorate(body):
        @pytest.mark.parametrize("examples", [few, pytest.param(many, marks=pytest.mark.full)])
        def test(examples):
            settings(max_examples=examples, deadline=None)(given(**strategies)(body))()

        test.__name__, test.__doc__ = body.__name__, body.__doc__
        return test

    return decorate


@dataclass(frozen=True)
class Case:
    """An attention problem: a plan of all blocks for `length` tokens, and the shapes of q, k, v."""

    plan: Plan
    heads: int
    kv_heads: int
    length: int
    dim: int

    @property
    def num_blocks(self) -> int:
        return self.plan.geometry.num_blocks


def cuts(stop: int, most: int):
    """Ascending places inside 0..stop, at most `most`, some perhaps equal."""
    return st.lists(st.integers(0, stop), max_size=most).map(sorted)


@st.composite
def documents(draw, batch: int, length: int):
    """Per row ascending, disjoint, non-empty ranges; what some of them leave out is padding."""
    rows = []
    for _ in range(batch):
        bounds = sorted({0, *draw(cuts(length, 5)), length})
        ranges = list(zip(bounds[:-1], bounds[1:], strict=True))
        rows.append(tuple(x for x in ranges if draw(st.integers(0, 4)) or len(ranges) == 1))
    return tuple(rows)


@st.composite
def geometries(draw, batch: int, length: int, block_size: int) -> Geometry:
    """Causal documents, or any two intervals a query, empty ones among them."""
    if draw(st.booleans()):
        return Geometry.causal(batch, length, block_size, draw(documents(batch, length)))
    g = _generator(draw)
    lo, hi, prefix_lo, prefix_hi = torch.randint(-2, length + 2, (4, batch, length), generator=g)
    prefix = (prefix_lo, prefix_hi) if draw(st.booleans()) else None
    return Geometry.from_intervals(lo, hi, block_size, prefix)


@st.composite
def plans(draw, geometry: Geometry, heads: int, kv_heads: int) -> Plan:
    """Tiles of any density, perhaps (repeated, invisible) columns; any allowed number of mask heads."""
    g, rows = _generator(draw), len(geometry.blocks)
    shared = st.sampled_from(sorted({1, kv_heads, heads}))
    density = draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
    tiles = torch.rand(geometry.batch, draw(shared), rows, geometry.num_blocks, generator=g) < density
    columns = group = None
    if draw(st.booleans()):
        groups, count = draw(st.integers(1, 3)), draw(st.integers(1, 20))
        shape = (geometry.batch, draw(shared), groups, count)
        columns = torch.randint(0, geometry.num_tokens + 3, shape, generator=g, dtype=torch.int32)
        group = torch.arange(rows, dtype=torch.int32) % groups
    return Plan.build(geometry, tiles, columns, group)


@st.composite
def cases(draw, longest: int = 300, dims=(16, 17, 32, 64, 96, 128)) -> Case:
    """B 1 to 3, H 1 to 8 in groups of 1 to 8, S 1 to `longest`, D of `dims`."""
    batch, heads = draw(st.integers(1, 3)), draw(st.integers(1, 8))
    kv_heads = draw(st.sampled_from([n for n in range(1, heads + 1) if heads % n == 0]))
    length, block_size = draw(st.integers(1, longest)), draw(st.sampled_from([16, 32, 64]))
    plan = draw(plans(draw(geometries(batch, length, block_size)), heads, kv_heads))
    return Case(plan, heads, kv_heads, length, draw(st.sampled_from(dims)))


@st.composite
def layouts(draw, num_blocks: int, block_size: int, most: int = 9) -> Layout:
    """Any order of the blocks on 1 to `most` ranks, which hold any number of them, some none."""
    world = draw(st.integers(1, most))
    order = draw(st.permutations(range(num_blocks)))
    bounds = [
        0,
        *draw(st.lists(st.integers(0, num_blocks), min_size=world - 1, max_size=world - 1).map(sorted)),
    ]
    parts = zip(bounds, [*bounds[1:], num_blocks], strict=True)
    return from_assignment([order[a:b] for a, b in parts], block_size)


@st.composite
def sharded_cases(draw, **options) -> tuple[Case, Layout]:
    """A case and a layout of its blocks."""
    case = draw(cases(**options))
    return case, draw(layouts(case.num_blocks, case.plan.geometry.block_size))


def _generator(draw) -> torch.Generator:
    return torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
