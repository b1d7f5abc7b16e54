"""From what the engine reports to rows of metrics, and from those to the summary of a run."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np

from ..balance import candidates, step_imbalance, step_of_source, work_matrices, worker_imbalance
from ..balance.schedule import HEADS, HEADS_RING
from ..cp import ContextParallel, Report, Shard
from .config import TrainConfig
from .measure import slow_rank
from .metrics import read_metrics


def step_statistics(report: Report) -> dict[str, Any]:
    """What `cp.report()` says of a step as a whole; bytes are those of all ranks and layers.

    predicted_*: as the planner expected them when it chose the layout, None where it did not choose.
    least_bytes: what the plans make necessary, of keys and their gradients. exposed: share of the step spent
    waiting for other ranks. headers, header_wait: how often hosts waited for a header, and seconds in all.
    """
    names = "density recall worker_imbalance step_imbalance layout exposed headers header_wait".split()
    values = {name: getattr(report, name) for name in names}
    work = report.predicted
    values["predicted_worker_imbalance"] = None if work is None else worker_imbalance(work)
    values["predicted_step_imbalance"] = None if work is None else step_imbalance(work)
    values["bytes"] = sum(report.bytes_moved.values())
    return values | {"least_bytes": sum(report.bytes_least.values())}


def layer_statistics(report: Report) -> dict[str, list[float]]:
    """Density and imbalances of each layer, and recall where this step sampled it."""
    density, recall = report.density_by_layer, report.recall_by_layer
    rows = {
        "density": list(density.values()),
        "worker_imbalance": list(report.worker_imbalance_by_layer.values()),
        "step_imbalance": list(report.step_imbalance_by_layer.values()),
    }
    return rows | ({"recall": [recall[layer] for layer in density]} if recall else {})


def work_by_layout(cp: ContextParallel, shard: Shard) -> list[dict[str, Any]]:
    """The work that the plans of `shard` give every rank in every step, under each layout.

    Layouts are those that the planner weighed for this step, or would have, and the one in use; that one
    alone where ranks share heads, whose work it does not change. The row of the one in use also says which
    rank holds each block, and how much work its queries are. All ranks call it. Work is in tiles, mean over
    heads, summed over layers; columns come last.
    """
    world, blocks, size = shard.transport.size, shard.geometry.num_blocks, shard.layout.block_size
    tiles, columns = np.zeros((blocks, blocks)), np.zeros(blocks)
    for plan in cp.plans(shard).values():
        tiles += plan.tiles_bool().double().mean(1).sum(0).cpu().numpy()
        if plan.columns is not None:
            computed = (plan.column_elements() > 0).sum(3).double().mean(1).sum(0)
            columns += computed.cpu().numpy() / size
    chosen = {
        "layout": shard.layout.name,
        "chosen": True,
        "rank_of_block": shard.layout.source_of_block.tolist(),
        "work_of_block": (tiles.sum(1) + columns).tolist(),
    }
    if shard.exchange in (HEADS, HEADS_RING):
        return [chosen | {"work": cp.report(shard).work.tolist()}]
    steps = step_of_source(shard.exchange, world, shard.transport.nodes)
    table = shard.decision.table or candidates(blocks, world, size, tiles, columns, steps)
    others = [each.layout for each in table if each.layout.name != shard.layout.name]
    works = [work.tolist() for work in work_matrices([*others, shard.layout], tiles, columns, steps)]
    rows = [
        {"layout": layout.name, "chosen": False, "work": work}
        for layout, work in zip(others, works[:-1], strict=True)
    ]
    return [*rows, chosen | {"work": works[-1]}]


def summarize(
    config: TrainConfig, metrics: Path, *, world_size: int, parameters: int, context: float, padding: float
) -> dict[str, Any]:
    """The summary of a run from its metrics.

    Rows of text differ, so each last loss is the mean of the last tenth of the steps. Other means are
    over all steps that measured the value; what was not measured, or not run, is None. straggler: the rank
    that the others waited for in more than half of the steps, for straggler_wait seconds each on average.
    """
    rows = list(read_metrics(metrics, "train"))
    tail = max(1, config.steps // 10)
    straggler, straggler_wait = slow_rank(rows) or (None, None)
    last = {
        kind: _mean(list(read_metrics(metrics, kind))[-tail:], "loss") for kind in ("train", "dense", "local")
    }
    return {
        "pattern": config.pattern,
        "steps": config.steps,
        "seq_len": config.seq_len,
        "mean_visible_context": context,
        "padding": padding,
        "world_size": world_size,
        "parameters": parameters,
        "loss_first": rows[0]["loss"],
        "loss_last": last["train"],
        "dense_loss_last": last["dense"],
        "local_loss_last": last["local"],
        "layout": rows[-1]["layout"],
        "density": _mean(rows, "density"),
        "recall": _mean(rows, "recall"),
        "worker_imbalance": _mean(rows, "worker_imbalance"),
        "step_imbalance": _mean(rows, "step_imbalance"),
        "predicted_worker_imbalance": _mean(rows, "predicted_worker_imbalance"),
        "predicted_step_imbalance": _mean(rows, "predicted_step_imbalance"),
        "bytes": _mean(rows, "bytes"),
        "least_bytes": _mean(rows, "least_bytes"),
        "exposed": _mean(rows, "exposed"),
        "headers": _mean(rows, "headers"),
        "header_wait": _mean(rows, "header_wait"),
        "straggler": straggler,
        "straggler_wait": straggler_wait,
        "tokens_per_second": _median(rows, "tokens_per_second"),
        "model_tflops": _median(rows, "model_tflops"),
        "attention_tflops": _median(rows, "attention_tflops"),
        "peak_memory": max(_values(rows, "peak_memory"), default=None),
    }


def _mean(rows: list[dict[str, Any]], name: str) -> float | None:
    values = _values(rows, name)
    return fmean(values) if values else None


def _median(rows: list[dict[str, Any]], name: str) -> float | None:
    values = _values(rows, name)
    return median(values) if values else None


def _values(rows: list[dict[str, Any]], name: str) -> list[float]:
    return [row[name] for row in rows if row.get(name) is not None]
