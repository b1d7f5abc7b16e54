"""The picture of benchmarks/balance.py: imbalance over bytes."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

MARKERS = {"contiguous": "s", "zigzag": "D", "striped": "o", "striped(4)": "P", "work-sorted": "^"}


def draw_frontier(frontiers: dict[tuple[str, float], dict[str, tuple[float, float]]], path: Path) -> None:
    """One panel for each pattern and density: every layout by (keys pulled, worker imbalance)."""
    columns = min(4, len(frontiers))
    lines = -(-len(frontiers) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(3.2 * columns, 2.7 * lines + 0.6), squeeze=False)
    handles: dict[str, object] = {}
    for ax, ((name, density), points) in zip(axes.flat, frontiers.items(), strict=False):
        for layout, (share, imbalance) in points.items():
            ours = layout not in MARKERS
            mark = MARKERS.get(layout, "*" if layout == "folded" else "X" if "(" in layout else "v")
            handles[layout] = ax.scatter(
                share, imbalance, marker=mark, s=60 if ours else 30, color="C3" if ours else "C0"
            )
        ax.axhline(1.03, color="grey", lw=0.8, ls=":")
        ax.set(title=f"{name}, {density:g}", xlim=(0, 1.04))
        ax.title.set_size(9)
    for ax in axes.flat[len(frontiers) :]:
        ax.axis("off")
    figure.supxlabel("keys pulled, as a share of a ring's", fontsize=9)
    figure.supylabel("worker imbalance", fontsize=9)
    figure.legend(
        handles.values(), handles, loc="upper center", ncols=len(handles), fontsize=8, frameon=False
    )
    figure.tight_layout(rect=(0, 0, 1, 0.96))
    figure.savefig(path, dpi=110)
    plt.close(figure)
