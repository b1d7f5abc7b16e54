"""The Triton kernels in Triton's interpreter, on the CPU, against the fp64 specification.

The interpreter has to be chosen before triton is imported. Where something else imported triton first, or
a GPU wants the compiled kernels, the cases below run in a process of their own.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import os
import sys
import threading
from dataclasses import dataclass

import interpreted
import machine
import oracle
import pytest
import tolerance
import torch

from sparring.kernels import Geometry, Plan, attend, bind, reference


def _import_for_interpreter() -> bool:
    """Whether this process has the kernels for the interpreter; leaves no trace in the environment."""
    preset = os.environ.get("TRITON_INTERPRET")
    if machine.lacks("triton") or machine.lacks("numpy < 2.4"):
        return False
    if preset is None and ("triton" in sys.modules or machine.lacks("gpu") is None):
        return False
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        from sparring.kernels import triton_forward, triton_steps  # noqa: F401

        importlib.import_module("triton.experimental.gluon")  # the first launch would import it
        return triton_forward.INTERPRET
    finally:
        if preset is None:
            del os.environ["TRITON_INTERPRET"]


INTERPRETED = _import_for_interpreter()
pytestmark = [
    pytest.mark.filterwarnings("error::RuntimeWarning"),  # of numpy: NaN, overflow, log of 0
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),
    pytest.mark.usefixtures("poisoned"),
]
here = machine.needs("triton interpreter")
BOUND = 2e-5
NAMES = ("out", "lse", "dq", "dk", "dv")


if not INTERPRETED:

    @machine.needs("triton", "numpy < 2.4")
    def test_in_a_process_of_its_own():
        interpreted.check(__file__)


@pytest.fixture(autouse=True, scope="module")
def _quick_interpreter():
    """Spares the interpreter two slow habits: patching again in every inner call, overflow checks."""
    if not INTERPRETED:
        yield
        return
    import triton.language as tl
    from triton.runtime import interpreter

    plain, patch, builder = tl.load, interpreter._patch_lang, interpreter.interpreter_builder

    def patch_once(function):
        modules = [x for x in function.__globals__.values() if inspect.ismodule(x) and x in (tl, tl.core)]
        if all(module.load is not plain for module in modules):
            return interpreter._LangPatchScope()
        return patch(function)

    options = builder.options
    interpreter._patch_lang = patch_once
    builder.options = dataclasses.replace(options, sanitize_overflow=False)
    yield
    interpreter._patch_lang, builder.options = patch, options


def positions(length, batch=1):
    return torch.arange(length).expand(batch, -1)


def intervals(lo, hi, block=32, prefix=None):
    return Geometry.from_intervals(lo, hi, block, prefix)


def prefix_lm(length, shared):
    """The first `shared` tokens see each other, all others are causal."""
    i = positions(length)
    return intervals(torch.zeros_like(i), i.clamp(min=shared - 1))


def sinks(length, width, count, block=32):
    i = positions(length)
    return intervals((i - width).clamp(min=0), i, block, (torch.zeros_like(i), torch.full_like(i, count - 1)))


PACKED = (((0, 20), (20, 21), (21, 90)),)
GEOMETRIES = {
    "causal": lambda: Geometry.causal(1, 96, 32),
    "ragged": lambda: Geometry.causal(1, 83, 32),
    "one": lambda: Geometry.causal(1, 1, 32),
    "packed": lambda: Geometry.causal(1, 96, 32, PACKED),
    "batch": lambda: Geometry.causal(2, 64, 32, (((0, 10), (10, 64)), ((3, 30), (40, 60)))),
    "padded": lambda: Geometry.causal(1, 96, 32, (((5, 40),),)),
    "window": lambda: intervals((positions(90) - 24).clamp(min=0), positions(90)),
    "sinks": lambda: sinks(90, 24, 4),
    "prefix_lm": lambda: prefix_lm(90, 40),
    "full": lambda: intervals(torch.zeros(1, 70).int(), torch.full((1, 70), 69)),
    "block16": lambda: Geometry.causal(1, 80, 16),
    "block64": lambda: Geometry.causal(1, 150, 64),
    "block128": lambda: sinks(250, 100, 4, 128),
    "block256": lambda: Geometry.causal(1, 300, 256),
}


@dataclass(frozen=True)
class Case:
    geometry: str
    heads: int = 2
    kv_heads: int = 1
    dim: int = 16
    mask_heads: int = 1
    column_heads: int = 0
    groups: int = 1
    count: int = 9
    density: float = 0.5
    dtype: str = "float32"

    def __str__(self):
        parts = [self.geometry, f"h{self.heads}:{self.kv_heads}", f"m{self.mask_heads}", f"d{self.dim}"]
        if self.column_heads:
            parts.append(f"c{self.column_heads}x{self.groups}x{self.count}")
        if self.density != 0.5:
            parts.append(f"density{self.density}")
        return "-".join(parts + [self.dtype] * (self.dtype != "float32"))


CASES = [Case("causal", dim=dim, column_heads=1) for dim in (16, 20, 32, 64, 80, 96, 128, 256)]
CASES += [  # head groupings, tiles only
    Case("causal", heads, kv_heads, mask_heads=mask_heads)
    for heads, kv_heads in ((3, 3), (4, 2), (4, 1), (6, 2))
    for mask_heads in sorted({1, kv_heads, heads})
]
CASES += [  # mask heads of tiles and columns mixed
    Case("ragged", 4, 2, mask_heads=mask_heads, column_heads=column_heads, groups=2)
    for mask_heads in (1, 2, 4)
    for column_heads in (1, 2, 4)
]
MASKS = ("ragged", "one", "packed", "batch", "padded", "window", "sinks", "prefix_lm", "full")
CASES += [Case(name, mask_heads=2) for name in MASKS]
CASES += [Case(name, column_heads=1, groups=2, density=0.3) for name in MASKS]
CASES += [Case(name, column_heads=1) for name in ("block64", "block128", "block256")]
CASES += [
    Case("block16", column_heads=1, count=40, density=0.0),  # several column tiles, sums over rows split
    Case("block16", column_heads=1, count=40, density=1.0),  # every column inside a chosen tile
    Case("block16", column_heads=2, groups=3, count=20, density=0.3),
    Case("sinks", 4, 2, 80, mask_heads=2, column_heads=4, groups=3),
]
CASES += [
    Case(name, mask_heads=2, column_heads=2, dtype="float64") for name in ("packed", "sinks", "block16")
]
CASES += [
    Case(name, dim=32, column_heads=1, dtype=dtype)
    for name in ("causal", "sinks")
    for dtype in ("float16", "bfloat16")
]


def make_plan(geometry, case, seed=1):
    g = torch.Generator().manual_seed(seed)
    rows = len(geometry.blocks)
    tiles = torch.rand(geometry.batch, case.mask_heads, rows, geometry.num_blocks, generator=g)
    columns = group = None
    if case.column_heads:
        shape = (geometry.batch, case.column_heads, case.groups, case.count)
        columns = torch.randint(0, geometry.num_tokens + 4, shape, generator=g)
        group = torch.arange(rows) % case.groups if case.groups > 1 else None
    return Plan.build(geometry, tiles < case.density, columns, group)


def specification(q, k, v, plan, dout, dlse, scale=None):
    """fp64 out, lse, dq, dk, dv of dense attention under the plan's element mask."""
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    length, scale = q.shape[2], q.shape[3] ** -0.5 if scale is None else scale
    mask = plan.element_mask()[:, :, :length, :length]
    out, lse = reference.attend_dense(*leaves, mask, scale)
    grads = torch.autograd.grad((out, lse), leaves, (dout.double(), dlse.double()))
    return out.detach(), lse.detach(), *grads


def inputs(plan, case, length):
    """q, k, v, dout in the dtype of the case, dlse; dlse is 0 where the query sees nothing."""
    dtype = getattr(torch, case.dtype)
    batch = plan.geometry.batch
    q, k, v, dout, dlse = oracle.inputs(batch, case.heads, case.kv_heads, length, case.dim)
    seen = plan.element_mask().any(-1)[:, :, :length]
    dlse = dlse * seen.repeat_interleave(case.heads // seen.shape[1], 1)
    return *(x.to(dtype) for x in (q, k, v, dout)), dlse.to(torch.promote_types(dtype, torch.float32))


def run(q, k, v, plan, dout, dlse):
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out, lse = attend(*leaves, plan, impl="triton")
    return out.detach(), lse.detach(), *torch.autograd.grad((out, lse), leaves, (dout, dlse))


def low_precision(q, k, v, plan, dout, dlse):
    """The same attention by plain operations that round where the kernels have to: P, dS, results."""
    length, group, dtype = q.shape[2], q.shape[1] // k.shape[1], q.dtype
    mask = plan.element_mask()[:, :, :length, :length]
    mask = mask.repeat_interleave(q.shape[1] // mask.shape[1], 1)
    q, k, v, dout = (x.float() for x in (q, k, v, dout))
    wide_k, wide_v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = (q @ wide_k.mT * q.shape[3] ** -0.5).masked_fill(~mask, -torch.inf)
    lse = scores.logsumexp(-1)
    weights = (scores - lse[..., None]).exp()
    rounded = weights.to(dtype).float()
    out = rounded @ wide_v
    delta = (out * dout).sum(-1) - dlse
    dscores = (weights * (dout @ wide_v.mT - delta[..., None])).to(dtype).float()
    dq, dk, dv = dscores @ wide_k, dscores.mT @ q, rounded.mT @ dout
    dk, dv = (x.unflatten(1, (-1, group)).sum(2) for x in (dk, dv))
    scale = q.shape[3] ** -0.5
    return [x.to(dtype) for x in (out, dq * scale, dk * scale, dv)]


def bounds(case, expected, arguments):
    """Allowed largest error of every result."""
    if case.dtype in ("float32", "float64"):
        relative = BOUND if case.dtype == "float32" else 1e-12
        return [relative * float(x[x.isfinite()].abs().max()) for x in expected]
    out, *grads = low_precision(*arguments)
    dtype = getattr(torch, case.dtype)
    exact = expected[0], *expected[2:]
    bound = [tolerance.rounding(low, x, dtype) for low, x in zip((out, *grads), exact, strict=True)]
    return [bound[0], BOUND * float(expected[1].abs().max()), *bound[1:]]


def check(actual, expected, bound):
    for name, x, y, limit in zip(NAMES, actual, expected, bound, strict=True):
        tolerance.check("triton-interpreter", name, x, y, limit)


@here
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_specification(case):
    geometry = GEOMETRIES[case.geometry]()
    plan = make_plan(geometry, case)
    ends = [end for ranges in geometry.documents for _, end in ranges]
    length = geometry.num_tokens if case.geometry == "padded" else max(ends)
    arguments = inputs(plan, case, length)
    arguments = (*arguments[:3], plan, *arguments[3:])
    expected = specification(*arguments)
    check(run(*arguments), expected, bounds(case, expected, arguments))


def steps(q, k, v, plan, dout, dlse, key_blocks, columns):
    """out, lse, dq, dk, dv of attention against sources that hold key_blocks, one step after the other."""
    from sparring.kernels import triton_steps

    size, scale = plan.geometry.block_size, q.shape[3] ** -0.5
    bound = bind(plan, key_blocks)
    held = [torch.cat([torch.arange(b * size, (b + 1) * size) for b in blocks]) for blocks in key_blocks]
    parts = [(k[:, :, tokens], v[:, :, tokens]) for tokens in held]
    out, lse = torch.zeros_like(q), torch.full(q.shape[:3], -torch.inf)
    for source, part in enumerate(parts):
        triton_steps.forward_step(q, *part, bound, source, out, lse, scale)
    if columns:
        triton_steps.forward_columns(q, *columns, bound, out, lse, scale)
    delta = (out * dout).sum(-1) - dlse
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for source, (part, tokens) in enumerate(zip(parts, held, strict=True)):
        grads = [torch.zeros_like(x) for x in part]
        triton_steps.backward_step(q, *part, dout, lse, delta, bound, source, dq, *grads, scale)
        dk[:, :, tokens], dv[:, :, tokens] = grads
    dcolumns = [torch.zeros_like(x) for x in columns]
    if columns:
        triton_steps.backward_columns(q, *columns, dout, lse, delta, bound, dq, *dcolumns, scale)
    return (out, lse, dq, dk, dv), dcolumns


@here
@pytest.mark.parametrize("mask_heads", [1, 4])
def test_sources_one_after_the_other_equal_one_source(mask_heads):
    """A permuted query shard, sources of unequal size and any order, columns: all as in one step."""
    from sparring.kernels.columns import gather_columns, scatter_columns

    case = Case("sinks", 4, 2, mask_heads=mask_heads, column_heads=2)
    whole = make_plan(sinks(128, 40, 4), case)
    q, k, v, dout, dlse = inputs(whole, case, 128)
    expected = specification(q, k, v, whole, dout, dlse)
    plan = whole.rows(whole.geometry.select((3, 0, 2, 1)))
    order = plan.geometry.positions
    columns = [gather_columns(x, whole) for x in (k, v)]
    inverse = order.argsort()
    for key_blocks in ((((0, 1, 2, 3),)), ((3, 0), (1, 2)), ((2,), (0, 3), (1,))):
        queries = [x[:, :, order] for x in (q, dout, dlse)]
        (out, lse, dq, dk, dv), dcolumns = steps(queries[0], k, v, plan, *queries[1:], key_blocks, columns)
        for total, part in zip((dk, dv), dcolumns, strict=True):
            scatter_columns(part, whole, total)
        actual = (out[:, :, inverse], lse[:, :, inverse], dq[:, :, inverse], dk, dv)
        check(actual, expected, bounds(case, expected, None))


@here
def test_columns_of_a_long_sequence():
    """Beyond the first word of the bitmask and the first scan of rows: only the last rows see the columns."""
    from sparring.kernels import triton_steps
    from sparring.kernels.columns import gather_columns

    geometry = Geometry.causal(1, 130 * 16, 16)
    columns = torch.tensor([2050, 2063, 2064, 2079])  # the first two outside of the last row's tile
    plan = Plan.build(geometry, torch.zeros(1, 1, 130, 130, dtype=torch.bool), columns[None, None, None])
    bound = bind(plan, (geometry.blocks,))
    q, k, v, dout, delta = oracle.inputs(1, 1, 1, 2080, 16, dtype=torch.float32)
    ck, cv = gather_columns(k, plan), gather_columns(v, plan)

    def results(steps):
        out, lse = torch.zeros_like(q), torch.full(q.shape[:3], -torch.inf)
        steps.forward_columns(q, ck, cv, bound, out, lse, 0.25)
        grads = [torch.zeros_like(x) for x in (q, ck, cv)]
        steps.backward_columns(q, ck, cv, dout, lse, delta, bound, *grads, 0.25)
        return out, lse, *grads

    expected = results(reference)
    assert (expected[3].amax((0, 1, 2, 4)) != 0).tolist() == [True, True, False, False]
    check(results(triton_steps), expected, [BOUND * float(x[x.isfinite()].abs().max()) for x in expected])


@here
def test_rows_without_tiles_are_left_alone():
    """Against a source that holds nothing for a row, its carried state stays, bit for bit."""
    from sparring.kernels import triton_steps

    case = Case("causal")
    plan = make_plan(GEOMETRIES["causal"](), dataclasses.replace(case, density=0.0))
    q, k, v, dout, dlse = inputs(plan, case, 96)
    bound = bind(plan, ((0,), (1, 2)))
    out, lse = torch.full_like(q, torch.nan), torch.full(q.shape[:3], 7.0)
    out[:, :, :32], lse[:, :, :32] = 0.0, -torch.inf
    dq = torch.full_like(q, torch.nan)
    dk, dv = torch.full_like(k, torch.nan), torch.full_like(v, torch.nan)
    dq[:, :, :32], dk[:, :, :32], dv[:, :, :32] = 0.0, 0.0, 0.0
    triton_steps.forward_step(q, k, v, bound, 0, out, lse, 0.25)
    triton_steps.backward_step(q, k, v, dout, lse, dlse, bound, 0, dq, dk, dv, 0.25)
    assert out[:, :, 32:].isnan().all() and (lse[:, :, 32:] == 7.0).all()
    assert dq[:, :, 32:].isnan().all() and dk[:, :, 32:].isnan().all() and dv[:, :, 32:].isnan().all()
    assert out[:, :, :32].isfinite().all() and dk[:, :, :32].isfinite().all()


@here
def test_keys_that_are_not_chosen_are_not_read():
    """Not even to be multiplied by zero: they may hold anything."""
    case = Case("causal", density=0.0)
    plan = make_plan(GEOMETRIES["causal"](), case)
    plan = plan.rows(plan.geometry.select((0, 2)))
    q, k, v, dout, dlse = oracle.inputs(1, 2, 1, 96, 16, dtype=torch.float32)
    q, dout, dlse = (x[:, :, plan.geometry.positions] for x in (q, dout, dlse))
    k[:, :, 32:64], v[:, :, 32:64] = torch.nan, torch.nan
    results, _ = steps(q, k, v, plan, dout, dlse, ((0, 1, 2),), ())
    for name, x in zip(NAMES, results, strict=True):
        assert x.isfinite().all(), name
    assert (results[3][:, :, 32:64] == 0).all() and (results[4][:, :, 32:64] == 0).all()


@here
def test_a_wrong_list_is_noticed():
    """Dropping a tile, moving a block or taking a partial tile for a full one breaks the bound by far."""
    case = Case("sinks", density=1.0)
    geometry = sinks(96, 40, 4)
    plan = make_plan(geometry, case)
    arguments = inputs(plan, case, 96)
    expected = specification(*arguments[:3], plan, *arguments[3:])
    limits = bounds(case, expected, None)

    def errors(plan, change=None):
        from sparring.kernels import triton_steps

        bound = bind(plan, (geometry.blocks,))
        bound = bound if change is None else dataclasses.replace(bound, **change(bound))
        q, k, v, dout, dlse = arguments
        scale = q.shape[3] ** -0.5
        out, lse = torch.zeros_like(q), torch.full(q.shape[:3], -torch.inf)
        triton_steps.forward_step(q, k, v, bound, 0, out, lse, scale)
        grads = [torch.zeros_like(x) for x in (q, k, v)]
        delta = (out * dout).sum(-1) - dlse
        triton_steps.backward_step(q, k, v, dout, lse, delta, bound, 0, *grads, scale)
        return [
            oracle.max_error(x, y) / z for x, y, z in zip((out, lse, *grads), expected, limits, strict=True)
        ]

    assert max(errors(plan)) <= 1
    for row, block in ((1, 0), (2, 0), (2, 1)):
        tiles = plan.tiles_bool()
        tiles[:, :, row, block] = False
        assert min(errors(Plan.build(geometry, tiles))) > 100
    full = bind(plan, (geometry.blocks,)).row_full
    assert int(full.sum()) < 6  # there are partial tiles
    wrong = (
        lambda bound: dict(key_base=bound.key_base + 1),
        lambda bound: dict(row_full=bound.row_full + (bound.row_full == 0), key_full=bound.key_full + 1),
        lambda bound: dict(row_tiles=bound.row_tiles.flip(0).contiguous()),
        lambda bound: dict(key_tiles=(bound.key_tiles + 1) % 3),
    )
    for change in wrong:
        assert max(errors(plan, change)) > 100


@here
def test_ranks_as_threads():
    """The interpreter keeps global state; launches from several threads must not mix."""
    case = Case("causal", density=1.0)
    plans = [make_plan(GEOMETRIES[name](), case) for name in ("causal", "packed")]
    arguments = [inputs(plan, case, 96) for plan in plans]
    expected = [run(*x[:3], plan, *x[3:]) for plan, x in zip(plans, arguments, strict=True)]
    results = [None, None]

    def work(i):
        results[i] = run(*arguments[i][:3], plans[i], *arguments[i][3:])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for actual, wanted in zip(results, expected, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(actual, wanted, strict=True))


@here
@pytest.mark.parametrize("numerator", [0.0, 1.0])
def test_an_undefined_operation_is_an_error(numerator, monkeypatch):
    """0 / 0 and 1 / 0 inside a kernel: NumPy warns, and here its warnings fail the test."""
    import triton
    import triton.language as tl

    monkeypatch.setenv("TRITON_INTERPRET", "1")

    @triton.jit
    def divide(x, y):
        tl.store(x, tl.load(x) / tl.load(y))

    with pytest.raises(Exception, match="invalid value|divide by zero") as error:
        divide[(1,)](torch.full((1,), numerator), torch.zeros(1))
    assert any(isinstance(x, RuntimeWarning) for x in (error.value, error.value.__cause__))


@here
def test_refusals():
    from sparring.kernels import triton_steps

    plan = make_plan(GEOMETRIES["causal"](), Case("causal"))
    q, k, v, *_ = inputs(plan, Case("causal"), 96)
    bound = bind(plan, (plan.geometry.blocks,))
    out, lse = torch.zeros_like(q), torch.full(q.shape[:3], -torch.inf)
    with pytest.raises(ValueError, match="scale > 0"):
        triton_steps.forward_step(q, k, v, bound, 0, out, lse, 0.0)
    with pytest.raises(ValueError, match="contiguous"):
        triton_steps.forward_step(q, k, v, bound, 0, out.mT.contiguous().mT, lse, 0.25)
    wide = [torch.zeros(1, heads, 96, 264) for heads in (2, 1, 1)]
    with pytest.raises(NotImplementedError, match="up to 256, got 264"):
        triton_steps.forward_step(*wide, bound, 0, torch.zeros(1, 2, 96, 264), lse, 0.25)
