"""Saving while training goes on: a copy is taken at once, and a thread writes it."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from .checkpoint import stage_state, write_checkpoint
from .gather import Group


class Saver:
    """Writes checkpoints under `root`, at most one at a time; a context that waits for the last.

    All ranks of `group`, which nothing else may use meanwhile, save the same steps. What goes wrong in the
    thread is raised by the next call, or at the end of the context.
    """

    def __init__(self, root: Path, keep: int, group: Group = None) -> None:
        self.root, self.keep, self.group = root, keep, group
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future | None = None

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Begin to save `state` (see `stage_state`) after `step` steps; returns once it is copied."""
        self.wait()
        staged = stage_state(state, self.group)
        self._pending = self._thread.submit(write_checkpoint, self.root, step, staged, self.keep, self.group)

    def wait(self) -> None:
        """Until the last save is complete; raises what went wrong with it."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind, error, trace) -> None:
        self._thread.shutdown()  # waits, no longer than the group's timeout: peers still need this rank
        if error is None:
            self.wait()
