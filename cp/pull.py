"""Pull: each rank gets exactly the blocks, of each key head, that the tiles of its plan touch.

Ranks tell each other one bit for every key head and block, once a plan. From these bits every rank knows
what all others send and need: messages have their exact sizes, and one that nobody needs is dropped. Ranks
that can read each other's memory (on the GPUs of one host) show their keys to all and read the rows that they
need; others send them, in one all-to-all a step. What arrives is kept compactly: a step holds the blocks that
any of its key heads needs. In the backward the gradients of the same rows go back, and their owner adds them
up in the order of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..balance.schedule import Schedule
from ..kernels.bound import BoundPlan, bind_to_slots
from ..kernels.geometry import Geometry
from ..kernels.plan import Plan, pack_bits, unpack_bits
from .link import Link, link_of
from .ring import Gradients, Ring
from .rows import Rows, first_set, step_rows
from .transport import Pending, Transport
from .windows import Window


@dataclass(frozen=True)
class Needs:
    """What a rank holds in each step of one plan, and what moves for it.

    block_size: in tokens. slots: int64 [steps, n], the block in each slot, -1 for none. widths: slots of each
    step that are in use, 1 at least. rows: for each step, None for the first. header: bytes that this rank
    sent to say what it needs.
    """

    block_size: int
    slots: Tensor
    widths: tuple[int, ...]
    rows: tuple[Rows | None, ...]
    header: int

    def bind(self, plan: Plan) -> BoundPlan:
        """The plan tied to the steps."""
        return bind_to_slots(plan, self.slots)


@dataclass(frozen=True)
class Pull(Ring):
    """Moves what `needs` says; the rest as in a Ring."""

    needs: Needs = field(kw_only=True)

    def keys(self, k: Tensor, v: Tensor, phase: str) -> Iterator[tuple[int, Tensor]]:
        own, size = torch.stack((k, v)), self.needs.block_size
        arriving = self._fetch(_rows(own, size), 2 * k.shape[0] * k.shape[1] * (self.tokens // size), phase)
        places = self.places
        for step in getattr(self.schedule, phase):
            place = places[step.sources] if step.sources else -1
            if place <= 0:
                yield place, own if place == 0 else None
                continue
            keys = own.new_empty(*own.shape[:3], self.needs.widths[place] * size, own.shape[4])
            if place in arriving:
                received, pending = arriving[place]
                pending.wait()
                _rows(keys, size).index_copy_(0, self.needs.rows[place].incoming, received)
            yield place, keys

    def gradients(self, k: Tensor) -> Gradients:
        return _Returning(self)

    def _fetch(self, own: Tensor, most: int, phase: str) -> dict[int, tuple[Tensor, Pending]]:
        """Starts to get the rows of every step that moves any. own: rows of this rank; most: of any."""
        arriving, window = {}, None
        for step, rows in enumerate(self.needs.rows):
            if rows is None or not rows.anybody:
                continue
            link = self._at(phase, step)
            if rows.places is None:
                leaving = own.index_select(0, rows.outgoing)
                arriving[step] = self._swap(leaving, rows.sends, rows.receives, link, "keys")
                continue
            if window is None:  # all steps read from one
                window = link.publish(own, most, "keys")
            self._count(own, sum(rows.sends), "keys")
            arriving[step] = _read(window, own, rows.receives, rows.places.keys, link)
        return arriving

    def _give(self, gradients: Tensor, step: int) -> tuple[Tensor, Pending]:
        """Starts to bring gradients of rows, by owner, to them; what comes for own rows, by rank."""
        rows, link = self.needs.rows[step], self._at("backward", step)
        if rows.places is None:
            return self._swap(gradients, rows.receives, rows.sends, link, "grads")
        window = link.publish(gradients, rows.places.most, "grads")
        self._count(gradients, sum(rows.receives), "grads")
        return _read(window, gradients, rows.sends, rows.places.gradients, link)

    def _swap(self, x: Tensor, sends, receives, link: Link, what: str) -> tuple[Tensor, Pending]:
        self._count(x, len(x), what)
        received = x.new_empty(sum(receives), x.shape[1])
        return received, link.all_to_all(x, sends, received, receives, what)

    def _at(self, phase: str, step: int) -> Link:
        return self.link.at(phase, step, len(self.needs.rows) - 1)

    def _count(self, x: Tensor, rows: int, what: str) -> None:
        self.sent[what] += rows * x.shape[1] * x.itemsize


class _Returning(Gradients):
    """The rows that came go back to their owner, which adds them to its share rank by rank."""

    def __init__(self, pull: Pull):
        self.pull = pull
        self.own: Tensor | None = None
        self.arriving: list[tuple[Rows, Tensor, Pending]] = []

    def add(self, place: int, gradient: Tensor) -> None:
        rows = self.pull.needs.rows[place]
        if rows is None:
            self.own = gradient
        elif rows.anybody:
            leaving = _rows(gradient, self.pull.needs.block_size).index_select(0, rows.incoming)
            self.arriving.append((rows, *self.pull._give(leaving, place)))

    def total(self) -> Tensor:
        for rows, received, pending in self.arriving:
            pending.wait()
            for share, places in zip(
                received.split(rows.sends), rows.outgoing.split(rows.sends), strict=True
            ):  # the rows of one rank are different ones, so the sum has one order
                _rows(self.own, self.pull.needs.block_size).index_add_(0, places, share)
        return self.own


def exchange_needs(
    plan: Plan, layout: tuple[tuple[int, ...], ...], schedule: Schedule, transport: Transport, kv_heads: int
) -> Needs:
    """Tells all ranks what each of them needs. layout: the blocks of every rank.

    Waits for the device once, for the numbers of rows: the header that the architecture's law 5 allows.
    """
    rank, world = transport.rank, transport.size
    held, members, receivers = prepare_needs(plan.geometry, layout, schedule)
    mine = needed_blocks(plan, kv_heads)[:, :, held.clamp(min=0)] & (held >= 0)  # [B, Hk, W, n]
    bits = pack_bits(mine)
    table = unpack_bits(transport.all_gather(bits), held.shape[1])  # [W, *mine.shape], of all ranks
    unions = mine.any(1).any(0) & members[:, :, None]  # [steps, W, n], for any head
    counts = torch.cat((table.sum((1, 2, 4)).flatten(), unions.sum((1, 2))))
    counts = link_of(transport).to_host(counts).tolist()
    between = [counts[needing * world : (needing + 1) * world] for needing in range(world)]
    widths = tuple(max(1, n) for n in counts[world * world :])

    needed, wanted = mine.movedim(2, 0), table[:, :, :, rank]  # [holder | receiver, B, Hk, n]
    blocks, one_sided = len(layout[rank]), transport.one_sided(held.device)
    slots = torch.full((len(unions), max(blocks, *widths)), -1, dtype=torch.int64, device=held.device)
    slots[0, :blocks] = held[rank, :blocks]
    rows: list[Rows | None] = [None]
    for step, planned in enumerate(schedule.forward[1:], 1):
        number = counts[world * world + step]
        taken = first_set(unions[step].flatten(), number)
        slots[step, :number] = held.flatten()[taken]
        place = torch.zeros(held.numel(), dtype=torch.int64, device=held.device)
        place[taken] = torch.arange(number, device=held.device)
        rows.append(
            step_rows(
                needed & members[step, :, None, None, None],
                wanted & receivers[step, :, None, None, None],
                between,
                rank,
                {(rank - source) % world for source in planned.sources},
                held,
                place.view_as(held),
                widths[step],
                one_sided,
            )
        )
    header = (world - 1) * bits.numel() * bits.itemsize
    return Needs(plan.geometry.block_size, slots, widths, tuple(rows), header)


def needed_blocks(plan: Plan, kv_heads: int) -> Tensor:
    """bool [B, Hk, num_blocks]: blocks that some tile of a query head of each key head touches."""
    batch, mask_heads, _, words = plan.tiles.shape
    lines = plan.tiles
    if mask_heads > kv_heads:
        lines = lines.reshape(batch, kv_heads, -1, words)
    while lines.shape[2] > 1:
        half = -(-lines.shape[2] // 2)
        lines = lines[:, :, :half] | torch.nn.functional.pad(
            lines[:, :, half:], (0, 0, 0, 2 * half - lines.shape[2])
        )
    bits = unpack_bits(lines, plan.geometry.num_blocks).any(2)
    return bits.expand(-1, kv_heads, -1) if mask_heads < kv_heads else bits


def prepare_needs(
    geometry: Geometry, layout: tuple[tuple[int, ...], ...], schedule: Schedule
) -> tuple[Tensor, Tensor, Tensor]:
    """Tables of a batch, made once: they wait for the device, which a step must not.

    int64 [W, n], the block in each slot of each rank, -1 for none; bool [steps, W] twice, from which ranks
    each step receives, and to which ranks it sends.
    """

    def build():
        width = max(1, max(map(len, layout)))
        held = [(*blocks, *[-1] * (width - len(blocks))) for blocks in layout]
        members = torch.zeros(2, len(schedule.forward), schedule.world, dtype=torch.bool)
        for transfer in schedule.forward[0].keys:
            step = next(i for i, s in enumerate(schedule.forward) if transfer.receives in s.sources)
            members[0, step, transfer.receives] = members[1, step, transfer.send_to] = True
        return torch.tensor(held, device=geometry.device), *members.to(geometry.device)

    return geometry.memo(("pull", layout), build)


def _read(
    window: Window, like: Tensor, counts: tuple[int, ...], which: Sequence[Tensor | slice], link: Link
) -> tuple[Tensor, Pending]:
    """Starts to read so many rows of each rank, those at the places `which` of each, one after another."""
    received = like.new_empty(sum(counts), like.shape[1])
    targets = enumerate(zip(received.split(counts), which, strict=True))
    return received, link.read(window, [(x, rank, at) for rank, (x, at) in targets if len(x)], like.device)


def _rows(x: Tensor, size: int) -> Tensor:
    """[2, B, Hk, n * size, D] -> [2 * B * Hk * n, size * D]."""
    return x.view(-1, size * x.shape[4])
