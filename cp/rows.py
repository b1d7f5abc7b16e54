"""Rows: what moves between ranks for a step of a pull. A row is a block of one head of keys, or of values."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Places:
    """Where to read what would otherwise be sent, for ranks that can read each other's memory.

    keys: for each rank int64 [n], rows of its keys and values that this one needs. gradients: for each rank
    those of the own rows among all gradients that it shows. most: rows of gradients that any rank shows.
    """

    keys: tuple[Tensor, ...]
    gradients: tuple[slice, ...]
    most: int


@dataclass(frozen=True)
class Rows:
    """What moves for one step.

    sends, receives: rows for and from each rank. outgoing: int64 [sum(sends)], rows of the own keys and
    values [2, B, Hk, n], by receiver. incoming: int64 [sum(receives)], rows of those of the step, by sender.
    anybody: whether any rank moves anything for it. places: None where messages are sent.
    """

    sends: tuple[int, ...]
    receives: tuple[int, ...]
    outgoing: Tensor
    incoming: Tensor
    anybody: bool
    places: Places | None


def step_rows(
    needed: Tensor,
    wanted: Tensor,
    between: list[list[int]],
    rank: int,
    hops: set[int],
    held: Tensor,
    place: Tensor,
    width: int,
    one_sided: bool,
) -> Rows:
    """The rows of a step whose keys come from the ranks `hops` before this one.

    needed: bool [W, B, Hk, n], blocks that this rank needs from each, in the step; wanted: that each needs
    from this one, in the same step of its own. between[r][s]: how many blocks of key heads r needs from s.
    held: int64 [W, n], the block in each slot, -1 for none. place: int64 [W, n], where it lies among the
    `width` slots of the step.
    """
    world = len(between)
    sources = [{(each - hop) % world for hop in hops} for each in range(world)]  # of the step on each rank

    def moved(receiver: int, sender: int) -> int:
        return 2 * between[receiver][sender] * (sender in sources[receiver])

    sends = tuple(moved(other, rank) for other in range(world))
    receives = tuple(moved(rank, other) for other in range(world))
    shown = [sum(moved(each, owner) for owner in range(world)) for each in range(world)]
    slot = torch.arange(held.shape[1], device=held.device).expand_as(held)
    lengths = (held >= 0).sum(1).view(-1, 1, 1, 1, 1)
    coming = set_rows(needed, sum(receives))
    places = None
    if one_sided:
        keys = _numbers(needed, slot, lengths)[coming].split(receives)
        begins = [sum(moved(each, owner) for owner in range(rank)) for each in range(world)]
        gradients = tuple(slice(begin, begin + n) for begin, n in zip(begins, sends, strict=True))
        places = Places(keys, gradients, max(shown))
    return Rows(
        sends=sends,
        receives=receives,
        outgoing=_numbers(wanted, slot, lengths[rank])[set_rows(wanted, sum(sends))],
        incoming=_numbers(needed, place, width)[coming],
        anybody=any(shown),
        places=places,
    )


def set_rows(mask: Tensor, number: int) -> Tensor:
    """int64 [number]: where bool mask [W, B, Hk, n] is set, for keys and for values: in [W, 2, B, Hk, n]."""
    both = mask[:, None].expand(-1, 2, -1, -1, -1)
    return first_set(both.flatten(), number)


def first_set(mask: Tensor, number: int) -> Tensor:
    """int64 [number]: the places of the set entries of bool mask [n]; their number is known before."""
    return mask.byte().argsort(descending=True, stable=True)[:number]


def _numbers(mask: Tensor, slot: Tensor, width: int | Tensor) -> Tensor:
    """int64 [W * 2 * B * Hk * n]: for blocks of mask [W, B, Hk, n] their rows in [2, B, Hk, width] of a rank.

    slot: int64 [W, n], where each block lies. width: slots of a row, or int64 [W, 1, 1, 1, 1], of each rank.
    """
    _, batch, heads, _ = mask.shape
    line = torch.arange(2 * batch * heads, device=mask.device).view(2, batch, heads, 1) * width
    return (line + slot[:, None, None, None]).flatten()
