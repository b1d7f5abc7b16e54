"""An event model of one attention call: what every rank computes and sends, and when.

It walks the schedules that the engine walks, for all ranks side by side, and keeps the engine's rules
(`cp/attention.py`). A rank computes step after step; a step waits for its keys, starts its transfers of keys,
computes, waits for the gradients that it sends on, adds them up and starts their transfers. Columns are
all-reduced from the start and computed last; their gradients are all-reduced at the end.

A message needs both ends to have started it. Messages of one channel (keys or gradients, inside or between
nodes) go in the order of steps, those of one step together. A message of n bytes takes n / bandwidth of the
port of its sender and of that of its receiver; each port serves in program order, on its own, for messages
travel in pieces. It arrives when both are done with it and the latency is over. One of 0 bytes is not sent.
An all-reduce has the latency of a tree and the bytes of a ring, and takes no port from others.
Computation and messages do not slow each other down.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby

import numpy as np

from .schedule import EXCHANGES, Schedule, Step, Transfer
from .topology import Topology


@dataclass(frozen=True, eq=False)
class Hop:
    """The transfer at one place of the program, of all ranks: int [W], see `Transfer`."""

    send_to: np.ndarray
    sends: np.ndarray
    outer: bool


@dataclass(frozen=True, eq=False)
class Program:
    """Forward or backward of the schedules of all ranks, step by step.

    groups: number of steps that compute. places: for each step the one of the forward that computes with the
    same sources, -1 if it computes nothing. sources: for each step int [W, n]. keys, gradients: for each step
    its transfers.
    """

    world: int
    groups: int
    places: tuple[int, ...]
    sources: tuple[np.ndarray, ...]
    keys: tuple[tuple[Hop, ...], ...]
    gradients: tuple[tuple[Hop, ...], ...]


@dataclass(frozen=True, eq=False)
class Flight:
    """A message of every rank. channel: as in the engine. size: bytes; begin, end: seconds; all [..., W]."""

    channel: str
    send_to: np.ndarray
    size: np.ndarray
    begin: np.ndarray
    end: np.ndarray


@dataclass(frozen=True, eq=False)
class Timeline:
    """When everything happens, in seconds from a common start. ...: the leading dims of `compute`.

    begins, ends: [..., W, groups + 1], of each rank's computation with each group of sources, in the order of
    the forward, and with the columns. busy: [..., W], computing and adding up. finish: [..., W]. inside,
    between: [..., W], bytes that each rank sends inside its node and to others. flights: the messages, those
    of columns excepted.
    """

    begins: np.ndarray
    ends: np.ndarray
    busy: np.ndarray
    finish: np.ndarray
    inside: np.ndarray
    between: np.ndarray
    flights: tuple[Flight, ...]

    @property
    def seconds(self) -> np.ndarray:
        """[...]: until the last rank is done."""
        return self.finish.max(-1)

    @property
    def exposed(self) -> np.ndarray:
        """[..., W]: how long each rank waits for messages before it is done."""
        return self.finish - self.busy


def programs(schedules: Iterable[Schedule]) -> tuple[Program, Program]:
    """Forward and backward of the schedules of ranks 0, 1, ... side by side.

    Raises ValueError unless all ranks start equally many transfers in each step and every message meets the
    receiver that expects it.
    """
    shape, rows = None, []
    for schedule in schedules:
        steps = (*schedule.forward, *schedule.backward)
        places = {(): -1} | {step.sources: place for place, step in enumerate(schedule.forward)}
        own = [
            (places[step.sources], len(step.sources), _outer(step.keys), _outer(step.gradients))
            for step in steps
        ]
        own.insert(0, len(schedule.forward))
        shape = shape or own
        if own != shape:
            raise ValueError(
                f"rank {len(rows)} starts other transfers than rank 0; give the schedules of one exchange"
            )
        rows.append(np.fromiter(_numbers(steps), dtype=np.int32))
    table, ranks = iter(np.stack(rows, axis=1)), np.arange(len(rows))

    def numbers(count: int) -> np.ndarray:
        return np.array([next(table) for _ in range(count)], dtype=np.int32).reshape(count, len(rows))

    def hops(outer: tuple[bool, ...]) -> tuple[Hop, ...]:
        found = []
        for each in outer:
            send_to, sends, recv_from, receives = numbers(4)
            if (recv_from[send_to] != ranks).any() or (receives[send_to] != sends).any():
                raise ValueError("a rank sends what the receiver does not expect; check the schedules")
            found.append(Hop(send_to, sends, each))
        return tuple(found)

    groups, *steps = shape
    steps = [
        (place, numbers(count).T, hops(keys), hops(gradients)) for place, count, keys, gradients in steps
    ]
    parts = steps[:groups], steps[groups:]
    return tuple(Program(len(rows), groups, *zip(*part, strict=True)) for part in parts)


@lru_cache(maxsize=16)
def programs_of(exchange: str, world: int, nodes: int = 1) -> tuple[Program, Program]:
    """Those of an exchange, by name. Kept: making them takes time with world * world."""
    return programs(EXCHANGES[exchange](rank, world, nodes) for rank in range(world))


def simulate(
    program: Program,
    topology: Topology,
    compute: np.ndarray,
    keys: float | np.ndarray,
    gradients: float | np.ndarray = 0.0,
    columns: float = 0.0,
    column_gradients: float = 0.0,
) -> Timeline:
    """The timeline of one phase.

    compute: [..., W, groups + 1], seconds of the computation with each group of sources, in the order of the
    forward, and with the columns, as `KernelCost.seconds` gives them from a work matrix. keys, gradients:
    bytes of a message of keys and of gradients; one number, or [..., W, W] for the messages in which rank r
    gets the keys of source s, and sends gradients of s (where only what is needed moves, r computes with s).
    columns, column_gradients: bytes that are all-reduced before and after. Leading dims are cases that are
    simulated at once.

    Raises ValueError if the sizes do not fit.
    """
    shape = (program.world, program.groups + 1)
    if compute.shape[-2:] != shape or topology.world != program.world:
        raise ValueError(
            f"compute is {compute.shape} and the topology has {topology.world} ranks, but the schedules have "
            f"{shape[0]} ranks and {shape[1] - 1} groups; compute must be [..., {shape[0]}, {shape[1]}]"
        )
    return _Run(program, topology, np.asarray(compute, dtype=np.float64), keys, gradients).run(
        columns, column_gradients
    )


class _Run:
    """What changes during a simulation; all arrays end in W unless said."""

    def __init__(self, program: Program, topology: Topology, compute: np.ndarray, keys, gradients):
        self.program, self.topology, self.compute = program, topology, compute
        world, self.ranks = program.world, np.arange(program.world)
        self.cases = compute.shape[:-2]
        square = (*self.cases, world, world)
        self.key_bytes = np.broadcast_to(np.asarray(keys, dtype=np.float64), square)
        self.gradient_bytes = np.broadcast_to(np.asarray(gradients, dtype=np.float64), square)
        self.clock, self.busy = self.zeros(world), self.zeros(world)
        self.keys_here = self.zeros(world, world)  # when, by rank and source
        # By whether they came from other nodes: when the last one was here, and bytes not yet added up.
        self.gradients_here = {outer: self.zeros(world, world) for outer in (False, True)}
        self.not_added = {outer: self.zeros(world, world) for outer in (False, True)}
        # Ports of ranks inside, then those between; when they are free.
        self.out, self.into = self.zeros(2 * world), self.zeros(2 * world)
        self.channels: dict[tuple[str, bool], np.ndarray] = {}  # when the rank's last messages are done
        self.inside, self.between = self.zeros(world), self.zeros(world)
        self.flights: list[Flight] = []

    def zeros(self, *shape: int) -> np.ndarray:
        return np.zeros((*self.cases, *shape))

    def run(self, columns: float, column_gradients: float) -> Timeline:
        columns_here = self.all_reduce(columns)
        begins, ends = self.zeros(*self.compute.shape[-2:]), self.zeros(*self.compute.shape[-2:])

        def compute(place: int) -> None:
            begins[..., place] = self.clock
            self.work(self.compute[..., place])
            ends[..., place] = self.clock

        program = self.program
        for place, sources, keys, gradients in zip(
            program.places, program.sources, program.keys, program.gradients, strict=True
        ):
            for source in sources.T:
                self.wait(self.keys_here[..., self.ranks, source])
            self.send_keys(keys)
            if place >= 0:
                compute(place)
            for source in sources.T:
                self.work(self.gradient_bytes[..., self.ranks, source] / self.topology.memory)  # zeroed
            self.send_gradients(gradients)
        self.add_up(self.ranks, (False, True))
        if columns:
            self.wait(columns_here)
        compute(-1)
        if column_gradients:
            everyone = self.clock.max(-1, keepdims=True)
            self.wait(everyone + self.all_reduce(column_gradients))
        return Timeline(begins, ends, self.busy, self.clock, self.inside, self.between, tuple(self.flights))

    def wait(self, until: np.ndarray) -> None:
        self.clock = np.maximum(self.clock, until)

    def work(self, seconds: np.ndarray) -> None:
        self.clock, self.busy = self.clock + seconds, self.busy + seconds

    def send_keys(self, hops: tuple[Hop, ...]) -> None:
        for outer, group in groupby(hops, key=lambda hop: hop.outer):
            free = self.channel_free("keys", outer)
            for hop in group:
                posted = np.maximum(np.maximum(self.clock, free), self.keys_here[..., self.ranks, hop.sends])
                size = self.key_bytes[..., hop.send_to, hop.sends]
                self.keys_here[..., hop.send_to, hop.sends] = self.send(hop, "keys", size, posted)

    def send_gradients(self, hops: tuple[Hop, ...]) -> None:
        for outer, some in groupby(hops, key=lambda hop: hop.outer):
            group, free = tuple(some), self.channel_free("grads", outer)
            for hop in group:
                self.add_up(hop.sends, (False, True) if outer else (False,))
            for hop in group:
                size = self.gradient_bytes[..., self.ranks, hop.sends]
                arrival = self.send(hop, "grads", size, np.maximum(self.clock, free))
                to = (..., hop.send_to, hop.sends)
                self.gradients_here[outer][to] = np.maximum(self.gradients_here[outer][to], arrival)
                self.not_added[outer][to] += size

    def add_up(self, sources: np.ndarray, kinds: tuple[bool, ...]) -> None:
        """Waits for the gradients of one source a rank and adds them: two are read, one is written."""
        at = (..., self.ranks, sources)
        for outer in kinds:
            self.wait(self.gradients_here[outer][at])
            self.work(3 * self.not_added[outer][at] / self.topology.memory)
            self.not_added[outer][at] = 0

    def channel_free(self, what: str, outer: bool) -> np.ndarray:
        """When each rank has sent and received what earlier steps started on a channel."""
        return self.channels.setdefault((what, outer), self.zeros(self.program.world)).copy()

    def send(self, hop: Hop, what: str, size: np.ndarray, posted: np.ndarray) -> np.ndarray:
        """When each rank's message arrives. posted: when each rank starts to send and to receive."""
        world, inner = self.program.world, self.topology.inner
        to, outside = hop.send_to, hop.send_to // inner != self.ranks // inner
        places = [world + (rank // inner if self.topology.shared else rank) for rank in (self.ranks, to)]
        out, into = (np.where(outside, *ports) for ports in zip(places, (self.ranks, to), strict=True))
        # Of ranks that share a port, one after the other.
        turns = [slice(i, None, inner) for i in range(inner)] if self.topology.shared else [slice(None)]
        between, inside = self.topology.between, self.topology.inside
        moving = size / np.where(outside, between.bandwidth, inside.bandwidth)
        posted = np.maximum(posted, posted[..., to])
        begin = posted.copy()
        for turn in turns:
            for free, port in ((self.out, out[turn]), (self.into, into[turn])):
                start = np.maximum(posted[..., turn], free[..., port])
                free[..., port] = np.where(size[..., turn] > 0, start + moving[..., turn], free[..., port])
                begin[..., turn] = np.maximum(begin[..., turn], start)
        begin = np.where(size > 0, begin, posted)
        arrival = begin + moving + np.where(outside, between.latency, inside.latency) * (size > 0)
        self.inside += np.where(outside, 0.0, size)
        self.between += np.where(outside, size, 0.0)
        self.flights.append(Flight("outer " * hop.outer + what, to, size, begin, arrival))
        done = self.channels[what, hop.outer]
        np.maximum(done, arrival, out=done)
        done[..., to] = np.maximum(done[..., to], arrival)
        return arrival

    def all_reduce(self, size: float) -> float:
        """Seconds."""
        world, several = self.program.world, self.topology.nodes > 1
        if not size or world == 1:
            return 0.0
        link = self.topology.between if several else self.topology.inside
        moved = 2 * (world - 1) / world * size
        crossing = several & ((self.ranks + 1) % self.topology.inner == 0)
        self.inside += moved * ~crossing
        self.between += moved * crossing
        return 2 * math.ceil(math.log2(world)) * link.latency + moved / link.bandwidth


def _outer(transfers: tuple[Transfer, ...]) -> tuple[bool, ...]:
    return tuple(each.outer for each in transfers)


def _numbers(steps: tuple[Step, ...]) -> Iterator[int]:
    """Sources and transfers of one rank, in the order in which `programs` takes them."""
    for step in steps:
        yield from step.sources
        for each in (*step.keys, *step.gradients):
            yield from (each.send_to, each.sends, each.recv_from, each.receives)
