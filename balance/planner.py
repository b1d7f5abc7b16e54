"""The planner: which layout and which exchange make the next step fastest, and why.

Every rank decides alone and all decide alike: the inputs (the documents of the batch, group-reduced
statistics, the state) are identical on all ranks, and so is the arithmetic (elementwise operations, ordered
sums, rounded transforms; no BLAS).
"""

from __future__ import annotations

import numpy as np

from .candidates import layouts, local_layouts, runs
from .cost import work_by_rank, work_by_step
from .decision import FRESH, SWITCH, Candidate, Decision, PlannerState
from .layout import Layout, named
from .predict import Call, least_seconds, predict
from .schedule import step_of_source
from .statistics import Statistics
from .tiles import Documents, Tiles, as_tiles, expected_columns, expected_tiles

LOCAL = 16  # runs of blocks on a rank; with more, ranks need so many keys that a pull is not weighed


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
        for layout in layouts(tiles.sums() + columns, world, block_size)
    )


def weigh(
    known: list[Layout],
    tiles: Tiles,
    columns: np.ndarray,
    call: Call,
    state: PlannerState,
    fastest: float = np.inf,
) -> list[Candidate]:
    """Those layouts with their best exchange. One whose slowest rank alone takes too long is left out."""
    by_block = tiles.sums() + columns
    totals = [work_by_rank(layout, by_block)[:, None] for layout in known]
    least = [
        least_seconds(call, layout, total[:, 0], tiles.batch)
        for layout, total in zip(known, totals, strict=True)
    ]
    table = [Candidate(*each) for each in zip(known, totals, strict=True)]
    for number in np.argsort(least, kind="stable").tolist():
        if least[number] > fastest * SWITCH:
            break
        table[number] = _candidate(known[number], tiles, columns, call, state)
        fastest = min(fastest, table[number].time)
    return table


def _all_candidates(
    tiles: Tiles, columns: np.ndarray, world: int, block_size: int, call: Call, state: PlannerState
) -> list[Candidate]:
    """Layouts that let ranks need few keys are looked for only where a pull of those could be the fastest.

    That is, where it would be the fastest of contiguous runs, which need the fewest, if their work were
    equal.
    """
    by_block = tiles.sums() + columns
    known = layouts(by_block, world, block_size)
    table = weigh(known, tiles, columns, call, state)
    fastest = min(candidate.time for candidate in table)
    if "pull" in call.exchanges:
        shared = np.full((world, world), by_block.sum() / world**2)
        floor = predict("pull", call, known[0], shared, np.zeros(world), tiles.needed(known[0]), tiles.batch)
        if floor.seconds <= fastest:
            local = local_layouts(by_block, tiles, block_size, call.topology(world))
            table += weigh(local, tiles, columns, call, state, fastest)
    return table


def _candidate(
    layout: Layout, tiles: Tiles, columns: np.ndarray, call: Call, state: PlannerState
) -> Candidate:
    world, local = layout.world, runs(layout) <= LOCAL * layout.world
    by_source, by_rank, needed = tiles.by_source(layout), work_by_rank(layout, columns), None
    if local and "pull" in call.exchanges:
        needed = tiles.needed(layout)
    names = [name for name in call.exchanges if local or name != "pull"] or call.exchanges
    if call.nodes > 1 and "hierarchical" in names:  # which is at least as fast as a flat ring
        names = [name for name in names if name != "ring"]
    options = [predict(name, call, layout, by_source, by_rank, needed, tiles.batch) for name in names]
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
    state: PlannerState = FRESH,
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
        weighed = (
            weigh(known, tiles, columns, call, state)
            if known
            else _all_candidates(tiles, columns, world, block_size, call, state)
        )
        table = tuple(weighed)
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
    state: PlannerState = FRESH,
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
    # Query heads of a key head choose neither alike nor independently of each other.
    heads = np.sqrt(call.heads / call.key_heads) if call else 1.0
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
