"""Several runs side by side: what they reached, where their settings differ, and their curves."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from .metrics import read_metrics
from .page import read_json
from .pictures import INK, MUTED, STYLE
from .progress import number

SHOWN = (
    "steps seq_len world_size parameters loss_first loss_last density recall worker_imbalance step_imbalance "
    "exposed straggler tokens_per_second model_tflops attention_tflops peak_memory"
).split()
PLACES = ("out", "resume", "log_every", "keep", "save_every", "tracker", "profile_step")


def compare_runs(runs: Sequence[Path], picture: Path) -> None:
    """Print a table of the runs and draw `picture`: losses over steps and over time, tokens a second.

    ValueError for a run without training steps.
    """
    names = labels(runs)
    steps = [list(read_metrics(run / "metrics.jsonl", "train")) for run in runs]
    for run, rows in zip(runs, steps, strict=True):
        if not rows:
            raise ValueError(f"{run / 'metrics.jsonl'} holds no training steps; train there first")
    Console(highlight=False).print(comparison(runs))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(13, 4), layout="constrained")
        draw_comparison(figure.subplots(1, 3), names, steps)
        figure.savefig(picture, dpi=130)


def comparison(runs: Sequence[Path]) -> Table:
    """Their summaries, then the settings in which they differ; a column for each run."""
    table = Table(title="runs", title_justify="left")
    table.add_column("")
    for name in labels(runs):
        table.add_column(name, justify="right", overflow="fold")
    for file, wanted, always in (("summary.json", SHOWN, True), ("config.json", None, False)):
        found = [read_json(run / file) for run in runs]
        known = list(dict.fromkeys(name for values in found for name in values))
        for name in wanted or [name for name in known if name not in PLACES]:
            values = [values.get(name) for values in found]
            if always or any(value != values[0] for value in values):
                table.add_row(name.replace("_", " "), *("-" if v is None else number(v) for v in values))
        table.add_section()
    return table


def labels(runs: Sequence[Path]) -> list[str]:
    """Names of runs: that of their folder, the whole path where two folders have the same."""
    names = [run.resolve().name for run in runs]
    return names if len(set(names)) == len(names) else [str(run) for run in runs]


def draw_comparison(grid: Sequence[Axes], names: Sequence[str], runs: Sequence[list[dict[str, Any]]]) -> None:
    """grid: three axes. runs: rows of the steps of each, of which "loss" is needed."""
    over_steps, over_time, speed = grid
    colors = matplotlib.colormaps["viridis"]
    for i, (name, rows) in enumerate(zip(names, runs, strict=True)):
        style = {"color": colors(0.1 + 0.75 * i / max(1, len(runs) - 1)), "linewidth": 1.6}
        at, losses = [row["step"] + 1 for row in rows], [row["loss"] for row in rows]
        over_steps.plot(at, losses, **style, label=f"{name}  {losses[-1]:.3f}")
        if all("seconds" in row for row in rows):
            over_time.plot(list(accumulate(row["seconds"] for row in rows)), losses, **style)
        if all("tokens_per_second" in row for row in rows):
            speed.plot(at, [row["tokens_per_second"] for row in rows], **style)
    over_steps.set(title="loss", xlabel="step", ylabel="nats per token")
    over_time.set(title="loss over time in steps", xlabel="seconds", ylabel="nats per token")
    speed.set(title="tokens a second", xlabel="step")
    speed.set_ylim(bottom=0)
    for axes in (over_steps, speed):
        axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
    over_steps.legend(title="last step", alignment="left", labelcolor=INK, title_fontproperties={"size": 8})
    speed.tick_params(colors=MUTED)
