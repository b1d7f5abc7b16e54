"""Transports: how tensors move between the ranks of one group.

One small protocol. Ranks are places in the group (0 .. size - 1). Traffic of different channels ("keys",
"grads") never waits for each other. `Distributed` uses torch.distributed (gloo, NCCL), `threads.py` has
the in-process form, `Alone` is a group of one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import RingDesyncError, RingTimeoutError

# torch 2.13 renames the tensor form of all_gather and deprecates the old name.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_LOST = ("timed out", "timeout", "monitoredbarrier", "connection", "broken pipe")  # how backends say it


@dataclass
class Pending:
    """A transfer in flight. `wait` returns once its results may be used on the current stream."""

    finish: Callable[[], None]
    holds: tuple[Tensor, ...] = ()  # kept alive until then

    def wait(self) -> None:
        self.finish()
        self.holds = ()


class Transport(Protocol):
    """A group of ranks as one of them sees it."""

    rank: int
    size: int

    def exchange(
        self, send: list[Tensor], send_to: int, receive: list[Tensor], recv_from: int, channel: str
    ) -> Pending:
        """Sends and receives contiguous tensors at once; `receive` is filled in place."""

    def all_reduce(self, x: Tensor, op: str = "sum") -> Pending:
        """Combines contiguous x over the group in place. op: "sum" or "max"."""

    def all_gather(self, x: Tensor) -> Tensor:
        """[size, *x.shape], equal shapes on all ranks; returns when done."""


@dataclass(frozen=True)
class Alone:
    """A group of one rank: nothing moves."""

    rank: int = 0
    size: int = 1

    def exchange(self, send, send_to, receive, recv_from, channel) -> Pending:
        raise AssertionError("a group of one has nobody to exchange with")

    def all_reduce(self, x: Tensor, op: str = "sum") -> Pending:
        return Pending(lambda: None)

    def all_gather(self, x: Tensor) -> Tensor:
        return x[None].clone()


@dataclass(frozen=True, eq=False)
class Distributed:
    """A group of torch.distributed; every channel has a communicator of its own.

    ranks: global ranks in group order. groups: process group of each channel and of "control".
    """

    rank: int
    ranks: tuple[int, ...]
    groups: dict[str, dist.ProcessGroup]

    @property
    def size(self) -> int:
        return len(self.ranks)

    def exchange(self, send, send_to, receive, recv_from, channel) -> Pending:
        group, to, source = self.groups[channel], self.ranks[send_to], self.ranks[recv_from]
        what = f"{channel} from rank {source}, to rank {to}"
        operations = [dist.P2POp(dist.isend, x, to, group) for x in send]
        operations += [dist.P2POp(dist.irecv, x, source, group) for x in receive]
        with self._typed(what):
            works = dist.batch_isend_irecv(operations)
        return self._pending(works, (*send, *receive), what)

    def all_reduce(self, x: Tensor, op: str = "sum") -> Pending:
        operation = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}[op]
        what = f"all-reduce over ranks {self.ranks}"
        with self._typed(what):
            work = dist.all_reduce(x, operation, group=self.groups["control"], async_op=True)
        return self._pending([work], (x,), what)

    def all_gather(self, x: Tensor) -> Tensor:
        out, what = x.new_empty(self.size, *x.shape), f"all-gather over ranks {self.ranks}"
        with self._typed(what):
            work = _all_gather(out.view(-1), x.reshape(-1), group=self.groups["control"], async_op=True)
        self._pending([work], (x,), what).wait()
        if self.ranks == tuple(sorted(self.ranks)):
            return out
        # torch.distributed sorts the ranks of a group; the mesh may have them in another order.
        return torch.stack([out[sorted(self.ranks).index(rank)] for rank in self.ranks])

    def close(self) -> None:
        """Destroys the communicators. gloo keeps threads for each; every rank closes at the same point."""
        for group in self.groups.values():
            dist.destroy_process_group(group)

    def _pending(self, works, tensors, what: str) -> Pending:
        def finish():
            with self._typed(what):
                for work in works:
                    work.wait()

        return Pending(finish, tensors)

    @contextmanager
    def _typed(self, what: str) -> Iterator[None]:
        """A peer that is late or gone raises RingTimeoutError, which says who waited and for what."""
        try:
            yield
        except RuntimeError as error:
            if any(sign in str(error).lower() for sign in _LOST):
                raise RingTimeoutError(f"rank {self.ranks[self.rank]}: {what}: {error}") from error
            raise


def agree(transport: Transport, names: tuple[str, ...], values: list[int], device) -> None:
    """Raises RingDesyncError, on every rank, unless all ranks hold the same integers."""
    mine = torch.tensor(values, dtype=torch.int64, device=device)
    table = transport.all_gather(mine).cpu()
    for name, column in zip(names, table.T.tolist(), strict=True):
        if len(set(column)) > 1:
            raise RingDesyncError(f"ranks disagree on {name}: {column} on ranks 0 to {len(column) - 1}")
