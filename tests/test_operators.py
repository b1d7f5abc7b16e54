"""attend as operators of torch: registered rightly, compiled without a graph break, out of reach of modes."""

from __future__ import annotations

import copy
import logging
from functools import partial

import machine
import oracle
import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from sparring.kernels import Geometry, Plan, attend, attention, bind, reference
from sparring.kernels.operators import parts_of

FORWARD, BACKWARD = torch.ops.sparring.attend.default, torch.ops.sparring.attend_backward.default
HEADS, KV_HEADS, DIM = 4, 2, 16
DOCUMENTS = (((0, 20), (20, 21), (21, 90)), ((3, 50), (60, 87)))  # tokens outside see nothing


@pytest.fixture(autouse=True)
def _nothing_compiled():
    torch._dynamo.reset()


def choose(geometry, mask_heads=1, columns=None, group=None, seed=1):
    """A third of the tiles; bound, for q, k, v of whole blocks."""
    g = torch.Generator().manual_seed(seed)
    shape = (geometry.batch, mask_heads, geometry.num_blocks, geometry.num_blocks)
    tiles = (torch.rand(shape, generator=g) < 0.33).to(geometry.device)
    if columns is not None:
        shape = (geometry.batch, columns, 1 if group is None else 2, 7)
        columns = torch.randint(0, geometry.num_tokens, shape, generator=g).to(geometry.device)
    return bind(Plan.build(geometry, tiles, columns, group), (geometry.blocks,))


def plans(block, device="cpu"):
    """Bound plans of every kind of mask, with every optional part and without."""
    length = 6 * block
    at = torch.arange(length, device=device).expand(2, -1)
    sink = (torch.zeros_like(at), torch.full_like(at, 3))
    causal = Geometry.causal(2, length, block, device=device)
    scale = block // 16
    documents = tuple(tuple((a * scale, b * scale) for a, b in row) for row in DOCUMENTS)
    packed = Geometry.causal(2, length, block, documents, device=device)
    window = Geometry.from_intervals((at - block).clamp(min=0), at, block, sink)
    group = torch.arange(6, device=device, dtype=torch.int32) % 2
    return {
        "causal": choose(causal),
        "documents, empty rows, by key head": choose(packed, KV_HEADS),
        "window and prefix, by query head": choose(window, HEADS),
        "columns": choose(causal, 1, 1),
        "columns by head and group": choose(packed, HEADS, HEADS, group),
        "prefix, columns and groups": choose(window, 1, KV_HEADS, group),
    }


def arguments(bound, dtype, impl, device="cpu", dim=DIM):
    """Of both operators."""
    geometry = bound.plan.geometry
    given = oracle.inputs(geometry.batch, HEADS, KV_HEADS, geometry.num_tokens, dim, dtype=dtype)
    q, k, v, dout, dlse = (x.to(device) for x in given)
    plan = (dim**-0.5, impl, True, geometry.block_size, *parts_of(bound))
    _, lse, exact = FORWARD(q, k, v, *plan)
    return (q, k, v, *plan), (q, k, v, exact, lse, dout, dlse.to(lse.dtype), *plan)


def check(forward, backward):
    torch.library.opcheck(FORWARD, forward)
    leaves = [x.clone().requires_grad_() for x in forward[:3]]
    torch.library.opcheck(FORWARD, (*leaves, *forward[3:]))
    torch.library.opcheck(BACKWARD, backward)


@pytest.mark.parametrize("name", plans(16))
def test_opcheck(name):
    """Schemas, shapes without data, derivatives, and traces of both by AOTAutograd with dynamic shapes."""
    check(*arguments(plans(16)[name], torch.float64, "reference"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck_of_other_dtypes(dtype):
    check(*arguments(plans(16)["columns"], dtype, "reference"))


@machine.needs("gpu", "triton compiled")
@pytest.mark.parametrize("name", plans(16))
def test_opcheck_on_a_gpu(name):
    check(*arguments(plans(128, "cuda")[name], torch.bfloat16, "triton", "cuda", 64))


@machine.needs("hopper gpu", "triton compiled")
def test_opcheck_of_the_hopper_kernels():
    check(*arguments(plans(128, "cuda")["causal"], torch.bfloat16, "hopper", "cuda", 64))


class Layer(nn.Module):
    """Attention between two products that a compiler can see."""

    def __init__(self, plan, device="cpu"):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.before, self.after = (nn.Linear(DIM, DIM, device=device) for _ in range(2))
        self.plan = plan

    def forward(self, q, k, v):
        out, lse = attend(self.before(q), k, v, self.plan)
        return self.after(out), lse


def gradients(layer, length, device="cpu"):
    """out, lse, and the gradients of q, k, v and all weights."""
    given = oracle.inputs(2, HEADS, KV_HEADS, length, DIM, dtype=torch.float32)
    *leaves, dout, dlse = (x.to(device) for x in given)
    leaves = [x.requires_grad_() for x in leaves]
    out, lse = layer(*leaves)
    dlse = dlse.masked_fill(lse.isinf(), 0.0)
    grads = torch.autograd.grad((out, lse), (*leaves, *layer.parameters()), (dout, dlse))
    return out, lse, *grads


@pytest.mark.parametrize(
    "backend",
    ["eager", "aot_eager", pytest.param("inductor", marks=(machine.needs("c++ compiler"), pytest.mark.full))],
)
def test_compiled_whole(backend):
    """fullgraph: no graph break, from the first product to the last, ragged lengths included."""
    layer = Layer(plans(16)["prefix, columns and groups"])
    expected = gradients(layer, 90)
    actual = gradients(torch.compile(layer, fullgraph=True, backend=backend), 90)
    for a, b in zip(actual, expected, strict=True):
        bound = 0.0 if backend != "inductor" else 1e-5 * float(b[b.isfinite()].abs().max())
        torch.testing.assert_close(a, b, rtol=0, atol=bound)


@machine.needs("gpu", "triton compiled")
def test_compiled_whole_on_a_gpu():
    layer = Layer(plans(128, "cuda")["prefix, columns and groups"], "cuda")
    expected = gradients(layer, 6 * 128, "cuda")
    actual = gradients(torch.compile(layer, fullgraph=True), 6 * 128, "cuda")
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-3 * float(b[b.isfinite()].abs().max()))


def test_a_new_plan_compiles_nothing_anew():
    geometry = Geometry.causal(2, 96, 16, DOCUMENTS)
    layer, counter = Layer(None), CompileCounter()
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for seed in range(3):
        layer.plan = choose(geometry, seed=seed)
        for a, b in zip(gradients(compiled, 96), gradients(layer, 96), strict=True):
            assert torch.equal(a, b)
    assert counter.frame_count == 1


def test_a_plan_that_is_not_bound_breaks_the_graph_and_says_how_not_to():
    bound = plans(16)["causal"]
    layer = Layer(bound.plan)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"bind the plan before: attend\(q, k, v, bind"):
        gradients(torch.compile(layer, fullgraph=True, backend="eager"), 96)
    torch._dynamo.reset()
    broken = gradients(torch.compile(layer, backend="eager"), 96)
    for a, b in zip(broken, gradients(Layer(bound), 96), strict=True):
        assert torch.equal(a, b)


def test_a_plan_bound_to_several_sources_is_refused():
    plan = plans(16)["causal"].plan
    q, k, v, *_ = oracle.inputs(2, HEADS, KV_HEADS, 96, DIM)
    with pytest.raises(ValueError, match="2 sources"):
        attend(q, k, v, bind(plan, ((0, 2, 4), (1, 3, 5))))


@pytest.mark.parametrize("of", ["out", "lse", "both"])
def test_each_result_alone_has_its_gradient(of):
    bound = plans(16)["columns by head and group"]
    q, k, v, dout, dlse = oracle.inputs(2, HEADS, KV_HEADS, 96, DIM)
    mask = oracle.expand(bound.plan, HEADS)
    dout, dlse = dout * (of != "lse"), dlse.masked_fill(~mask.any(-1), 0.0) * (of != "out")
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out, lse = attend(*leaves, bound)
    chosen = {"out": ((out,), (dout,)), "lse": ((lse,), (dlse,)), "both": ((out, lse), (dout, dlse))}[of]
    grads = torch.autograd.grad(chosen[0], leaves, chosen[1])
    for actual, expected in zip(grads, oracle.attention(q, k, v, mask, dout, dlse)[2:], strict=True):
        assert oracle.max_error(actual, expected) <= 1e-10


def test_second_derivatives_are_refused_by_name():
    q, k, v, *_ = oracle.inputs(2, HEADS, KV_HEADS, 96, DIM)
    q.requires_grad_()
    (dq,) = torch.autograd.grad(attend(q, k, v, plans(16)["columns"])[0].sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative of attend"):
        dq.sum().backward()


def test_autocast_does_not_reach_into_it():
    bound = plans(16)["columns"]
    q, k, v, dout, _ = oracle.inputs(2, HEADS, KV_HEADS, 96, DIM, dtype=torch.float32)
    results = []
    for enabled in (False, True):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out, lse = attend(*leaves, bound)
            out.backward(dout)
        results.append((out, lse, *(x.grad for x in leaves)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("kept", [True, False])
def test_selective_checkpointing_sees_one_operation(kept, monkeypatch):
    """It can keep the result of attention and compute the rest again."""
    layer = Layer(plans(16)["columns"])
    expected = gradients(layer, 96)
    runs, forward_step = [], reference.forward_step

    def counted(*args, **options):
        runs.append(1)
        forward_step(*args, **options)

    monkeypatch.setattr(reference, "forward_step", counted)
    context = partial(create_selective_checkpoint_contexts, [FORWARD] if kept else [])
    again = copy.copy(layer)
    again.forward = lambda *x: checkpoint(layer, *x, use_reentrant=False, context_fn=context)
    for a, b in zip(gradients(again, 96), expected, strict=True):
        assert torch.equal(a, b)
    assert len(runs) == (1 if kept else 2)


def test_auto_says_once_what_it_picked(caplog):
    attention._pick.cache_clear()
    bound = plans(16)["causal"]
    q, k, v, *_ = oracle.inputs(2, HEADS, KV_HEADS, 96, DIM)
    with caplog.at_level(logging.INFO, "sparring.kernels.attention"):
        for _ in range(2):
            attend(q, k, v, bound)
    (record,) = caplog.records
    assert record.getMessage() == (
        f"impl 'auto' is 'reference' on cpu for torch.float64, head dim {DIM}, blocks of 16"
    )
