"""What a job writes down and shows: JSON lines, a progress bar or plain lines, a table at the end."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

MAIN_KINDS = ("train", "layers", "work")


class MetricsWriter:
    """Appends one JSON object per line to a file, flushed at once; writes nothing if not `active`.

    A run resumed at step `start` keeps the main run's rows of the steps before it, and no others.
    """

    def __init__(self, path: Path, *, active: bool = True, start: int = 0) -> None:
        self._file = None
        if not active:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [r for r in read_metrics(path) if r["step"] < start and r["kind"] in MAIN_KINDS]
        fresh = path.with_suffix(".new")
        fresh.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        os.replace(fresh, path)
        self._file = open(path, "a", encoding="utf-8")

    def write(self, kind: str, step: int, **values: Any) -> None:
        """One row: a kind (of MAIN_KINDS, "dense" or "local"), the step (from 0) and values."""
        if self._file is not None:
            self._file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Close the file; later rows are an error."""
        if self._file is not None:
            self._file.close()


def read_metrics(path: Path, kind: str | None = None) -> Iterator[dict[str, Any]]:
    """The rows of a metrics file (of one kind); a last line that a crash cut short is left out."""
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if kind is None or row["kind"] == kind:
            yield row


class ProgressReport:
    """A progress bar on a terminal, a line every `every` steps elsewhere, silent if not `active`."""

    def __init__(self, title: str, steps: int, *, active: bool = True, every: int = 1) -> None:
        self._console = Console(quiet=not active, soft_wrap=True, highlight=False)
        self._title, self._steps, self._every, self._bar = title, steps, every, None
        if active and self._console.is_terminal:
            columns = (
                *(TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn()),
                *(TextColumn("{task.fields[text]}"), TimeRemainingColumn()),
            )
            self._bar = Progress(*columns, console=self._console)
            self._task = self._bar.add_task(title, total=steps, text="")
            self._bar.start()

    def update(self, step: int, values: dict[str, Any]) -> None:
        """`step` (from 0) is done; `values` is its row of metrics."""
        text = progress_text(values)
        if self._bar is not None:
            self._bar.update(self._task, completed=step + 1, text=text)
        elif step % self._every == 0 or step + 1 == self._steps:
            self._console.print(f"{self._title} {step + 1:>4}/{self._steps}  {text}")

    def close(self) -> None:
        """End the bar; what it last showed stays."""
        if self._bar is not None:
            self._bar.stop()


def progress_text(values: dict[str, Any]) -> str:
    """The few numbers of a row that one wants to watch."""
    shown = (
        ("loss", "loss", "{:.4f}"),
        ("tokens_per_second", "tok/s", "{:,.0f}"),
        ("density", "density", "{:.3f}"),
        ("worker_imbalance", "worker", "{:.3f}"),
        ("step_imbalance", "step", "{:.3f}"),
        ("layout", "", "{}"),
    )
    parts = []
    for name, label, form in shown:
        if values.get(name) is not None:
            parts.append(f"{label} {form.format(values[name])}".strip())
    return "  ".join(parts)


def print_table(title: str, values: dict[str, Any]) -> None:
    """The summary of a run, one line per value."""
    table = Table(title=title, show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(justify="right")
    for name, value in values.items():
        digits = 4 if isinstance(value, float) and abs(value) < 1000 else 0
        text = f"{value:,.{digits}f}" if isinstance(value, float) else str(value)
        table.add_row(name.replace("_", " "), text)
    Console(highlight=False).print(table)
