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
    """Computation with the keys of one source, and the messages around it.

    source: the rank that owns the keys of this step; they have arrived when the step computes.
    keys: started before the computation and in flight during it; bring the keys of later steps.
    gradients: started after the computation, in flight during later steps. One inside a node sends on all
        that is here of a source: this rank's share and what came for it inside the node. An outer one adds
        what came for it from other nodes.
    """

    source: int
    keys: tuple[Transfer, ...] = ()
    gradients: tuple[Transfer, ...] = ()


@dataclass(frozen=True)
class Schedule:
    """What one rank does in the forward and in the backward of one attention call.

    A message is waited for where it is used: keys by the step that computes with them, gradients by the
    transfer that sends them on or, those of this rank's own keys, at the end.
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
    the fewest waits, for the memory of all keys of the sequence. nodes: not looked at.
    """
    _check("gather", rank, world, nodes)

    def hop(step: int) -> Transfer:
        return Transfer((rank + step) % world, rank, (rank - step) % world, (rank - step) % world)

    def home(step: int) -> Transfer:
        source = (rank - step) % world
        return Transfer(source, source, (rank + step) % world, rank)

    everything = tuple(hop(step) for step in range(1, world))
    keys = [everything if step == 0 else () for step in range(world)]
    sources = [(rank - step) % world for step in range(world)]
    return Schedule(
        "gather",
        rank,
        world,
        forward=tuple(map(Step, sources, keys)),
        backward=tuple(
            Step(sources[step], keys[step], (home(step),) if step else ()) for step in range(world)
        ),
    )


EXCHANGES: dict[str, Callable[[int, int, int], Schedule]] = {
    "ring": ring,
    "hierarchical": hierarchical,
    "gather": gather,
}


@lru_cache
def schedule_of(exchange: str, rank: int, world: int, nodes: int = 1) -> Schedule:
    """That of one rank, kept: every layer of every step walks it."""
    return EXCHANGES[exchange](rank, world, nodes)


@lru_cache
def order(exchange: str, world: int, nodes: int = 1) -> np.ndarray:
    """int64 [world, world]: the source of every rank's steps. Kept, their schedules are not."""
    ranks = (EXCHANGES[exchange](rank, world, nodes) for rank in range(world))
    sources = np.array([[step.source for step in each.forward] for each in ranks])
    sources.setflags(write=False)
    return sources


def _check(name: str, rank: int, world: int, nodes: int) -> None:
    if not 0 <= rank < world:
        raise ValueError(f"rank is {rank}, world is {world}; a {name} needs 0 <= rank < world")
    if nodes < 1 or world % nodes:
        raise ValueError(f"{world} ranks on {nodes} nodes; a {name} needs equally many on each")


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
        forward=tuple(Step(source(*at), tuple(keys(*at))) for at in order),
        backward=tuple(Step(source(*at), tuple(keys(*at)), tuple(gradients(*at))) for at in order),
    )


def _line(step: Step) -> str:
    parts = [f"compute with the keys of {step.source}"]
    for what, transfers in (("keys", step.keys), ("gradients", step.gradients)):
        parts += [
            f"{'outer ' * each.outer}{what} of {each.sends} to {each.send_to}, "
            f"of {each.receives} from {each.recv_from}"
            for each in transfers
        ]
    return "; ".join(parts)
