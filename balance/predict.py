"""Seconds of one attention call, forward and backward, by a few recurrences: what the planner compares.

They leave out what hardly ever counts: channels that wait for each other, columns on the wire. `simulate`
walks the schedules themselves and is more exact; this is many times as fast.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .cost import work_by_step
from .layout import Layout
from .schedule import step_of_source
from .topology import Constants, KernelCost, Topology

ADDED = 3  # how often gradients are read or written where they are added up

# Forward and backward: seconds of computation, [..., W, steps + 1], and bytes of gradients, [..., W, W].
Phases = list[tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Call:
    """What an attention call is, beside its tiles. All layers of a step are taken to be alike.

    heads, key_heads: of queries, of keys. key_bytes, gradient_bytes: of keys and values of one block of one
    batch row, all key heads, and of their gradients. exchanges: names of those that may be chosen, see
    FORMULAS. machine, nodes: what it runs on. backward: False without a backward. most_pulled: the largest
    share of the keys of others that a rank may be expected to hold at once for a pull to be weighed.
    """

    heads: int
    key_heads: int
    key_bytes: float
    gradient_bytes: float
    exchanges: tuple[str, ...]
    machine: Constants
    nodes: int = 1
    backward: bool = True
    most_pulled: float = 1.0

    def topology(self, world: int) -> Topology:
        return self.machine.topology(world, self.nodes)


@dataclass(frozen=True)
class Prediction:
    """Seconds of an exchange under a layout. compute: of the slowest rank, if it never waited."""

    exchange: str
    seconds: float
    compute: float

    @property
    def exposed(self) -> float:
        """Seconds of waiting, for keys and for slower ranks."""
        return self.seconds - self.compute


def predict(
    exchange: str,
    call: Call,
    layout: Layout,
    by_source: np.ndarray,
    columns: np.ndarray,
    needed: np.ndarray | None = None,
    batch: int = 1,
    shares: np.ndarray | float = 1.0,
) -> Prediction:
    """Seconds of an exchange under a layout, for a batch of so many rows.

    by_source: [..., W, W], columns: [..., W], work in tiles, mean over heads; needed: [..., W, W] key blocks,
    see `Tiles`, None for all; each summed over rows. The leading dim, if there is one, is that of layer
    groups, and shares, [groups], what they count: the result is their mean. Raises ValueError for an
    exchange that it knows no formula for.
    """
    if exchange not in FORMULAS:
        raise ValueError(f"no prediction for exchange {exchange!r}; known are {', '.join(FORMULAS)}")
    world, sizes = layout.world, np.array(layout.blocks_per_rank) * float(batch)
    work = work_by_step(by_source, columns, step_of_source(exchange, world, call.nodes))
    blocks = needed if exchange == "pull" and needed is not None else np.broadcast_to(sizes, (world, world))
    blocks = blocks * (1 - np.eye(world))
    compute, phases = np.zeros(work.shape[:-2]), []
    for kernel, gradient_bytes in [(call.machine.forward, 0.0)] + [
        (call.machine.backward, call.gradient_bytes)
    ] * call.backward:
        steps = step_seconds(kernel, call, work, sizes, layout.block_size)
        gradients = blocks * gradient_bytes
        if world > 1:  # zeroed before they are added to
            zeroed = gradients.sum(-1, keepdims=True) / (steps.shape[-1] - 2) / call.machine.memory
            steps[..., 1:-1] += zeroed
        compute = compute + steps.sum(-1).max(-1)
        phases.append((steps, gradients))
    seconds = FORMULAS[exchange](phases, blocks * call.key_bytes, call.topology(world))
    seconds, compute = (float(np.sum(shares * each).round(9)) for each in (seconds, compute))
    return Prediction(exchange, seconds, compute)


def least_seconds(call: Call, layout: Layout, work: np.ndarray, batch: int = 1) -> float:
    """What no exchange is faster than: the slowest rank's work in one launch. work: [W], in tiles."""
    steps = np.column_stack([work, np.zeros(layout.world)])
    sizes = np.array(layout.blocks_per_rank) * float(batch)
    kernels = [call.machine.forward] + [call.machine.backward] * call.backward
    return float(sum(step_seconds(kernel, call, steps, sizes, layout.block_size).max() for kernel in kernels))


def step_seconds(
    kernel: KernelCost, call: Call, work: np.ndarray, sizes: np.ndarray, block_size: int
) -> np.ndarray:
    """[..., W, steps + 1] from work of that shape in tiles; blocks may not be as large as the kernel's."""
    parts = block_size / call.machine.block_size
    scaled = np.concatenate([work[..., :-1] * parts**2, work[..., -1:] * parts], axis=-1)
    return kernel.seconds(scaled, sizes[:, None] * parts, call.heads, call.machine.block_size)


def _ring(phases: Phases, keys: np.ndarray, topology: Topology) -> np.ndarray:
    return sum(_turns(steps, keys.max(), gradients.max(), topology, 1) for steps, gradients in phases)


def _hierarchical(phases: Phases, keys: np.ndarray, topology: Topology) -> np.ndarray:
    rounds = topology.nodes
    return sum(_turns(steps, keys.max(), gradients.max(), topology, rounds) for steps, gradients in phases)


def _turns(steps: np.ndarray, keys: float, gradients: float, topology: Topology, rounds: int) -> np.ndarray:
    """Ranks wait for neighbours alone: keys arrive a hop after both ranks were there to send and to receive.

    In each round keys go once round a ring; meanwhile those of the next round cross. Gradients share links
    with keys, and ranks compute with their own keys last if there are any. keys, gradients: bytes of a
    message.
    """
    world, size = topology.world, keys + gradients
    inner, ranks = world // rounds, np.arange(world)
    before, node = ranks - ranks % inner + (ranks - 1) % inner, ranks // topology.inner
    inside, between = topology.inside.seconds(size), topology.between.seconds(size)
    *compute, columns = np.moveaxis(steps, -1, 0) + 0.0
    for each in compute[bool(gradients) :]:
        each += ADDED * gradients / topology.memory
    hop = np.where(node == node[before], inside, between)
    clock = np.zeros(steps.shape[:-1])
    for turn in range(rounds):
        begun = clock
        for step in range(inner):
            arrives = np.maximum(clock, clock[..., before])
            if turn or step or not gradients:
                clock = clock + compute[turn * inner + step]
            if step < inner - 1:
                clock = np.maximum(clock, arrives + hop)
        if turn < rounds - 1:
            clock = np.maximum(clock, np.maximum(begun, begun[..., ranks - inner]) + between)
    if gradients:
        last = topology.between if topology.nodes > 1 else topology.inside
        home = clock[..., ranks - inner if rounds > 1 else before] + last.seconds(gradients) * (world > 1)
        clock = np.maximum(clock + compute[0], home)
    return (clock + columns).max(-1)


def _gather(phases: Phases, keys: np.ndarray, topology: Topology) -> np.ndarray:
    world, several = topology.world, topology.nodes > 1
    # Between nodes, what stays inside a node is little, and has ports of its own.
    share = (world - topology.inner) / (world - 1) if several else 1.0
    link = topology.between if several else topology.inside
    counts = [len(hops) for hops in _halves(world)]

    def seconds(count: int, size: float) -> np.ndarray:
        return np.full(world, count * share * size / link.bandwidth + link.latency)

    arrivals = [seconds(count, keys.max()) for count in np.cumsum(counts)]
    return sum(
        _all_at_once(steps, arrivals, [seconds(count, sent.max()) for count in counts], sent, topology)
        for steps, sent in phases
    )


def _pull(phases: Phases, keys: np.ndarray, topology: Topology) -> np.ndarray:
    halves = _halves(topology.world)
    arrivals = [_arrivals(keys, topology, -1, range(1, hops.stop)) for hops in halves]
    total = 0.0
    for steps, sent in phases:
        back = sent.swapaxes(-1, -2)
        homes = [_arrivals(back, topology, 1, hops) for hops in halves] if sent.any() else []
        total = total + _all_at_once(steps, arrivals, homes, sent, topology)
    return total


def _halves(world: int) -> list[range]:
    """Of the hops to other ranks, computed with in one launch each."""
    half = world // 2 + 1
    return [hops for hops in (range(1, half), range(half, world)) if hops]


def _all_at_once(
    steps: np.ndarray,
    arrivals: list[np.ndarray],
    homes: list[np.ndarray],
    gradients: np.ndarray,
    topology: Topology,
) -> np.ndarray:
    """All keys start at once; a group of sources is computed with when the last of them is there.

    arrivals: for each group [..., W] seconds until its keys are there; homes: those that its gradients take.
    They go behind all keys, and their owners add them up.
    """
    clock, home = np.zeros(steps.shape[:-1]), np.zeros(steps.shape[:-1])
    backward = gradients.any()
    if not backward:
        clock = clock + steps[..., 0]
    for number, arrived in enumerate(arrivals):
        clock = np.maximum(clock, arrived) + steps[..., number + 1]
        if backward:
            home = np.maximum(home, np.maximum(clock.max(-1, keepdims=True), arrivals[-1])) + homes[number]
    if backward:
        clock = np.maximum(clock + steps[..., 0], home) + ADDED * gradients.sum(-2) / topology.memory
    return (clock + steps[..., -1]).max(-1)


def _arrivals(sizes: np.ndarray, topology: Topology, sign: int, hops: range) -> np.ndarray:
    """[..., W] seconds until each rank has the messages of some hops, if those start at once.

    sizes: bytes [..., receiver, sender]; in hop h rank r gets those of r + sign * h. The messages of earlier
    hops go first, at either end, inside nodes and between them.
    """
    world, ranks, turns = topology.world, np.arange(topology.world), np.array(hops)[:, None]
    senders, receivers = (ranks + sign * turns) % world, (ranks - sign * turns) % world
    size, node, here = sizes[..., ranks, senders], ranks // topology.inner, 0.0
    row = np.arange(len(turns))[:, None]
    outside = node != node[senders]
    for crossing, link in ((outside, topology.between), (~outside, topology.inside)):
        moving = np.where(crossing, size / link.bandwidth, 0)
        sent = moving[..., row, receivers]  # by sender
        earlier = (sent.cumsum(-2) - sent)[..., row, senders]
        begin = np.maximum(moving.cumsum(-2) - moving, earlier)
        here = np.maximum(here, np.where(moving > 0, begin + moving + link.latency, 0).max(-2))
    return here


FORMULAS: dict[str, Callable[[Phases, np.ndarray, Topology], np.ndarray]] = {
    "ring": _ring,
    "hierarchical": _hierarchical,
    "gather": _gather,
    "pull": _pull,
}
