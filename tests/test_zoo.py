"""Every mask of the zoo through rings of any size, against the fp64 oracle; memory is poisoned with NaN."""

from __future__ import annotations

from dataclasses import replace

import oracle
import pytest
import tolerance
import torch
from rings import LAYOUTS, NAMES, on_ring
from sampling import pairwise
from zoo import ADVERSARIAL, LONGCA, METHODS, SIZE, ZOO

from sparring.balance import EXCHANGES
from sparring.kernels import attend
from sparring.kernels.plan import pack_bits

BOUND = 1e-10
HEADS = {"MHA": (2, 2), "GQA": (4, 2), "MQA": (2, 1)}
LENGTHS = [1, 31, 203, 240]
DIM = 8
NODES = {16: 4, 32: 8, 64: 8}  # of a hierarchical ring of so many ranks
pytestmark = pytest.mark.usefixtures("poisoned")


def case(mask, heads, length):
    """The plan, the tensors and what the oracle says of them."""
    plan = ZOO[mask](length, *HEADS[heads])
    tensors = oracle.inputs(1, *HEADS[heads], length, DIM)
    pairs = oracle.expand(plan, HEADS[heads][0])[:, :, :length, :length]
    tensors = (*tensors[:4], torch.where(pairs.any(-1), tensors[4], 0.0))
    return plan, tensors, oracle.attention(*tensors[:3], pairs, *tensors[3:])


def check(mask, heads, world, layout, length, exchange, nodes=None):
    plan, tensors, expected = case(mask, heads, length)
    held = LAYOUTS[layout](plan.geometry.num_blocks, world, SIZE)
    nodes = NODES.get(world, 1) if nodes is None else nodes
    actual = on_ring(plan, held, *tensors, exchange=exchange, nodes=nodes)
    for name, x, y in zip(NAMES, actual, expected, strict=True):
        tolerance.check("fp64", name, x, y, BOUND)


@pytest.mark.parametrize(
    "mask,heads,world,layout,length",
    pairwise(list(ZOO), list(HEADS), [1, 2, 3, 4, 5, 7, 8], list(LAYOUTS), LENGTHS),
)
def test_zoo(mask, heads, world, layout, length):
    check(mask, heads, world, layout, length, "ring")


@pytest.mark.parametrize(
    "exchange,mask,heads,world,layout",
    pairwise(["gather", "pull"], list(ZOO), list(HEADS), [2, 3, 5, 8], list(LAYOUTS)),
)
def test_all_at_once(exchange, mask, heads, world, layout):
    check(mask, heads, world, layout, 203, exchange)


SHAPES = [(2, 2), (2, 4), (4, 2), (3, 2), (1, 4), (4, 1)]  # nodes, and ranks of each


@pytest.mark.parametrize("mask,heads,shape,layout", pairwise(list(ZOO), list(HEADS), SHAPES, list(LAYOUTS)))
def test_rings_of_rings(mask, heads, shape, layout):
    check(mask, heads, shape[0] * shape[1], layout, 203, "hierarchical", shape[0])


SMOKE = ((16, "empty_rows"), (16, "key_head_top_k"), (32, "vertical_slash"), (64, "causal_document"))


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize(
    "world,mask",
    [
        pytest.param(world, mask, marks=() if (world, mask) in SMOKE else pytest.mark.full)
        for world in (16, 32, 64)
        for mask in ZOO
    ],
)
def test_many_ranks(world, mask, exchange):
    check(mask, "GQA", world, "striped", 203, exchange)


def test_the_zoo_is_complete():
    """The 14 masks of LongCA-bench, and no name twice."""
    assert len(LONGCA) == 14
    assert len(ZOO) == len(LONGCA) + len(METHODS) + len(ADVERSARIAL)


def error_of(plan, tensors, expected) -> float:
    """The largest error of out and the gradients on one device."""
    leaves = [x.clone().requires_grad_() for x in tensors[:3]]
    out, lse = attend(*leaves, plan)
    dlse = torch.where(lse > -torch.inf, tensors[4], 0.0)
    actual = out, *torch.autograd.grad((out, lse), leaves, (tensors[3], dlse))
    return max(map(oracle.max_error, actual, (expected[0], *expected[2:])))


def one_of(chosen, seed=0) -> tuple[int, ...]:
    where = chosen.nonzero()
    at = torch.randint(len(where), (1,), generator=torch.Generator().manual_seed(seed))
    return tuple(where[int(at)].tolist())


@pytest.mark.parametrize("mask", ZOO)
def test_a_lost_tile_or_column_is_noticed(mask):
    """The comparison has teeth: with one visible tile or column less the error is far beyond the bound."""
    plan, tensors, expected = case(mask, "GQA", 203)
    assert error_of(plan, tensors, expected) <= BOUND
    tiles = plan.tiles_bool().clone()
    tiles[one_of(tiles)] = False
    assert error_of(replace(plan, tiles=pack_bits(tiles)), tensors, expected) > 1e5 * BOUND
    if plan.columns is not None:
        heads, nowhere = HEADS["GQA"][0], plan.geometry.num_tokens
        alone = replace(plan, columns=None, column_group=None)
        row, head, _, token = one_of(oracle.expand(plan, heads) & ~oracle.expand(alone, heads))
        columns = plan.columns.clone()
        mine = columns[row, head * columns.shape[1] // heads]
        mine[mine == token] = nowhere
        less = replace(plan, columns=columns.sort(-1).values.contiguous())
        assert error_of(less, tensors, expected) > 1e5 * BOUND
