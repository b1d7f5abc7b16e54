"""Pooled and antidiagonal block scores against loops in Python, fp64; kernels interpreted or on a GPU.

The interpreter has to be chosen before triton is imported, so its cases run in a process of their own.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import interpreted
import machine
import pytest
import tolerance
import torch
from interpreted import INTERPRETED, MARKS, kernels_run

from sparring.kernels import Geometry, antidiagonal, pooled
from sparring.kernels.block_scores import operations
from sparring.kernels.estimates import FIXED, LOG2E

pytestmark = MARKS

if INTERPRETED:
    from test_triton import _quick_interpreter  # noqa: F401, a fixture of this module

    from sparring.kernels import triton_antidiagonal  # noqa: F401, machine.py asks for which mode it is imported

else:

    @machine.needs("triton", "numpy < 2.4")
    def test_in_a_process_of_its_own():
        interpreted.check(__file__)

    @machine.needs("triton")
    def test_shipped_configurations_compile_for_hopper():
        """Nothing is spilled, and for bf16 two programs of antidiagonal scores fit into an SM."""
        script = Path(__file__).parent / "block_scores_compile.py"
        environment = os.environ | {"PYTHONPATH": str(script.parent)}
        command = [sys.executable, script]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250)
        assert done.returncode == 0, done.stderr[-2000:]
        found = json.loads(done.stdout.splitlines()[-1])
        assert len(found) == 20
        for each in found:
            twice = each["type"] == "torch.bfloat16"
            assert each["spilled"] == 0 and each["registers"] <= 255, each
            assert each["shared"] <= 226 * 1024 // (2 if twice else 1), each  # 1 KB a program is taken


@dataclass(frozen=True)
class Run:
    """An implementation and the dtype of its inputs."""

    kernels: bool
    dtype: str

    @property
    def device(self) -> str:
        return "cuda" if self.kernels and not INTERPRETED else "cpu"

    @property
    def rounding(self) -> float:
        """Relative error of adding one product; tensor cores truncate."""
        return {"float64": 2**-53, "float32": 2**-24}.get(self.dtype, 2**-23)

    @property
    def tier(self) -> str:
        if not self.kernels:
            return {"float64": "fp64", "float32": "fp32"}[self.dtype]
        return "triton-interpreter" if INTERPRETED else "gpu-fp32" if self.dtype == "float32" else "gpu-bf16"

    def ops(self, name):
        if not self.kernels:
            return {"pooled": pooled, "antidiagonal": antidiagonal}[name]
        from sparring.kernels import triton_antidiagonal, triton_pooled

        return {"pooled": triton_pooled, "antidiagonal": triton_antidiagonal}[name]


LOW = () if INTERPRETED else ("bfloat16", "float16")  # the interpreter multiplies in fp32 alone
KERNELS = [pytest.param(Run(True, x), marks=kernels_run, id=f"kernels-{x}") for x in ("float32", *LOW)]
RUNS = [pytest.param(Run(False, x), id=f"specification-{x}") for x in ("float64", "float32")] + KERNELS


def sinks(length, width, count, block):
    i = torch.arange(length)[None]
    return Geometry.from_intervals((i - width).clamp(min=0), i, block, (i * 0, i * 0 + count - 1))


PACKED = (((0, 20), (20, 21), (30, 70)), ((5, 38), (38, 64)))
CASES = {  # geometry, (heads, key heads), head dim, stride
    "ragged": (lambda: Geometry.causal(1, 75, 16), (2, 2), 16, 4),
    "packed": (lambda: Geometry.causal(2, 70, 16, PACKED), (4, 2), 20, 8),
    "prefix": (lambda: sinks(90, 20, 5, 16), (2, 1), 8, 16),
    "wide": (lambda: Geometry.causal(1, 100, 32), (1, 1), 40, 8),
    "full": (lambda: Geometry.from_intervals(*(torch.full((1, 40), x) for x in (0, 39)), 32), (2, 1), 16, 4),
}


def case(name, run, seed=0):
    """Geometry with its blocks in reverse, q of its rows, and k of all blocks in logical order."""
    make, (heads, kv_heads), dim, stride = CASES[name]
    geometry = make()
    geometry = geometry.to(run.device).select(tuple(reversed(geometry.blocks)))
    g = torch.Generator().manual_seed(seed)
    shapes = [(geometry.batch, h, geometry.num_tokens, dim) for h in (heads, kv_heads)]
    q, k = (
        torch.randn(shape, generator=g).div(2).to(run.device, getattr(torch, run.dtype)) for shape in shapes
    )
    return geometry, q[:, :, geometry.positions], k, stride


def summable(x):
    """Interpreted, x in 64ths: products add up exactly, which numpy rounds by their place in a matrix."""
    return x.mul(64).round().div(64) if INTERPRETED else x


def all_stages(ops, q, k, blocks, geometry, stride, parts=1):
    """peak, total and mass, from the keys cut into parts."""
    size = geometry.block_size
    cuts = [
        (k[:, :, x[0] * size : (x[-1] + 1) * size], blocks[x]) for x in torch.arange(len(blocks)).chunk(parts)
    ]
    peak = torch.stack([ops.peaks(q, *part, geometry, stride) for part in cuts]).amax(0)
    total = torch.stack([ops.totals(q, *part, peak, geometry, stride) for part in cuts]).sum(0)
    mass = torch.cat([ops.masses(q, *part, peak, total, geometry, stride) for part in cuts], 3)
    assert total.dtype == torch.int64 and mass.dtype == torch.int32
    return peak, total, mass


def by_loops(q, k, geometry, stride):
    """fp64 peak and sum of exponentials of every query group, and the probability of every pair of groups."""
    geometry, products = (
        geometry.to("cpu"),
        torch.einsum(
            "bhqd,bhkd->bhqk",
            q.cpu().double(),
            k.cpu().double().repeat_interleave(q.shape[1] // k.shape[1], 1),
        ),
    )
    batch, heads, tokens, length = products.shape
    seen = geometry.visible(torch.arange(length)).view(batch, tokens // stride, stride, -1, stride)
    seen, products = seen.any(4).any(2).tolist(), products.tolist()
    peak = torch.full((batch, heads, tokens // stride), -torch.inf, dtype=torch.float64)
    total = torch.zeros_like(peak)
    share = torch.zeros(batch, heads, tokens // stride, length // stride, dtype=torch.float64)
    for b, h, i in itertools.product(*map(range, peak.shape)):
        scores = {}
        for j in range(length // stride):
            if seen[b][i][j]:
                pairs = [(i * stride + stride - 1 - t, j * stride + t) for t in range(stride)]
                scores[j] = sum(products[b][h][x][y] for x, y in pairs) / (stride * math.sqrt(q.shape[3]))
        if scores:
            peak[b, h, i] = max(scores.values())
            total[b, h, i] = sum(math.exp(s - peak[b, h, i]) for s in scores.values())
            for j, s in scores.items():
                share[b, h, i, j] = math.exp(s - peak[b, h, i]) / total[b, h, i]
    return peak, total, share


def of_tiles(share, groups):
    """Mean over query groups and sum over key groups of the pairs in every tile."""
    return share.unflatten(3, (-1, groups)).sum(4).unflatten(2, (-1, groups)).mean(3)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("run", RUNS)
def test_antidiagonal_scores_are_their_definition(run, name):
    """And no pair of groups is so light that the comparison would not notice its loss."""
    geometry, q, k, stride = case(name, run)
    blocks = torch.arange(geometry.num_blocks, device=run.device)
    found = [x.cpu().double() for x in all_stages(run.ops("antidiagonal"), q, k, blocks, geometry, stride)]
    peak, total, share = by_loops(q, k, geometry, stride)
    groups, length = geometry.block_size // stride, geometry.num_tokens // stride
    mass = of_tiles(share, groups)
    longest = [x.double().unflatten(2, (-1, stride)).norm(dim=(3, 4)).max().item() for x in (q, k)]
    terms = stride * q.shape[3] + 4
    score = terms * run.rounding * math.prod(longest) * LOG2E / (stride * math.sqrt(q.shape[3]))
    # Of 2^(score - peak): ln 2 < 1 times the error of both, and its own units.
    relative = 2 * score + (2**-50 if run.dtype == "float64" else 2**-20)
    tolerance.check(run.tier, "peak", found[0], peak * LOG2E, score)
    tolerance.check(run.tier, "total", found[1] / FIXED, total, relative * total + length / 2 / FIXED)
    # Of a probability: that of its exponential and of the total. Every pair is rounded, and the mean.
    bound = (2 * relative + length / 2 / FIXED) * mass + (groups / 2 + 1) / FIXED
    tolerance.check(run.tier, "mass", found[2] / FIXED, mass, bound)
    of_pairs = bound.repeat_interleave(groups, 2).repeat_interleave(groups, 3)
    assert ((share == 0) | (share / groups > of_pairs)).all()
    assert (mass == 0).any() or name == "full"


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("name", CASES)
def test_equal_scores_give_exact_shares(name, run):
    """All scores are 0: a tile is worth the visible pairs of groups in it, exactly rounded."""
    geometry, q, k, stride = case(name, run)
    blocks, groups = torch.arange(geometry.num_blocks, device=run.device), geometry.block_size // stride
    peak, total, mass = all_stages(run.ops("antidiagonal"), q * 0, k, blocks, geometry, stride)
    _, _, share = by_loops(q * 0, k, geometry, stride)
    seen = share > 0
    assert torch.equal(peak.cpu() == 0, seen.any(3)) and torch.equal(peak.cpu() == -torch.inf, ~seen.any(3))
    assert torch.equal(total.cpu(), seen.sum(3) * FIXED)
    dtype = torch.float64 if run.dtype == "float64" else torch.float32
    fixed = (seen / seen.sum(3, keepdim=True).clamp(min=1).double()).to(dtype).mul(FIXED).add(
        0.5
    ).long() * seen
    summed = fixed.unflatten(3, (-1, groups)).sum(4).unflatten(2, (-1, groups)).sum(3)
    assert torch.equal(mass.cpu(), ((summed + groups // 2) // groups).int())


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("name", ["ragged"] if INTERPRETED else CASES)
def test_parts_of_the_keys_and_rows_combine_bit_for_bit(name, run):
    """In any number of parts, in any order, for queries alone or together."""
    geometry, q, k, stride = case(name, run)
    q, k = summable(q), summable(k)
    size, ops = geometry.block_size, run.ops("antidiagonal")
    blocks = torch.arange(geometry.num_blocks, device=run.device)
    whole = all_stages(ops, q, k, blocks, geometry, stride)
    order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(1)).to(run.device)
    shuffled = k.unflatten(2, (-1, size))[:, :, order].flatten(2, 3)
    for parts in (3,) if INTERPRETED else (1, 2, 3):
        peak, total, mass = all_stages(ops, q, shuffled, order, geometry, stride, parts)
        assert torch.equal(peak, whole[0]) and torch.equal(total, whole[1])
        assert torch.equal(mass, whole[2][..., order])
    rows = [2, 0] if len(blocks) > 2 else [1]
    some = geometry.select(tuple(geometry.blocks[row] for row in rows))
    of_rows = all_stages(ops, q.unflatten(2, (-1, size))[:, :, rows].flatten(2, 3), k, blocks, some, stride)
    for x, y in zip(of_rows[:2], whole[:2], strict=True):
        assert torch.equal(x, y.unflatten(2, (len(blocks), -1))[:, :, rows].flatten(2, 3))
    assert torch.equal(of_rows[2], whole[2][:, :, rows])


@pytest.mark.parametrize("run", RUNS)
def test_a_query_group_reaches_what_lies_between_its_queries(run):
    """As a tile does; but a prefix does not widen the interval."""
    lo, hi = torch.arange(64)[None], torch.arange(64)[None]
    low, first = lo.clone(), torch.zeros(1, 64, dtype=torch.int64)
    low[0, 49], low[0, 48] = 8, 40
    hi = torch.where(low == lo, hi, low + 1)
    geometry = Geometry.from_intervals(low, hi, 16, (first, first + 1)).to(run.device)
    q, k = (torch.zeros(1, 1, 64, 16, device=run.device, dtype=getattr(torch, run.dtype)) for _ in "qk")
    total = run.ops("antidiagonal").totals(
        q, k, geometry.block_ids, torch.zeros(1, 1, 16, device=run.device), geometry, 4
    )
    counts = (total // FIXED).flatten().tolist()
    # Group 12 has tokens 48 to 51: they see 8 and 9, 40 and 41, 50 and 51: groups 2 to 12, and the prefix.
    assert counts[12] == 12 and counts[11] == 2 and counts[0] == 1


@pytest.mark.parametrize("run", RUNS)
def test_rows_that_see_nothing_have_no_score(run):
    """The last block is padding, and so is the first one of the second row."""
    documents = (((0, 40),), ((16, 40),))
    geometry = Geometry.causal(2, 64, 16, documents).to(run.device)
    q, k = (torch.randn(2, 1, 64, 16, device=run.device, dtype=getattr(torch, run.dtype)) for _ in "qk")
    peak, total, mass = all_stages(run.ops("antidiagonal"), q, k, geometry.block_ids, geometry, 8)
    nothing = torch.tensor([[False, False, False, True], [True, False, False, True]], device=run.device)
    assert (mass[:, 0] == 0).all(2).equal(nothing)
    groups = (peak[:, 0] == -torch.inf).unflatten(1, (4, 2))
    assert groups.all(2).equal(nothing) and (total[:, 0] == 0).unflatten(1, (4, 2)).equal(groups)
    means = [run.ops("pooled").block_means(x, geometry) for x in (q, k)]
    assert (means[0][:, 0] == 0).all(2).equal(nothing)
    scores = run.ops("pooled").pooled_scores(*means, geometry)
    assert (scores[:, 0] == -torch.inf).all(2).equal(nothing)


@pytest.mark.parametrize("run", RUNS)
def test_a_holder_of_no_blocks_has_empty_results(run):
    geometry = Geometry.causal(1, 40, 16, blocks=()).to(run.device)
    q, k = (torch.zeros(1, 2, n, 16, device=run.device, dtype=getattr(torch, run.dtype)) for n in (0, 48))
    blocks, ops = torch.arange(3, device=run.device), run.ops("antidiagonal")
    found = all_stages(ops, q, k, blocks, geometry, 8)
    assert [x.shape for x in found] == [(1, 2, 0), (1, 2, 0), (1, 2, 0, 3)]
    mean = run.ops("pooled").block_means(q, geometry)
    scores = run.ops("pooled").pooled_scores(mean, mean.new_zeros(1, 1, 3, 16), geometry)
    assert mean.shape == (1, 2, 0, 16) and scores.shape == (1, 2, 0, 3)
    whole = geometry.select((0, 1, 2))
    assert (ops.peaks(k, q, blocks[:0], whole, 8) == -torch.inf).all()
    assert (
        ops.masses(k, q, blocks[:0], *(torch.zeros(1, 2, 6, device=run.device),) * 2, whole, 8).shape[3] == 0
    )


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("run", RUNS)
def test_block_means_are_of_real_tokens(run, name):
    """Padding does not count, not even NaN; a block of padding gives 0."""
    geometry, x, _, _ = case(name, run)
    real = [
        [any(a <= t < b for a, b in row) for t in range(geometry.num_tokens)] for row in geometry.documents
    ]
    kept = torch.tensor(real)[:, geometry.positions.cpu()]
    dirty = x.masked_fill(~kept[:, None, :, None].to(run.device), torch.nan)
    means = run.ops("pooled").block_means(dirty, geometry)
    size, exact = geometry.block_size, x.cpu().double()
    expected = torch.zeros(*x.shape[:2], len(geometry.blocks), x.shape[3], dtype=torch.float64)
    for b, row in itertools.product(range(geometry.batch), range(len(geometry.blocks))):
        tokens = [t for t in range(row * size, (row + 1) * size) if kept[b, t]]
        if tokens:
            expected[b, :, row] = sum(exact[b, :, t] for t in tokens) / len(tokens)
    rounding = 2**-53 if run.dtype == "float64" else 2**-24
    tolerance.check(run.tier, "mean", means.cpu(), expected, (size + 1) * rounding * float(exact.abs().max()))
    some = geometry.select(geometry.blocks[1:2])
    alone = run.ops("pooled").block_means(dirty[:, :, size : 2 * size], some)
    assert torch.equal(alone, means[:, :, 1:2])
    if run.kernels:
        assert torch.equal(means.cpu(), pooled.block_means(dirty.cpu(), geometry.to("cpu")))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("run", [x for x in RUNS if x.values[0].dtype in ("float64", "float32")])
def test_pooled_scores_are_products_of_means(run, name):
    """Of visible tiles, the same in every bit for a row alone."""
    geometry, q, k, _ = case(name, run)
    ops, everywhere = run.ops("pooled"), geometry.select(tuple(range(geometry.num_blocks)))
    mean_q, mean_k = ops.block_means(q, geometry), ops.block_means(k, everywhere)
    scores = ops.pooled_scores(mean_q, mean_k, geometry)
    expected = torch.full(scores.shape, -torch.inf, dtype=torch.float64)
    size, members, dim = geometry.block_size, q.shape[1] // k.shape[1], q.shape[3]
    seen = geometry.to("cpu").visible(torch.arange(geometry.num_tokens))
    exact_q, exact_k = mean_q.cpu().double(), mean_k.cpu().double()
    for b, h, row, j in itertools.product(*map(range, expected.shape)):
        if seen[b, row * size : (row + 1) * size, j * size : (j + 1) * size].any():
            expected[b, h, row, j] = exact_q[b, h, row] @ exact_k[b, h // members, j] / math.sqrt(dim)
    longest = float(exact_q.norm(dim=3).max() * exact_k.norm(dim=3).max())
    bound = (dim + 2) * run.rounding * longest / math.sqrt(dim)
    tolerance.check(run.tier, "pooled", scores.cpu(), expected, bound)
    mean_q, mean_k = summable(mean_q), summable(mean_k)
    scores = ops.pooled_scores(mean_q, mean_k, geometry)
    alone = ops.pooled_scores(mean_q[:, :, 1:2], mean_k, geometry.select(geometry.blocks[1:2]))
    assert torch.equal(alone, scores[:, :, 1:2])


def test_bad_arguments_say_what_to_use():
    geometry = Geometry.causal(1, 64, 16)
    x, blocks = torch.zeros(1, 2, 64, 8), geometry.block_ids
    wrong = [
        (
            lambda: antidiagonal.peaks(x, x, blocks, geometry, 12),
            r"stride 12 .* blocks of 16 .* \(4, 8, 16\)",
        ),
        (lambda: antidiagonal.peaks(x, x, blocks, geometry, 32), "stride 32 .* blocks of 16"),
        (lambda: antidiagonal.peaks(x[:, :, :48], x, blocks, geometry, 8), r"48, 8\).* heads, 64,"),
        (lambda: antidiagonal.totals(x, x, blocks[:3], x, geometry, 8), r"64, 8\).* heads, 48,"),
        (lambda: antidiagonal.masses(x, x[0], blocks, x, x, geometry, 8), r"k has shape \(2, 64, 8\)"),
        (lambda: antidiagonal.peaks(x[:, :1], x, blocks, geometry, 8), r"1, 64, 8\).*\(1, 2, 64, 8\)"),
        (lambda: antidiagonal.peaks(x, x.half(), blocks, geometry, 8), "float32 .*float16"),
        (lambda: pooled.block_means(x[:, :, 1:], geometry), r"63, 8\).* heads, 64,"),
        (lambda: pooled.pooled_scores(x, x[:, :, :4], geometry), r"mean_q .*64, 8\).* heads, 4,"),
        (lambda: pooled.pooled_scores(x[:, :, :4], x[:, :, :3], geometry), r"mean_k .*3, 8\).* heads, 4,"),
        (lambda: pooled.pooled_scores(*[x[:, :, :4].half()] * 2, geometry), "float16.*float32 or"),
    ]
    for call, message in wrong:
        with pytest.raises(ValueError, match=message):
            call()
    large = Geometry.causal(1, 1024, 1024)
    x = torch.zeros(1, 1, 1024, 8)
    with pytest.raises(ValueError, match="1024 tokens into 256 groups, more than 128; use blocks of 512"):
        antidiagonal.peaks(x, x, large.block_ids, large, 4)


def test_the_specification_computes_on_the_cpu():
    x = torch.zeros(1)
    assert operations(x, "pooled") is pooled and operations(x, "antidiagonal") is antidiagonal
