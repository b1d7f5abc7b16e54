"""Ranks as threads of one process: the transport of tests, of debugging, and of many ranks on one GPU."""

from __future__ import annotations

import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor

from .errors import RingDesyncError, RingTimeoutError
from .transport import Pending, Transport

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


class ThreadTransport:
    """One rank of a group of threads. Messages are copied when sent, so buffers may be reused."""

    def __init__(self, rank: int, hub: _Hub, nodes: int):
        self.rank, self.size, self.nodes, self._hub = rank, hub.size, nodes, hub
        self.ranks = tuple(range(hub.size))
        self._calls: Counter[Hashable] = Counter()  # messages are matched by their place in program order

    def exchange(self, send, send_to, receive, recv_from, channel) -> Pending:
        sent, expected = self._number("to", channel, send_to), self._number("from", channel, recv_from)
        self._hub.put((channel, sent, self.rank, send_to), [x.detach().clone() for x in send])

        def finish():
            what = f"no {channel} from rank {recv_from}"
            arrived = self._hub.take((channel, expected, recv_from, self.rank), what, self.rank, recv_from)
            self._same(receive, arrived, recv_from)
            for target, x in zip(receive, arrived, strict=True):
                target.copy_(x)

        return Pending(finish)

    def all_to_all(self, send, sends, receive, receives, channel) -> Pending:
        call = ("rows", channel, self._number("rows", channel))
        for rank, part in enumerate(send.detach().split(list(sends))):
            self._hub.put((*call, self.rank, rank), [part.clone()])

        def finish():
            for rank, target in enumerate(receive.split(list(receives))):
                what = f"no {channel} from rank {rank}"
                arrived = self._hub.take((*call, rank, self.rank), what, self.rank, rank)
                self._same([target], arrived, rank)
                target.copy_(arrived[0])

        return Pending(finish)

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
        call, copy = ("all", channel, self._number("all", channel)), x.detach().clone()
        for rank in self.ranks:
            self._hub.put((*call, self.rank, rank), copy)

        def finish():
            parts = []
            for rank in self.ranks:
                what = f"nothing from rank {rank} for a collective over ranks {self.ranks}"
                parts.append(self._hub.take((*call, rank, self.rank), what, self.rank, rank))
                self._same([copy], parts[-1:], rank)
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
