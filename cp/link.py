"""A transport as one call sees it: errors say where they happened, waits are timed, messages agreed upon."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .errors import Place, RingError
from .transport import Pending, Transport, agree


class Waits:
    """How long a rank waits for others in one step; on CUDA how long its stream does. Never synchronises.

    device: where the tensors of the step are. Time counts from here.
    """

    def __init__(self, device: torch.device | str = "cpu"):
        self.began = _now(torch.device(device))
        self.spans: list[tuple[Any, Any]] = []

    @contextmanager
    def timed(self, device: torch.device) -> Iterator[None]:
        start = _now(device)
        yield
        self.spans.append((start, _now(device)))

    def seconds(self) -> tuple[float, float]:
        """Seconds waited, and seconds from the beginning to the end of the last wait. Synchronises."""
        if not self.spans:
            return 0.0, 0.0
        return sum(_between(*span) for span in self.spans), _between(self.began, self.spans[-1][1])


def _now(device: torch.device):
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def _between(start, end) -> float:
    if isinstance(start, float):
        return end - start
    end.synchronize()
    return start.elapsed_time(end) / 1e3


@dataclass(frozen=True)
class Link:
    """A Transport around another.

    place: where in the step. header: what else must be equal on all ranks. debug: before every message
    all ranks compare place, header, kind, shapes and dtypes; waits for the device. entry: they compare
    place and header only, when a forward or backward begins.
    """

    transport: Transport
    place: Place = Place()
    header: Mapping[str, object] = field(default_factory=dict)
    debug: bool = False
    entry: bool = False
    waits: Waits = field(default_factory=Waits)

    @property
    def rank(self) -> int:
        return self.transport.rank

    @property
    def size(self) -> int:
        return self.transport.size

    @property
    def ranks(self) -> tuple[int, ...]:
        return self.transport.ranks

    @property
    def nodes(self) -> int:
        return self.transport.nodes

    def at(self, phase: str, hop: int | None = None, hops: int | None = None) -> Link:
        return replace(self, place=replace(self.place, phase=phase, hop=hop, hops=hops))

    def enter(self, device: torch.device, **header: object) -> None:
        """Proves agreement where a forward or backward begins, if that is asked for."""
        if self.entry or self.debug:
            with self._located():
                self._agree(device, header)

    def exchange(self, send, send_to, receive, recv_from, channel) -> Pending:
        with self._located():
            self._prove(channel, *send, *receive)
            return self._pending(
                self.transport.exchange(send, send_to, receive, recv_from, channel), send[0].device
            )

    def all_to_all(self, send, sends, receive, receives, channel) -> Pending:
        with self._located():
            self._prove(f"all-to-all of {channel}", send[:0])  # ranks have their own numbers of rows
            return self._pending(
                self.transport.all_to_all(send, sends, receive, receives, channel), send.device
            )

    def all_reduce(self, x: Tensor, op: str = "sum") -> Pending:
        with self._located():
            self._prove(f"all-reduce, {op}", x)
            return self._pending(self.transport.all_reduce(x, op), x.device)

    def all_gather(self, x: Tensor, channel: str = "control") -> Tensor:
        with self._located():
            self._prove("all-gather", x)
            with self.waits.timed(x.device):
                return self.transport.all_gather(x, channel)

    def _prove(self, message: str, *tensors: Tensor) -> None:
        if self.debug:
            kinds = " ".join(f"{list(x.shape)} {str(x.dtype).removeprefix('torch.')}" for x in tensors)
            self._agree(tensors[0].device, {"message": message, "tensors": kinds})

    def _agree(self, device: torch.device, header: Mapping[str, object]) -> None:
        with self.waits.timed(device):
            agree(self.transport, vars(self.place) | {**self.header, **header}, device)

    def _pending(self, pending: Pending, device: torch.device) -> Pending:
        def finish():
            with self._located(), self.waits.timed(device):
                pending.wait()

        return Pending(finish)

    @contextmanager
    def _located(self) -> Iterator[None]:
        try:
            yield
        except RingError as error:
            error.place = self.place
            raise
