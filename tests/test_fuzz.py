"""Random nonsense at the doors of the library: the right result or a typed refusal, never anything else.

Cases start from arguments that fit together; some of them are then replaced by things of the wrong type,
shape, dtype, device or value. What is not refused must agree with the oracle and have a backward.
"""

from __future__ import annotations

import functools

import oracle
import pytest
import tolerance
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparring.cp import ContextParallel
from sparring.kernels import Geometry, Plan, attend
from sparring.kernels.patterns import SinkWindow, VerticalSlash

SIZE = 16
REFUSALS = (ValueError, TypeError, NotImplementedError)
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
DTYPES = (*FLOATS, torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn)
FIXED = settings(max_examples=150, deadline=None, derandomize=True, database=None)
DRAWN = settings(max_examples=3000, deadline=None, suppress_health_check=list(HealthCheck))

odd_values = st.sampled_from(
    [None, True, -1, 0, 1, 3, 17, 1000, 2.5, float("nan"), "x", (), [1], {}, torch.ones(()), ((0, 7),)]
)


@st.composite
def odd_tensors(draw):
    shape = draw(st.lists(st.sampled_from([0, 1, 2, 3, 8, 16, 24, 40, 48]), max_size=5))
    while torch.Size(shape).numel() > 10**5:
        shape.pop()
    x = torch.full(shape, draw(st.sampled_from([0, 1, -1, 7, 10**4])), dtype=torch.int64)
    x = x.to(draw(st.sampled_from(DTYPES)))
    return x.to("meta") if draw(st.integers(0, 5)) == 0 else x


def like(x):
    """A tensor that nearly fits in the place of x."""
    changes = [
        lambda: x.to(torch.int32),
        lambda: x.double(),
        lambda: x.to("meta"),
        lambda: x[..., :-1],
        lambda: x[:0],
        lambda: x.transpose(0, -1),
        lambda: x.unsqueeze(0),
        lambda: x.squeeze(0),
        lambda: torch.cat((x, x), 1) if x.dim() > 1 else x,
        lambda: -x if x.dtype != torch.bool else ~x,
        lambda: x + 10**5 if x.dtype != torch.bool else x,
        lambda: x.tolist(),
    ]
    return st.sampled_from(changes).map(lambda change: change())


def spoiled(draw, parts):
    """parts with up to two of them replaced."""
    for name in draw(st.lists(st.sampled_from(sorted(parts)), max_size=2, unique=True)):
        choices = odd_values | odd_tensors()
        if isinstance(parts[name], torch.Tensor):
            choices |= like(parts[name])
        parts[name] = draw(choices)
    return parts


def accepted(call):
    """What call() returns, or None if it refuses in words of the library."""
    try:
        return call()
    except REFUSALS as error:
        assert str(error) and "aten::" not in str(error), error
        return None


def documents(draw, batch, length):
    cuts = sorted(draw(st.sets(st.integers(1, length - 1), max_size=3))) if length > 1 else []
    ranges = tuple(zip([0, *cuts], [*cuts, length], strict=True))
    return (ranges,) * batch


def check(out, q, k, v, plan, scale=None):
    """out [B, H, S, D] against the oracle on the plan's own mask, where values are finite and precise."""
    length = out.shape[2]
    out.double().sum().backward()
    largest = max(float(x.detach().abs().max()) for x in (q, k, v))
    if q.dtype in FLOATS[:2] and largest < 100:  # not NaN
        mask = oracle.expand(plan, q.shape[1])[:, :, :length, :length]
        zero = torch.zeros(out.shape, dtype=torch.float64)
        expected = oracle.attention(q, k, v, mask, zero, zero[..., 0], scale)[0]
        tier, bound = ("fp64", 1e-8) if q.dtype == torch.float64 else ("fp32", 1e-3)
        tolerance.check(tier, "out", out, expected, bound)


@st.composite
def attend_cases(draw):
    batch, length, kv_heads = draw(st.integers(1, 2)), draw(st.integers(1, 40)), draw(st.integers(1, 2))
    heads, dim = kv_heads * draw(st.integers(1, 2)), draw(st.sampled_from([1, 4, 9]))
    n, groups = -(-length // SIZE), draw(st.integers(1, 2))
    geometry = {"batch": batch, "length": length, "block_size": SIZE, "blocks": None}
    geometry["documents"] = documents(draw, batch, length)
    g = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    shape = (batch, draw(st.sampled_from([1, kv_heads, heads])), groups, draw(st.integers(1, 5)))
    plan = {
        "tiles": torch.rand(batch, heads, n, n, generator=g) < 0.5,
        "columns": torch.randint(-2, n * SIZE + 3, shape, generator=g),
        "column_group": torch.arange(n) % groups,
    }
    q, k, v, *_ = oracle.inputs(batch, heads, kv_heads, length, dim, dtype=draw(st.sampled_from(FLOATS)))
    call = {"q": q, "k": k, "v": v, "scale": None, "impl": "reference"}
    return [spoiled(draw, parts) for parts in (geometry, plan, call)]


def attend_case(case):
    geometry_parts, plan_parts, call = case
    geometry = accepted(lambda: Geometry.causal(**geometry_parts))
    plan = None if geometry is None else accepted(lambda: Plan.build(geometry, **plan_parts))
    if plan is None:
        return
    for name in "qkv":
        if isinstance(call[name], torch.Tensor) and call[name].is_floating_point():
            call[name].requires_grad_()
    result = accepted(lambda: attend(plan=plan, **call))
    if result is not None:
        check(result[0], call["q"], call["k"], call["v"], plan, call["scale"])


@functools.cache
def context_parallel(pattern):
    return ContextParallel(None, pattern=pattern, block_size=SIZE, layout="zigzag", recall_every=3)


PATTERNS = ("dense", SinkWindow(3, 16), VerticalSlash(columns=(1, 3), sink=1, probe=4, window=0))


@st.composite
def shard_cases(draw):
    batch, length = draw(st.integers(1, 2)), draw(st.integers(1, 40))
    ids = torch.arange(batch * length).view(batch, length)
    fields = {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)}
    fields |= {"document_ids": ids // 17, "position_ids": torch.arange(length)[None]}
    kept = draw(st.sets(st.sampled_from(sorted(fields))))
    fields = spoiled(draw, {name: x for name, x in fields.items() if name in kept | {"input_ids"}})
    padded = -(-length // SIZE) * SIZE
    heads, dtype = draw(st.sampled_from([(1, 1), (4, 2)])), draw(st.sampled_from(FLOATS))
    q, k, v, *_ = oracle.inputs(batch, *heads, padded, 4, dtype=dtype)
    call = {"q": q, "k": k, "v": v, "layer": 0, "scale": None}
    return draw(st.sampled_from(PATTERNS)), fields, spoiled(draw, call)


def shard_case(case):
    pattern, fields, call = case
    cp = context_parallel(pattern)
    shard = accepted(lambda: cp.shard(fields))
    if shard is None:
        return
    for name in "qkv":
        if isinstance(call[name], torch.Tensor) and call[name].is_floating_point():
            call[name].requires_grad_()
    out = accepted(lambda: cp.attention(shard=shard, **call))
    if out is not None:
        check(out, call["q"], call["k"], call["v"], cp.plans(shard)[call["layer"]], call["scale"])


@FIXED
@given(attend_cases())
def test_attend_and_plans(case):
    attend_case(case)


@FIXED
@given(shard_cases())
def test_shard_and_attention(case):
    shard_case(case)


@pytest.mark.full
@DRAWN
@given(attend_cases())
def test_attend_and_plans_drawn(case):
    attend_case(case)


@pytest.mark.full
@DRAWN
@given(shard_cases())
def test_shard_and_attention_drawn(case):
    shard_case(case)
