"""What a job writes down: JSON lines, and the same numbers for a tracker."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .trackers import Tracker

MAIN_KINDS = ("train", "layers", "work", "decision")


class MetricsWriter:
    """Appends one JSON object per line to a file, flushed at once; writes nothing if not `active`.

    A run resumed at step `start` keeps the main run's rows of the steps before it, and no others. tracker:
    is told the numbers of each row too.
    """

    def __init__(
        self, path: Path, *, active: bool = True, start: int = 0, tracker: Tracker | None = None
    ) -> None:
        self._file, self._tracker = None, tracker
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
            if self._tracker is not None:
                self._tracker.log(step, _numbers(kind, values))

    def close(self) -> None:
        """Close the file; later rows are an error."""
        if self._file is not None:
            self._file.close()
            if self._tracker is not None:
                self._tracker.close()


def _numbers(kind: str, values: dict[str, Any]) -> dict[str, float]:
    """The numbers of a row by name; of lists with a value for each layer, a name with its place."""
    found = {}
    for name, value in values.items():
        parts = {f"/{i}": x for i, x in enumerate(value)} if kind == "layers" else {"": value}
        for place, part in parts.items():
            if isinstance(part, int | float) and not isinstance(part, bool):
                found[f"{kind}/{name}{place}"] = part
    return found


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
