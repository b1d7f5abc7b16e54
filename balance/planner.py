"""The planner: which layout and which exchange make the next step fastest, and why.

Every rank decides alone and all decide alike: the inputs (the documents of the batch, group-reduced
statistics, the state) are identical on all ranks, and so is the arithmetic (elementwise operations, ordered
sums, rounded transforms; no BLAS).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from .candidates import layouts, runs
from .cost import step_imbalance, work_by_rank, work_by_step, worker_imbalance
from .layout import Layout, named
from .predict import Call, Prediction, least_seconds, predict
from .schedule import step_of_source
from .statistics import Statistics
from .tiles import Documents, Tiles, as_tiles, expected_columns, expected_tiles

SWITCH = 1.03  # another layout must be predicted this much faster to replace the one in use
LOCAL = 16  # runs of blocks on a rank; with more, ranks need so many keys that a pull is not weighed
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


@dataclass(frozen=True, eq=False)
class Candidate:
    """A layout and its work, float64 [W, steps + 1] in tiles as `work_matrices` gives it.

    best: what is predicted for its fastest exchange, whose steps the work is by; others: for the other exchanges,
    in seconds by name. pulled: keys that ranks need of others, as a share of all keys of others. best is None
    where nothing is known of the attention call, and then so is pulled; or where the layout was left out since
    its slowest rank alone takes longer than the chosen one, and then work holds totals, [W, 1].
    """

    layout: Layout
    work: np.ndarray
    best: Prediction | None = None
    others: tuple[tuple[str, float], ...] = ()
    pulled: float | None = None

    @property
    def time(self) -> float:
        """Predicted seconds; in tiles where nothing is known of the call, or infinite if left out.

        A layout whose slowest rank has 3 % more work than the mean counts as 3 % slower: where transfers take
        longest, work costs nothing by that prediction alone.

        In tiles it is the slowest rank of each step, summed over steps. The share of the work that needs the
        keys of other ranks adds up to 0.1 %: among equals the layout with the least to move wins.
        """
        if self.best is not None:
            return self.best.seconds * (SWITCH if worker_imbalance(self.work) > SWITCH else 1.0)
        if self.work.shape[1] == 1:
            return np.inf
        total = self.work.sum()
        remote = self.work[:, 1:-1].sum() / total if total else 0.0
        return float(self.work.max(0).sum() * (1 + LOCALITY * remote))


@dataclass(frozen=True, eq=False)
class Decision:
    """The layout of a step, the candidates that it was chosen from, and the state for the next step.

    exchange: chosen or given with the call; None where that is not the planner's matter. The table is empty if
    the layout was given by the user.
    """

    layout: Layout
    table: tuple[Candidate, ...]
    state: PlannerState
    exchange: str | None = None

    @property
    def chosen(self) -> Candidate:
        return next(candidate for candidate in self.table if candidate.layout is self.layout)

    def explain(self) -> str:
        """The candidates as a text table; the chosen one is marked."""
        if not self.table:
            return f"{self.layout}, given by the user"
        return _table_of_seconds(self) if self.chosen.best else _table_of_tiles(self)


def candidates(
    num_blocks: int,
    world: int,
    block_size: int,
    tiles: Tiles | np.ndarray,
    columns: np.ndarray,
    steps: np.ndarray | None = None,
) -> tuple[Candidate, ...]:
    """The layouts that the planner weighs by work alone, for an exchange that moves all keys.

    tiles[i]: the work of query block i with each key block (an array or `expected_tiles`). columns:
    [num_blocks], the column work of each query block. steps: see `work_matrices`.
    """
    tiles, steps = as_tiles(tiles), step_of_source("ring", world) if steps is None else steps
    return tuple(
        Candidate(layout, work_by_step(tiles.by_source(layout), work_by_rank(layout, columns), steps))
        for layout in layouts(tiles, columns, world, block_size)
    )


def weigh(
    known: list[Layout], tiles: Tiles, columns: np.ndarray, call: Call, state: PlannerState
) -> tuple[Candidate, ...]:
    """Those layouts with their best exchange. One whose slowest rank alone takes too long is left out."""
    by_block = tiles.sums() + columns
    totals = [work_by_rank(layout, by_block)[:, None] for layout in known]
    least = [least_seconds(call, layout, total[:, 0]) for layout, total in zip(known, totals, strict=True)]
    table, fastest = [Candidate(*each) for each in zip(known, totals, strict=True)], np.inf
    for number in np.argsort(least, kind="stable").tolist():
        if least[number] > fastest * SWITCH:
            break
        table[number] = _candidate(known[number], tiles, columns, call, state)
        fastest = min(fastest, table[number].time)
    return tuple(table)


def _candidate(
    layout: Layout, tiles: Tiles, columns: np.ndarray, call: Call, state: PlannerState
) -> Candidate:
    world, local = layout.world, runs(layout) <= LOCAL * layout.world
    by_source, by_rank, needed = tiles.by_source(layout), work_by_rank(layout, columns), None
    if local and "pull" in call.exchanges:
        needed = tiles.needed(layout)
    names = [name for name in call.exchanges if local or name != "pull"] or call.exchanges
    if call.nodes > 1 and "hierarchical" in names:  # at least as fast as a flat ring, and that takes time to say
        names = [name for name in names if name != "ring"]
    options = [predict(name, call, layout, by_source, by_rank, needed) for name in names]
    best = min(options, key=lambda option: option.seconds)
    for option in options:
        if (layout.name, option.exchange) == (state.layout, state.exchange):
            best = option if option.seconds <= best.seconds * SWITCH else best
    work = work_by_step(by_source, by_rank, step_of_source(best.exchange, world, call.nodes))
    others = tuple((option.exchange, option.seconds) for option in options if option is not best)
    if needed is None:
        return Candidate(layout, work, best, others)
    remote = (needed.sum() - np.trace(needed)) / max(1, tiles.batch * layout.num_blocks * (world - 1))
    return Candidate(layout, work, best, others, float(remote))


def choose(
    tiles: Tiles | np.ndarray,
    columns: np.ndarray,
    world: int,
    block_size: int,
    state: PlannerState = PlannerState(),
    steps: np.ndarray | None = None,
    call: Call | None = None,
    known: list[Layout] | None = None,
) -> Decision:
    """The candidate with the least predicted time; the one in use stays unless another is 3 % faster.

    call: what is to be computed on what machine, and which exchanges may be chosen; without it layouts are
    weighed by their work, in the `steps` of a given exchange. known: the layouts to weigh, by default all.
    """
    if call is None:
        table = candidates(len(columns), world, block_size, tiles, columns, steps)
    else:
        tiles = as_tiles(tiles)
        topology = call.topology(world) if "pull" in call.exchanges else None
        known = known or layouts(tiles, columns, world, block_size, topology)
        table = weigh(known, tiles, columns, call, state)
    best = min(table, key=lambda candidate: candidate.time)
    for candidate in table:
        if candidate.layout.name == state.layout and candidate.time <= best.time * SWITCH:
            best = candidate
    exchange = best.best.exchange if best.best else None
    return Decision(best.layout, table, PlannerState(best.layout.name, exchange), exchange)


def resolve(
    layout: str | Layout,
    documents: Documents,
    num_blocks: int,
    world: int,
    block_size: int,
    statistics: Statistics | None = None,
    state: PlannerState = PlannerState(),
    steps: np.ndarray | None = None,
    call: Call | None = None,
) -> Decision:
    """The layout, and with a call the exchange, of a step from what the user asked for.

    layout: "auto" (the planner chooses), "contiguous", "zigzag", "striped", "striped(g)", or a Layout.
    documents: for each batch row its token ranges. steps, call: see `choose`. Raises ValueError for unknown
    names and for a Layout of other sizes than this step's.
    """
    given = None if layout == "auto" else _given(layout, num_blocks, world, block_size)
    if given is not None and (call is None or len(call.exchanges) == 1):
        return Decision(given, (), state, call.exchanges[0] if call else None)
    heads = (
        np.sqrt(call.heads / call.key_heads) if call else 1.0
    )  # query heads choose neither alike nor independently
    tiles = expected_tiles(documents, num_blocks, block_size, statistics, heads)
    columns = expected_columns(documents, num_blocks, block_size, statistics)
    known = None if given is None else [given]
    return choose(tiles, columns, world, block_size, state, steps, call, known)


def _given(layout: str | Layout, num_blocks: int, world: int, block_size: int) -> Layout:
    if not isinstance(layout, Layout):
        return named(layout, num_blocks, world, block_size)
    given = (layout.num_blocks, layout.world, layout.block_size)
    if given != (num_blocks, world, block_size):
        raise ValueError(
            f"{layout} does not fit this step, which has {num_blocks} blocks of {block_size} tokens "
            f"on {world} ranks; build the layout for these sizes, or use a name, such as 'auto'"
        )
    return layout


def _table_of_tiles(decision: Decision) -> str:
    lines = [f"  {'layout':<14}{'work':>12}{'worker':>9}{'step':>9}{'time':>12}"]
    for candidate in decision.table:
        work = candidate.work
        lines.append(
            f"{'*' if candidate.layout is decision.layout else ' '} {candidate.layout.name:<14}"
            f"{work.sum():>12.1f}{worker_imbalance(work):>9.3f}{step_imbalance(work):>9.3f}"
            f"{candidate.time:>12.1f}"
        )
    return "\n".join([*lines, "work and time in tiles, imbalances as max / mean; * = chosen"])


def _table_of_seconds(decision: Decision) -> str:
    chosen = decision.chosen
    lines = [
        f"  {'layout':<21}{'exchange':<14}{'worker':>7}{'step':>7}{'pulled':>8}{'ms':>9}{'waits':>9}  why not"
    ]
    for candidate in decision.table:
        mark, work, best = "*" if candidate is chosen else " ", candidate.work, candidate.best
        line = f"{mark} {candidate.layout.name:<21}{best.exchange if best else '-':<14}{worker_imbalance(work):>7.3f}"
        if best is None:
            lines.append(f"{line}{'-':>7}{'-':>8}{'-':>9}{'-':>9}  its slowest rank alone takes longer")
            continue
        pulled = "-" if candidate.pulled is None else f"{candidate.pulled:.3f}"
        line += f"{step_imbalance(work):>7.3f}{pulled:>8}{1e3 * best.seconds:>9.3f}{1e3 * best.exposed:>9.3f}"
        lines.append(line + _why_not(candidate, chosen))
    others = ", ".join(f"{name} {1e3 * seconds:.3f}" for name, seconds in chosen.others)
    lines.append(
        f"ms of one layer, forward and backward; waits: of these for keys or slower ranks; * = chosen"
    )
    return "\n".join([*lines, f"the chosen layout with other exchanges: {others} ms"] if others else lines)


def _why_not(candidate: Candidate, chosen: Candidate) -> str:
    if candidate is chosen:
        return ""
    slower = candidate.time / chosen.time - 1
    if slower <= SWITCH - 1:
        return (
            f"  {slower:+.1%}: as good, simpler or in use wins"
            if slower > -1e-9
            else f"  {slower:+.1%}: not worth a change"
        )
    unequal = candidate.best.compute - chosen.best.compute > 0.5 * (candidate.time - chosen.time)
    return f"  {slower:+.1%}: {'unequal work' if unequal else 'waits longer'}"
