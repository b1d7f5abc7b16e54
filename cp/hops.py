"""Hops that nobody needs are dropped, by a header that all ranks of a ring agree on.

In layers whose plan of two steps before left such hops, ranks share a table of the steps in which each
computes anything. It crosses while the own tiles are computed and is waited for before the second transfer
(law 5); recomputation and backward know it already.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..balance.hops import HOPPING, Live, live_hops
from ..balance.schedule import Schedule
from ..kernels.bound import BoundPlan
from .link import Link
from .record import Record
from .transport import Transport


@dataclass(frozen=True, eq=False)
class Hops:
    """Those of one plan. arrive: waits for the table, uint8 [W, W] by rank and step, on the host."""

    exchange: str
    nodes: int
    arrive: Callable[[], Tensor]

    @cached_property
    def live(self) -> Live:
        """Which are needed, the same on all ranks; waits the first time."""
        return live_hops(self.exchange, self.arrive().numpy() > 0, self.nodes)

    @property
    def known(self) -> bool:
        """Whether the table has been waited for: alike on all ranks, which walk their schedules alike."""
        return "live" in vars(self)


def share_hops(bound: BoundPlan, schedule: Schedule, link: Link, sent: Counter) -> Hops:
    """Tells all ranks in which steps this one computes; returns at once. bound: to the schedule's steps."""
    table = torch.zeros(link.size, link.size, dtype=torch.uint8, device=bound.row_ptr.device)
    table[link.rank] = bound.work.sum(0) > 0
    sent["needs"] += 2 * (link.size - 1) * table.numel() // link.size  # as any ring all-reduce
    return Hops(schedule.name, link.nodes, link.reduced_header(table))


def layers_with_dead_hops(record: Record, transport: Transport) -> tuple[tuple[str, str], ...]:
    """Exchange and repr of the layers of a step in which some hop was needed by nobody.

    None of a step without a backward: only after one all ranks have used every communicator, and NCCL makes
    them when all do so together. Synchronises; all ranks call it.
    """
    exchange, layers = record.exchange, list(record.work)
    backward = {"grads", "outer grads"} & record.bytes.keys()  # there on all ranks, be it with no bytes
    if exchange not in HOPPING or transport.size == 1 or not backward:
        return ()
    work = torch.stack([record.work[layer][:-1] for layer in layers])
    cells = transport.all_gather(work).cpu().numpy().swapaxes(0, 1) > 0
    dead = [not live_hops(exchange, each, transport.nodes).all for each in cells]
    return tuple((exchange, repr(layer)) for layer, some in zip(layers, dead, strict=True) if some)
