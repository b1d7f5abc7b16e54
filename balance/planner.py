"""The planner: which layout and which exchange make the next step fastest, and why.

Every rank decides alone and all decide alike: the inputs (the documents of the batch, group-reduced
statistics, the state) are identical on all ranks, and so is the arithmetic (elementwise operations, ordered
sums, rounded transforms; no BLAS).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .candidates import layouts, local_layouts, runs
from .cost import work_by_rank, work_by_step
from .decision import FRESH, SWITCH, Candidate, Decision, PlannerState
from .layers import Layers, expected_layers, mean, work_of
from .layout import Layout, named
from .predict import Call, least_seconds, predict
from .schedule import step_of_source
from .statistics import Statistics
from .tiles import Documents, Tiles, as_tiles

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
    return _by_work([Layers(as_tiles(tiles), columns)], world, block_size, steps)


def _by_work(
    layers: Sequence[Layers], world: int, block_size: int, steps: np.ndarray | None
) -> tuple[Candidate, ...]:
    """See `candidates`; of the mean layer."""
    steps, table = step_of_source("ring", world) if steps is None else steps, []
    for layout in layouts(_by_block(layers), world, block_size):
        by_source, by_rank = (mean(layers, each) for each in work_of(layers, layout))
        table.append(Candidate(layout, work_by_step(by_source, by_rank, steps)))
    return tuple(table)


def _by_block(layers: Sequence[Layers]) -> np.ndarray:
    return mean(layers, [group.by_block for group in layers])


def weigh(
    known: list[Layout],
    layers: Sequence[Layers],
    call: Call,
    state: PlannerState,
    fastest: float = np.inf,
) -> list[Candidate]:
    """Those layouts with their best exchange. One whose slowest rank alone takes too long is left out."""
    by_block, batch = _by_block(layers), layers[0].tiles.batch
    totals = [work_by_rank(layout, by_block)[:, None] for layout in known]
    least = [
        least_seconds(call, layout, total[:, 0], batch) for layout, total in zip(known, totals, strict=True)
    ]
    table = [Candidate(*each) for each in zip(known, totals, strict=True)]
    for number in np.argsort(least, kind="stable").tolist():
        if least[number] > fastest * SWITCH:
            break
        table[number] = _candidate(known[number], layers, call, state)
        fastest = min(fastest, table[number].time)
    return table


def _all_candidates(
    layers: Sequence[Layers], world: int, block_size: int, call: Call, state: PlannerState
) -> list[Candidate]:
    """Layouts that let ranks need few keys are looked for only where a pull of those could be the fastest.

    That is, where it would be the fastest of contiguous runs, which need the fewest, if their work were
    equal.
    """
    by_block, tiles = _by_block(layers), [group.tiles for group in layers]
    known = layouts(by_block, world, block_size)
    table = weigh(known, layers, call, state)
    fastest = min(candidate.time for candidate in table)
    if "pull" in call.exchanges:
        equal = [np.full((world, world), group.by_block.sum() / world**2) for group in layers]
        needed = np.stack([each.needed(known[0]) for each in tiles])
        shared = np.stack(equal), np.zeros((len(layers), world)), needed
        floor = predict("pull", call, known[0], *shared, tiles[0].batch, _shares(layers))
        if floor.seconds <= fastest:
            local = local_layouts(by_block, tiles, block_size, call.topology(world))
            table += weigh(local, layers, call, state, fastest)
    return table


def _shares(layers: Sequence[Layers]) -> np.ndarray:
    return np.array([group.share for group in layers])


def _candidate(layout: Layout, layers: Sequence[Layers], call: Call, state: PlannerState) -> Candidate:
    world, local, batch = layout.world, runs(layout) <= LOCAL * layout.world, layers[0].tiles.batch
    work, needed, shares = work_of(layers, layout), None, _shares(layers)
    if local and "pull" in call.exchanges:
        needed = np.stack([group.tiles.needed(layout) for group in layers])
        local = max(_most(each, layout, batch) for each in needed) <= call.most_pulled
    names = [name for name in call.exchanges if local or name != "pull"] or call.exchanges
    if call.nodes > 1 and "hierarchical" in names:  # which is at least as fast as a flat ring
        names = [name for name in names if name != "ring"]
    options = [predict(name, call, layout, *work, needed, batch, shares) for name in names]
    best = min(options, key=lambda option: option.seconds)
    for option in options:
        if (layout.name, option.exchange) == (state.layout, state.exchange):
            best = option if option.seconds <= best.seconds * SWITCH else best
    steps = step_of_source(best.exchange, world, call.nodes)
    total = work_by_step(*(mean(layers, each) for each in work), steps)
    others = tuple((option.exchange, option.seconds) for option in options if option is not best)
    if needed is None:
        return Candidate(layout, total, best, others)
    needed = mean(layers, needed)
    remote = (needed.sum() - np.trace(needed)) / max(1, batch * layout.num_blocks * (world - 1))
    return Candidate(layout, total, best, others, float(remote))


def _most(needed: np.ndarray, layout: Layout, batch: int) -> float:
    """The share of the keys of others that the rank that needs most of them needs. needed: see `Tiles`."""
    others = batch * (layout.num_blocks - np.array(layout.blocks_per_rank))
    return float(((needed.sum(1) - needed.diagonal()) / np.maximum(1, others)).max())


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
    return choose_for([Layers(as_tiles(tiles), columns)], world, block_size, state, steps, call, known)


def choose_for(
    layers: Sequence[Layers],
    world: int,
    block_size: int,
    state: PlannerState = FRESH,
    steps: np.ndarray | None = None,
    call: Call | None = None,
    known: list[Layout] | None = None,
) -> Decision:
    """`choose` for groups of layers that differ: by the sum of their predicted times, or of their work."""
    if call is None:
        table = _by_work(layers, world, block_size, steps)
    elif known:
        table = tuple(weigh(known, layers, call, state))
    else:
        table = tuple(_all_candidates(layers, world, block_size, call, state))
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
    layers = expected_layers(documents, num_blocks, block_size, statistics, heads)
    known = None if given is None else [given]
    return choose_for(layers, world, block_size, state, steps, call, known)


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
