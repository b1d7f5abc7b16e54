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
from sparring.kernels.attention import start

SIZE, LENGTH = 128, 1100  # 9 blocks, the last one ragged


@machine.needs("triton")
def test_shipped_configurations_compile_for_hopper():
    """No serialised wgmma; at most a few registers spilled, around the loops over tiles."""
    script = Path(__file__).parent / "hopper_compile.py"
    result = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=250)
    assert result.returncode == 0, result.stderr[-2000:]
    configurations = json.loads(result.stdout.splitlines()[-1])
    assert len(configurations) == 8
    for each in configurations:
        assert not each["warnings"], each
        assert each["spilled"] <= (256 if each["WIDTH"] == 128 else 0), each
        assert each["shared"] <= 227 * 1024, each


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
    per = bound.blocks_per_source * SIZE
    for source in range(sources):
        part = [x[:, :, source * per : (source + 1) * per] for x in (k, v)]
        part = [torch.nn.functional.pad(x, (0, 0, 0, per - x.shape[2])) for x in part]
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
    exact, exact_lse = start(q.double())
    reference.forward_step(q.double(), k.double(), v.double(), whole, 0, exact, exact_lse, dim**-0.5)
    low = attend(q, k, v, plan, impl="triton")[0]
    tolerance.check("gpu-bf16", "out", out, exact, tolerance.rounding(low, exact, dtype))
    tolerance.check("gpu-bf16", "lse", lse, exact_lse, 1e-4)


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
