"""Hops: which messages of a ring hold what some rank needs, as pure data.

Keys go on to a rank if it computes with them, or a rank further along does; gradients of a source go on from
a rank if it computed some, or a rank before it did. All follows from one small table that ranks share, so
the two ends of a hop decide alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from .schedule import EXCHANGES, Schedule, Transfer, step_of_source

HOPPING = ("ring", "hierarchical")  # exchanges whose keys pass from rank to rank

Slots = tuple[
    np.ndarray, ...
]  # int64 [3, W] each, in program order: of every rank (it, its receiver, source)


@dataclass(frozen=True, eq=False)
class Live:
    """bool [W, W] each, by rank and source, all True for a rank's own keys.

    computes: the rank has work with these keys. keys: they come to it. gradients: it sends some on.
    """

    computes: np.ndarray
    keys: np.ndarray
    gradients: np.ndarray

    @property
    def all(self) -> bool:
        """Whether no hop can be dropped."""
        return bool(self.keys.all() and self.gradients.all())

    def keys_move(self, rank: int, transfer: Transfer) -> tuple[bool, bool]:
        """Whether the rank sends its part of a transfer of keys, and whether it receives."""
        return bool(self.keys[transfer.send_to, transfer.sends]), bool(self.keys[rank, transfer.receives])

    def gradients_move(self, rank: int, transfer: Transfer) -> tuple[bool, bool]:
        """The same of gradients."""
        sends, receives = (rank, transfer.sends), (transfer.recv_from, transfer.receives)
        return bool(self.gradients[sends]), bool(self.gradients[receives])


@lru_cache
def everything(world: int) -> Live:
    """Every hop of `world` ranks."""
    table = np.ones((world, world), dtype=bool)
    table.setflags(write=False)
    return Live(table, table, table)


def live_hops(exchange: str, cells: np.ndarray, nodes: int = 1) -> Live:
    """cells: bool [W, W], whether each rank computes anything in each step of the forward.

    exchange: one of HOPPING, for ranks on so many nodes.
    """
    world = len(cells)
    computes = np.take_along_axis(cells, step_of_source(exchange, world, nodes), 1)
    computes |= np.eye(world, dtype=bool)
    keys, gradients = computes.copy(), computes.copy()
    hops_of_keys, hops_of_gradients = _hops(exchange, world, nodes)
    for sender, receiver, source in reversed(hops_of_keys):
        keys[sender, source] |= keys[receiver, source]
    for sender, receiver, source in hops_of_gradients:
        gradients[receiver, source] |= gradients[sender, source]
    return Live(computes, keys, gradients)


@lru_cache
def _hops(exchange: str, world: int, nodes: int) -> tuple[Slots, Slots]:
    """Of keys and of gradients."""
    schedules = [EXCHANGES[exchange](rank, world, nodes) for rank in range(world)]
    return _slots(schedules, "forward", "keys"), _slots(schedules, "backward", "gradients")


def _slots(schedules: list[Schedule], phase: str, what: str) -> Slots:
    """What all ranks send at the same place of their program."""
    return tuple(
        np.array([(rank, each.send_to, each.sends) for rank, each in enumerate(transfers)]).T
        for steps in zip(*(getattr(schedule, phase) for schedule in schedules), strict=True)
        for transfers in zip(*(getattr(step, what) for step in steps), strict=True)
    )
