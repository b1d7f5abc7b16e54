"""BoundPlan: a plan tied to physical memory, as the lists of tiles that kernels walk.

Keys arrive from `sources` (the ranks of a ring, or one source on a single device), each holding some
blocks in some order. The tiles of a query block are sorted by source, full tiles before partial ones, so
the work against one source is a slice of the list and nothing is rebuilt between ring steps. The
transposed lists serve dK and dV. Everything is built on the device without host synchronisation.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass, replace
from functools import cached_property
from types import ModuleType

import torch
from torch import Tensor

from .geometry import FULL, Geometry, Memo
from .plan import Plan

LISTS = ("row_ptr", "row_full", "row_tiles", "key_ptr", "key_full", "key_tiles")
AHEAD = 2  # entries behind the last one that kernels may read

Lists = tuple[Tensor, Tensor, Tensor]  # pointers, numbers of full entries, entries


@dataclass(frozen=True)
class BoundPlan(Memo):
    """Lists of a plan for R sources of at most n blocks each; M = held query blocks.

    row_ptr: int32 [B*Hm*M*R + 1]; the tiles of (b, head, row, source), flattened in this order to x, are
        row_tiles[row_ptr[x] : row_ptr[x + 1]], the first row_full[x] of them full, the rest partial.
    row_tiles: int32 [capacity + 2], slot of the key block inside its source, full ones first, both kinds
        ascending. The two entries behind the last are valid slots, for kernels that read ahead; the rest
        is not initialised.
    key_ptr, key_full, key_tiles: the transpose; x = (b, head, source, slot), entries are rows.
    key_base: int32 [R * n], logical position of the first token of each slot.
    lo, hi, prefix_lo, prefix_hi: int32 [B, M * block_size], visible intervals in physical order.
    columns, column_group: as in the plan; column_begin, column_end: int32 [B, Hc, M], the range of its
        group's columns that a row can possibly see.
    """

    plan: Plan
    num_sources: int
    blocks_per_source: int
    row_ptr: Tensor
    row_full: Tensor
    row_tiles: Tensor
    key_ptr: Tensor
    key_full: Tensor
    key_tiles: Tensor
    key_base: Tensor
    lo: Tensor
    hi: Tensor
    prefix_lo: Tensor | None
    prefix_hi: Tensor | None
    column_begin: Tensor | None
    column_end: Tensor | None

    @property
    def block_size(self) -> int:
        return self.plan.geometry.block_size

    @property
    def mask_heads(self) -> int:
        return self.plan.mask_heads

    @property
    def rows(self) -> int:
        return len(self.plan.geometry.blocks)

    @property
    def tiles(self) -> Tensor:
        return self.plan.tiles

    @property
    def columns(self) -> Tensor | None:
        return self.plan.columns

    @property
    def column_group(self) -> Tensor | None:
        return self.plan.column_group

    def split(self) -> tuple[BoundPlan, tuple[Tensor, ...]]:
        """The plan without its lists, and the lists: what autograd saves, drops and recomputes."""
        return replace(self, **dict.fromkeys(LISTS)), tuple(getattr(self, name) for name in LISTS)

    def join(self, lists: tuple[Tensor, ...]) -> BoundPlan:
        """The inverse of `split`."""
        return replace(self, **dict(zip(LISTS, lists, strict=True)))

    @cached_property
    def work(self) -> Tensor:
        """float64 [M, R]: tiles of each row against each source, mean over mask heads, summed over B."""
        shape = (self.plan.geometry.batch, self.mask_heads, self.rows, self.num_sources)
        counts = (self.row_ptr[1:] - self.row_ptr[:-1]).view(shape)
        return counts.double().mean(1).sum(0)


def prepare(geometry: Geometry, key_blocks: tuple[tuple[int, ...], ...]) -> None:
    """Makes the tables that `bind` takes from a geometry. They wait for the device; a step must not."""
    tables = (geometry.num_visible_tiles, geometry.intervals)
    del tables  # cached properties are computed by being read
    slots, kernels = slots_of(geometry, key_blocks), _kernels(geometry)
    if kernels is not None:
        _tables(geometry, key_blocks, slots, kernels)


def bind(plan: Plan, key_blocks: tuple[tuple[int, ...], ...]) -> BoundPlan:
    """Ties a plan to sources: key_blocks[s] lists the logical blocks that source s holds, in order.

    -1 stands for a slot that holds no block. ValueError unless every block is held once.
    """
    slots, kernels = slots_of(plan.geometry, key_blocks), _kernels(plan.geometry)
    known = None if kernels is None else _tables(plan.geometry, key_blocks, slots, kernels)
    return _bound(plan, slots, kernels, known)


def bind_to_slots(plan: Plan, slots: Tensor) -> BoundPlan:
    """Ties a plan to sources that need not hold all blocks: tiles of a block that none holds are left out.

    slots: int64 [R, n] on the device of the plan, the logical block in each slot of each source, -1 for none.
    """
    kernels = _kernels(plan.geometry)
    known = None if kernels is None else kernels.tables(plan.geometry, slots)
    return _bound(plan, slots, kernels, known)


def _bound(plan: Plan, slots: Tensor, kernels: ModuleType | None, known) -> BoundPlan:
    geometry = plan.geometry
    capacity = plan.mask_heads * geometry.num_visible_tiles
    if capacity >= 2**31:
        raise ValueError(
            f"a plan of {plan.mask_heads} mask heads may hold {capacity} tiles, more than the 2^31 of "
            "int32 lists; share the mask between heads or use more ranks"
        )
    if kernels is None:
        by_row, by_key = plain_lists(plan, slots, capacity)
    else:
        by_row, by_key = kernels.lists(plan, known, capacity)
    (row_ptr, row_full, row_tiles), (key_ptr, key_full, key_tiles) = by_row, by_key
    intervals = [bound for pair in geometry.intervals for bound in pair]
    lo, hi, prefix_lo, prefix_hi = (intervals + [None, None])[:4]
    begin, end = _column_ranges(plan) if plan.columns is not None else (None, None)
    return BoundPlan(
        plan=plan,
        num_sources=slots.shape[0],
        blocks_per_source=slots.shape[1],
        row_ptr=row_ptr,
        row_full=row_full,
        row_tiles=row_tiles,
        key_ptr=key_ptr,
        key_full=key_full,
        key_tiles=key_tiles,
        key_base=(slots.clamp(min=0) * geometry.block_size).int().flatten(),
        lo=lo,
        hi=hi,
        prefix_lo=prefix_lo,
        prefix_hi=prefix_hi,
        column_begin=begin,
        column_end=end,
    )


def slots_of(geometry: Geometry, key_blocks: tuple[tuple[int, ...], ...]) -> Tensor:
    """int64 [R, n]: the logical block in each slot, -1 where a source holds fewer than n."""

    def build() -> Tensor:
        held = [block for blocks in key_blocks for block in blocks if block >= 0]
        if sorted(held) != list(range(geometry.num_blocks)):
            raise ValueError(
                f"sources hold {len(held)} blocks, the plan covers {geometry.num_blocks}; "
                "every key block must be held by exactly one source"
            )
        width = max(1, max(map(len, key_blocks)))
        slots = [(*blocks, *[-1] * (width - len(blocks))) for blocks in key_blocks]
        return torch.tensor(slots, dtype=torch.int64, device=geometry.device)

    return geometry.memo(("slots", key_blocks), build)


def _tables(geometry: Geometry, key_blocks: tuple[tuple[int, ...], ...], slots: Tensor, kernels: ModuleType):
    in_order = key_blocks == (tuple(range(geometry.num_blocks)),)
    return geometry.memo(("tables", key_blocks), lambda: kernels.tables(geometry, slots, in_order))


def _kernels(geometry: Geometry) -> ModuleType | None:
    """What makes the lists of this geometry: kernels on a GPU that has triton, otherwise `plain_lists`."""
    return importlib.import_module(".triton_lists", __package__) if on_gpu(geometry) else None


def on_gpu(geometry: Geometry) -> bool:
    """Whether tables of this geometry are made by kernels: on a GPU, where there is triton."""
    return geometry.device.type == "cuda" and importlib.util.find_spec("triton") is not None


def plain_lists(plan: Plan, slots: Tensor, capacity: int) -> tuple[Lists, Lists]:
    """The lists by row and by key by plain operations, on any device: what the kernels have to equal.

    slots: int64 [R, n], as `slots_of` makes them. Takes memory for several int32 of every bit.
    """
    geometry = plan.geometry
    held, ids = slots >= 0, slots.clamp(min=0)
    chosen = plan.tiles_bool()[..., ids] & held  # [B, Hm, M, R, n], physical key order
    full = (geometry.tile_class == FULL)[:, None][..., ids] & chosen
    by_row = _lists(chosen, full, capacity)
    transposed = (x.permute(0, 1, 3, 4, 2) for x in (chosen, full))
    return by_row, _lists(*transposed, capacity)


def _lists(chosen: Tensor, full: Tensor, capacity: int) -> Lists:
    """CSR over the last dim of bool [..., n]: pointers, number of full entries, entries (full first)."""
    n = chosen.shape[-1]
    chosen, full = chosen.flatten(0, -2), full.flatten(0, -2)
    rank_full, rank_all = full.cumsum(1, dtype=torch.int32), chosen.cumsum(1, dtype=torch.int32)
    num_full, count = full.sum(1, dtype=torch.int32), chosen.sum(1, dtype=torch.int32)
    pointer = torch.nn.functional.pad(count.cumsum(0, dtype=torch.int32), (1, 0))
    rank = torch.where(full, rank_full - 1, num_full[:, None] + (rank_all - rank_full) - 1)
    place = torch.where(chosen, pointer[:-1, None] + rank, capacity)  # a dump slot at the end
    entries = torch.zeros(capacity + AHEAD, dtype=torch.int32, device=chosen.device)
    values = torch.arange(n, dtype=torch.int32, device=chosen.device).expand(chosen.shape[0], n)
    entries.scatter_(0, place.flatten().long(), values.flatten())
    return pointer, num_full, entries


def _column_ranges(plan: Plan) -> tuple[Tensor, Tensor]:
    """int32 [B, Hc, M] twice: first and one-past-last column that some query of a row may see."""
    shape = (len(plan.geometry.blocks), plan.geometry.block_size)
    lows, highs = zip(*plan.geometry.intervals, strict=True)
    low = torch.stack(lows).amin(0).unflatten(1, shape).amin(2)
    high = torch.stack(highs).amax(0).unflatten(1, shape).amax(2)
    columns = plan.columns, plan.column_group
    return columns_before(*columns, low), columns_before(*columns, high, right=True)


def columns_before(columns: Tensor, column_group: Tensor | None, at: Tensor, right: bool = False) -> Tensor:
    """int32 [B, Hc, M]: how many columns of a row's group lie before position at [B, M]; right: or at it."""
    at = at[:, None, None].expand(-1, *columns.shape[1:3], -1).contiguous()
    before = torch.searchsorted(columns.contiguous(), at, right=right, out_int32=True)  # in every group
    if column_group is None:
        return before[:, :, 0]
    group = column_group.long().expand(*before.shape[:2], 1, -1)
    return before.gather(2, group)[:, :, 0]
