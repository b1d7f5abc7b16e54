"""What benchmarks/simulate.py compares: drawn patterns, their work and needs under a layout, and the methods.

Patterns are slashes (tiles at chosen distances) and columns, in blocks; so the tiles between two runs of
blocks are differences of cumulative sums over distance, and millions of tokens are cheap.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import numpy as np

from sparring.balance import (
    Constants,
    Layout,
    LinkCost,
    Timeline,
    Topology,
    contiguous,
    from_assignment,
    programs_of,
    simulate,
    striped,
    zigzag,
)
from sparring.balance.simulate import Program

HEADS, KEY_HEADS, DIM, BLOCK = 32, 8, 128, 128
COLUMNS = 1024  # of each head: half of them in the first blocks, half anywhere
BAND = 32  # blocks
BF16, FP32 = 2, 4


@dataclass(frozen=True, eq=False)
class Pattern:
    """distances: bool [HEADS, blocks], the block distances that each query head chooses."""

    name: str
    distances: np.ndarray

    @property
    def blocks(self) -> int:
        return self.distances.shape[1]

    @cached_property
    def tiles(self) -> float:
        """All of them, mean over heads."""
        return float(self.distances.mean(0) @ (self.blocks - np.arange(self.blocks)))

    @property
    def density(self) -> float:
        return self.tiles / (self.blocks * (self.blocks + 1) / 2)

    def columns(self) -> np.ndarray:
        """float64 [blocks]: column work of each key block for one query block that sees it, in tiles."""
        anywhere = np.full(self.blocks, COLUMNS / 2 / self.blocks / BLOCK)
        sinks = np.zeros(self.blocks)
        sinks[: COLUMNS // 2 // BLOCK] = 1.0
        return (anywhere + sinks) * (1 - self.density)  # the rest lies in chosen tiles


def scattered(blocks: int, density: float, seed: int = 0) -> Pattern:
    """Every query head has a window and slashes of its own, one block wide, log-uniform over distance."""
    rng = np.random.default_rng(seed)
    share = _log_uniform(blocks, density)
    return Pattern("scattered", rng.random((HEADS, blocks)) < share)


def banded(blocks: int, density: float, seed: int = 0) -> Pattern:
    """The query heads of a key head share slashes, in bands of 32 blocks (4096 tokens), log-uniform too."""
    rng = np.random.default_rng(seed)
    bands = _log_uniform(blocks // BAND, density)
    chosen = rng.random((KEY_HEADS, len(bands))) < bands
    return Pattern("banded", chosen.repeat(BAND, axis=1).repeat(HEADS // KEY_HEADS, axis=0))


def _log_uniform(n: int, density: float) -> np.ndarray:
    """[n]: min(1, a / distance), 1 for distance 0, with a such that the share of tiles is `density`."""
    distance, weight = np.arange(n), n - np.arange(n)
    low, high = 0.0, float(n)
    for _ in range(60):
        middle = (low + high) / 2
        chosen = np.minimum(1, middle / np.maximum(distance, middle or 1))
        chosen[0] = 1
        low, high = (middle, high) if chosen @ weight < density * weight.sum() else (low, middle)
    return chosen


# -- work and needs under a layout --------------------------------------------------------------------


@lru_cache(maxsize=16)
def work_by_source(pattern: Pattern, layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    """[W, W] each: tiles, and column work in tiles, of each rank's queries with each rank's keys."""
    tiles = tiles_by_source(layout, pattern.distances.mean(0))
    return tiles, columns_by_source(layout, pattern.columns())


@lru_cache(maxsize=16)
def runs_of(layout: Layout) -> list[list[tuple[int, int]]]:
    """The blocks of each rank as ranges [a, b)."""
    return [list(runs(blocks)) for blocks in layout.assignment]


def runs(blocks: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    held = np.sort(np.array(blocks))
    breaks = np.flatnonzero(np.diff(held) > 1) + 1
    for part in np.split(held, breaks):
        yield int(part[0]), int(part[-1]) + 1


def tiles_by_source(layout: Layout, by_distance: np.ndarray) -> np.ndarray:
    """[W, W]: tiles of each rank's queries with each rank's keys. by_distance: tiles of a pair of blocks."""
    total = np.concatenate([[0.0], np.cumsum(by_distance)])
    owner, by_key = layout.source_of_block, np.empty(layout.num_blocks)
    found = np.empty((layout.world, layout.world))
    for rank, held in enumerate(runs_of(layout)):
        by_key[:] = 0
        for a, b in held:
            by_key[:b] += total[b:0:-1]
            by_key[:a] -= total[a:0:-1]
        found[rank] = np.bincount(owner, by_key, layout.world)
    return found


def columns_by_source(layout: Layout, by_key: np.ndarray) -> np.ndarray:
    """[W, W]: column work in tiles. by_key: of each key block for one query block behind it."""
    held = [np.array(blocks) for blocks in layout.assignment]
    behind = [np.searchsorted(np.sort(rows), np.arange(layout.num_blocks), side="right") for rows in held]
    owner = layout.source_of_block
    return np.stack(
        [
            np.bincount(owner, by_key * (len(rows) - seen), layout.world)
            for rows, seen in zip(held, behind, strict=True)
        ]
    )


def needed_by_source(layout: Layout, distances: np.ndarray) -> np.ndarray:
    """[heads, W, W]: key blocks of each source that any query of a rank touches, by key head.

    distances: bool [heads, query heads of each, blocks].
    """
    owner, found = layout.source_of_block, np.empty((len(distances), layout.world, layout.world))
    touched = np.empty(layout.num_blocks, dtype=bool)
    for head, chosen in enumerate(distances.any(1)):
        total = np.concatenate([[0], np.cumsum(chosen, dtype=np.int32)])
        for rank, held in enumerate(runs_of(layout)):
            touched[:] = False
            for a, b in held:
                touched[:a] |= total[b : b - a : -1] > total[a:0:-1]
                touched[a:b] = True  # the diagonal
            found[head, rank] = np.bincount(owner, touched, layout.world)
    return found


# -- methods ------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Setting:
    """One case: a pattern on a machine, `inner` ranks a node.

    need: factor on the pulled blocks. skew: of the work of each rank with each source, see `noise`.
    """

    pattern: Pattern
    world: int
    inner: int
    constants: Constants
    need: float = 1.0
    skew: float = 0.0

    @property
    def nodes(self) -> int:
        return max(1, self.world // self.inner)

    @property
    def topology(self) -> Topology:
        return self.constants.topology(self.world, self.nodes)

    @property
    def blocks(self) -> int:
        """Of a rank."""
        return self.pattern.blocks // self.world

    @property
    def block_bytes(self) -> int:
        """Keys and values of one block of one key head, bf16."""
        return 2 * BLOCK * DIM * BF16

    def noise(self, shape: tuple[int, ...]) -> np.ndarray:
        """Log-normal factors with mean 1 and deviation `skew`, the same for equal shapes."""
        rng = np.random.default_rng(1)
        return np.exp(rng.normal(0, self.skew, shape) - self.skew**2 / 2)

    def seconds(self, way: str, work: np.ndarray, blocks: int, heads: int = HEADS) -> np.ndarray:
        return getattr(self.constants, way).seconds(work, blocks, heads, BLOCK)

    def ideal(self) -> float:
        """Forward and backward of an equal share of all work in one launch, without a message."""
        columns = self.pattern.columns() @ (self.pattern.blocks - np.arange(self.pattern.blocks))
        work = np.array([[self.pattern.tiles, columns]]) / self.world
        return sum(float(self.seconds(way, work, self.blocks).sum()) for way in ("forward", "backward"))


@dataclass(frozen=True)
class Outcome:
    """Of a method. seconds: forward and backward. waiting: share of them that the mean rank does not compute.

    inside, between: bytes that the busiest rank sends. need: bytes of pulled keys over those of all keys.
    """

    layout: str
    seconds: float
    waiting: float
    inside: float
    between: float
    need: float = 1.0


@dataclass(frozen=True)
class Cost:
    """What ranks compute and send. blocks, heads: of each. columns: whether any are gathered."""

    setting: Setting
    topology: Topology
    blocks: int
    heads: int
    columns: bool = True

    def timelines(self, programs: tuple[Program, Program], work: np.ndarray, keys) -> list[Timeline]:
        """Forward and backward. work: [..., W, groups + 1], keys: as in `simulate`, of bf16."""
        forward, backward = (
            self.setting.seconds(way, work, self.blocks, self.heads) for way in ("forward", "backward")
        )
        reduced = self.heads * COLUMNS * 2 * DIM * BF16 * self.columns
        wide = FP32 // BF16
        return [
            simulate(programs[0], self.topology, forward, keys, columns=reduced),
            simulate(programs[1], self.topology, backward, keys, wide * keys, reduced, wide * reduced),
        ]


def exchanged(
    setting: Setting,
    exchange: str,
    layouts: list[Layout],
    one_channel: bool = False,
    columns_apart: bool = True,
) -> Outcome:
    """The best of some layouts under an exchange of the engine.

    one_channel: inner and outer rings wait for each other. columns_apart: gathered once, not in the ring.
    """
    return min((_exchanged(setting, exchange, each, one_channel, columns_apart) for each in layouts),
               key=lambda outcome: outcome.seconds)  # fmt: skip


def _exchanged(setting, exchange, layout, one_channel, columns_apart) -> Outcome:
    tiles, columns = work_by_source(setting.pattern, layout)
    tiles = tiles * setting.noise((setting.world,) * 2)
    if not columns_apart:
        tiles, columns = tiles + columns * _column_pace(setting), np.zeros_like(columns)
    keys, need = float(setting.blocks * KEY_HEADS * setting.block_bytes), 1.0
    if exchange == "pull":
        needed = needed_by_source(
            layout, setting.pattern.distances.reshape(KEY_HEADS, -1, layout.num_blocks)
        ).sum(0)
        needed = np.minimum(needed * setting.need, KEY_HEADS * setting.blocks)
        keys = needed * setting.block_bytes
        remote = ~np.eye(setting.world, dtype=bool)
        need = float(needed[remote].mean() / (KEY_HEADS * setting.blocks)) if setting.world > 1 else 1.0
    forward, backward = programs_of(exchange, setting.world, setting.nodes)
    if one_channel:
        forward, backward = _merged(forward), _merged(backward)
    cost = Cost(setting, setting.topology, setting.blocks, HEADS, columns_apart)
    lines = cost.timelines((forward, backward), by_group(forward, tiles, columns.sum(1)), keys)
    return _outcome(layout.name, lines, need)


def _column_pace(setting: Setting) -> float:
    """Column work in a ring step in tiles of the same cost (forward)."""
    return setting.constants.forward.column * BLOCK / setting.constants.forward.tile


def by_group(forward: Program, by_source: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """[..., W, groups + 1] from [..., W, W] and [..., W]."""
    ranks = np.arange(forward.world)[:, None]
    steps = [by_source[..., ranks, sources].sum(-1) for sources in forward.sources]
    return np.stack([*steps, columns], axis=-1)


def _merged(program: Program) -> Program:
    """Keys from other nodes in the channel of those inside."""

    def one(transfers):
        return tuple(tuple(replace(hop, outer=False) for hop in step) for step in transfers)

    return replace(program, keys=one(program.keys))


def _outcome(layout: str, lines: list[Timeline], need: float = 1.0, more: float = 0.0) -> Outcome:
    seconds = sum(float(line.seconds.max()) for line in lines) + more
    busy = sum(float(line.busy.mean()) for line in lines)
    sent = [float(sum(getattr(line, what) for line in lines).max()) for what in ("inside", "between")]
    return Outcome(layout, seconds, 1 - busy / seconds, *sent, need)


def gathered(setting: Setting) -> Outcome:
    """All keys are gathered before the computation, gradients scattered after it; zigzag.

    The collectives use every adapter of a node: bytes of all other nodes over those of the node's ranks.
    """
    layout = zigzag(setting.pattern.blocks, setting.world, BLOCK)
    tiles, columns = work_by_source(setting.pattern, layout)
    tiles = tiles * setting.noise((setting.world,) * 2)
    work = np.stack([tiles.sum(1), columns.sum(1)], axis=1)
    compute = [setting.seconds(way, work, setting.blocks).sum(1) for way in ("forward", "backward")]
    keys = setting.world * setting.blocks * KEY_HEADS * setting.block_bytes
    moves = [_collective(setting, size) for size in (keys, keys, FP32 // BF16 * keys)]  # and gradients
    seconds = sum(float(each.max()) for each in compute) + sum(moves)
    sent = 4 * keys * np.array([(setting.world - 1) / setting.world, (setting.nodes - 1) / setting.world])
    busy = sum(float(each.mean()) for each in compute)
    return Outcome(layout.name, float(seconds), float(1 - busy / seconds), *sent.tolist())


def _collective(setting: Setting, size: float) -> float:
    """Seconds of an all-gather to, or a reduce-scatter of, `size` bytes a rank."""
    topology, latency = setting.topology, setting.constants.inside.latency
    inside = size * (setting.world - 1) / setting.world / topology.inside.bandwidth
    between = size * (setting.nodes - 1) / setting.nodes / topology.inner / topology.between.bandwidth
    return latency * np.ceil(np.log2(setting.world)) + max(inside, between)


def by_heads(setting: Setting, exchange: str | None, layouts: list[Layout]) -> Outcome | None:
    """Tokens swapped for heads by an all-to-all, among all ranks (exchange None) or inside a node.

    Between nodes then an exchange for each place in the node, among as many ranks as nodes. None where there
    are fewer query heads than ranks that swap.
    """
    size = setting.world if exchange is None else min(setting.inner, setting.world)
    if size > HEADS:
        return None
    return min(
        (_by_heads(setting, exchange, each, size) for each in layouts), key=lambda outcome: outcome.seconds
    )


def _by_heads(setting: Setting, exchange: str | None, layout: Layout, size: int) -> Outcome:
    pattern, groups = setting.pattern, layout.world
    mine, kept = HEADS // size, max(1, KEY_HEADS // size)
    share = pattern.distances.reshape(size, mine, pattern.blocks)
    tiles = np.stack([tiles_by_source(layout, each.mean(0)) for each in share])
    tiles *= setting.noise(tiles.shape)
    columns = columns_by_source(layout, pattern.columns()).sum(1) * np.ones((size, 1))
    blocks = pattern.blocks // groups
    keys, need = float(blocks * kept * setting.block_bytes), 1.0
    if exchange == "pull":
        by_key_head = pattern.distances.reshape(KEY_HEADS, -1, pattern.blocks)
        needed = np.minimum(needed_by_source(layout, by_key_head) * setting.need, blocks)
        needed = (
            needed.reshape(KEY_HEADS // kept, kept, groups, groups)
            .sum(1)
            .repeat(size * kept // KEY_HEADS, axis=0)
        )
        keys = needed * setting.block_bytes
        remote = ~np.eye(groups, dtype=bool)
        need = float(needed[:, remote].mean() / (blocks * kept)) if groups > 1 else 1.0
    topology = Topology(
        groups, 1, setting.constants.inside, setting.constants.between, setting.constants.memory
    )
    programs = programs_of(exchange or "ring", groups, groups)
    cost = Cost(setting, topology, blocks, mine)
    lines = cost.timelines(programs, by_group(programs[0], tiles, columns), keys)
    # By peer: q, keys, out; dout, dq, gradients of keys, which are sums still to be made where heads repeat.
    token_head = setting.blocks * BLOCK * DIM * BF16
    swapped = [(mine + 2 * kept) * token_head, mine * token_head, mine * token_head]
    swapped.append((mine + 2 * kept * (2 if size > KEY_HEADS else 1)) * token_head)
    near = min(size, setting.inner) - 1
    far = size - 1 - near
    inside, between = setting.topology.inside, setting.topology.between
    more = sum(
        max(near * b / inside.bandwidth, far * b / between.bandwidth) + between.latency for b in swapped
    )
    outcome = _outcome(layout.name, lines, need, more)
    return replace(
        outcome, inside=outcome.inside + near * sum(swapped), between=outcome.between + far * sum(swapped)
    )


def mirrored(blocks: int, world: int, part: int) -> Layout:
    """Contiguous, but 1 / part of every rank's blocks are swapped with the rank as far from the other end.

    What a local search with a penalty on distance comes to where work grows along the sequence.
    """
    each = blocks // world
    kept = each - each // part
    held = [(*range(r * each, r * each + kept), *range((world - 1 - r) * each + kept, (world - r) * each))
            for r in range(world)]  # fmt: skip
    return from_assignment(held, BLOCK, f"mirrored(1/{part})")


def layouts_of(blocks: int, world: int, fine: bool) -> list[Layout]:
    """What the best is taken of; fine: single blocks too."""
    each = [contiguous(blocks, world, BLOCK), zigzag(blocks, world, BLOCK)]
    each += [mirrored(blocks, world, part) for part in (8, 4) if blocks // world >= part]
    stripes = [blocks // world // 8] * (blocks // world >= 8) + [1] * fine
    return each + [striped(blocks, world, BLOCK, stripe) for stripe in stripes]


def _flat(kind: Callable) -> Callable[[Setting], Outcome]:
    return lambda s: exchanged(s, "ring", [kind(s.pattern.blocks, s.world, BLOCK)])


def _mtraining(s: Setting) -> Outcome:
    layout = striped(s.pattern.blocks, s.world, BLOCK)
    return exchanged(s, "hierarchical", [layout], one_channel=True, columns_apart=False)


def _over_nodes(exchange: str, s: Setting) -> Outcome | None:
    layouts = layouts_of(s.pattern.blocks, s.nodes, fine=False)
    return by_heads(s, exchange, layouts if exchange == "pull" else layouts[1:2])


METHODS: dict[str, Callable[[Setting], Outcome | None]] = {
    "ring, contiguous": _flat(contiguous),
    "ring, zigzag": _flat(zigzag),
    "striped, double ring (MTraining)": _mtraining,
    "gather (Megatron DSA, Automodel)": gathered,
    "heads (Ulysses)": lambda s: by_heads(s, None, [contiguous(s.pattern.blocks, 1, BLOCK)]),
    "heads x ring": lambda s: _over_nodes("ring", s),
    "hierarchical, best layout": lambda s: exchanged(
        s, "hierarchical", layouts_of(s.pattern.blocks, s.world, fine=True)
    ),
    "pull, best layout": lambda s: exchanged(s, "pull", layouts_of(s.pattern.blocks, s.world, fine=False)),
    "heads x pull, best layout": lambda s: _over_nodes("pull", s),
}


def faster_links(constants: Constants, factor: float) -> Constants:
    """All links with another bandwidth."""

    def scaled(link: LinkCost) -> LinkCost:
        return LinkCost(link.latency, link.bandwidth * factor)

    return replace(constants, inside=scaled(constants.inside), between=scaled(constants.between))
