"""Transports: how tensors move between the ranks of one group.

One small protocol. Ranks are places in the group (0 .. size - 1), node by node. Traffic of different channels
("keys", "grads", the "outer" ones of both between nodes, "control", "headers") never waits for each other.
`Distributed` uses torch.distributed (gloo, NCCL), `threads.py` has the in-process form, `Alone` is a group of
one.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import RingDesyncError, RingTimeoutError
from .windows import Window, Windows

# torch 2.13 renames the tensor form of all_gather and deprecates the old name.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_LATE = ("timed out", "timeout", "monitoredbarrier")  # how backends say that a peer is late
_GONE = ("connection", "broken pipe", "socket")  # or gone
HEADER = 1024  # bytes of every header: whatever two ranks are about to do, their headers can be compared


@dataclass
class Pending:
    """A transfer in flight. `wait` returns once its results may be used on the current stream."""

    finish: Callable[[], None]
    holds: tuple[Tensor, ...] = ()  # kept alive until then

    def wait(self) -> None:
        self.finish()
        self.holds = ()


@runtime_checkable
class Transport(Protocol):
    """A group of ranks as one of them sees it. ranks: the global rank of each place.

    nodes: on how many nodes they lie, equally many on each, as far as that is known; else 1.
    """

    rank: int
    size: int
    ranks: tuple[int, ...]
    nodes: int

    def exchange(
        self, send: list[Tensor], send_to: int, receive: list[Tensor], recv_from: int, channel: str
    ) -> Pending:
        """Sends and receives contiguous tensors at once; `receive` is filled in place."""

    def all_to_all(
        self, send: Tensor, sends: Sequence[int], receive: Tensor, receives: Sequence[int], channel: str
    ) -> Pending:
        """Sends sends[r] rows of contiguous `send` to each rank r, in rank order, and fills `receive` so.

        Rank r sends receives[r] rows here. Rows lie along dim 0; this rank may send some to itself.
        """

    def one_sided(self, device: torch.device) -> bool:
        """Whether ranks can read each other's memory on their devices, by windows; the same on all.

        All ranks ask at once. The first time may wait for the device.
        """

    def publish(self, x: Tensor, rows: int, channel: str) -> Window:
        """Lets all ranks read contiguous x [n, width] of this one, where they can; see `Windows`."""

    def all_reduce(self, x: Tensor, op: str = "sum") -> Pending:
        """Combines contiguous x over the group in place. op: "sum" or "max"."""

    def all_gather(self, x: Tensor, channel: str = "control") -> Tensor:
        """[size, *x.shape], equal shapes on all ranks; returns when done."""


@dataclass(frozen=True)
class Alone:
    """A group of one rank: nothing moves."""

    rank: int = 0
    size: int = 1
    ranks: tuple[int, ...] = (0,)
    nodes: int = 1

    def exchange(self, send, send_to, receive, recv_from, channel) -> Pending:
        raise AssertionError("a group of one has nobody to exchange with")

    def all_to_all(self, send, sends, receive, receives, channel) -> Pending:
        receive.copy_(send)
        return Pending(lambda: None)

    def one_sided(self, device) -> bool:
        return False

    def publish(self, x, rows, channel) -> Window:
        raise AssertionError("a group of one has nobody to show anything to")

    def all_reduce(self, x: Tensor, op: str = "sum") -> Pending:
        return Pending(lambda: None)

    def all_gather(self, x: Tensor, channel: str = "control") -> Tensor:
        return x[None].clone()


@dataclass(frozen=True, eq=False)
class Distributed:
    """A group of torch.distributed; every channel has a communicator of its own.

    ranks: global ranks in group order. groups: the process group of each channel. timeout: theirs, seconds.
    nodes: see Transport. windows: by channel, made when they are used. shares: whether ranks can read each
    other's memory, by kind of device, where that has been asked.
    """

    rank: int
    ranks: tuple[int, ...]
    groups: dict[str, dist.ProcessGroup]
    timeout: float
    nodes: int = 1
    windows: dict[str, Windows] = field(default_factory=dict)
    shares: dict[str, bool] = field(default_factory=dict)

    @property
    def size(self) -> int:
        return len(self.ranks)

    def exchange(self, send, send_to, receive, recv_from, channel) -> Pending:
        group, to, source = self.groups[channel], self.ranks[send_to], self.ranks[recv_from]
        operations = [dist.P2POp(dist.irecv, x, source, group) for x in receive]
        operations += [dist.P2POp(dist.isend, x, to, group) for x in send]
        peers = (f"rank {to}", to) if source == to else (f"ranks {source} and {to}", None)
        with self._typed(f"{channel} not exchanged with {peers[0]}", peers[1]):
            works = dist.batch_isend_irecv(operations)
        what = [(f"no {channel} from rank {source}", source)] * len(receive)
        what += [(f"{channel} not taken by rank {to}", to)] * len(send)
        return self._pending(works, (*send, *receive), what)

    def all_to_all(self, send, sends, receive, receives, channel) -> Pending:
        order = sorted(range(self.size), key=self.ranks.__getitem__)  # torch.distributed sorts them
        sorted_already = order == list(range(self.size))
        out = receive if sorted_already else torch.empty_like(receive)
        if not sorted_already:
            parts = send.split(list(sends))
            send = torch.cat([parts[rank] for rank in order])
        sends, receives = ([counts[rank] for rank in order] for counts in (sends, receives))
        what = (f"{channel} not exchanged between ranks {self.ranks}", None)
        with self._typed(*what):
            work = dist.all_to_all_single(
                out, send, receives, sends, group=self.groups[channel], async_op=True
            )
        pending = self._pending([work], (send, out), [what])
        if sorted_already:
            return pending

        def finish():
            pending.wait()
            parts = out.split(receives)
            torch.cat([parts[order.index(rank)] for rank in range(self.size)], out=receive)

        return Pending(finish)

    def one_sided(self, device) -> bool:
        if device.type not in self.shares:
            shares = self.nodes == 1 and device.type == "cuda"
            if shares:
                from .symmetric import can_share  # of torch's builds only those for GPUs need to have it

                shares = can_share(self)
            self.shares[device.type] = shares
        return self.shares[device.type]

    def publish(self, x, rows, channel) -> Window:
        if channel not in self.windows:
            from .symmetric import Symmetric

            of_group = {"group": self.groups[channel], "ranks": self.ranks, "timeout": self.timeout}
            self.windows[channel] = Windows(self.rank, partial(Symmetric, **of_group), x.device)
        return self.windows[channel].publish(x, rows)

    def all_reduce(self, x: Tensor, op: str = "sum") -> Pending:
        operation = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}[op]
        what = (f"no all-reduce over ranks {self.ranks}", None)
        with self._typed(*what):
            work = dist.all_reduce(x, operation, group=self.groups["control"], async_op=True)
        return self._pending([work], (x,), [what])

    def all_gather(self, x: Tensor, channel: str = "control") -> Tensor:
        out, what = x.new_empty(self.size, *x.shape), (f"no all-gather over ranks {self.ranks}", None)
        with self._typed(*what):
            work = _all_gather(out.view(-1), x.reshape(-1), group=self.groups[channel], async_op=True)
        self._pending([work], (x,), [what]).wait()
        if self.ranks == tuple(sorted(self.ranks)):
            return out
        # torch.distributed sorts the ranks of a group; the mesh may have them in another order.
        return torch.stack([out[sorted(self.ranks).index(rank)] for rank in self.ranks])

    def close(self) -> None:
        """Destroys the communicators. gloo keeps threads for each; every rank closes at the same point."""
        self.windows.clear()
        for group in self.groups.values():
            dist.destroy_process_group(group)

    def _pending(self, works, tensors, what: list[tuple[str, int | None]]) -> Pending:
        def finish():
            for work, (text, peer) in zip(works, what, strict=False):  # NCCL has one work for a batch
                with self._typed(text, peer):
                    work.wait()

        return Pending(finish, tensors)

    @contextmanager
    def _typed(self, what: str, peer: int | None) -> Iterator[None]:
        """A peer that is late or gone raises RingTimeoutError, which says who waited and for what."""
        try:
            yield
        except RuntimeError as error:
            if not (late(error) or gone(error)):
                raise
            why = f"within {self.timeout:g} s" if late(error) else "before the connection was lost"
            mine = self.ranks[self.rank]
            raise RingTimeoutError(f"{what} {why} ({error})", rank=mine, peer=peer) from error


def late(error: RuntimeError) -> bool:
    """Whether an error of torch.distributed, or one of ours, says that a peer did not answer in time."""
    return any(sign in str(error).lower() for sign in _LATE)


def gone(error: RuntimeError) -> bool:
    """Whether it says that a peer has closed its connection."""
    return not late(error) and any(sign in str(error).lower() for sign in _GONE)


def agree(transport: Transport, header: Mapping[str, object], device) -> None:
    """Raises RingDesyncError, on every rank, unless all ranks hold the same header.

    header: names and values, compared as text. Headers have one size and a channel of their own, so ranks
    that are in different places of the program find out as well. Synchronises.
    """
    text = "\n".join(f"{name}={value}" for name, value in header.items()).encode("ascii", "backslashreplace")
    if len(text) > HEADER:
        text = text[: HEADER - 9] + b"\n%08x" % zlib.crc32(text)
    mine = torch.frombuffer(bytearray(text.ljust(HEADER, b"\0")), dtype=torch.uint8)
    table = transport.all_gather(mine.to(device), "headers").cpu()
    if torch.equal(table, table[:1].expand_as(table)):
        return
    texts = [bytes(row.tolist()).rstrip(b"\0").decode() for row in table]
    headers = [dict(line.partition("=")[::2] for line in each.split("\n")) for each in texts]
    names = dict.fromkeys(name for each in headers for name in each)
    differing = [name for name in names if len({each.get(name) for each in headers}) > 1]
    holders = {each: [r for r, other in enumerate(texts) if other == each] for each in texts}
    lines = [f"  ranks {ranks}: {each.replace(chr(10), ', ')}" for each, ranks in holders.items()]
    mine = transport.ranks[transport.rank]
    raise RingDesyncError(f"ranks disagree on {', '.join(differing)}\n" + "\n".join(lines), rank=mine)
