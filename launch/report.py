"""report.png: loss, density and recall per layer, and who works when under each layout."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..balance import step_imbalance, worker_imbalance
from .metrics import read_metrics

INK, MUTED, GRID = "#22252b", "#737985", "#e3e6eb"
CURVES = {
    "train": (None, "#1f6feb", 2.2),
    "dense": ("dense", INK, 1.4),
    "local": ("one-block window", "#e8590c", 1.4),
}


def write_report(run_dir: str | Path) -> Path:
    """Draw `report.png` from the `metrics.jsonl` and `summary.json` of `run_dir`; returns its path.

    Rows used: "train", "dense", "local" (loss), "layers" (density, recall: a number for each layer)
    and "work" (layout, chosen, work: [[rank x ring step]], where one step more than there are ranks is
    that of the columns), of which those of the last step count.
    """
    run_dir = Path(run_dir)
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in read_metrics(run_dir / "metrics.jsonl"):
        rows.setdefault(row["kind"], []).append(row)
    if "train" not in rows:
        raise ValueError(f"{run_dir / 'metrics.jsonl'} holds no training steps; train there first")
    path = run_dir / "summary.json"
    summary = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    work = [row for row in rows.get("work", []) if row["step"] == rows["work"][-1]["step"]]
    layers, steps = rows.get("layers", []), rows["train"][-1]["step"] + 1
    with matplotlib.rc_context(_style()):
        figure = Figure(figsize=(13, 8 if work else 4.4), layout="constrained")
        top, *below = figure.subfigures(2, 1, height_ratios=(1.15, 1)) if work else (figure,)
        loss, density, recall = top.subplots(1, 3, width_ratios=(1.5, 1, 1))
        _draw_loss(loss, rows, summary.get("pattern", "sparse"))
        _draw_layers(density, layers, "density", steps)
        _draw_layers(recall, layers, "recall", steps)
        if work:
            _draw_work(below[0], work)
        figure.suptitle(_title(summary), color=MUTED, fontsize=10, x=0.012, ha="left")
        figure.savefig(run_dir / "report.png", dpi=130)
    return run_dir / "report.png"


def _style() -> dict[str, Any]:
    return {
        "font.size": 9,
        "text.color": INK,
        "axes.edgecolor": GRID,
        "axes.labelcolor": MUTED,
        "axes.titlesize": 10,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "grid.color": GRID,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "legend.frameon": False,
    }


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
    axes.set(title="loss", xlabel="step", ylabel="nats per byte")
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


def _draw_work(figure: Any, rows: list[dict[str, Any]]) -> None:
    """One heat map per layout, all on one scale: ranks down, ring steps across."""
    figure.suptitle("work per rank and ring step", x=0.012, ha="left", weight="bold", fontsize=10)
    grid = figure.subplots(1, len(rows), squeeze=False)[0]
    top = max(np.max(row["work"]) for row in rows) or 1.0
    for axes, row in zip(grid, rows, strict=True):
        work = np.asarray(row["work"], dtype=float)
        image = axes.imshow(work, cmap="YlGnBu", vmin=0, vmax=top)
        axes.grid(False)
        ranks, steps = work.shape
        axes.set(xticks=_ticks(min(ranks, steps)), yticks=_ticks(ranks), xlabel="ring step")
        if steps > ranks:  # the columns, computed after the ring
            axes.set_xticks([*axes.get_xticks(), ranks], [*map(int, axes.get_xticks()), "col"])
            axes.axvline(ranks - 0.5, color="white", linewidth=2)
        worker, step = worker_imbalance(work), step_imbalance(work)
        color = "#1f6feb" if row["chosen"] else INK
        name = f"{row['layout']} (chosen)" if row["chosen"] else row["layout"]
        axes.set_title(f"{name}\nworker {worker:.3f}   step {step:.3f}", color=color)
        for spine in axes.spines.values():
            spine.set(visible=row["chosen"], color=color, linewidth=2)
        if work.size <= 16:
            for (rank, at), value in np.ndenumerate(work):
                ink = "white" if value > 0.6 * top else INK
                axes.text(at, rank, f"{value:,.0f}", ha="center", va="center", color=ink)
    grid[0].set_ylabel("rank")
    figure.colorbar(image, ax=grid, shrink=0.8, label="tiles", pad=0.01)


def _ticks(count: int) -> list[int]:
    return list(range(0, count, max(1, count // 8)))


def main(arguments: Sequence[str] | None = None) -> None:
    """`sparring report [RUN]`: draw the report of a run again."""
    parser = argparse.ArgumentParser(prog="sparring report", description=write_report.__doc__)
    parser.add_argument("run_dir", nargs="?", default="runs/quickstart")
    try:
        print(write_report(parser.parse_args(arguments).run_dir))
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
