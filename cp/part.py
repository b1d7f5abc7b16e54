"""Part: some ranks of a group as a transport of their own, over the communicators of the whole group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .transport import Alone, Pending, Transport
from .windows import Window


@dataclass(frozen=True)
class Part:
    """Ranks at some places of a group, such as those of one node, or one of each node.

    whole: the group. places: of the members in it, this rank's among them. Every rank of the group belongs to
    one part, all parts are of one size, and all make the same calls: each is one call of the whole group.
    """

    whole: Transport
    places: tuple[int, ...]
    nodes: int = 1

    @property
    def rank(self) -> int:
        return self.places.index(self.whole.rank)

    @property
    def size(self) -> int:
        return len(self.places)

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(self.whole.ranks[place] for place in self.places)

    def exchange(self, send, send_to, receive, recv_from, channel) -> Pending:
        return self.whole.exchange(send, self.places[send_to], receive, self.places[recv_from], channel)

    def all_to_all(self, send, sends, receive, receives, channel) -> Pending:
        return self.whole.all_to_all(send, self._of_all(sends), receive, self._of_all(receives), channel)

    def one_sided(self, device) -> bool:
        return False

    def publish(self, x, rows, channel) -> Window:
        raise AssertionError("a part of a group sends messages")

    def all_reduce(self, x: Tensor, op: str = "sum") -> Pending:
        """Every member combines a share of x, in the order of ranks, and all gather the shares."""
        share = -(-x.numel() // self.size)
        mine = torch.nn.functional.pad(x.flatten(), (0, share * self.size - x.numel())).view(self.size, share)
        parts, ones = torch.empty_like(mine), [1] * self.size
        pending = self.all_to_all(mine, ones, parts, ones, "control")

        def finish():
            pending.wait()
            total = parts.amax(0) if op == "max" else parts.sum(0)
            x.copy_(self.all_gather(total).flatten()[: x.numel()].view_as(x))

        return Pending(finish)

    def all_gather(self, x: Tensor, channel: str = "control") -> Tensor:
        out, ones = x.new_empty(self.size, *x.shape), [1] * self.size
        self.all_to_all(x.expand_as(out).contiguous(), ones, out, ones, channel).wait()
        return out

    def _of_all(self, counts: Sequence[int]) -> list[int]:
        """Numbers of rows for all ranks of the group, none for those of other parts."""
        table = dict(zip(self.places, counts, strict=True))
        return [table.get(place, 0) for place in range(self.whole.size)]


def part_of(transport: Transport, places: Sequence[int]) -> Transport:
    """The ranks at these places; the group itself if they are all of it."""
    if len(places) == transport.size:
        return transport
    if len(places) == 1:
        return Alone(ranks=(transport.ranks[places[0]],))
    return Part(transport, tuple(places))
