"""Error does not grow with the ranks: half-precision inputs through rings of up to 64, against fp64.

A ring rounds once, at the end, so W ranks are as precise as one. Rows are measured one by one, in units of
their largest value, which is what rounding is relative to.
"""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace

import machine
import oracle
import pytest
import tolerance
import torch
from rings import LAYOUTS, Wrapped, attend_batch, on_ring, whole
from zoo import SIZE, ZOO

from sparring.cp import run_threads
from sparring.kernels import Geometry, Plan, reference
from sparring.kernels.patterns import Dense, VerticalSlash

pytestmark = pytest.mark.usefixtures("poisoned")
GROWTH = 1.1  # of the error of one rank
NAMES = ("out", "dq", "dk", "dv")
HEADS, LENGTH, DIM = (4, 2), 1024, 16


def low_precision(q, k, v, dout, mask):
    """out, dq, dk, dv by plain operations that round where kernels do: weights, their gradients, results."""
    dtype, group, scale = q.dtype, q.shape[1] // k.shape[1], q.shape[3] ** -0.5
    q, k, v, dout = (x.float() for x in (q, k, v, dout))
    wide_k, wide_v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = (q @ wide_k.mT * scale).masked_fill(~mask, -torch.inf)
    lse = scores.logsumexp(-1, keepdim=True)
    weights = (scores - lse.masked_fill(lse == -torch.inf, 0.0)).exp()
    rounded = weights.to(dtype).float()
    out = rounded @ wide_v
    delta = (out * dout).sum(-1, keepdim=True)
    dscores = (weights * (dout @ wide_v.mT - delta)).to(dtype).float()
    dq, dk, dv = dscores @ wide_k, dscores.mT @ q, rounded.mT @ dout
    dk, dv = (x.unflatten(1, (-1, group)).sum(2) for x in (dk, dv))
    return [x.to(dtype) for x in (out, dq * scale, dk * scale, dv)]


def row_errors(actual, exact) -> torch.Tensor:
    """Largest error of each row in units of its largest value, beyond what sums in fp32 lose.

    That is 2^-18 of the largest value of all, whatever cancels: dq of these tensors in fp32 is off by up to
    2.7e-6 of it, by more or less in another order of the sums.
    """
    size = exact.abs().amax(-1)
    error = (actual.double() - exact).abs().amax(-1) - float(size.max()) * 2**-18
    return error.clamp(min=0) / size.clamp(min=float(size.max()) * 2**-18)


def assert_no_growth(actual, alone, exact, flip=0.0) -> None:
    """The errors of a ring against those of one rank: the mean square, and the largest but for `flip`."""
    for name, x, one, y in zip(NAMES, actual, alone, exact, strict=True):
        errors, before = row_errors(x, y), row_errors(one, y)
        assert errors.square().mean() <= GROWTH**2 * before.square().mean(), name
        assert errors.max() <= GROWTH * before.max() + flip, name


@cache
def setting(mask, dtype):
    """Plan, tensors, visible pairs, and the exact out, dq, dk, dv."""
    plan = ZOO[mask](LENGTH, *HEADS)
    q, k, v, dout, dlse = oracle.inputs(1, *HEADS, LENGTH, DIM, dtype=dtype)
    pairs = oracle.expand(plan, HEADS[0])
    out, _, *grads = oracle.attention(q, k, v, pairs, dout, dlse * 0)
    return plan, (q, k, v, dout, torch.zeros(dlse.shape)), pairs, (out, *grads)


def through_ring(mask, dtype, world, **options):
    plan, tensors, *_ = setting(mask, dtype)
    layout = LAYOUTS["zigzag"](plan.geometry.num_blocks, world, SIZE)
    out, _, *grads = on_ring(plan, layout, *tensors, **options)
    return out, *grads


@cache
def alone(mask, dtype):
    return through_ring(mask, dtype, 1)


MASKS = ("causal", "vertical_slash", "top_k")
HALF = (torch.bfloat16, torch.float16)
QUICK = {(torch.bfloat16, 8, mask) for mask in MASKS} | {(torch.bfloat16, 2, "causal")}
QUICK |= {(torch.float16, 3, "causal"), (torch.bfloat16, 32, "causal")}


@pytest.mark.parametrize(
    "dtype,world,mask",
    [
        pytest.param(dtype, world, mask, marks=() if (dtype, world, mask) in QUICK else pytest.mark.full)
        for dtype in HALF
        for world in (2, 3, 4, 5, 6, 7, 8, 16, 32, 64)
        for mask in MASKS
    ],
)
def test_error_does_not_grow_with_the_ranks(dtype, world, mask):
    actual = through_ring(mask, dtype, world)
    assert_no_growth(actual, alone(mask, dtype), setting(mask, dtype)[3])


@pytest.mark.parametrize(
    "mask,dtype",
    [
        *((mask, torch.bfloat16) for mask in MASKS),
        ("causal", torch.float16),
        *(pytest.param(mask, torch.float16, marks=pytest.mark.full) for mask in MASKS[1:]),
    ],
)
def test_one_rank_is_as_precise_as_plain_operations(mask, dtype):
    _, tensors, pairs, exact = setting(mask, dtype)
    low = low_precision(*tensors[:4], pairs)
    for name, x, y, rough in zip(NAMES, alone(mask, dtype), exact, low, strict=True):
        tolerance.check("bf16", name, x, y, tolerance.rounding(rough, y, dtype))


# -- the comparison has teeth -------------------------------------------------------------------------


def rounded(x):
    return x.to(torch.bfloat16).to(x.dtype)


def forward_step(q, k, v, bound, source, out, lse, scale, fresh):
    reference.forward_step(q, k, v, bound, source, out, lse, scale, fresh)
    out.copy_(rounded(out))


def backward_step(q, k, v, dout, lse, delta, bound, source, dq, dk, dv, scale):
    reference.backward_step(q, k, v, dout, lse, delta, bound, source, dq, dk, dv, scale)
    dq.copy_(rounded(dq))


class RoughGradients(Wrapped):
    def exchange(self, send, send_to, receive, recv_from, channel):
        send = [rounded(x) for x in send] if channel == "grads" else send
        return super().exchange(send, send_to, receive, recv_from, channel)


@pytest.mark.parametrize("world", [2, 8])
def test_carrying_half_precision_would_be_noticed(world):
    """Partial results and travelling gradients in bf16 are beyond the bound, each of them."""
    steps = SimpleNamespace(forward_step=forward_step, backward_step=backward_step)
    actual = through_ring("causal", torch.bfloat16, world, steps=steps, wrap=RoughGradients)
    exact = setting("causal", torch.bfloat16)[3]
    for name, x, one, y in zip(NAMES, actual, alone("causal", torch.bfloat16), exact, strict=True):
        errors, before = row_errors(x, y), row_errors(one, y)
        assert errors.square().mean() > GROWTH**2 * before.square().mean(), name
        assert errors.max() > GROWTH * before.max(), name


# -- with the Triton kernels --------------------------------------------------------------------------


def on_cpu(plan) -> Plan:
    geometry = Geometry.causal(1, plan.geometry.num_tokens, plan.geometry.block_size)
    columns, group = (None if x is None else x.cpu() for x in (plan.columns, plan.column_group))
    return Plan(geometry, plan.tiles.cpu(), columns, group)


PATTERNS = {
    "dense": Dense(),
    "vertical-slash": VerticalSlash(0.8, columns=(16, 200), slashes=(2, 8)),
}


@machine.needs("gpu", "triton compiled")
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name", PATTERNS)
def test_error_of_kernels_does_not_grow_with_the_ranks(name, dtype):
    """Ranks as threads of one GPU; the same plan at every W.

    The weights of a tile are rounded to half precision against the peak so far, which depends on the order
    of the tiles: one may go the other way, by half a unit.
    """
    heads, length = (4, 2), 64 * 128
    tensors = [x.cuda() for x in oracle.inputs(1, *heads, length, 64, dtype=dtype)[:4]]
    batch = {"input_ids": torch.zeros(1, length, dtype=torch.int64, device="cuda")}
    options = dict(pattern=PATTERNS[name], layout="zigzag", recall_every=0, impl="triton")

    def body(transport):
        with torch.autograd.set_multithreading_enabled(False):
            return attend_batch(transport, batch, *tensors, **options)

    first = exact = None
    for world in (1, 2, 8, 64):
        shares = run_threads(world, body)
        actual = whole([share.tensors for share in shares], shares[0].layout, length)
        if first is None:
            first, plan = actual, shares[0].plan
            pairs = oracle.expand(on_cpu(plan), heads[0]).cuda()
            silent = torch.zeros(pairs.shape[:3], device="cuda")
            exact = oracle.attention(*tensors[:3], pairs, tensors[3], silent)
            exact = exact[0], *exact[2:]
            low = low_precision(*tensors, pairs)
            for what, x, y, rough in zip(NAMES, first, exact, low, strict=True):
                tolerance.check("gpu-bf16", what, x, y, tolerance.rounding(rough, y, dtype))
        assert torch.equal(shares[0].plan.tiles, plan.tiles)
        assert_no_growth(actual, first, exact, flip=torch.finfo(dtype).eps / 2)
