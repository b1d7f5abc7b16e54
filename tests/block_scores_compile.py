"""Run by test_block_scores.py in a process of its own: compiles its kernels for sm_90, no GPU needed.

Prints a JSON list: for every kernel and configuration, what ptxas says of registers and spills.
"""

from __future__ import annotations

import json

import torch
from estimates_compile import report

from sparring.kernels import Geometry, triton_antidiagonal, triton_pooled


def launches(dtype: torch.dtype, dim: int, stride: int) -> list:
    """(kernel, arguments, options) of every launch of both estimates; none of them runs."""
    found = []

    def note(kernel, _, __, arguments, **meta):
        found.append((kernel, arguments, meta))

    triton_antidiagonal.launch = triton_pooled.launch = note
    geometry = Geometry.causal(1, 1024)
    q, k = torch.zeros(1, 8, 1024, dim, dtype=dtype), torch.zeros(1, 2, 1024, dim, dtype=dtype)
    means = [triton_pooled.block_means(x, geometry) for x in (k, q)]
    triton_pooled.pooled_scores(means[1], means[0], geometry)
    given = q, k, geometry.block_ids
    peak = triton_antidiagonal.peaks(*given, geometry, stride)
    total = triton_antidiagonal.totals(*given, peak, geometry, stride)
    triton_antidiagonal.masses(*given, peak, total, geometry, stride)
    return found[1:]  # the first one is that of queries, too


if __name__ == "__main__":
    low, full = torch.bfloat16, torch.float32
    cases = ((low, 64, 8), (low, 128, 16), (full, 64, 16), (full, 128, 8))
    found = [
        dict(dim=dim, type=str(dtype), stride=stride, stage=x[2].get("STAGE")) | report(*x)
        for dtype, dim, stride in cases
        for x in launches(dtype, dim, stride)
    ]
    print(json.dumps(found))
