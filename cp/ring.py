"""Keys and gradients on their way between ranks, for schedules whose messages hold whole shards."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..balance.hops import Live, everything
from ..balance.schedule import Schedule, Transfer
from ..kernels.attention import accumulator_dtype
from .link import Link, link_of
from .transport import Pending, Transport

if TYPE_CHECKING:
    from .hops import Hops


@dataclass(frozen=True)
class Ring:
    """What one attention call needs of its surroundings.

    transport: a Link where errors should say in which step and layer they happened. schedule: its steps are
    the sources of the bound plan. steps: the functions that compute them. tokens: of the largest shard, to
    which keys are padded as they travel. sent: bytes sent by this rank, by traffic class; counted here.
    hops: which of them somebody needs; None if all are made.
    """

    transport: Transport
    schedule: Schedule
    steps: ModuleType
    tokens: int
    sent: Counter = field(default_factory=Counter)
    hops: Hops | None = None

    @property
    def link(self) -> Link:
        return link_of(self.transport)

    def live(self, first: bool = False) -> Live:
        """The hops that are made. first: before a header can have come."""
        if self.hops is None or (first and not self.hops.known):
            return everything(self.schedule.world)
        return self.hops.live

    def all_reduce(self, phase: str, x: Tensor) -> Pending:
        """Of columns. A ring all-reduce sends 2 (size - 1) / size of the tensor from every rank."""
        size = self.transport.size
        self.sent["columns"] += 2 * (size - 1) * x.numel() * x.itemsize // size
        return self.link.at(phase).all_reduce(x)

    @property
    def places(self) -> dict[tuple[int, ...], int]:
        """The sources of each step of the schedule, and which source of the bound plan they are together."""
        return {step.sources: place for place, step in enumerate(self.schedule.forward)}

    def keys(self, k: Tensor, v: Tensor, phase: str) -> Iterator[tuple[int, Tensor | None]]:
        """Yields (place, keys and values [2, B, Hk, tokens, D]) of every step, moving them meanwhile.

        None instead in a step that computes nothing; before the first of the backward the place is -1.
        """
        steps, places, rank = getattr(self.schedule, phase), self.places, self.schedule.rank
        hop, hops = 0, sum(len(step.keys) for step in steps)
        own = torch.stack((k, v))
        if own.shape[3] < self.tokens:  # a copy only where shards are uneven
            own = torch.nn.functional.pad(own, (0, 0, 0, self.tokens - own.shape[3]))
        held: dict[int, Tensor] = {self.schedule.forward[0].sources[0]: own}
        arriving: dict[int, Pending] = {}
        leaving: list[Pending] = []
        for number, step in enumerate(steps):
            for source in step.sources:
                if source in arriving:
                    arriving.pop(source).wait()
            live = self.live(first=phase == "forward" and number == 0)
            for transfer in step.keys:
                hop += 1
                sends, receives = live.keys_move(rank, transfer)
                send = held[transfer.sends] if sends else None
                link = self.link.at(phase, hop, hops)
                received, pending = self._move(link, transfer, send, receives, own, "keys")
                if receives:
                    held[transfer.receives], arriving[transfer.receives] = received, pending
                else:
                    leaving.append(pending)
            parts = [held.pop(source) for source in step.sources if source in held]
            if any(live.computes[rank, source] for source in step.sources):
                yield places[step.sources], torch.cat(parts, 3) if len(parts) > 1 else parts[0]
            else:
                yield places.get(step.sources, -1), None
        for pending in leaving:
            pending.wait()

    def gradients(self, k: Tensor) -> Gradients:
        """Where the gradients of keys like k [B, Hk, S, D] are given, step by step."""
        return _Travelling(self, k)

    def _move(
        self, link: Link, transfer: Transfer, send: Tensor | None, receives: bool, like: Tensor, what: str
    ) -> tuple[Tensor | None, Pending]:
        """Starts what is made of a transfer; what it receives is there once the pending is waited for.

        like: of the shape of all messages.
        """
        channel = f"outer {what}" if transfer.outer else what
        leaves = [] if send is None else [send]
        self.sent[channel] += sum(x.numel() * x.itemsize for x in leaves)
        received = torch.empty(like.shape, dtype=like.dtype, device=like.device) if receives else None
        comes = [] if received is None else [received]
        return received, link.exchange(leaves, transfer.send_to, comes, transfer.recv_from, channel, like)


class Gradients:
    """The way home for the gradients of keys and values."""

    def add(self, place: int, gradient: Tensor | None) -> None:
        """Takes those of a place, in full precision, shaped like its keys [2, B, Hk, tokens, D].

        None if nothing was computed with them.
        """
        raise NotImplementedError

    def total(self) -> Tensor:
        """[2, B, Hk, S, D] of this rank's own keys and values; ordered sums."""
        raise NotImplementedError


class _Travelling(Gradients):
    """As the schedule says: a transfer sends on all that is here of a source, in one order."""

    def __init__(self, ring: Ring, k: Tensor):
        self.ring, self.length = ring, k.shape[2]
        one = torch.empty((), dtype=accumulator_dtype(k), device=k.device)
        self.like = one.expand(2, *k.shape[:2], ring.tokens, k.shape[3])
        self.steps = {ring.places[step.sources]: step for step in ring.schedule.backward if step.sources}
        self.shares: dict[int, Tensor] = {}  # of this rank, by source
        self.arriving: dict[tuple[int, bool], list[tuple[Tensor, Pending]]] = defaultdict(list)
        self.leaving: list[Pending] = []
        self.hop, self.hops = 0, sum(len(step.gradients) for step in self.steps.values())

    def add(self, place: int, gradient: Tensor | None) -> None:
        sources, live = self.steps[place].sources, self.ring.live()
        if gradient is not None:
            self.shares |= zip(sources, gradient.split(self.ring.tokens, 3), strict=True)
        for transfer in self.steps[place].gradients:
            self.hop += 1
            link = self.ring.link.at("backward", self.hop, self.hops)
            sends, receives = live.gradients_move(self.ring.schedule.rank, transfer)
            sum_here = self._summed(transfer.sends, transfer.outer).contiguous() if sends else None
            moving = self.ring._move(link, transfer, sum_here, receives, self.like, "grads")
            if receives:
                self.arriving[transfer.receives, transfer.outer].append(moving)
            else:
                self.leaving.append(moving[1])

    def total(self) -> Tensor:
        for pending in self.leaving:
            pending.wait()
        return self._summed(self.ring.schedule.forward[0].sources[0], True)[:, :, :, : self.length]

    def _summed(self, source: int, outer: bool) -> Tensor:
        """All that is here of a source, from other nodes too if `outer`; always in the same order."""
        arrived = self.arriving.pop((source, False), [])
        if outer:
            arrived += self.arriving.pop((source, True), [])
        parts = [self.shares.pop(source)] if source in self.shares else []
        for received, pending in arrived:
            pending.wait()
            parts.append(received)
        total, *others = parts
        for other in others:
            total += other
        return total


def step_blocks(schedule: Schedule, held: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, ...], ...]:
    """For each step the blocks of its sources as they lie there: those of held[source], padded with -1."""
    width = max(1, max(map(len, held)))
    padded = [blocks + (-1,) * (width - len(blocks)) for blocks in held]
    return tuple(sum((padded[source] for source in step.sources), ()) for step in schedule.forward)


def accumulators(like: Tensor) -> Tensor:
    """Zeros of the same shape in full precision."""
    return torch.zeros(like.shape, dtype=accumulator_dtype(like), device=like.device)
