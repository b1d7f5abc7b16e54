"""The planner: which layout makes the next step fastest, and why.

Every rank decides alone and all decide alike: the inputs (the documents of the batch, group-reduced
statistics, the state) are identical on all ranks, and so is the arithmetic (elementwise operations and
ordered sums; no BLAS).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from .cost import (
    Documents,
    Tiles,
    block_work,
    expected_columns,
    expected_tiles,
    step_imbalance,
    work_matrices,
    worker_imbalance,
)
from .layout import Layout, contiguous, from_assignment, named, striped, zigzag
from .statistics import Statistics

SWITCH = 1.03  # another layout must be predicted this much faster to replace the one in use
LOCALITY = 1e-3  # how much dearer work with the keys of other ranks is


@dataclass(frozen=True)
class PlannerState:
    """What the planner remembers from step to step: the name of the layout in use."""

    layout: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return asdict(self)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> PlannerState:
        """The inverse of `to_dict`."""
        return PlannerState(**values)


@dataclass(frozen=True, eq=False)
class Candidate:
    """A layout and its work, float64 [W, W + 1] in tiles as `work_matrices` gives it."""

    layout: Layout
    work: np.ndarray

    @property
    def time(self) -> float:
        """Predicted time in tiles: the slowest rank of each step, summed over steps.

        The share of the work that needs the keys of other ranks adds up to 0.1 %: among equals the
        layout with the least to move wins.
        """
        total = self.work.sum()
        remote = self.work[:, 1:-1].sum() / total if total else 0.0
        return float(self.work.max(0).sum() * (1 + LOCALITY * remote))


@dataclass(frozen=True, eq=False)
class Decision:
    """The layout of a step, the candidates that it was chosen from, and the state for the next step.

    The table is empty if the layout was given by the user.
    """

    layout: Layout
    table: tuple[Candidate, ...]
    state: PlannerState

    def explain(self) -> str:
        """The candidates as a text table; the chosen one is marked."""
        if not self.table:
            return f"{self.layout}, given by the user"
        lines = [f"  {'layout':<14}{'work':>12}{'worker':>9}{'step':>9}{'time':>12}"]
        for candidate in self.table:
            work = candidate.work
            lines.append(
                f"{'*' if candidate.layout is self.layout else ' '} {candidate.layout.name:<14}"
                f"{work.sum():>12.1f}{worker_imbalance(work):>9.3f}{step_imbalance(work):>9.3f}"
                f"{candidate.time:>12.1f}"
            )
        return "\n".join([*lines, "work and time in tiles, imbalances as max / mean; * = chosen"])


def candidates(
    num_blocks: int,
    world: int,
    block_size: int,
    tiles: Tiles,
    columns: np.ndarray,
    order: np.ndarray | None = None,
) -> tuple[Candidate, ...]:
    """The layouts that the planner weighs, with their work.

    tiles[i]: the work of query block i with each key block (an array or `expected_tiles`). columns:
    [num_blocks], the column work of each query block. order: see `work_matrices`.
    """
    layouts = [
        contiguous(num_blocks, world, block_size),
        zigzag(num_blocks, world, block_size),
        striped(num_blocks, world, block_size),
        striped(num_blocks, world, block_size, 4),
        work_sorted(block_work(tiles, columns), world, block_size),
    ]
    work = work_matrices(layouts, tiles, columns, order)
    return tuple(map(Candidate, layouts, work))


def work_sorted(by_block: np.ndarray, world: int, block_size: int) -> Layout:
    """Query blocks sorted by work and dealt in snake order; equal work goes to the lower id first.

    by_block: [num_blocks], work in tiles; differences below 1e-6 do not count. A rank keeps its blocks
    in logical order.
    """
    order = np.argsort(-np.round(by_block, 6), kind="stable")
    turn, place = np.divmod(np.arange(len(order)), world)
    rank = np.where(turn % 2 == 0, place, world - 1 - place)
    assignment = [sorted(order[rank == r].tolist()) for r in range(world)]
    return from_assignment(assignment, block_size, "work-sorted")


def choose(
    tiles: Tiles,
    columns: np.ndarray,
    world: int,
    block_size: int,
    state: PlannerState = PlannerState(),
    order: np.ndarray | None = None,
) -> Decision:
    """The candidate with the least predicted time; the layout in use stays unless one is 3 % faster."""
    table = candidates(len(columns), world, block_size, tiles, columns, order)
    best = min(table, key=lambda candidate: candidate.time)
    for candidate in table:
        if candidate.layout.name == state.layout and candidate.time <= best.time * SWITCH:
            best = candidate
    return Decision(best.layout, table, PlannerState(best.layout.name))


def resolve(
    layout: str | Layout,
    documents: Documents,
    num_blocks: int,
    world: int,
    block_size: int,
    statistics: Statistics | None = None,
    state: PlannerState = PlannerState(),
    order: np.ndarray | None = None,
) -> Decision:
    """The layout of a step from what the user asked for.

    layout: "auto" (the planner chooses), "contiguous", "zigzag", "striped", "striped(g)", or a Layout.
    documents: for each batch row its token ranges. order: see `work_matrices`. Raises ValueError for unknown
    names and for a Layout of other sizes than this step's.
    """
    if isinstance(layout, Layout):
        given = (layout.num_blocks, layout.world, layout.block_size)
        if given != (num_blocks, world, block_size):
            raise ValueError(
                f"{layout} does not fit this step, which has {num_blocks} blocks of {block_size} tokens "
                f"on {world} ranks; build the layout for these sizes, or use a name, such as 'auto'"
            )
        return Decision(layout, (), state)
    if layout != "auto":
        return Decision(named(layout, num_blocks, world, block_size), (), state)
    tiles = expected_tiles(documents, num_blocks, block_size, statistics)
    columns = expected_columns(documents, num_blocks, block_size, statistics)
    return choose(tiles, columns, world, block_size, state, order)
