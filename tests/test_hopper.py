"""The Hopper kernels: what the compiler makes of them (no GPU needed), and every kind of mask on a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import machine
import pytest
import tolerance
import torch
from sampling import pairwise

from sparring.kernels import Geometry, Plan, attend, bind, reference
from sparring.kernels.attention import carried, output_delta

SIZE, LENGTH = 128, 1100  # 9 blocks, the last one ragged


@machine.needs("triton")
@pytest.mark.parametrize("arguments", [[], pytest.param(["all"], marks=pytest.mark.full)], ids=str)
def test_shipped_configurations_compile_for_hopper(arguments):
    """No serialised wgmma; no spills in the loops of the forward and of dK and dV of columns, few reloads in
    other mask-free loops.

    The fused backward needs some registers more than there are with masks, and for head dim 64 always.
    """
    script = Path(__file__).parent / "hopper_compile.py"
    command = [sys.executable, script, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=290)
    assert result.returncode == 0, result.stderr[-2000:]
    configurations = json.loads(result.stdout.splitlines()[-1])
    assert len(configurations) == (32 if arguments else 16)
    for each in configurations:
        assert not each["warnings"], each
        assert each["shared"] <= 227 * 1024, each
        loops = each["spilled_in_loops"]
        assert len(loops) == 4, each  # of two consumers, without a mask and with one
        if each["kernel"] in ("_forward", "_keys"):
            assert max(loops) == 0, each
        else:
            assert max(loops[:2]) <= (28 if each.get("WITH_DQ") and each["WIDTH"] == 64 else 1), each
            assert max(loops[2:]) <= 26, each


def geometry(mask: str) -> Geometry:
    i = torch.arange(9 * SIZE, device="cuda")[None]
    if mask == "documents":
        documents = ((0, 300), (300, 301), (301, LENGTH))
        return Geometry.causal(1, LENGTH, SIZE, device="cuda", documents=(documents,)).pad_to(9 * SIZE)
    if mask == "prefix":
        return Geometry.from_intervals(i - 300, i, SIZE, (i * 0, i * 0 + 9))
    blind = (i >= SIZE) & (i < 700)
    return Geometry.from_intervals(torch.where(blind, 9 * SIZE, i * 0), torch.where(blind, -1, i), SIZE)


def step_by_step(q, k, v, bound, sources: int):
    """out (fp32) and lse from one launch a source, from memory that holds NaN."""
    from sparring.kernels import hopper_steps

    out, lse = (
        torch.full_like(q, float("nan"), dtype=torch.float32),
        torch.full(q.shape[:3], -torch.inf).cuda(),
    )
    for source in range(sources):
        part = [split(x, bound, source) for x in (k, v)]
        hopper_steps.forward_step(q, *part, bound, source, out, lse, q.shape[3] ** -0.5)
    return torch.where(lse[..., None] == -torch.inf, 0.0, out), lse


@machine.needs("hopper gpu", "triton compiled")
@pytest.mark.parametrize(
    "mask,heads,dim,dtype,sources,programs",
    pairwise(
        ["documents", "prefix", "empty rows"],
        [(2, 2), (4, 2), (4, 1)],
        [64, 80, 96, 128],
        [torch.bfloat16, torch.float16],
        [1, 2, 3],
        [1, 5, 132],
    ),
)
def test_forward_matches_the_reference(monkeypatch, mask, heads, dim, dtype, sources, programs):
    """Few programs take many query tiles each, one after the other."""
    properties = torch.cuda.get_device_properties(0)
    shown = {name: getattr(properties, name) for name in dir(properties) if not name.startswith("_")}
    count = min(programs, properties.multi_processor_count)
    fewer = SimpleNamespace(**shown | {"multi_processor_count": count})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: fewer)
    g = torch.Generator("cuda").manual_seed(0)
    shape = geometry(mask)
    tiles = torch.rand(1, heads[0], 9, 9, generator=g, device="cuda") < 0.5
    plan = Plan.build(shape, tiles)
    q, k, v = (
        (torch.randn(1, h, 9 * SIZE, dim, generator=g, device="cuda") + shift).to(dtype)
        for h, shift in ((heads[0], 0), (heads[1], 0), (heads[1], 1))
    )
    per = -(-9 // sources)
    held = tuple(tuple(range(9))[i * per : (i + 1) * per] for i in range(sources))
    out, lse = step_by_step(q, k, v, bind(plan, held), sources)
    whole = bind(plan, (shape.blocks,))
    exact, exact_lse = carried(q.double())
    reference.forward_step(
        q.double(), k.double(), v.double(), whole, 0, exact, exact_lse, dim**-0.5, fresh=True
    )
    low = attend(q, k, v, plan, impl="triton")[0]
    tolerance.check("gpu-bf16", "out", out, exact, tolerance.rounding(low, exact, dtype))
    tolerance.check("gpu-bf16", "lse", lse, exact_lse, 1e-4)


@machine.needs("hopper gpu", "triton compiled")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("dim", [64, 96, 128])
def test_fresh_results_do_not_depend_on_what_was_there(dim, dtype):
    """Rows without tiles are written too; results in the dtype of q are those in fp32, rounded once."""
    from sparring.kernels import hopper_steps

    g = torch.Generator("cuda").manual_seed(0)
    plan = random_plan("empty rows", 2, g)
    q, k, v, _, _ = inputs((4, 2), 9 * SIZE, dim, torch.bfloat16, g)
    bound = bind(plan, (plan.geometry.blocks,))
    out, lse = torch.zeros(q.shape, device="cuda"), torch.full(q.shape[:3], -torch.inf, device="cuda")
    hopper_steps.forward_step(q, k, v, bound, 0, out, lse, 0.1)
    fresh, fresh_lse = torch.full_like(q, torch.nan, dtype=dtype), torch.full_like(lse, torch.nan)
    hopper_steps.forward_step(q, k, v, bound, 0, fresh, fresh_lse, 0.1, fresh=True)
    assert (fresh_lse == -torch.inf).any() and torch.equal(fresh_lse, lse)
    assert torch.equal(fresh, out.to(dtype))


def random_plan(mask: str, mask_heads: int, generator) -> Plan:
    tiles = torch.rand(1, mask_heads, 9, 9, generator=generator, device="cuda") < 0.5
    return Plan.build(geometry(mask), tiles)


def split(x, bound, source: int):
    """The keys of one source, filled up to whole blocks."""
    per = bound.blocks_per_source * SIZE
    part = x[:, :, source * per : (source + 1) * per]
    return torch.nn.functional.pad(part, (0, 0, 0, per - part.shape[2])).contiguous()


def gradients(steps, q, k, v, dout, lse, delta, bound, held=0.0):
    """dq, dk, dv (fp32, or fp64 of fp64) beyond what the accumulators held, one step a source."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    dq, keys = torch.full(q.shape, held, dtype=dtype, device="cuda"), []
    for source in range(bound.num_sources):
        part = [split(x, bound, source) for x in (k, v)]
        sums = [torch.full(x.shape, held, dtype=dtype, device="cuda") for x in part]
        scale = q.shape[3] ** -0.5
        steps.backward_step(q, *part, dout, lse.to(dtype), delta.to(dtype), bound, source, dq, *sums, scale)
        keys.append(sums)
    dk, dv = (torch.cat(x, 2)[:, :, : k.shape[2]] for x in zip(*keys, strict=True))
    return [x - held for x in (dq, dk, dv)]


def steps_of(deterministic: bool):
    from sparring.kernels import hopper_deterministic_steps, hopper_steps

    return hopper_deterministic_steps if deterministic else hopper_steps


def inputs(heads, tokens, dim, dtype, generator):
    """q, k, v, dout, dlse; v and dout have a mean, so that a missing tile shows."""

    def normal(count, mean):
        shape = (1, count, tokens, dim)
        return (torch.randn(shape, generator=generator, device="cuda") + mean).to(dtype)

    dlse = torch.randn(1, heads[0], tokens, generator=generator, device="cuda")
    return normal(heads[0], 0), normal(heads[1], 0), normal(heads[1], 1), normal(heads[0], 0.5), dlse


def check_backward(plan, heads, dim, dtype, sources, deterministic, generator):
    from sparring.kernels import triton_backward

    blocks = plan.geometry.num_blocks
    q, k, v, dout, dlse = inputs(heads, blocks * SIZE, dim, dtype, generator)
    per = -(-blocks // sources)
    held = tuple(tuple(range(blocks))[i * per : (i + 1) * per] for i in range(sources))
    whole = bind(plan, (plan.geometry.blocks,))
    wide = [x.double() for x in (q, k, v, dout)]
    out, lse = carried(wide[0])
    reference.forward_step(*wide[:3], whole, 0, out, lse, dim**-0.5, fresh=True)
    delta = output_delta(out, wide[3], dlse.double())
    exact = gradients(reference, *wide, lse, delta, whole)
    low = gradients(triton_backward, q, k, v, dout, lse, delta, whole)
    found = gradients(steps_of(deterministic), q, k, v, dout, lse, delta, bind(plan, held), held=2.0)
    for name, x, y, rough in zip(("dq", "dk", "dv"), found, exact, low, strict=True):
        tolerance.check("gpu-bf16", name, x, y, tolerance.rounding(rough, y, dtype))


@machine.needs("hopper gpu", "triton compiled")
@pytest.mark.parametrize(
    "mask,heads,mask_heads,dim,dtype,sources,deterministic",
    pairwise(
        ["documents", "prefix", "empty rows"],
        [(4, 4), (4, 2), (4, 1)],
        [4, 2, 1],
        [64, 80, 96, 128],
        [torch.bfloat16, torch.float16],
        [1, 3],
        [False, True],
    ),
)
def test_backward_matches_the_reference(mask, heads, mask_heads, dim, dtype, sources, deterministic):
    g = torch.Generator("cuda").manual_seed(0)
    check_backward(random_plan(mask, mask_heads, g), heads, dim, dtype, sources, deterministic, g)


@machine.needs("hopper gpu", "triton compiled")
@pytest.mark.parametrize("dim", [64, 128])
def test_long_columns_are_computed_in_parts(dim):
    """A sink that all of 64 rows attend to, among columns of a few tiles."""
    from sparring.kernels.hopper_schedule import column_table

    g = torch.Generator("cuda").manual_seed(0)
    shape = Geometry.causal(1, 64 * SIZE, SIZE, device="cuda")
    tiles = torch.rand(1, 2, 64, 64, generator=g, device="cuda") < 0.05
    tiles[..., 0] = True
    plan = Plan.build(shape, tiles)
    table, live = column_table(bind(plan, (shape.blocks,)), 0, 4, 2, split=True)
    assert int(table[: int(live), 3].max()) > 1
    check_backward(plan, (4, 2), dim, torch.bfloat16, 1, False, g)


@machine.needs("hopper gpu", "triton compiled")
def test_tensors_at_odd_addresses_are_read():
    """TMA wants addresses that divide by 16; a view into a flat buffer has any."""
    g = torch.Generator("cuda").manual_seed(0)
    plan = random_plan("documents", 2, g)
    *given, dout, _ = inputs((4, 2), 9 * SIZE, 64, torch.bfloat16, g)
    results = []
    for shift in (0, 1):
        flat = [torch.empty(x.numel() + shift, dtype=x.dtype, device="cuda")[shift:] for x in given]
        leaves = [a.view_as(x).copy_(x).requires_grad_() for a, x in zip(flat, given, strict=True)]
        out, _ = attend(*leaves, plan, impl="hopper", deterministic=True)
        results.append([out, *torch.autograd.grad(out, leaves, dout)])
    assert leaves[0].data_ptr() % 16
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


@machine.needs("hopper gpu", "triton compiled")
def test_deterministic_gradients_repeat_bit_for_bit():
    g = torch.Generator("cuda").manual_seed(0)
    plan = random_plan("documents", 2, g)
    q, k, v, dout, dlse = inputs((4, 2), 9 * SIZE, 128, torch.bfloat16, g)
    bound = bind(plan, (plan.geometry.blocks,))
    first, *others = (gradients(steps_of(True), q, k, v, dout, dlse, dlse, bound) for _ in range(10))
    for each in others:
        assert all(torch.equal(x, y) for x, y in zip(first, each, strict=True))


@machine.needs("hopper gpu", "triton compiled")
@pytest.mark.parametrize("deterministic", [False, True])
def test_backward_does_not_read_what_is_not_selected(deterministic):
    """Keys of a block that its own queries alone chose hold NaN: gradients of all others are as before."""
    g = torch.Generator("cuda").manual_seed(0)
    plan = Plan.build(geometry("documents"), torch.eye(9, dtype=torch.bool, device="cuda").expand(1, 1, 9, 9))
    q, k, v, dout, dlse = inputs((4, 2), 9 * SIZE, 128, torch.bfloat16, g)
    bound = bind(plan, (plan.geometry.blocks,))
    expected = gradients(steps_of(deterministic), q, k, v, dout, dlse, dlse, bound)
    for x in (q, k, v, dout):
        x[:, :, :SIZE] = float("nan")
    found = gradients(steps_of(deterministic), q, k, v, dout, dlse, dlse, bound)
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(x[:, :, SIZE:], y[:, :, SIZE:])


@machine.needs("hopper gpu", "triton compiled")
def test_repeats_are_bit_identical_and_unselected_keys_are_not_read():
    plan = Plan.build(geometry("documents"), torch.zeros(1, 1, 9, 9, dtype=torch.bool, device="cuda"))
    q, k, v = (torch.randn(1, h, LENGTH, 128, device="cuda", dtype=torch.bfloat16) for h in (4, 2, 2))
    first = attend(q, k, v, plan, impl="hopper")
    for _ in range(9):
        for x, y in zip(first, attend(q, k, v, plan, impl="hopper"), strict=True):
            assert torch.equal(x, y)
    poisoned = [x.clone() for x in (k, v)]
    for x in poisoned:
        x[:, :, :SIZE] = float("nan")  # the first block is chosen by its own queries alone
    assert torch.equal(attend(q, *poisoned, plan, impl="hopper")[0][:, :, SIZE:], first[0][:, :, SIZE:])


@machine.needs("hopper gpu", "triton compiled")
@pytest.mark.parametrize(
    "q,size,text",
    [
        ((1, 2, 256, 128, torch.float32), 128, "has bf16 and fp16, got torch.float32"),
        ((1, 2, 256, 256, torch.bfloat16), 128, "head dims up to 128 that divide by 8, got 256"),
        ((1, 2, 256, 128, torch.bfloat16), 64, "has blocks of 128, got 64"),
    ],
)
def test_what_it_lacks_is_refused_by_name(q, size, text):
    *shape, dtype = q
    x = torch.randn(shape, device="cuda", dtype=dtype)
    plan = Plan.build(
        Geometry.causal(1, 256, size, device="cuda"), torch.ones(1, 1, 256 // size, 256 // size).cuda() > 0
    )
    with pytest.raises(NotImplementedError, match=text):
        attend(x, x, x, plan, impl="hopper")


@machine.needs("triton compiled")
def test_a_cpu_is_refused_by_name():
    x = torch.randn(1, 1, 128, 64, dtype=torch.bfloat16)
    plan = Plan.build(Geometry.causal(1, 128), torch.ones(1, 1, 1, 1, dtype=torch.bool))
    with pytest.raises(NotImplementedError, match="compute capability 9, got cpu"):
        attend(x, x, x, plan, impl="hopper")
