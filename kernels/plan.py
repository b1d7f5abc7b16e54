"""Plan: the tiles and columns chosen for one attention layer, in logical block ids.

A (query, key) pair is computed if the geometry lets the query see the key and either its tile is chosen
or the key is a column of the query's group; a pair covered by both counts once. The plan is compact (one
bit a tile) and knows no ranks; `bind` turns it into the lists that kernels walk.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .geometry import EMPTY, Geometry

WORD = 32  # tiles per int32 word of the bitmask
INTEGERS = (torch.int32, torch.int64)


@dataclass(frozen=True)
class Plan:
    """Chosen tiles and columns for the query blocks held here against all key blocks.

    tiles: int32 [B, Hm, held blocks, words]; bit j % 32 of word j // 32 stands for key block j.
    columns: int32 [B, Hc, groups, C] ascending unique token positions, padded with num_tokens, or None.
    column_group: int32 [held blocks], the column group of each query block, or None (one group).
    Mask heads Hm and Hc are 1, the number of key heads, or the number of query heads.

    Raises ValueError for other shapes, dtypes or devices and, where the tensors lie on the CPU, for
    entries that break these rules. On a GPU entries are not looked at: that would wait for the device.
    """

    geometry: Geometry
    tiles: Tensor
    columns: Tensor | None = None
    column_group: Tensor | None = None

    def __post_init__(self) -> None:
        geometry, words = self.geometry, -(-self.geometry.num_blocks // WORD)
        held = {"held blocks": len(geometry.blocks)}
        rows = {"batch": geometry.batch, "mask heads": None}
        check_tensor("tiles", self.tiles, (torch.int32,), rows | held | {"words": words}, geometry)
        if self.columns is not None:
            dims = rows | {"groups": None, "columns": None}
            check_tensor("columns", self.columns, (torch.int32,), dims, geometry)
        if self.column_group is not None:
            check_tensor("column_group", self.column_group, INTEGERS, held, geometry)
        if self.columns is not None and self.column_group is None and self.columns.shape[2] != 1:
            raise ValueError(
                f"columns have {self.columns.shape[2]} groups; say which of them each of the "
                f"{len(geometry.blocks)} query blocks uses by column_group"
            )
        if geometry.device.type == "cpu":
            check_entries(self)

    @staticmethod
    def build(
        geometry: Geometry,
        tiles: Tensor,
        columns: Tensor | None = None,
        column_group: Tensor | None = None,
    ) -> Plan:
        """Plan from bool tiles [B, Hm, held blocks, num_blocks] and unordered columns.

        The diagonal tile is always added and invisible tiles are dropped. Duplicate columns count once;
        positions outside [0, num_tokens) stand for no column.
        """
        held = {"held blocks": len(geometry.blocks)}
        rows = {"batch": geometry.batch, "mask heads": None}
        dims = rows | held | {"key blocks": geometry.num_blocks}
        check_tensor("tiles", tiles, (torch.bool,), dims, geometry)
        diagonal = geometry.block_ids[:, None] == torch.arange(geometry.num_blocks, device=tiles.device)
        tiles = (tiles | diagonal) & (geometry.tile_class != EMPTY)[:, None]
        if columns is not None:
            dims = rows | {"groups": None, "columns": None}
            check_tensor("columns", columns, INTEGERS, dims, geometry)
            columns = _clean_columns(columns, geometry.num_tokens)
        if column_group is not None:
            check_tensor("column_group", column_group, INTEGERS, held, geometry)
            column_group = column_group.int()
        return Plan(geometry, pack_bits(tiles), columns, column_group)

    @property
    def mask_heads(self) -> int:
        return self.tiles.shape[1]

    def tiles_bool(self) -> Tensor:
        """bool [B, Hm, held blocks, num_blocks]."""
        return unpack_bits(self.tiles, self.geometry.num_blocks)

    def rows(self, geometry: Geometry) -> Plan:
        """The part of this plan for the blocks that `geometry` holds: the same batch, however padded.

        ValueError if the plan is of another batch or lacks a block that is not padding.
        """
        own, size = self.geometry, geometry.block_size
        if (own.block_size, own.documents) != (size, geometry.documents):
            raise ValueError(
                f"the plan is for blocks of {own.block_size} and documents {own.documents}, this batch has "
                f"blocks of {size} and documents {geometry.documents}; use the plans of this batch"
            )
        where = {block: row for row, block in enumerate(own.blocks)}
        end = max((end for ranges in own.documents for _, end in ranges), default=0)
        missing = [block for block in geometry.blocks if block not in where and block * size < end]
        if missing:
            raise ValueError(
                f"the plan has {len(where)} query blocks and lacks {missing[:4]}; use a plan of all blocks"
            )
        rows = torch.tensor([where.get(block, len(where)) for block in geometry.blocks], dtype=torch.int64)
        rows = rows.to(self.tiles.device)
        pad = torch.nn.functional.pad
        words = -(-geometry.num_blocks // WORD) - self.tiles.shape[3]  # if negative, of padding: cut off
        tiles = pad(self.tiles, (0, words, 0, 1))[:, :, rows]  # the row added is that of padding: empty
        columns, group = self.columns, self.column_group
        if columns is not None:
            columns = columns.masked_fill(columns >= own.num_tokens, geometry.num_tokens)
        return Plan(geometry, tiles, columns, None if group is None else pad(group, (0, 1))[rows])

    def column_elements(self) -> Tensor:
        """int32 [B, max(Hm, Hc), held blocks, C]: visible pairs of each column outside chosen tiles."""
        geometry = self.geometry
        columns = columns_of_rows(self.columns, self.column_group, len(geometry.blocks)).contiguous()
        count = torch.zeros_like(columns)
        for lo, hi in geometry.intervals:
            empty = lo > hi  # such queries must cancel out of the difference below
            hi = torch.where(empty, lo, hi)
            shape = (columns.shape[1], -1, geometry.block_size)
            lo = lo.unflatten(1, (len(geometry.blocks), geometry.block_size)).sort(-1).values
            hi = hi.unflatten(1, (len(geometry.blocks), geometry.block_size)).sort(-1).values
            lo = lo[:, None].expand(-1, *shape).contiguous()
            hi = hi[:, None].expand(-1, *shape).contiguous()
            # A query sees the column if lo <= column and not hi < column.
            started = torch.searchsorted(lo, columns, right=True, out_int32=True)
            count += started - torch.searchsorted(hi, columns, out_int32=True)
        covered = tile_of_columns(self.tiles, columns, geometry.block_size)
        count = count * (columns < geometry.num_tokens)
        return _repeat_heads(count, covered.shape[1]) * ~covered

    def element_mask(self) -> Tensor:
        """bool [B, max(Hm, Hc), held tokens, num_tokens]: every pair the plan computes. Quadratic."""
        geometry, size = self.geometry, self.geometry.block_size
        mask = self.tiles_bool().repeat_interleave(size, 2).repeat_interleave(size, 3)
        if self.columns is not None:
            columns = columns_of_rows(self.columns, self.column_group, len(geometry.blocks)).long()
            hit = torch.zeros(*columns.shape[:3], geometry.num_tokens + 1, device=mask.device)
            hit = hit.scatter_(3, columns, 1.0)[..., :-1].bool().repeat_interleave(size, 2)
            heads = max(mask.shape[1], hit.shape[1])
            mask = _repeat_heads(mask, heads) | _repeat_heads(hit, heads)
        keys = torch.arange(geometry.num_tokens, device=mask.device)
        return mask & geometry.visible(keys)[:, None]


def _repeat_heads(x: Tensor, heads: int) -> Tensor:
    return x.repeat_interleave(heads // x.shape[1], 1)


def _clean_columns(columns: Tensor, num_tokens: int) -> Tensor:
    """Sorted, without duplicates, padded with num_tokens at the end."""
    columns = columns.masked_fill((columns < 0) | (columns >= num_tokens), num_tokens).int()
    columns = columns.sort(-1).values
    repeated = torch.zeros_like(columns, dtype=torch.bool)
    repeated[..., 1:] = columns[..., 1:] == columns[..., :-1]
    return columns.masked_fill(repeated, num_tokens).sort(-1).values.contiguous()


def columns_of_rows(columns: Tensor, column_group: Tensor | None, rows: int) -> Tensor:
    """int32 [B, Hc, rows, C]: the columns that each query block uses."""
    if column_group is None:
        return columns.expand(-1, -1, rows, -1)
    return columns[:, :, column_group.long()]


def tile_of_columns(tiles: Tensor, columns: Tensor, block_size: int) -> Tensor:
    """bool, shape of columns [B, H, rows, C] with the larger head count: is the column's tile chosen?"""
    heads = max(tiles.shape[1], columns.shape[1])
    tiles = _repeat_heads(tiles, heads)
    block = _repeat_heads(columns, heads).long() // block_size
    word = (block // WORD).clamp(max=tiles.shape[3] - 1)  # padding may point past the last word
    return (torch.gather(tiles, 3, word) >> (block % WORD).int()) & 1 == 1


def pack_bits(bits: Tensor) -> Tensor:
    """bool [..., n] -> int32 [..., ceil(n / 32)], lowest bit first."""
    n = bits.shape[-1]
    bits = torch.nn.functional.pad(bits, (0, -n % WORD)).unflatten(-1, (-1, WORD))
    weights = 1 << torch.arange(WORD, device=bits.device)
    return (bits * weights).sum(-1).to(torch.int32)


def unpack_bits(words: Tensor, n: int) -> Tensor:
    """int32 [..., words] -> bool [..., n], the inverse of pack_bits."""
    shifts = torch.arange(WORD, device=words.device, dtype=torch.int32)
    return ((words[..., None] >> shifts) & 1).bool().flatten(-2)[..., :n]


def check_tensor(
    name: str, x: Tensor, dtypes: tuple[torch.dtype, ...], dims: dict[str, int | None], geometry: Geometry
) -> None:
    """Type, shape (dims by name; None for any number), dtype and device of a part of a plan."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: a {type(x).__name__}; use a tensor of {dtypes[0]}")
    sizes = zip(x.shape, dims.values(), strict=False)
    if len(x.shape) != len(dims) or any(want not in (None, size) for size, want in sizes):
        form = ", ".join(dim if want is None else f"{dim}={want}" for dim, want in dims.items())
        raise ValueError(f"{name}: shape {tuple(x.shape)}; this geometry needs [{form}]")
    if x.dtype not in dtypes:
        raise ValueError(f"{name}: {x.dtype}; use {' or '.join(map(str, dtypes))}")
    if x.device != geometry.device:
        raise ValueError(f"{name}: on {x.device}, the geometry on {geometry.device}; use one device")


def check_entries(plan: Plan) -> None:
    """ValueError for entries that a kernel must not meet. Reads them; for plans on the CPU."""
    geometry, columns, group = plan.geometry, plan.columns, plan.column_group
    hidden = int((plan.tiles_bool() & (geometry.tile_class == EMPTY)[:, None]).sum())
    if hidden:
        raise ValueError(f"tiles: {hidden} chosen that no query may see; use Plan.build, which drops them")
    if columns is not None and columns.numel():
        low, high, end = int(columns.min()), int(columns.max()), geometry.num_tokens
        if low < 0 or high > end:
            raise ValueError(
                f"columns: positions {low} to {high}; use 0 to {end - 1} and {end} for none, or Plan.build"
            )
        if bool(((columns[..., 1:] <= columns[..., :-1]) & (columns[..., 1:] < end)).any()):
            raise ValueError("columns: not ascending and unique; use Plan.build, which sorts them")
    if columns is not None and group is not None and len(group):
        low, high, groups = int(group.min()), int(group.max()), columns.shape[2]
        if low < 0 or high >= groups:
            raise ValueError(f"column_group: {low} to {high}; columns have the groups 0 to {groups - 1}")
