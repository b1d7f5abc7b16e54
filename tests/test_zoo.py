"""Every mask of the zoo through rings of any size, against the fp64 oracle; memory is poisoned with NaN."""

from __future__ import annotations

from collections.abc import Callable

import oracle
import pytest
import torch
from sampling import pairwise
from zoo import SIZE, ZOO

from sparring.balance import contiguous, from_assignment, ring, striped, zigzag
from sparring.cp import run_threads
from sparring.cp.attention import Ring, ring_attention
from sparring.kernels import bind, reference

BOUND = 1e-10
HEADS = {"MHA": (2, 2), "GQA": (4, 2), "MQA": (2, 1)}
LENGTHS = [1, 31, 203, 240]


def first_rank_empty(blocks: int, world: int, size: int):
    """All blocks on the other ranks, dealt backwards."""
    held = [list(range(blocks))[::-1][rank :: max(1, world - 1)] for rank in range(max(1, world - 1))]
    return from_assignment(tuple(map(tuple, [[], *held][:world] if world > 1 else held)), size)


LAYOUTS: dict[str, Callable] = {
    "contiguous": contiguous,
    "zigzag": zigzag,
    "striped": striped,
    "first rank empty": first_rank_empty,
}


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """torch.empty gives NaN: what is read before it is written shows."""
    for name in ("empty", "empty_like"):
        original = getattr(torch, name)

        def poison(*args, original=original, **options):
            x = original(*args, **options)
            return x.fill_(float("nan")) if x.is_floating_point() else x.fill_(2**7 - 1)

        monkeypatch.setattr(torch, name, poison)


def on_ring(plan, layout, world, q, k, v, dout, dlse):
    """out, lse, dq, dk, dv in logical order from a ring of threads that walks the given plan."""
    length, total = q.shape[2], plan.geometry.num_tokens
    q, k, v, dout = (torch.nn.functional.pad(x, (0, 0, 0, total - length)) for x in (q, k, v, dout))
    dlse = torch.nn.functional.pad(dlse, (0, total - length))

    def body(transport):
        geometry = plan.geometry.select(layout.assignment[transport.rank])
        at = geometry.positions
        bound = bind(plan.rows(geometry), layout.assignment)
        leaves = [x[:, :, at].requires_grad_() for x in (q, k, v)]
        surroundings = Ring(transport, ring(transport.rank, world), reference)
        out, lse = ring_attention(*leaves, bound, surroundings, q.shape[3] ** -0.5)
        grads = torch.autograd.grad((out, lse), leaves, (dout[:, :, at], dlse[:, :, at]))
        return [x.detach() for x in (out, lse, *grads)]

    parts = zip(*run_threads(world, body, timeout=60), strict=True)
    inverse = torch.from_numpy(layout.inverse)
    return [torch.cat(part, 2)[:, :, inverse][:, :, :length] for part in parts]


def check(mask, heads, world, layout, length):
    plan = ZOO[mask](length, HEADS[heads][0])
    q, k, v, dout, dlse = oracle.inputs(1, *HEADS[heads], length, 8)
    dense = oracle.expand(plan, HEADS[heads][0])[:, :, :length, :length]
    dlse = torch.where(dense.any(-1), dlse, 0.0)
    held = LAYOUTS[layout](plan.geometry.num_blocks, world, SIZE)
    actual = on_ring(plan, held, world, q, k, v, dout, dlse)
    expected = oracle.attention(q, k, v, dense, dout, dlse)
    for name, x, y in zip(("out", "lse", "dq", "dk", "dv"), actual, expected, strict=True):
        assert not torch.isnan(x).any(), name
        assert oracle.max_error(x, y) <= BOUND, name


@pytest.mark.parametrize(
    "mask,heads,world,layout,length",
    pairwise(list(ZOO), list(HEADS), [1, 2, 3, 4, 5, 7, 8], list(LAYOUTS), LENGTHS),
)
def test_zoo(mask, heads, world, layout, length):
    check(mask, heads, world, layout, length)


@pytest.mark.parametrize("world", [16, 32, 64])
@pytest.mark.parametrize("mask", ["causal_document", "vertical_slash", "empty_rows"])
def test_many_ranks(mask, world):
    check(mask, "GQA", world, "striped", 203)
