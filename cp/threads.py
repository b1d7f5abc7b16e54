"""Ranks as threads of one process: the transport of tests, of debugging, and of many ranks on one GPU."""

from __future__ import annotations

import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from .errors import RingDesyncError, RingTimeoutError
from .transport import Pending, Transport
from .windows import Window, Windows

Result = TypeVar("Result")


class _Hub:
    """Where the threads of one group leave messages for each other. Keys end with the rank that takes."""

    def __init__(self, size: int, timeout: float):
        self.size, self.timeout = size, timeout
        lock = threading.Lock()
        self.arrived = [threading.Condition(lock) for _ in range(size)]  # each rank is woken for its own only
        self.boxes: dict[Any, list] = defaultdict(list)
        self.failure: tuple[int, BaseException] | None = None  # of the first rank that failed

    def put(self, key: Any, value: Any) -> None:
        arrived = self.arrived[key[-1]]
        with arrived:
            self.boxes[key].append(value)
            arrived.notify_all()

    def take(self, key: Any, what: str, rank: int, peer: int) -> Any:
        """The oldest message under the key, waiting for it. what, rank, peer: for the error."""
        arrived = self.arrived[key[-1]]
        with arrived:
            arrived.wait_for(lambda: self.boxes[key] or self.failure, self.timeout)
            if not self.boxes[key]:
                why = f"within {self.timeout:g} s"
                if self.failure is not None:
                    why = f"as rank {self.failure[0]} failed: {self.failure[1]!r}"
                raise RingTimeoutError(f"{what} {why}", rank=rank, peer=peer)
            message = self.boxes[key].pop(0)
            if not self.boxes[key]:
                del self.boxes[key]
            return message

    def fail(self, rank: int, error: BaseException) -> None:
        with self.arrived[rank]:
            self.failure = self.failure or (rank, error)
            for arrived in self.arrived:
                arrived.notify_all()


@dataclass(frozen=True)
class _Message:
    """Copies of tensors. made: on a GPU, when they are there."""

    tensors: list[Tensor]
    made: torch.cuda.Event | None

    @staticmethod
    def of(tensors: list[Tensor]) -> _Message:
        copies = [x.detach().clone() for x in tensors]
        device = copies[0].device
        made = torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None
        return _Message(copies, made)

    def taken(self) -> list[Tensor]:
        """For use on the current stream of the GPU that they are on."""
        if self.made is not None:
            stream = torch.cuda.current_stream(self.tensors[0].device)
            stream.wait_event(self.made)
            for x in self.tensors:
                x.record_stream(stream)
        return self.tensors


class ThreadTransport:
    """One rank of a group of threads. Messages are copied when sent, so buffers may be reused.

    On GPUs every channel has streams of its own, on which keys and gradients travel beside the computation.
    """

    def __init__(self, rank: int, hub: _Hub, nodes: int):
        self.rank, self.size, self.nodes, self._hub = rank, hub.size, nodes, hub
        self.ranks = tuple(range(hub.size))
        self._calls: Counter[Hashable] = Counter()  # messages are matched by their place in program order
        self._windows: dict[str, Windows] = {}
        self._streams: dict[tuple[str, torch.device], torch.cuda.Stream] = {}

    def exchange(self, send, send_to, receive, recv_from, channel) -> Pending:
        if send:
            number = self._number("to", channel, send_to)
            self._hub.put((channel, number, self.rank, send_to), _Message.of(send))
        if not receive:
            return Pending(lambda: None)
        key = (channel, self._number("from", channel, recv_from), recv_from, self.rank)

        def take() -> _Message:
            message = self._hub.take(key, f"no {channel} from rank {recv_from}", self.rank, recv_from)
            self._same(receive, message.tensors, recv_from)
            return message

        if receive[0].is_cuda:
            return self._copied_beside(take(), receive, channel)

        def finish():
            for target, x in zip(receive, take().taken(), strict=True):
                target.copy_(x)

        return Pending(finish)

    def stream(self, channel: str, device: torch.device) -> torch.cuda.Stream:
        """Where what this rank receives is copied, on the GPU that it comes from and on its own."""
        if (channel, device) not in self._streams:
            self._streams[channel, device] = torch.cuda.Stream(device)
        return self._streams[channel, device]

    def _copied_beside(self, message: _Message, receive: list[Tensor], channel: str) -> Pending:
        """Copies from now on; threads have waited for each other for it, streams of computation do not."""
        device = receive[0].device
        here, there = (self.stream(channel, x[0].device) for x in (receive, message.tensors))
        here.wait_stream(torch.cuda.current_stream(device))  # the memory may still be in use
        with torch.cuda.stream(there), torch.cuda.stream(here):  # between GPUs the sender's stream copies
            for target, x in zip(receive, message.taken(), strict=True):
                target.copy_(x, non_blocking=True)
        done = here.record_event()
        return Pending(lambda: torch.cuda.current_stream(device).wait_event(done))

    def all_to_all(self, send, sends, receive, receives, channel) -> Pending:
        call = ("rows", channel, self._number("rows", channel))
        for rank, part in enumerate(send.detach().split(list(sends))):
            self._hub.put((*call, self.rank, rank), _Message.of([part]))

        def finish():
            for rank, target in enumerate(receive.split(list(receives))):
                what = f"no {channel} from rank {rank}"
                arrived = self._hub.take((*call, rank, self.rank), what, self.rank, rank).taken()
                self._same([target], arrived, rank)
                target.copy_(arrived[0])

        return Pending(finish)

    def one_sided(self, device) -> bool:
        """Not where threads have GPUs of their own: those send."""
        return self.nodes == 1 and len(set(self.swap(device, "control"))) == 1

    def publish(self, x, rows, channel) -> Window:
        if channel not in self._windows:

            def share(size: int) -> _Shared:
                return _Shared(self, torch.empty(size, dtype=torch.uint8, device=x.device), channel)

            self._windows[channel] = Windows(self.rank, share, x.device)
        return self._windows[channel].publish(x, rows)

    def swap(self, value: Any, channel: str) -> list[Any]:
        """What all ranks give at this point of a channel, themselves, not copies."""
        call = ("swap", channel, self._number("swap", channel))
        for rank in self.ranks:
            self._hub.put((*call, self.rank, rank), value)
        what = f"nothing shown for {channel} by rank "
        return [
            self._hub.take((*call, rank, self.rank), f"{what}{rank}", self.rank, rank) for rank in self.ranks
        ]

    def all_reduce(self, x: Tensor, op: str = "sum") -> Pending:
        collect = self._collect(x, "control")

        def finish():
            parts = torch.stack(collect())
            x.copy_(parts.amax(0) if op == "max" else parts.sum(0))

        return Pending(finish)

    def all_gather(self, x: Tensor, channel: str = "control") -> Tensor:
        return torch.stack(self._collect(x, channel)())

    def _number(self, *kind: Hashable) -> int:
        """How many messages of a kind there were, this one included."""
        self._calls[kind] += 1
        return self._calls[kind]

    def _collect(self, x: Tensor, channel: str) -> Callable[[], list[Tensor]]:
        call, message = ("all", channel, self._number("all", channel)), _Message.of([x])
        for rank in self.ranks:
            self._hub.put((*call, self.rank, rank), message)

        def finish():
            parts = []
            for rank in self.ranks:
                what = f"nothing from rank {rank} for a collective over ranks {self.ranks}"
                arrived = self._hub.take((*call, rank, self.rank), what, self.rank, rank).taken()
                self._same([x], arrived, rank)
                parts.append(arrived[0].to(x.device))
            return parts

        return finish

    def _same(self, wanted: list[Tensor], arrived: list[Tensor], source: int) -> None:
        shapes = [[f"{tuple(x.shape)} {x.dtype}" for x in tensors] for tensors in (wanted, arrived)]
        if shapes[0] != shapes[1]:
            raise RingDesyncError(
                f"expected {', '.join(shapes[0])} from rank {source}, which sent {', '.join(shapes[1])}",
                rank=self.rank,
                peer=source,
            )


class _Shared:
    """Memory of all threads, see windows.Shared."""

    def __init__(self, transport: ThreadTransport, own: Tensor, channel: str):
        self.transport, self.channel, self.device = transport, channel, own.device
        self.buffers = transport.swap(own, channel)
        transport._same([own] * transport.size, self.buffers, transport.rank)

    def of(self, rank: int) -> Tensor:
        return self.buffers[rank]

    def barrier(self) -> None:
        done = None
        if self.device.type == "cuda":
            done = torch.cuda.current_stream(self.device).record_event()
        for event in self.transport.swap(done, self.channel):
            if event is not None:
                torch.cuda.current_stream(self.device).wait_event(event)


def run(
    world: int, body: Callable[[Transport], Result], timeout: float = 120.0, nodes: int = 1
) -> list[Result]:
    """Runs body(transport) on `world` threads and returns what they return, in rank order.

    The first failure is raised after the others have been woken. timeout: seconds for any one wait.
    nodes: that the ranks count as lying on, for a hierarchical ring.
    On a GPU the bodies must run their backward under torch.autograd.set_multithreading_enabled(False).
    """
    hub = _Hub(world, timeout)
    results: list[Any] = [None] * world

    def rank_body(rank: int) -> None:
        try:
            results[rank] = body(ThreadTransport(rank, hub, nodes))
        except BaseException as error:  # noqa: BLE001 - reported by the caller's thread
            hub.fail(rank, error)

    threads = [threading.Thread(target=rank_body, args=(rank,), daemon=True) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if hub.failure is not None:
        raise hub.failure[1]
    return results
