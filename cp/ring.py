"""Keys and gradients on their way between ranks, for schedules whose messages hold whole shards."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import ModuleType

import torch
from torch import Tensor

from ..balance.schedule import Schedule, Transfer
from ..kernels.attention import accumulator_dtype
from .link import Link
from .transport import Pending, Transport


@dataclass(frozen=True)
class Ring:
    """What one attention call needs of its surroundings.

    transport: a Link where errors should say in which step and layer they happened. schedule: its steps are
    the sources of the bound plan. steps: the functions that compute them. tokens: of the largest shard, to
    which keys are padded as they travel. sent: bytes sent by this rank, by traffic class; counted here.
    """

    transport: Transport
    schedule: Schedule
    steps: ModuleType
    tokens: int
    sent: Counter = field(default_factory=Counter)

    @property
    def link(self) -> Link:
        return self.transport if isinstance(self.transport, Link) else Link(self.transport)

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

        None instead, and -1, in a step that computes nothing.
        """
        steps, places = getattr(self.schedule, phase), self.places
        hop, hops = 0, sum(len(step.keys) for step in steps)
        own = torch.stack((k, v))
        if own.shape[3] < self.tokens:  # a copy only where shards are uneven
            own = torch.nn.functional.pad(own, (0, 0, 0, self.tokens - own.shape[3]))
        held: dict[int, Tensor] = {self.schedule.forward[0].sources[0]: own}
        arriving: dict[int, Pending] = {}
        for step in steps:
            for source in step.sources:
                if source in arriving:
                    arriving.pop(source).wait()
            for transfer in step.keys:
                hop += 1
                received = self._send(self.link.at(phase, hop, hops), transfer, held[transfer.sends], "keys")
                held[transfer.receives], arriving[transfer.receives] = received
            parts = [held.pop(source) for source in step.sources]
            if not parts:
                yield -1, None
            else:
                yield places[step.sources], torch.cat(parts, 3) if len(parts) > 1 else parts[0]

    def gradients(self, k: Tensor) -> Gradients:
        """Where the gradients of keys like k [B, Hk, S, D] are given, step by step."""
        return _Travelling(self, k)

    def _send(self, link: Link, transfer: Transfer, x: Tensor, what: str) -> tuple[Tensor, Pending]:
        """Starts a transfer; the returned tensor is filled once the pending is waited for."""
        channel = f"outer {what}" if transfer.outer else what
        self.sent[channel] += x.numel() * x.itemsize
        received = torch.empty_like(x)
        return received, link.exchange([x], transfer.send_to, [received], transfer.recv_from, channel)


class Gradients:
    """The way home for the gradients of keys and values."""

    def add(self, place: int, gradient: Tensor) -> None:
        """Takes those of a place, in full precision, shaped like its keys [2, B, Hk, tokens, D]."""
        raise NotImplementedError

    def total(self) -> Tensor:
        """[2, B, Hk, S, D] of this rank's own keys and values; ordered sums."""
        raise NotImplementedError


class _Travelling(Gradients):
    """As the schedule says: a transfer sends on all that is here of a source, in one order."""

    def __init__(self, ring: Ring, k: Tensor):
        self.ring, self.length = ring, k.shape[2]
        self.steps = {ring.places[step.sources]: step for step in ring.schedule.backward if step.sources}
        self.shares: dict[int, Tensor] = {}  # of this rank, by source
        self.arriving: dict[tuple[int, bool], list[tuple[Tensor, Pending]]] = defaultdict(list)
        self.hop, self.hops = 0, sum(len(step.gradients) for step in self.steps.values())

    def add(self, place: int, gradient: Tensor) -> None:
        sources = self.steps[place].sources
        self.shares |= zip(sources, gradient.split(self.ring.tokens, 3), strict=True)
        for transfer in self.steps[place].gradients:
            self.hop += 1
            link = self.ring.link.at("backward", self.hop, self.hops)
            sum_here = self._summed(transfer.sends, transfer.outer).contiguous()
            received = self.ring._send(link, transfer, sum_here, "grads")
            self.arriving[transfer.receives, transfer.outer].append(received)

    def total(self) -> Tensor:
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
