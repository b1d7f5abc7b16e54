"""Block scores on a GPU, at shipped shapes: against fp64, in parts, without waiting, in little memory."""

from __future__ import annotations

import math

import machine
import pytest
import tolerance
import torch
from test_block_scores import Run, all_stages

from sparring.kernels import Geometry, antidiagonal, pooled
from sparring.kernels.estimates import FIXED, LOG2E

pytestmark = [machine.needs("gpu", "triton compiled"), pytest.mark.usefixtures("poisoned")]


def on_device(length, heads, kv_heads, dim, dtype="bfloat16"):
    documents = (((0, length // 3), (length // 3, length - 100)),)
    geometry = Geometry.causal(1, length, 128, documents, device="cuda")
    g = torch.Generator(device="cuda").manual_seed(0)
    shapes = [(1, h, geometry.num_tokens, dim) for h in (heads, kv_heads)]
    q, k = (torch.randn(x, generator=g, device="cuda").to(getattr(torch, dtype)) for x in shapes)
    return geometry, q, k


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("dim,stride", [(64, 16), (96, 8), (128, 4), (128, 8), (128, 16), (256, 16)])
def test_shipped_shapes_on_a_gpu(dim, stride, dtype):
    """Kernels of whole tiles, against the specification in fp64, and in parts and rows bit for bit."""
    geometry, q, k = on_device(6000, 4, 2, dim, dtype)
    run, blocks = Run(True, dtype), geometry.block_ids
    peak, total, mass = all_stages(run.ops("antidiagonal"), q, k, blocks, geometry, stride)
    exact = all_stages(antidiagonal, q.double(), k.double(), blocks, geometry, stride)
    longest = [x.double().unflatten(2, (-1, stride)).norm(dim=(3, 4)).max().item() for x in (q, k)]
    score = (stride * dim + 4) * run.rounding * math.prod(longest) * LOG2E / (stride * math.sqrt(dim))
    relative, groups = 2 * score + 2**-20, 128 // stride
    tolerance.check(run.tier, "peak", peak, exact[0], score)
    tolerance.check(run.tier, "total", total, exact[1], relative * exact[1] + geometry.num_tokens / stride)
    bound = (2 * relative + geometry.num_tokens / stride / FIXED) * exact[2] + groups + 2
    tolerance.check(run.tier, "mass", mass, exact[2], bound)
    in_parts = all_stages(run.ops("antidiagonal"), q, k, blocks, geometry, stride, 3)
    assert all(torch.equal(x, y) for x, y in zip(in_parts, (peak, total, mass), strict=True))
    rows = tuple(range(1, geometry.num_blocks, 4))
    some = geometry.select(rows)
    mine = q[:, :, some.positions]
    assert torch.equal(
        all_stages(run.ops("antidiagonal"), mine, k, blocks, some, stride)[2], mass[:, :, rows]
    )
    means = [run.ops("pooled").block_means(x, geometry) for x in (q, k)]
    assert torch.equal(means[0].cpu(), pooled.block_means(q.cpu(), geometry.to("cpu")))
    scores = run.ops("pooled").pooled_scores(*means, geometry)
    expected = pooled.pooled_scores(*(x.double() for x in means), geometry)
    longest = float(means[0].norm(dim=3).max() * means[1].norm(dim=3).max())
    tolerance.check("gpu-fp32", "pooled", scores, expected, (dim + 2) * 2**-24 * longest / math.sqrt(dim))
    alone = run.ops("pooled").pooled_scores(means[0][:, :, rows], means[1], some)
    assert torch.equal(alone, scores[:, :, rows])


def test_addresses_have_64_bits():
    """More than 2^31 elements of queries; the last rows of the last head are those of a short tensor."""
    geometry = Geometry.causal(1, 2**19 + 2**15, 128, device="cuda")
    q = torch.zeros(1, 32, geometry.num_tokens, 128, dtype=torch.bfloat16, device="cuda")
    assert q.numel() > 2**31
    last = geometry.select(geometry.blocks[-2:])
    q[:, -1:, -256:] = torch.randn(1, 1, 256, 128, device="cuda")
    mine, k = q[:, -1:, -256:].contiguous(), torch.randn(1, 1, 256, 128, device="cuda").bfloat16()
    ops, means = Run(True, "bfloat16").ops("antidiagonal"), Run(True, "bfloat16").ops("pooled").block_means
    found = all_stages(ops, q, k, last.block_ids, geometry, 16)
    expected = all_stages(ops, mine, k, last.block_ids, last, 16)
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(x[:, -1:, -y.shape[2] :], y)
    assert torch.equal(means(q, geometry)[:, -1:, -2:], means(mine, last))


def test_block_scores_do_not_wait_for_the_device_and_take_no_memory():
    """What they allocate is mostly their result: 32 bits a tile."""
    geometry, q, k = on_device(32768, 8, 2, 128)
    run = Run(True, "bfloat16")

    def estimate():
        ops, given = run.ops("antidiagonal"), (q, k, geometry.block_ids)
        peak = ops.peaks(*given, geometry, 8)
        mass = ops.masses(*given, peak, ops.totals(*given, peak, geometry, 8), geometry, 8)
        means = [run.ops("pooled").block_means(x, geometry) for x in (q, k)]
        return mass, run.ops("pooled").pooled_scores(*means, geometry)

    expected = estimate()  # compiles, and fills what the geometry keeps
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = estimate()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    used = torch.cuda.max_memory_allocated() - before
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    results = 2 * 8 * geometry.num_blocks**2 * 4
    by_group = 8 * (geometry.num_tokens // 8) * (4 + 8 + 4 + 8 + 8)  # peak, total, share and its temporaries
    by_mean = 10 * geometry.num_blocks * 128 * 4
    assert used < results + by_group + by_mean + 2**20
