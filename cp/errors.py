"""Typed errors of distributed execution. They say where in a step it happened, and can be pickled."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """Where in a step ranks talk; the same on all of them.

    phase: "plan" (the pattern's estimate), "move" (of query blocks), "forward", "backward", "recall", "loss".
    hop: from 1, of `hops`.
    """

    step: int | None = None
    layer: Hashable = None
    phase: str | None = None
    hop: int | None = None
    hops: int | None = None

    def __str__(self) -> str:
        phase = self.phase if self.hop is None else f"{self.phase} hop {self.hop} of {self.hops}"
        parts = (("step ", self.step), ("layer ", self.layer), ("", phase))
        return ", ".join(f"{name}{value}" for name, value in parts if value is not None)


class RingError(RuntimeError):
    """Ranks could not exchange what an attention call needs.

    step, layer, hop, phase: where, see Place. rank: the global rank that raises. peer: the global rank that
    it waited for. All None where not known.
    """

    def __init__(self, what: str, rank: int | None = None, peer: int | None = None):
        super().__init__(what)
        self.rank, self.peer, self.place = rank, peer, Place()

    step = property(lambda self: self.place.step)
    layer = property(lambda self: self.place.layer)
    phase = property(lambda self: self.place.phase)
    hop = property(lambda self: self.place.hop)

    def __str__(self) -> str:
        rank = "" if self.rank is None else f"rank {self.rank}"
        return ": ".join(part for part in (rank, str(self.place), self.args[0]) if part)


class RingDesyncError(RingError):
    """Ranks disagree on what they exchange: layout, plan, shapes, dtypes, step, layer or hop."""


class RingTimeoutError(RingError):
    """A peer did not answer in time, or is gone."""
