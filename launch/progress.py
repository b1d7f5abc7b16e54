"""What one sees of a run while it goes on: a bar on a terminal, plain lines elsewhere, a table at the end."""

from __future__ import annotations

import time
from collections import deque
from datetime import timedelta
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from .measure import slow_rank

WINDOW = 10  # steps by which the time that is left and a slow rank are judged
SHOWN = (
    ("loss", "loss {:.4f}"),
    ("tokens_per_second", "tok/s {:,.0f}"),
    ("model_tflops", "model {:.4g} TFLOP/s"),
    ("attention_tflops", "attention {:.4g} TFLOP/s"),
    ("density", "density {:.3f}"),
    ("recall", "recall {:.3f}"),
    ("worker_imbalance", "worker {:.3f}"),
    ("step_imbalance", "step {:.3f}"),
    ("peak_memory", "peak {:.2f} GiB"),
    ("layout", "{}"),
)


class ProgressReport:
    """A bar above the last numbers; where there is no terminal, a line every `every` steps.

    Silent if not `active`. The time that is left follows from the last WINDOW steps, and so does a rank that
    is late again and again.
    """

    def __init__(self, title: str, steps: int, *, active: bool = True, every: int = 1) -> None:
        self._console = Console(quiet=not active, highlight=False)
        self._title, self._steps, self._every, self._live = title, steps, every, None
        self._rows: deque[dict[str, Any]] = deque(maxlen=WINDOW)
        self._ends: deque[float] = deque(maxlen=WINDOW + 1)  # when steps ended
        if active and self._console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn())
            self._bar = Progress(*columns, TimeRemainingColumn())
            self._task = self._bar.add_task(title, total=steps)
            self._live = Live(self._bar, console=self._console)
            self._live.start()

    def update(self, step: int, values: dict[str, Any]) -> None:
        """`step` (from 0) is done; `values` is its row of metrics."""
        self._rows.append(values)
        self._ends.append(time.monotonic())
        text = progress_text(values)
        if (slow := slow_rank(self._rows)) is not None:
            text += "  rank {} is late by {:.2f} s".format(*slow)
        if self._live is not None:
            self._bar.update(self._task, completed=step + 1)
            self._live.update(Group(self._bar, Text(text)))
        elif step % self._every == 0 or step + 1 == self._steps:
            line = f"{self._title} {step + 1:>4}/{self._steps}  {text}{self._left(step)}"
            self._console.print(line, soft_wrap=True)

    def _left(self, step: int) -> str:
        if len(self._ends) < 2 or step + 1 == self._steps:
            return ""
        each = (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1)
        return f"  left {timedelta(seconds=round(each * (self._steps - step - 1)))}"

    def close(self) -> None:
        """End the bar; what it last showed stays."""
        if self._live is not None:
            self._live.stop()


def progress_text(values: dict[str, Any]) -> str:
    """The few numbers of a row that one wants to watch; TFLOP/s are those of a rank, see measure.py."""
    return "  ".join(form.format(values[name]) for name, form in SHOWN if values.get(name) is not None)


def print_table(title: str, values: dict[str, Any]) -> None:
    """The summary of a run, one line per value."""
    table = Table(title=title, show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(justify="right")
    for name, value in values.items():
        table.add_row(name.replace("_", " "), number(value))
    Console(highlight=False).print(table)


def number(value: Any) -> str:
    """A value as tables show it."""
    if isinstance(value, float):
        digits = ",.0f" if abs(value) >= 1000 else ".4f" if abs(value) >= 0.01 else ".4g"
        return f"{value:{digits}}"
    return f"{value:,}" if type(value) is int else str(value)
