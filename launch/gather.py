"""A few integers of every rank, over a CPU group: how ranks agree outside the steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

Group = dist.ProcessGroup | None  # on the CPU (gloo); None: this process alone

WIDTH = 5  # integers that a rank tells: enough for the size of a file and its sha256


def rank_of(group: Group) -> int:
    """This process's rank in `group`."""
    return group.rank() if group else 0


def gather(group: Group, values: Sequence[int]) -> list[list[int]]:
    """The integers of all ranks, in rank order, as many on each.

    Raises RuntimeError when a rank is gone, or at the group's timeout.
    """
    own = torch.tensor(values, dtype=torch.int64)
    if group is None:
        return [own.tolist()]
    rows = [torch.empty_like(own) for _ in range(group.size())]
    dist.all_gather(rows, own, group=group)
    return [row.tolist() for row in rows]


def together(group: Group, work: Callable[[], Sequence[int]]) -> list[list[int]]:
    """The integers (at most WIDTH; zeros are added) that `work` returns on every rank, in rank order.

    An exception of `work` is raised on its rank, and RuntimeError on all others.
    """
    failure, values = None, ()
    try:
        values = work()
    except Exception as error:
        failure = error
    try:
        rows = gather(group, [failure is None, *values, *[0] * (WIDTH - len(values))])
    except RuntimeError as error:
        raise RuntimeError(f"another rank was not heard: {error}") from (failure or error)
    if failure is not None:
        raise failure
    for rank, (good, *_) in enumerate(rows):
        if not good:
            raise RuntimeError(f"rank {rank} failed; its own error has the reason")
    return [row[1:] for row in rows]
