"""A transport as one call sees it: errors say where they happened, waits are timed, messages agreed upon."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .errors import Place, RingError
from .transport import Pending, Transport, agree
from .windows import Reads, Window


class Waits:
    """How long a rank waits for others in one step; on CUDA how long its stream does. Never synchronises.

    device: where the tensors of the step are. Time counts from here. headers: seconds that the host waited
    for each header, the exception of law 5.
    """

    def __init__(self, device: torch.device | str = "cpu"):
        self.began = _now(torch.device(device))
        self.spans: list[tuple[Any, Any]] = []
        self.headers: list[float] = []

    @contextmanager
    def timed(self, device: torch.device) -> Iterator[None]:
        start = _now(device)
        yield
        self.spans.append((start, _now(device)))

    @contextmanager
    def header(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.headers.append(time.perf_counter() - start)

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

    def exchange(self, send, send_to, receive, recv_from, channel, like: Tensor | None = None) -> Pending:
        """like: shaped as all messages, where some ranks may have none to send or none to receive."""
        tensors = [*send, *receive] if like is None else [like]
        with self._located():
            self._prove(channel, *tensors)
            if not send and not receive:
                return Pending(lambda: None)
            return self._pending(
                self.transport.exchange(send, send_to, receive, recv_from, channel), tensors[0].device
            )

    def all_to_all(self, send, sends, receive, receives, channel) -> Pending:
        with self._located():
            self._prove(f"all-to-all of {channel}", send[:0])  # ranks have their own numbers of rows
            return self._pending(
                self.transport.all_to_all(send, sends, receive, receives, channel), send.device
            )

    def one_sided(self, device: torch.device) -> bool:
        with self._located():
            return self.transport.one_sided(device)

    def publish(self, x: Tensor, rows: int, channel: str) -> Window:
        with self._located():
            self._prove(f"window of {channel}, {rows} rows", x[:0])  # ranks have their own numbers of rows
            with self.waits.timed(x.device):
                return self.transport.publish(x, rows, channel)

    def read(self, window: Window, reads: Reads, device: torch.device) -> Pending:
        with self._located():
            return self._pending(Pending(window.read(reads)), device)

    def all_reduce(self, x: Tensor, op: str = "sum") -> Pending:
        with self._located():
            self._prove(f"all-reduce, {op}", x)
            return self._pending(self.transport.all_reduce(x, op), x.device)

    def all_gather(self, x: Tensor, channel: str = "control") -> Tensor:
        with self._located():
            self._prove("all-gather", x)
            with self.waits.timed(x.device):
                return self.transport.all_gather(x, channel)

    def reduced_header(self, x: Tensor) -> Callable[[], Tensor]:
        """The sum of x over all ranks, on the host, when the returned function is called; x is used up.

        It comes while the device computes on, which waits for nobody meanwhile.
        """
        with self._located():
            self._prove("header", x)
            pending = self.transport.all_reduce(x)
            if not x.is_cuda:
                return lambda: self._awaited(lambda: (pending.wait(), x)[1])
            beside = torch.cuda.Stream(x.device)
            x.record_stream(beside)
            with torch.cuda.stream(beside):
                pending.wait()
                arriving = _copied(x)
            return lambda: self._awaited(arriving)

    def to_host(self, x: Tensor) -> Tensor:
        """Waits for nothing but x itself."""
        return self._awaited(_copied(x))

    def _awaited(self, arrive: Callable[[], Tensor]) -> Tensor:
        with self._located(), self.waits.header():
            return arrive()

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


def link_of(transport: Transport) -> Link:
    """The transport itself where it is a Link."""
    return transport if isinstance(transport, Link) else Link(transport)


def _copied(x: Tensor) -> Callable[[], Tensor]:
    """x on the host, to where it is on its way; the returned function waits for it."""
    if not x.is_cuda:
        return lambda: x
    pinned = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    pinned.copy_(x, non_blocking=True)
    event = torch.cuda.Event()
    event.record()

    def arrive() -> Tensor:
        event.synchronize()
        return pinned

    return arrive
