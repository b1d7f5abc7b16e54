"""What the planner weighed and decided, as data and as text."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from .cost import step_imbalance, worker_imbalance
from .layout import Layout
from .predict import Prediction

SWITCH = 1.03  # another layout must be predicted this much faster to replace the one in use
EVEN, UNEQUAL = 1.03, 1.25  # a worker imbalance beyond the one counts as so much slower
LOCALITY = 1e-3  # how much dearer work with the keys of other ranks is


@dataclass(frozen=True)
class PlannerState:
    """What the planner remembers from step to step: the names of the layout and the exchange in use."""

    layout: str | None = None
    exchange: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return asdict(self)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> PlannerState:
        """The inverse of `to_dict`."""
        return PlannerState(**values)


FRESH = PlannerState()


@dataclass(frozen=True, eq=False)
class Candidate:
    """A layout and its work, float64 [W, steps + 1] in tiles as `work_matrices` gives it.

    best: what is predicted for its fastest exchange, by whose steps the work is; None where nothing is
    known of the attention call. others: (name, seconds) of the other exchanges. pulled: keys that ranks
    need of others, as a share of all keys of others, if a pull was weighed. A layout that was left out,
    since its slowest rank alone takes longer than the fastest candidate, has totals as its work, [W, 1].
    """

    layout: Layout
    work: np.ndarray
    best: Prediction | None = None
    others: tuple[tuple[str, float], ...] = ()
    pulled: float | None = None

    @property
    def time(self) -> float:
        """What candidates are compared by: seconds, or tiles where nothing is known of the attention call.

        In seconds a layout whose slowest rank has 3 % more work than the mean counts as a quarter slower:
        where transfers take longest unequal work would seem to cost nothing, and of the two work is known
        better. In tiles it is the slowest rank of each step, summed over steps; the share of the work that
        needs the keys of other ranks adds up to 0.1 %, so that among equals the layout with the least to
        move wins.
        """
        if self.best is not None:
            return self.best.seconds * (UNEQUAL if worker_imbalance(self.work) > EVEN else 1.0)
        if self.work.shape[1] == 1:
            return np.inf
        total = self.work.sum()
        remote = self.work[:, 1:-1].sum() / total if total else 0.0
        return float(self.work.max(0).sum() * (1 + LOCALITY * remote))


@dataclass(frozen=True, eq=False)
class Decision:
    """The layout of a step, the candidates that it was chosen from, and the state for the next step.

    exchange: chosen or given with the attention call, None without one. given: whether the user gave it. The
    table is empty if nothing was left to choose.
    """

    layout: Layout
    table: tuple[Candidate, ...]
    state: PlannerState
    exchange: str | None = None
    given: bool = False

    @property
    def chosen(self) -> Candidate:
        """The candidate that the layout is of."""
        return next(candidate for candidate in self.table if candidate.layout is self.layout)

    @property
    def why(self) -> str:
        """Why this exchange, in one line."""
        if self.given:
            return "given by the user"
        if not self.table or self.chosen.best is None:
            return "fixed until attention of two steps before is known"
        best, others = self.chosen.best, self.chosen.others
        listed = ", ".join(f"{name} {1e3 * seconds:.3f}" for name, seconds in others)
        kept = any(seconds < best.seconds for _, seconds in others)
        return (
            f"{1e3 * best.seconds:.3f} ms of one layer"
            + (f", in this layout {listed}" if others else ", no other fits this layout")
            + (f"; in use, none is {SWITCH - 1:.0%} faster" if kept else "")
        )

    def explain(self) -> str:
        """The candidates as a text table, the chosen one marked, and why the exchange was chosen."""
        if not self.table:
            table = f"{self.layout}, given by the user"
        else:
            table = _in_seconds(self) if self.chosen.best else _in_tiles(self)
        return table if self.exchange is None else f"{table}\nexchange {self.exchange}: {self.why}"


def _in_tiles(decision: Decision) -> str:
    lines = [f"  {'layout':<14}{'work':>12}{'worker':>9}{'step':>9}{'time':>12}"]
    for candidate in decision.table:
        work = candidate.work
        lines.append(
            f"{'*' if candidate.layout is decision.layout else ' '} {candidate.layout.name:<14}"
            f"{work.sum():>12.1f}{worker_imbalance(work):>9.3f}{step_imbalance(work):>9.3f}"
            f"{candidate.time:>12.1f}"
        )
    return "\n".join([*lines, "work and time in tiles, imbalances as max / mean; * = chosen"])


def _in_seconds(decision: Decision) -> str:
    chosen = decision.chosen
    names = ("exchange", "worker", "step", "pulled", "ms", "waits")
    lines = ["  {:<22}{:<14}{:>7}{:>7}{:>8}{:>10}{:>10}  why not".format("layout", *names)]
    for candidate in decision.table:
        best, work = candidate.best, candidate.work
        values = ["-"] * len(names)
        values[1] = f"{worker_imbalance(work):.3f}"
        if best is not None:
            values[0], values[2] = best.exchange, f"{step_imbalance(work):.3f}"
            values[4:] = (f"{1e3 * seconds:.3f}" for seconds in (best.seconds, best.exposed))
        if candidate.pulled is not None:
            values[3] = f"{candidate.pulled:.3f}"
        mark = "*" if candidate is chosen else " "
        line = "{} {:<22}{:<14}{:>7}{:>7}{:>8}{:>10}{:>10}  {}".format(
            mark, candidate.layout.name, *values, _why_not(candidate, chosen)
        )
        lines.append(line.rstrip())
    lines.append(
        "ms of one layer, of these waits for keys or slower ranks; imbalances max / mean; * = chosen"
    )
    return "\n".join(lines)


def _why_not(candidate: Candidate, chosen: Candidate) -> str:
    if candidate is chosen:
        return ""
    if candidate.best is None:
        return "its slowest rank alone takes longer"
    slower = candidate.best.seconds / chosen.best.seconds - 1
    uneven = worker_imbalance(candidate.work) > EVEN
    if abs(slower) < SWITCH - 1 and not uneven:
        return f"{slower:+.1%}: as good"
    unequal = candidate.best.compute - chosen.best.compute > 0.5 * slower * chosen.best.seconds
    return f"{slower:+.1%}: {'unequal work' if uneven and (unequal or slower < 0) else 'waits longer'}"
