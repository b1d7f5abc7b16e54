"""Move: for one layer ranks compute query blocks of each other; keys stay where the layout has them.

Queries go to the rank that computes them and outputs come home, in the backward their gradients go the same
ways, all by all-to-alls of whole blocks. In between the attention is that of the exchange in use.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from ..balance import Layout, worker_imbalance
from ..balance.cost import work_by_rank
from ..balance.lever import MoveCost, may_pay, move_blocks
from ..kernels.bound import BoundPlan
from ..kernels.geometry import EMPTY, Geometry
from ..kernels.plan import Plan
from .attention import backward, forward
from .isolated import isolated
from .link import Link
from .ring import Ring
from .transport import Transport

MOVABLE = ("ring", "hierarchical", "gather")  # exchanges that bring all keys to every rank, by their steps


@dataclass(frozen=True, eq=False)
class Move:
    """Which query blocks this rank computes in one layer: first own ones, then those that come, rank by rank.

    stay, leave: int64, places of own blocks that it computes itself, and of those that go to others, by
    receiver. home: int64 [own blocks], where each own block is among (stay, leave). sends, receives: blocks
    for and from each rank. geometry: of the blocks computed here.
    """

    stay: Tensor
    leave: Tensor
    home: Tensor
    sends: tuple[int, ...]
    receives: tuple[int, ...]
    geometry: Geometry

    def there(self, x: Tensor, rows: int, link: Link, sent: Counter, channel: str) -> Callable[[], Tensor]:
        """x [B, H, own rows, ...] -> [B, H, rows of the blocks computed here, ...]. rows: of a block.

        Starts the transfer and returns a function that waits for it.
        """
        x = _by_block(x, rows)
        arrived = _start(x.index_select(0, self.leave), self.sends, self.receives, link, sent, channel)
        return lambda: _by_row(torch.cat((x.index_select(0, self.stay), arrived())))

    def back(self, x: Tensor, rows: int, link: Link, sent: Counter, channel: str) -> Callable[[], Tensor]:
        """The inverse of `there`."""
        own, guests = _by_block(x, rows).split((len(self.stay), sum(self.receives)))
        arrived = _start(guests.contiguous(), self.receives, self.sends, link, sent, channel)
        return lambda: _by_row(torch.cat((own, arrived())).index_select(0, self.home))

    def plan(self, plan: Plan, link: Link, sent: Counter) -> Plan:
        """The part of the plans of all ranks for the blocks computed here."""
        tiles, group = self.there(plan.tiles, 1, link, sent, "keys"), plan.column_group
        if group is not None:
            group = self.there(group[None, None], 1, link, sent, "keys")()[0, 0]
        return Plan(self.geometry, tiles(), plan.columns, group)


@dataclass(frozen=True, eq=False)
class Moved:
    """A layer whose query blocks have moved. plan: of the blocks computed here.

    columns: column work of these in tiles, mean over heads. blocks: how many moved, on all ranks.
    imbalance: of workers before.
    """

    move: Move
    plan: Plan
    columns: float
    blocks: int
    imbalance: float

    def work(self, bound: BoundPlan) -> Tensor:
        """float64 [steps + 1]: work of this rank in tiles, that of columns last. bound: its plan."""
        return torch.nn.functional.pad(bound.work.sum(0), (0, 1), value=self.columns)


def move_queries(
    plan: Plan, work: Tensor, layout: Layout, cost: MoveCost, link: Link, sent: Counter
) -> Moved | None:
    """Moves query blocks of a layer if its plan turned out unequal and that pays; all ranks call it.

    plan: of own blocks. work: float64 [2, own blocks], tiles and columns of each in tiles, mean over heads.
    Waits for the device once, for the work of all blocks: the header that the architecture's law 5 allows.
    """
    geometry = plan.geometry
    seen = (geometry.tile_class != EMPTY).sum((0, 2))
    table = work.new_zeros(3, geometry.num_blocks)
    table.index_copy_(1, geometry.block_ids, torch.cat((work, seen.to(work.dtype)[None])))
    link.all_reduce(table).wait()  # every block is on one rank: sums with zeros are exact
    tiles, columns, visible = link.to_host(table).numpy()
    computes = move_blocks(tiles + columns, layout, cost)
    if computes is None:
        return None
    move = make_move(computes, visible, layout, geometry, link.rank)
    here = list(move.geometry.blocks)
    return Moved(
        move=move,
        plan=move.plan(plan, link, sent),
        columns=float(columns[here].sum()),
        blocks=int(np.count_nonzero(computes != layout.source_of_block)),
        imbalance=worker_imbalance(work_by_rank(layout, tiles + columns)[:, None]),
    )


def make_move(
    computes: np.ndarray, visible: np.ndarray, layout: Layout, geometry: Geometry, rank: int
) -> Move:
    """computes, visible: [num_blocks], the rank that computes each query block, tiles that it can see."""
    held = [np.array(blocks, dtype=np.int64) for blocks in layout.assignment]
    to, others = computes[held[rank]], [other for other in range(layout.world) if other != rank]
    stay = np.flatnonzero(to == rank)
    leave = np.concatenate([np.flatnonzero(to == other) for other in others])
    comes = [blocks[computes[blocks] == rank] for blocks in held]
    blocks = np.concatenate([held[rank][stay], *(comes[other] for other in others)])
    moved = geometry.select(tuple(blocks.tolist()))
    # What it would otherwise ask the device for.
    ids = _to_device(blocks, geometry.device)
    vars(moved).update(block_ids=ids, num_visible_tiles=int(visible[blocks].sum()))
    return Move(
        stay=_to_device(stay, geometry.device),
        leave=_to_device(leave, geometry.device),
        home=_to_device(np.concatenate([stay, leave]).argsort(), geometry.device),
        sends=tuple(int((to == other).sum()) * (other != rank) for other in range(layout.world)),
        receives=tuple(len(comes[other]) * (other != rank) for other in range(layout.world)),
        geometry=moved,
    )


def movable_layers(loads: dict[Hashable, tuple[MoveCost, Tensor]], transport: Transport) -> list[str]:
    """Layers where moving query blocks could pay, by their repr. Synchronises; all ranks call it.

    loads: for each layer what moving costs, and the work of this rank's blocks in tiles.
    """
    if not loads:
        return []
    table = transport.all_gather(torch.stack([load for _, load in loads.values()])).cpu().numpy()
    layers = zip(loads.items(), table.T, strict=True)
    return [repr(layer) for (layer, (cost, _)), load in layers if may_pay(load, cost)]


@dataclass(frozen=True)
class MovedRing(Ring):
    """What one call needs where query blocks have moved. bound: the plan of the blocks computed here."""

    move: Move = field(kw_only=True)
    bound: BoundPlan | None = field(kw_only=True)


def moved_attention(q: Tensor, k: Tensor, v: Tensor, ring: MovedRing, scale: float) -> tuple[Tensor, Tensor]:
    """As `ring_attention`, in the order of the layout."""
    return _MovedAttention.apply(q, k.contiguous(), v.contiguous(), ring, scale)


class _MovedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, ring: MovedRing, scale: float):
        way = ring.bound.block_size, ring.link.at("forward"), ring.sent, "keys"
        q = ring.move.there(q, *way)()
        out, lse = forward(q, k, v, ring.bound, ring, scale)
        ctx.bound, lists = ring.bound.split()  # saved as in a ring
        ctx.save_for_backward(q, k, v, out, lse, *lists)
        ctx.ring, ctx.scale = replace(ring, bound=None), scale
        arriving = ring.move.back(out.to(q.dtype), *way), ring.move.back(lse, *way)
        return arriving[0](), arriving[1]()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout, dlse):
        q, k, v, out, lse, *lists = ctx.saved_tensors  # activation checkpointing runs the model again here
        ring, bound = ctx.ring, ctx.bound.join(lists)
        with isolated(dout.device):
            link = ring.link.at("backward")
            link.enter(dout.device)
            way = bound.block_size, link, ring.sent, "grads"
            arriving = ring.move.there(dout, *way), ring.move.there(dlse, *way)
            dout, dlse = arriving[0](), arriving[1]()
            ring = replace(ring, transport=replace(link, entry=False))
            dq, dk, dv = backward(q, k, v, out, lse, dout, dlse, bound, ring, ctx.scale)
            dq = ring.move.back(dq.to(q.dtype), *way)
            return dq(), dk.to(k.dtype), dv.to(v.dtype), None, None


def _by_block(x: Tensor, rows: int) -> Tensor:
    """[B, H, n * rows, ...] -> [n, B, H, rows, ...]"""
    return x.unflatten(2, (x.shape[2] // rows, rows)).movedim(2, 0)


def _by_row(x: Tensor) -> Tensor:
    """The inverse of `_by_block`, contiguous."""
    return x.movedim(0, 2).flatten(2, 3).contiguous()


def _start(
    x: Tensor, sends: tuple[int, ...], receives: tuple[int, ...], link: Link, sent: Counter, channel: str
) -> Callable[[], Tensor]:
    sent["queries"] += x.numel() * x.itemsize
    received = x.new_empty(sum(receives), *x.shape[1:])
    pending = link.all_to_all(x, sends, received, receives, channel)

    def finish() -> Tensor:
        pending.wait()
        return received

    return finish


def _to_device(x: np.ndarray, device: torch.device) -> Tensor:
    """Does not wait for the device."""
    tensor = torch.from_numpy(x)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
