"""report.png: loss, density and recall per layer, imbalance and traffic, who holds what and works when."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .compare import compare_runs
from .metrics import read_metrics
from .page import PICTURE, read_json, write_page
from .pictures import BLUE, GRID, INK, MUTED, ORANGE, STYLE, draw_layouts

CURVES = {
    "train": (None, BLUE, 2.2),
    "dense": ("dense", INK, 1.4),
    "local": ("one-block window", ORANGE, 1.4),
}


def write_report(run_dir: str | Path) -> Path:
    """Draw `report.png` from the `metrics.jsonl` and `summary.json` of `run_dir`; returns its path.

    Rows used: "train" (loss, imbalances, bytes, waiting), "dense", "local" (loss), "layers" (density, recall,
    imbalances: a number for each layer) and "work" (see `work_by_layout`), of which those of the last step
    count.
    """
    run_dir = Path(run_dir)
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in read_metrics(run_dir / "metrics.jsonl"):
        rows.setdefault(row["kind"], []).append(row)
    if "train" not in rows:
        raise ValueError(f"{run_dir / 'metrics.jsonl'} holds no training steps; train there first")
    summary = read_json(run_dir / "summary.json")

    work = [row for row in rows.get("work", []) if row["step"] == rows["work"][-1]["step"]]
    layers, steps = rows.get("layers", []), rows["train"][-1]["step"] + 1
    with matplotlib.rc_context(STYLE):
        heights = (4.4, 3.3, 8) if work else (4.4, 3.3)  # inches
        figure = Figure(figsize=(13, sum(heights)), layout="constrained")
        top, middle, *below = figure.subfigures(len(heights), 1, height_ratios=heights)
        loss, density, recall = top.subplots(1, 3, width_ratios=(1.5, 1, 1))
        _draw_loss(loss, rows, summary.get("pattern", "sparse"))
        _draw_layers(density, layers, "density", steps)
        _draw_layers(recall, layers, "recall", steps)
        worker, step, traffic, exposed, speed = middle.subplots(1, 5)
        _draw_imbalance(worker, rows, "worker_imbalance")
        _draw_imbalance(step, rows, "step_imbalance")
        _draw_traffic(traffic, rows["train"])
        _draw_exposed(exposed, rows["train"])
        _draw_speed(speed, rows["train"])
        if work:
            draw_layouts(below[0], work)
        figure.suptitle(_title(summary), color=MUTED, fontsize=10, x=0.012, ha="left")
        figure.savefig(run_dir / PICTURE, dpi=130)
    return run_dir / PICTURE


def _title(summary: dict[str, Any]) -> str:
    shown = ("pattern", "world_size", "seq_len", "steps", "density", "recall", "tokens_per_second")
    parts = []
    for name in shown:
        if (value := summary.get(name)) is not None:
            text = f"{value:.3f}" if isinstance(value, float) and value < 10 else value
            text = f"{value:,.0f}" if isinstance(value, float) and value >= 10 else text
            parts.append(f"{name.replace('_', ' ')} {text}")
    return "   ".join(parts)


def _draw_loss(axes: Axes, rows: dict[str, list[dict[str, Any]]], pattern: str) -> None:
    for kind, (label, color, width) in CURVES.items():
        label = label or pattern
        if kind in rows:
            steps = [row["step"] + 1 for row in rows[kind]]
            loss = [row["loss"] for row in rows[kind]]
            label = f"{label}  {loss[-1]:.3f}"
            axes.plot(steps, loss, color=color, linewidth=width, label=label)
    axes.set(title="loss", xlabel="step", ylabel="nats per token")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(title="last step", alignment="left")


def _draw_layers(axes: Axes, rows: list[dict[str, Any]], name: str, steps: int) -> None:
    rows = [row for row in rows if row.get(name)]
    axes.set(title=f"{name} per layer", xlabel="step", xlim=(0, steps + 1))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if not rows:
        axes.text(0.5, 0.5, "not measured", ha="center", color=MUTED, transform=axes.transAxes)
        return
    values = np.array([row[name] for row in rows], dtype=float)
    at = [row["step"] + 1 for row in rows]
    colors = matplotlib.colormaps["viridis"](np.linspace(0.1, 0.85, values.shape[1]))
    for layer, color in enumerate(colors):
        marker = "o" if len(at) < 20 else None
        style = {"color": color, "linewidth": 1.5, "marker": marker, "markersize": 3}
        axes.plot(at, values[:, layer], **style, label=f"layer {layer}")
    axes.set_ylim(0, 1.03)
    handles, labels = axes.get_legend_handles_labels()
    shown = range(len(labels)) if len(labels) <= 4 else (0, len(labels) // 2, len(labels) - 1)
    axes.legend([handles[i] for i in shown], [labels[i] for i in shown])


def _draw_imbalance(axes: Axes, rows: dict[str, list[dict[str, Any]]], name: str) -> None:
    """Of the step as a whole, as it was predicted, and the range of its layers."""
    train, layers = rows["train"], [row for row in rows.get("layers", []) if row.get(name)]
    if layers:
        values = np.array([row[name] for row in layers], dtype=float)
        at = [row["step"] + 1 for row in layers]
        axes.fill_between(at, values.min(1), values.max(1), color=GRID, label="layers")
    _plot(axes, train, name, "all layers", color=BLUE, linewidth=1.8)
    _plot(axes, train, f"predicted_{name}", "predicted", color=ORANGE, linewidth=1.2, linestyle="--")
    axes.set(title=name.replace("_", " "), xlabel="step", ylabel="max / mean")
    axes.set_ylim(bottom=1)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend_below(axes)


def _draw_traffic(axes: Axes, rows: list[dict[str, Any]]) -> None:
    _plot(axes, rows, "bytes", "moved", 2**-20, color=BLUE, linewidth=1.8)
    _plot(axes, rows, "least_bytes", "least for the tiles", 2**-20, color=ORANGE, linewidth=1.2)
    axes.set(title="bytes moved", xlabel="step", ylabel="MiB, all ranks")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend_below(axes)


def _draw_exposed(axes: Axes, rows: list[dict[str, Any]]) -> None:
    _plot(axes, rows, "exposed", "", 100, color=BLUE, linewidth=1.8)
    axes.set(title="waiting for other ranks", xlabel="step", ylabel="% of the step")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _draw_speed(axes: Axes, rows: list[dict[str, Any]]) -> None:
    _plot(axes, rows, "model_tflops", "model", color=BLUE, linewidth=1.8)
    _plot(axes, rows, "attention_tflops", "attention", color=ORANGE, linewidth=1.2)
    axes.set(title="operations of a rank", xlabel="step", ylabel="TFLOP/s")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend_below(axes)


def _legend_below(axes: Axes) -> None:
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=3, fontsize=8, handlelength=1.4)


def _plot(axes: Axes, rows: list[dict[str, Any]], name: str, label: str, scale: float = 1, **style) -> None:
    """One value of the steps that have it."""
    rows = [row for row in rows if row.get(name) is not None]
    marker = "o" if len(rows) < 20 else None
    values = [row[name] * scale for row in rows]
    axes.plot([row["step"] + 1 for row in rows], values, label=label, marker=marker, markersize=3, **style)


def main(arguments: Sequence[str] | None = None) -> None:
    """`sparring report [RUN ...]`: draw the report of one run again, or compare several."""
    parser = argparse.ArgumentParser(prog="sparring report", description=main.__doc__)
    parser.add_argument("runs", nargs="*", type=Path, default=[Path("runs/quickstart")])
    parser.add_argument(
        "--out", type=Path, default=Path("comparison.png"), help="picture of several runs (%(default)s)"
    )
    given = parser.parse_args(arguments)
    try:
        if len(given.runs) == 1:
            print(f"{write_report(given.runs[0])}\n{write_page(given.runs[0])}")
        else:
            compare_runs(given.runs, given.out)
            print(given.out)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
