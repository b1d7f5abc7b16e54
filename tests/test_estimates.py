"""The kernels of estimates against their specification in PyTorch: interpreted on the CPU, compiled on a GPU.

The interpreter has to be chosen before triton is imported, so these cases run in a process of their own.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import interpreted
import machine
import oracle
import pytest
import torch
from interpreted import INTERPRETED, MARKS, kernels_run

from sparring.cp import run_threads
from sparring.cp.estimate import combine_over
from sparring.kernels import Geometry, estimates
from sparring.kernels.patterns import VerticalSlash, vertical_slash
from sparring.kernels.patterns.base import make_plan
from sparring.kernels.select import decode, encode, make_contest

DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = MARKS

if INTERPRETED:
    from test_triton import _quick_interpreter  # noqa: F401, a fixture of this module

    from sparring.kernels import triton_estimates  # noqa: F401, machine.py asks for which mode it is imported

else:

    @machine.needs("triton", "numpy < 2.4")
    def test_in_a_process_of_its_own():
        interpreted.check(__file__)

    @machine.needs("triton")
    def test_shipped_configurations_compile_for_hopper():
        """Nothing is spilled, and for bf16 keys of width 128 two programs fit into an SM."""
        script = Path(__file__).parent / "estimates_compile.py"
        done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=250)
        assert done.returncode == 0, done.stderr[-2000:]
        found = json.loads(done.stdout.splitlines()[-1])
        assert len(found) == 24
        for each in found:
            twice = each["dim"] == 128 and each["type"] == "torch.bfloat16"
            assert each["spilled"] == 0 and each["registers"] <= (128 if twice else 255), each
            assert each["shared"] <= 227 * 1024 // (2 if twice else 1), each


def kernels():
    from sparring.kernels import triton_estimates

    return triton_estimates


def prefix_lm(length, shared, block):
    """The first `shared` tokens see each other, all others see them and a window."""
    i = torch.arange(length)[None]
    return Geometry.from_intervals(
        (i - 40).clamp(min=0), i.clamp(min=shared - 1), block, (torch.zeros_like(i), i * 0 + shared - 1)
    )


PACKED = (((0, 20), (20, 21), (30, 170)), ((5, 100), (100, 170)))
SMALL = VerticalSlash(0.6, columns=(3, 20), slashes=(1, 4), probe=12, sink=2, window=0)
LONG = VerticalSlash(0.6, columns=(3, 40), slashes=(1, 4), probe=64, window=0)
SEGMENTS = VerticalSlash(0.6, columns=(3, 20), slashes=(1, 4), probe=40, sink=2, window=0, segment=64)
CASES = {  # geometry, pattern, (heads, key heads), head dim
    "ragged": (lambda: Geometry.causal(1, 203, 16), SMALL, (2, 2), 16),
    "packed": (lambda: Geometry.causal(2, 170, 32, PACKED), LONG, (4, 2), 20),
    "segments": (lambda: Geometry.causal(2, 170, 32, PACKED), SEGMENTS, (3, 1), 16),
    "prefix": (lambda: prefix_lm(170, 50, 32), SMALL, (2, 1), 32),
    "block128": (lambda: Geometry.causal(1, 500, 128), LONG, (2, 1), 64),
    "block256": (lambda: Geometry.causal(1, 600, 256), LONG, (2, 1), 128),
}
DTYPES = {"float32": 2**-24, "bfloat16": 2**-23, "float16": 2**-23}  # an addition of a product; MMA truncates


def on_device(geometry):
    return geometry.to(DEVICE).select(tuple(reversed(geometry.blocks)))  # physical order is not logical


def inputs(name, dtype="float32", seed=0):
    make, pattern, heads, dim = CASES[name]
    geometry = on_device(make())
    q, k, *_ = oracle.inputs(geometry.batch, *heads, geometry.num_tokens, dim, seed)
    q, k = (x.to(DEVICE, getattr(torch, dtype)) for x in (q, k))
    return geometry, pattern, q, k


def stages(ops, rows, k, tables, peak, share):
    """peak, total, slash, far and the masses of columns by one implementation, from the same state."""
    probes = tables.probes
    high = ops.peaks(rows, k, probes)
    total = ops.totals(rows, k, peak.to(high.dtype), probes)
    state = peak.to(high.dtype), share.to(high.dtype), tables.tail
    slash, far, codes = ops.masses(rows, k, *state, probes)
    assert total.dtype == slash.dtype == far.dtype == codes.dtype == torch.int64
    return high, total, slash, far, codes


@kernels_run
@pytest.mark.parametrize("dtype", ["float32"] if INTERPRETED else DTYPES)  # it multiplies in fp32 alone
@pytest.mark.parametrize("name", CASES)
def test_stages_match_fp64(name, dtype):
    """Within what the rounding of scores can change, and one unit of fixed point for every probability."""
    geometry, pattern, q, k = inputs(name, dtype)
    tables = pattern.prepare(geometry)
    probes, size, dim = tables.probes, geometry.block_size, q.shape[3]
    rows = vertical_slash.probe.gather_rows(q, probes)
    exact = rows.double(), k.double()
    peak = estimates.peaks(*exact, probes).float()
    total = estimates.totals(*exact, peak.double(), probes)
    share = (estimates.FIXED / total.clamp(min=1).double()).float()
    actual = stages(kernels(), rows, k, tables, peak, share)
    expected = stages(estimates, *exact, tables, peak, share)
    longest = exact[0].norm(dim=-1).max() * exact[1].norm(dim=-1).max()
    score = (dim + 4) * DTYPES[dtype] * float(longest) * dim**-0.5 * estimates.LOG2E
    relative = score + 2**-20  # of 2^x: ln 2 < 1 times the error of x, and its own two units
    count = probes.rows.shape[1]
    bounds = [
        score,
        relative * expected[1] + geometry.num_tokens,
        relative * expected[2] + 2 * count * size**2,  # P rows have 2 * size keys near a diagonal
        relative * expected[3] + count * geometry.num_tokens,
    ]
    names = ("peak", "total", "slash", "far")
    for what, x, y, bound in zip(names, actual, expected, bounds, strict=False):
        assert torch.equal(x.isinf(), y.isinf()), what
        error = torch.where(x == y, 0.0, (x.double() - y.double()).abs())
        assert (error <= bound).all(), (what, float(error.max()))
    (mass, ids, forced), (wanted, *same) = (decode(codes) for codes in (actual[4], expected[4]))
    assert torch.equal(ids, same[0]) and torch.equal(forced, same[1])
    assert torch.equal(actual[4] < 0, expected[4] < 0)
    assert ((mass - wanted).abs() <= relative * wanted + count).all()


@kernels_run
@pytest.mark.parametrize("name", CASES)
def test_equal_scores_give_equal_integers(name):
    """All scores are 0, so that every probability is the share of its row: masks and sums, exactly."""
    geometry, pattern, q, k = inputs(name)
    tables = pattern.prepare(geometry)
    rows = vertical_slash.probe.gather_rows(q * 0, tables.probes)
    peak = estimates.peaks(rows, k, tables.probes)
    share = torch.linspace(0.01, 0.3, peak.numel(), device=DEVICE).view(peak.shape)
    expected = stages(estimates, rows, k, tables, peak, share)
    for x, y in zip(stages(kernels(), rows, k, tables, peak, share), expected, strict=True):
        assert torch.equal(x, y)


def some_codes(shape, seed=0):
    """Codes of few different masses, some forced, some invalid."""
    g = torch.Generator().manual_seed(seed)
    mass = torch.randint(0, 5, shape, generator=g) * 2**35 // 4
    forced = torch.rand(shape, generator=g) < 0.05
    codes = encode(mass, torch.arange(shape[-1]).expand(shape), forced)
    return codes.masked_fill(torch.rand(shape, generator=g) < 0.2, -1).to(DEVICE)


@kernels_run
@pytest.mark.parametrize("keep,match,rounds", [(10, 40, 3), (16, 64, 3), (40, 8192, 1), (0, 64, 2)])
def test_top_k_is_its_definition(keep, match, rounds):
    """Of parts of any length, in one round or several."""
    bounds = ((0, 0), (0, 3), (3, 8), (8, 308), (308, 308), (308, 340))
    codes = some_codes((2, 340))
    contest = make_contest(bounds, keep, torch.device(DEVICE), match)
    assert len(contest.rounds) == rounds
    expected = estimates.top_k(codes, contest).sort(-1).values
    assert torch.equal(kernels().top_k(codes, contest).sort(-1).values, expected)


@kernels_run
@pytest.mark.parametrize("floor,cap", [(0, 0), (0, 7), (5, 5), (3, 20), (0, 90)])
def test_threshold_keeps_what_the_sorted_selection_keeps(floor, cap):
    codes = some_codes((3, 2, 70))
    target = torch.tensor([[-5, 0], [1, 2**36], [2**33, 2**50]], device=DEVICE)
    kept = codes >= kernels().threshold(codes, target, floor, cap)[..., None]
    assert torch.equal(kept, codes >= estimates.threshold(codes, target, floor, cap)[..., None])


@kernels_run
@pytest.mark.parametrize("name", CASES)
def test_tiles_of_diagonals_are_equal(name):
    geometry, pattern, q, _ = inputs(name)
    tables = pattern.prepare(geometry)
    shape = (len(tables.probes.rows), q.shape[1], geometry.num_blocks)
    chosen = (torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.4).to(DEVICE)
    arguments = chosen, geometry, 1, tables.window_of_row
    assert torch.equal(kernels().tiles_of_diagonals(*arguments), estimates.tiles_of_diagonals(*arguments))


def plans_of_ranks(world, pattern, geometry, q, k, stride):
    """The plan of every rank; its blocks are every `stride`-th of a shuffled order."""
    order = torch.randperm(geometry.num_blocks, generator=torch.Generator().manual_seed(stride)).tolist()
    held = [tuple(order[rank::world]) for rank in range(world)]

    def body(transport):
        local = geometry.select(held[transport.rank])
        mine = [x[:, :, local.positions] for x in (q, k)]
        return make_plan(pattern, *mine, mine[1], local, combine=combine_over(transport))

    return run_threads(world, body, timeout=250)


@kernels_run
@pytest.mark.parametrize(
    "world,dtype",
    [(2, "float32")] if INTERPRETED else [(w, d) for w in (1, 2, 4) for d in ("float32", "bfloat16")],
)
@pytest.mark.parametrize("name", ["ragged"] if INTERPRETED else [*CASES, "long"])
def test_plans_are_the_same_for_any_number_of_ranks(monkeypatch, name, world, dtype):
    if INTERPRETED:
        monkeypatch.setattr(vertical_slash, "operations", lambda x: kernels())
    if name == "long":
        geometry = Geometry.causal(1, 20000, 128, (((0, 7000), (7000, 20000)),), device=DEVICE)
        q, k = (torch.randn(1, heads, geometry.num_tokens, 128, device=DEVICE) for heads in (8, 2))
        pattern, q, k = VerticalSlash(0.9), q.to(getattr(torch, dtype)), k.to(getattr(torch, dtype))
    else:
        geometry, pattern, q, k = inputs(name, dtype)
        order = geometry.positions.argsort()
        geometry, q, k = geometry.select(tuple(range(geometry.num_blocks))), q[:, :, order], k[:, :, order]
    assert vertical_slash.operations(q) is kernels()
    whole = make_plan(pattern, q, k, k, geometry)
    for plan in plans_of_ranks(world, pattern, geometry, q, k, stride=world):
        expected = whole.rows(plan.geometry)
        assert torch.equal(plan.tiles, expected.tiles)
        assert torch.equal(plan.columns, expected.columns)


@machine.needs("gpu", "triton compiled")
def test_an_estimate_does_not_wait_for_the_device():
    geometry = Geometry.causal(1, 4000, 128, (((0, 1000), (1000, 4000)),), device="cuda")
    q, k = (torch.randn(1, h, geometry.num_tokens, 64, device="cuda").bfloat16() for h in (4, 2))
    expected = make_plan(LONG, q, k, k, geometry)  # compiles, and fills what the geometry caches
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        plan = make_plan(LONG, q, k, k, geometry)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(plan.tiles, expected.tiles) and torch.equal(plan.columns, expected.columns)


@machine.needs("gpu", "triton compiled")
def test_scores_take_no_memory():
    """What the stages allocate is mostly one code of 64 bits for every key and head."""
    geometry = Geometry.causal(1, 32768, 128, device="cuda")
    q, k = (torch.randn(1, h, 32768, 64, device="cuda").bfloat16() for h in (8, 2))
    make_plan(LONG, q, k, k, geometry)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    make_plan(LONG, q, k, k, geometry)
    assert torch.cuda.max_memory_allocated() - before < 8 * 32768 * 64 * 4 / 4  # a quarter of fp32 scores
