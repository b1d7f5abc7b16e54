"""Ranks as threads of one process: the transport of tests, of debugging, and of many ranks on one GPU."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from .errors import RingDesyncError, RingTimeoutError
from .transport import Pending, Transport

Result = TypeVar("Result")


class _Hub:
    """Where the threads of one group leave messages for each other."""

    def __init__(self, size: int, timeout: float):
        self.size, self.timeout = size, timeout
        self.changed = threading.Condition()
        self.boxes: dict[Any, list] = defaultdict(list)
        self.failure: BaseException | None = None

    def put(self, key: Any, value: Any) -> None:
        with self.changed:
            self.boxes[key].append(value)
            self.changed.notify_all()

    def take(self, key: Any) -> Any:
        """The oldest message under the key, waiting for it."""
        self._wait(lambda: self.boxes[key], key)
        with self.changed:
            message = self.boxes[key].pop(0)
            if not self.boxes[key]:
                del self.boxes[key]
            return message

    def fail(self, error: BaseException) -> None:
        with self.changed:
            self.failure = self.failure or error
            self.changed.notify_all()

    def _wait(self, ready: Callable[[], Any], what: Any) -> None:
        with self.changed:
            done = self.changed.wait_for(lambda: self.failure or ready(), self.timeout)
            if self.failure is not None:
                raise RingTimeoutError(f"another rank failed: {self.failure!r}")
            if not done:
                raise RingTimeoutError(f"nothing arrived for {what} within {self.timeout} s")


class ThreadTransport:
    """One rank of a group of threads. Messages are copied when sent, so buffers may be reused."""

    def __init__(self, rank: int, hub: _Hub):
        self.rank, self.size, self._hub = rank, hub.size, hub
        self._calls = 0  # collectives are matched by their place in program order

    def exchange(self, send, send_to, receive, recv_from, channel) -> Pending:
        self._hub.put((channel, self.rank, send_to), [x.detach().clone() for x in send])

        def finish():
            arrived = self._hub.take((channel, recv_from, self.rank))
            for target, x in zip(receive, arrived, strict=True):
                if target.shape != x.shape or target.dtype != x.dtype:
                    raise RingDesyncError(
                        f"rank {self.rank} expected {tuple(target.shape)} {target.dtype} from rank "
                        f"{recv_from}, which sent {tuple(x.shape)} {x.dtype}"
                    )
                target.copy_(x)

        return Pending(finish)

    def all_reduce(self, x: Tensor, op: str = "sum") -> Pending:
        collect = self._collect(x)

        def finish():
            parts = torch.stack(collect())
            x.copy_(parts.amax(0) if op == "max" else parts.sum(0))

        return Pending(finish)

    def all_gather(self, x: Tensor) -> Tensor:
        return torch.stack(self._collect(x)())

    def _collect(self, x: Tensor) -> Callable[[], list[Tensor]]:
        call, self._calls = self._calls, self._calls + 1
        copy = x.detach().clone()
        for rank in range(self.size):
            self._hub.put(("collective", call, self.rank, rank), copy)
        return lambda: [self._hub.take(("collective", call, rank, self.rank)) for rank in range(self.size)]


def run(world: int, body: Callable[[Transport], Result], timeout: float = 120.0) -> list[Result]:
    """Runs body(transport) on `world` threads and returns what they return, in rank order.

    The first failure is raised after the others have been woken. timeout: seconds for any one wait.
    On a GPU the bodies must run their backward under torch.autograd.set_multithreading_enabled(False).
    """
    hub = _Hub(world, timeout)
    results: list[Any] = [None] * world

    def rank_body(rank: int) -> None:
        try:
            results[rank] = body(ThreadTransport(rank, hub))
        except BaseException as error:  # noqa: BLE001 - reported by the caller's thread
            hub.fail(error)

    threads = [threading.Thread(target=rank_body, args=(rank,), daemon=True) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if hub.failure is not None:
        raise hub.failure
    return results
