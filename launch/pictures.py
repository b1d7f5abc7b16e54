"""Pictures of a layout: who works when before and after the choice, what was weighed, who holds what."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes

from ..balance import step_imbalance, worker_imbalance

INK, MUTED, GRID, BLUE, ORANGE = "#22252b", "#737985", "#e3e6eb", "#1f6feb", "#e8590c"
#: Settings of matplotlib, for rc_context.
STYLE = {
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


def draw_layouts(figure: Any, rows: Sequence[dict[str, Any]]) -> None:
    """Two bands: heat maps of the worst layout and the chosen one, and all of them as bars; who holds what.

    figure: a Figure or SubFigure. rows: of `work_by_layout`, one for each layout, all of the same plans.
    """
    chosen = next(row for row in rows if row["chosen"])
    others = [row for row in rows if not row["chosen"]]
    before = max(others, key=lambda row: step_imbalance(np.array(row["work"])), default=None)
    above, below = figure.subfigures(2, 1, height_ratios=(1.1, 1))
    maps = [chosen] if before is None else [before, chosen]
    *grid, table = above.subplots(1, len(maps) + 1, width_ratios=[1] * len(maps) + [0.7])
    draw_work(grid, maps)
    draw_weighed(table, rows)
    if "rank_of_block" in chosen:  # older runs did not say
        draw_blocks(below.subplots(), chosen["rank_of_block"], chosen["work_of_block"], len(chosen["work"]))


def draw_work(grid: Sequence[Axes], rows: Sequence[dict[str, Any]]) -> None:
    """One heat map for each row, all on one scale: ranks down, steps across, totals of ranks at the right."""
    top = max(np.max(row["work"]) for row in rows) or 1.0
    for axes, row in zip(grid, rows, strict=True):
        work = np.asarray(row["work"], dtype=float)
        ranks, steps = work.shape
        image = axes.imshow(work, cmap="YlGnBu", vmin=0, vmax=top, aspect="auto")
        axes.grid(False)
        at = [*_ticks(steps - 1), steps - 1]  # what comes after the steps is the work of columns
        axes.set_xticks(at, [*map(str, at[:-1]), "col"])
        axes.set(yticks=_ticks(ranks), xlabel="step")
        axes.axvline(steps - 1.5, color="white", linewidth=2)
        text = {"color": MUTED, "fontsize": 8}
        for rank in _ticks(ranks):
            axes.text(steps - 0.4, rank, f" {work[rank].sum():,.0f}", va="center", **text)
        axes.annotate(
            " total", (steps - 0.4, -0.5), (0, 6), textcoords="offset points", annotation_clip=False, **text
        )
        color = BLUE if row["chosen"] else INK
        name = f"{row['layout']} (chosen)" if row["chosen"] else f"{row['layout']} (the worst weighed)"
        imbalances = f"worker {worker_imbalance(work):.3f}   step {step_imbalance(work):.3f}"
        axes.set_title(f"work, {name}\n{imbalances}", color=color)
        if work.size <= 16:
            for (rank, step), value in np.ndenumerate(work):
                ink = "white" if value > 0.6 * top else INK
                axes.text(step, rank, f"{value:,.0f}", ha="center", va="center", color=ink)
    grid[0].set_ylabel("rank")
    for axes in grid[1:]:
        axes.tick_params(labelleft=False)
    grid[0].figure.colorbar(image, ax=list(grid), shrink=0.8, label="tiles", pad=0.01, aspect=30)


def draw_weighed(axes: Axes, rows: Sequence[dict[str, Any]]) -> None:
    """Bars of both imbalances of each layout; they begin at 1, where all work is equal."""
    works = [np.array(row["work"], dtype=float) for row in rows]
    places = np.arange(len(rows))
    kinds = (("worker", worker_imbalance, BLUE), ("step", step_imbalance, ORANGE))
    for shift, (name, measure, color) in zip((-0.2, 0.2), kinds, strict=True):
        values = [measure(work) for work in works]
        axes.barh(places + shift, np.array(values) - 1, left=1, height=0.36, color=color, label=name)
        for place, value in enumerate(values):
            axes.text(value, place + shift, f" {value:.3f}", va="center", fontsize=8, color=MUTED)
    axes.set_yticks(places, [f"{row['layout']} *" if row["chosen"] else row["layout"] for row in rows])
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.set_xlim(1, 1.01 + 1.3 * (max(map(step_imbalance, works)) - 1))
    axes.set(title="imbalance by layout", xlabel="max / mean   (* chosen)")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)


def draw_blocks(axes: Axes, ranks: Sequence[int], work: Sequence[float], world: int) -> None:
    """A lane for each rank; in it the blocks that it holds, as high as the work of their queries.

    ranks, work: of each block, in logical order. Where blocks are many, they are drawn wider than they are.
    """
    ranks, work = np.asarray(ranks), np.asarray(work, dtype=float)
    height = np.maximum(0.9 * work / (work.max() or 1.0), 0.05)  # blocks without work are seen too
    points = 72 * axes.get_figure(root=True).get_size_inches()[0] * 0.95 / len(ranks)  # a block is wide
    colors = matplotlib.colormaps["viridis"](np.linspace(0.1, 0.85, world))[ranks]
    axes.vlines(
        np.arange(len(ranks)), ranks + 0.5 - height, ranks + 0.5, colors, linewidth=max(0.9 * points, 1.5)
    )
    axes.hlines(np.arange(world) + 0.5, -0.5, len(ranks) - 0.5, GRID, linewidth=0.4)
    axes.grid(False)
    axes.set(xlim=(-0.5, len(ranks) - 0.5), ylim=(world - 0.4, -0.5), yticks=_ticks(world))
    axes.set(title="blocks of each rank, as high as their work", xlabel="block", ylabel="rank")


def _ticks(count: int) -> list[int]:
    return list(range(0, count, max(1, -(-count // 8))))
