"""Schedules: in which order keys move between ranks and are computed with, as plain data.

A schedule says, for one rank, what each step computes and which messages are in flight meanwhile. It
names no device, group or tensor, so the engine, tests and a simulator walk the same object. Ranks are
places in the context-parallel group; the transport turns them into global ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np


@dataclass(frozen=True)
class Transfer:
    """One message out and one message in, in flight together.

    A message is named by its source: the rank that owns the keys that it holds, or whose keys the
    gradients that it holds belong to. outer: it crosses from node to node.
    """

    send_to: int
    sends: int
    recv_from: int
    receives: int
    outer: bool = False


@dataclass(frozen=True)
class Step:
    """Computation with the keys of some sources in one launch, and the messages around it.

    sources: the ranks that own the keys of this step; they have arrived when the step computes.
    keys: started before the computation and in flight during it; bring the keys of later steps.
    gradients: started after the computation, in flight during later steps. One inside a node sends on all
        that is here of a source: this rank's share and what came for it inside the node. An outer one adds
        what came for it from other nodes.
    """

    sources: tuple[int, ...]
    keys: tuple[Transfer, ...] = ()
    gradients: tuple[Transfer, ...] = ()


@dataclass(frozen=True)
class Schedule:
    """What one rank does in the forward and in the backward of one attention call.

    A message is waited for where it is used: keys by the step that computes with them, gradients by the
    transfer that sends them on or, those of this rank's own keys, at the end. Both phases compute with the
    same groups of sources. The forward begins with this rank's own, while the first keys travel; the backward
    begins with nothing and ends with this rank's own, while the last gradients travel home.
    """

    name: str
    rank: int
    world: int
    forward: tuple[Step, ...]
    backward: tuple[Step, ...]

    def __str__(self) -> str:
        """Readable text, one line a step."""
        lines = [f"{self.name}, rank {self.rank} of {self.world}"]
        for phase, steps in (("forward", self.forward), ("backward", self.backward)):
            lines += [f"  {phase} {number}: {_line(step)}" for number, step in enumerate(steps)]
        return "\n".join(lines)


def ring(rank: int, world: int, nodes: int = 1) -> Schedule:
    """The flat ring (Liu et al., arXiv 2310.01889): step t computes with the keys of rank - t.

    Meanwhile those keys go on to rank + 1 and the next ones come from rank - 1: world - 1 hops. In the
    backward the gradient of each source follows one step behind its keys, collects the share of every
    other rank and arrives home, where the owner's share waits, after world - 1 hops. nodes: not looked at.
    """
    _check("ring", rank, world, nodes)
    return _ring_of_rings("ring", rank, 1, world)


def hierarchical(rank: int, world: int, nodes: int) -> Schedule:
    """A ring of nodes around rings inside of them, as in LoongTrain's double ring (arXiv 2406.18485).

    Ranks are numbered node by node. In round a the ranks of node o compute with the keys of node o - a,
    which turn once inside the node; the transfer that brings the next node's keys is in flight from the
    first to the last step of the round. Gradients of a source are summed inside the node first, and cross
    from node to node once a round, during the whole of the next one, nodes - 1 times in all.
    """
    _check("hierarchical ring", rank, world, nodes)
    return _ring_of_rings("hierarchical", rank, nodes, world // nodes)


def gather(rank: int, world: int, nodes: int = 1) -> Schedule:
    """Every rank sends its keys to all others at once and computes with its own meanwhile.

    A gather of all keys forward and, backward, a scatter of gradients that their owner sums in one order:
    the fewest waits and launches, for the memory of all keys of the sequence. The others' keys are computed
    with in two launches, so that the gradients of the first travel during the second. nodes: not looked at.
    """
    return _all_at_once("gather", rank, world, nodes)


def pull(rank: int, world: int, nodes: int = 1) -> Schedule:
    """A gather whose messages hold only those blocks, of each key head, that the receiver's plan touches."""
    return _all_at_once("pull", rank, world, nodes)


EXCHANGES: dict[str, Callable[[int, int, int], Schedule]] = {
    "ring": ring,
    "hierarchical": hierarchical,
    "gather": gather,
    "pull": pull,
}


HEADS, HEADS_RING = "heads", "heads x ring"  # all keys of the sequence, or of a node, are there at once


@lru_cache
def schedule_of(exchange: str, rank: int, world: int, nodes: int = 1) -> Schedule:
    """That of one rank, kept: every layer of every step walks it."""
    return EXCHANGES[exchange](rank, world, nodes)


@lru_cache
def step_of_source(exchange: str, world: int, nodes: int = 1) -> np.ndarray:
    """int64 [world, world]: in which step each rank computes with the keys of each source. Kept."""
    if exchange in (HEADS, HEADS_RING):
        nodes = nodes if exchange == HEADS_RING else 1
        node = np.arange(world) * nodes // world
        table = (node[:, None] - node) % nodes
    else:
        table = np.empty((world, world), dtype=np.int64)
        for rank in range(world):
            for number, step in enumerate(EXCHANGES[exchange](rank, world, nodes).forward):
                table[rank, list(step.sources)] = number
    table.setflags(write=False)
    return table


def _check(name: str, rank: int, world: int, nodes: int) -> None:
    if not 0 <= rank < world:
        raise ValueError(f"rank is {rank}, world is {world}; a {name} needs 0 <= rank < world")
    if nodes < 1 or world % nodes:
        raise ValueError(f"{world} ranks on {nodes} nodes; a {name} needs equally many on each")


def _all_at_once(name: str, rank: int, world: int, nodes: int) -> Schedule:
    _check(name, rank, world, nodes)
    others = range(1, world)
    groups = [hops for hops in (others[: world // 2], others[world // 2 :]) if hops]

    def keys(hop: int) -> Transfer:
        return Transfer((rank + hop) % world, rank, (rank - hop) % world, (rank - hop) % world)

    def home(hop: int) -> Transfer:
        source = (rank - hop) % world
        return Transfer(source, source, (rank + hop) % world, rank)

    first = Step((rank,), tuple(map(keys, others)))
    sources = [tuple((rank - hop) % world for hop in hops) for hops in groups]
    return Schedule(
        name,
        rank,
        world,
        forward=(first, *map(Step, sources)),
        backward=_own_last(
            (first, *(Step(each, (), tuple(map(home, to))) for each, to in zip(sources, groups, strict=True)))
        ),
    )


def _ring_of_rings(name: str, rank: int, nodes: int, inner: int) -> Schedule:
    node, place = divmod(rank, inner)
    after, before = node * inner + (place + 1) % inner, node * inner + (place - 1) % inner
    next_node, last_node = (((node + turn) % nodes) * inner + place for turn in (1, -1))

    def source(turn: int, step: int) -> int:
        return (node - turn) % nodes * inner + (place - step) % inner

    def across(turn: int) -> Transfer:
        """Of what belongs to the place of this rank in the node of a round, for keys and for gradients."""
        return Transfer(next_node, source(turn, 0), last_node, source(turn + 1, 0), outer=True)

    def keys(turn: int, step: int) -> Iterator[Transfer]:
        if step == 0 and turn < nodes - 1:
            yield across(turn)
        if step < inner - 1:
            yield Transfer(after, source(turn, step), before, source(turn, step + 1))

    def gradients(turn: int, step: int) -> Iterator[Transfer]:
        if step > 0:  # what belongs to the place of this rank is summed up here
            yield Transfer(after, source(turn, step), before, source(turn, step + 1))
        # The sum of a node is complete with the last hop of its round, so it goes on after the next step.
        complete = turn if inner == 1 else turn - 1
        if step == 0 and complete > 0:  # that of the own node is at home
            yield across(complete)
        if step == inner - 1 > 0 and turn == nodes - 1 > 0:
            yield across(turn)

    order = [(turn, step) for turn in range(nodes) for step in range(inner)]
    return Schedule(
        name,
        rank,
        nodes * inner,
        forward=tuple(Step((source(*at),), tuple(keys(*at))) for at in order),
        backward=_own_last(
            tuple(Step((source(*at),), tuple(keys(*at)), tuple(gradients(*at))) for at in order)
        ),
    )


def _own_last(steps: tuple[Step, ...]) -> tuple[Step, ...]:
    """The messages of the first step, then the others, then the computation of the first."""
    first, *others = steps
    return Step((), first.keys), *others, Step(first.sources)


def _line(step: Step) -> str:
    what = f"with the keys of {', '.join(map(str, step.sources))}" if step.sources else "nothing yet"
    parts = [f"compute {what}"]
    for what, transfers in (("keys", step.keys), ("gradients", step.gradients)):
        parts += [
            f"{'outer ' * each.outer}{what} of {each.sends} to {each.send_to}, "
            f"of {each.receives} from {each.recv_from}"
            for each in transfers
        ]
    return "; ".join(parts)
