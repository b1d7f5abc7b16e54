"""What a step was over all ranks of the job: speed, memory, and whom the others waited for."""

from __future__ import annotations

import resource
import sys
from collections import Counter
from collections.abc import Sequence
from statistics import fmean
from typing import Any

import torch

from ..cp import Report, Shard

TERA, GIB = 1e12, 2**30


def own_counts(report: Report, shard: Shard, device: torch.device) -> list[int]:
    """This rank's part of `job_statistics`; outside the step, as it waits for the device.

    Pairs of query and key that its plans chose, summed over heads and layers; the most bytes that it held;
    the straggler of its group, or -1; the microseconds that the others of the group waited for that one.
    """
    tiles, columns, _ = torch.stack(list(shard.record.elements.values())).sum(0).tolist()
    late = -1 if report.straggler is None else report.straggler
    return [tiles + columns, peak_bytes(device), late, round(1e6 * waited_for(report))]


def job_statistics(
    counts: Sequence[Sequence[int]], seconds: float, weight_flops: float, pair_flops: float
) -> dict[str, Any]:
    """Values of a row of metrics, from the `own_counts` of all ranks.

    seconds: of the step. weight_flops: operations of all weights for all tokens of the step; pair_flops: of
    attention for one pair (see flops.py).

    model_tflops, attention_tflops: TFLOP in a second of the step and a rank, of the whole model and of its
    attention alone. peak_memory: GiB of the rank that held most, since the job began. straggler: the rank
    that made the others of its group wait longest, None where none did for long; straggler_wait: seconds.
    Waiting inside attention counts: not that for weights, which FSDP gathers, nor that for batches.
    """
    pairs, peaks, late, waits = zip(*counts, strict=True)
    attention = sum(pairs) * pair_flops
    per_rank = seconds * len(counts) * TERA
    rank, wait = max(zip(late, waits, strict=True), key=lambda pair: pair[1])
    return {
        "model_tflops": (weight_flops + attention) / per_rank,
        "attention_tflops": attention / per_rank,
        "peak_memory": max(peaks) / GIB,
        "straggler": None if rank < 0 else rank,
        "straggler_wait": None if rank < 0 else wait / 1e6,
    }


def waited_for(report: Report) -> float:
    """Seconds that the others of the group waited longer than the straggler, on average; 0 without one."""
    if report.straggler is None:
        return 0.0
    least = min(report.waited)
    return (sum(report.waited) - least) / (len(report.waited) - 1) - least


def slow_rank(rows: Sequence[dict[str, Any]]) -> tuple[int, float] | None:
    """The rank that was the straggler in more than half of the rows of steps, if there is one.

    And the mean seconds that others waited for it in those. Of a step alone it says nothing: work differs.
    """
    found = [row for row in rows if row.get("straggler") is not None]
    if len(rows) < 2 or not found:
        return None
    rank, times = Counter(row["straggler"] for row in found).most_common(1)[0]
    if 2 * times <= len(rows):
        return None
    return rank, fmean(row["straggler_wait"] for row in found if row["straggler"] == rank)


def peak_bytes(device: torch.device) -> int:
    """The most memory that this process held: allocated by torch on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 2**10)
