"""Vertical-slash: per head, the key columns and the diagonals that a probe of late queries attends to.

MInference (arXiv 2407.02490) observed the two shapes; MTraining (arXiv 2510.18830) trains with them,
choosing per head the smallest sets that hold a share p of the probe's attention.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..geometry import Geometry
from ..plan import Plan
from ..select import ID_BITS, decode, encode, keep_top_p
from . import probes as probe
from .base import Field, Pattern, Summary, Traits, block_distance, check_counts
from .probes import FIXED, Probes


@dataclass(frozen=True)
class VerticalSlash(Pattern):
    """Columns and block diagonals by the attention of the last queries of each document.

    top_p: share of the probe's attention that the columns, and the diagonals, must each reach.
    columns, slashes: (fewest, most) columns per document and block diagonals per head; equal numbers are
        fixed budgets. slashes count block diagonals, the forced local ones included. A document that has
        fewer gives all it has.
    probe: queries at the end of each document (or segment) that choose.
    sink: first tokens of each document, always columns. window: local tokens, rounded up to whole
        blocks, always tiles; the diagonal always is.
    segment: tokens, a multiple of the block size, or None. With it every segment has a probe of its own
        that sees only itself and earlier tokens, so that no choice looks beyond its segment; without it
        the end of a document chooses for all of it.
    """

    top_p: float = 0.95
    columns: tuple[int, int] = (32, 1024)
    slashes: tuple[int, int] = (2, 64)
    probe: int = 64
    sink: int = 16
    window: int = 128
    segment: int | None = None

    stages = 4

    def __post_init__(self):
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it is a share of attention in (0, 1]")
        check_counts(sink=self.sink, window=self.window, probe=self.probe)
        for name, limits in (("columns", self.columns), ("slashes", self.slashes)):
            if not isinstance(limits, tuple) or len(limits) != 2 or not 0 <= limits[0] <= limits[1]:
                raise ValueError(f"{name} is {limits}; use (fewest, most) with 0 <= fewest <= most")
            check_counts(**{name: limits[0]})
            check_counts(**{name: limits[1]})
        if not 1 <= self.probe <= 64:
            raise ValueError(f"probe is {self.probe}; use 1 to 64 queries (sums are exact up to 64)")
        if self.sink > self.columns[1]:
            raise ValueError(
                f"sink {self.sink} exceeds the {self.columns[1]} columns a document may have; raise these"
            )
        if self.segment is not None and (not isinstance(self.segment, int) or self.segment < 1):
            raise ValueError(f"segment is {self.segment}; use a multiple of the block size, or None")

    @property
    def traits(self) -> Traits:
        return Traits("noncausal" if self.segment is None else "block", "summary", "column")

    def prepare(self, geometry: Geometry) -> _Tables:
        return geometry.memo(self, lambda: _tables(self, geometry))

    def local(self, geometry: Geometry) -> int:
        """Forced block diagonals: the diagonal and those that the window reaches."""
        return 1 + -(-self.window // geometry.block_size)

    def summarize(
        self, q: Tensor, k: Tensor, v: Tensor, geometry: Geometry, stage: int, summary: Summary
    ) -> dict[str, Field]:
        tables = self.prepare(geometry)
        probes = tables.probes
        if stage == 0:
            return {"rows": Field(probe.gather_rows(q, geometry, probes), "sum")}
        if stage == 1:
            scores = probe.score(summary["rows"], k, geometry, probes)
            return {
                "scores": Field(scores, "local"),
                "peak": Field(probe.peak(scores, probes), "max"),
            }
        weights = probe.exponentials(summary["scores"].clone(), summary["peak"], probes)
        if stage == 2:
            total = probe.sum_by_window(probe.fixed(weights).sum(3), probes)
            return {"total": Field(total, "sum")}
        share = FIXED / summary["total"].clamp(min=1)  # exact inputs, one rounding
        mass = probe.fixed(weights.double() * share[probes.pair_window][..., None])
        vertical = mass.sum(2).masked_fill(~tables.far[:, None], 0)  # [T, H, block]
        return {
            "slash": Field(probe.diagonal_mass(mass, geometry, probes), "sum"),
            "far": Field(probe.sum_by_window(vertical.sum(2), probes), "sum"),
            "columns": Field(_best_columns(vertical, tables), "gather"),
        }

    def estimate(self, q: Tensor, summary: Summary, geometry: Geometry) -> Plan:
        tables = self.prepare(geometry)
        distance = block_distance(geometry)
        near = (distance >= 0) & (distance < self.local(geometry))
        if not tables.probes.windows:
            return Plan.build(geometry, near.expand(geometry.batch, 1, -1, -1))
        diagonals = self._diagonals(summary["slash"], geometry, tables)
        diagonals = torch.nn.functional.pad(diagonals, (0, 0, 0, 0, 0, 1))  # last: no window
        reach = distance.clamp(min=0).expand(geometry.batch, q.shape[1], -1, -1)
        tiles = near.expand_as(reach)
        for index in tables.window_of_row:  # [B, held blocks]; several where documents share a block
            chosen = diagonals[index].transpose(1, 2)  # [B, H, held blocks, num_blocks]
            tiles = tiles | (torch.gather(chosen, 3, reach) & (distance >= 0))
        columns = self._columns(summary, geometry, tables)
        return Plan.build(geometry, tiles, columns, tables.column_group)

    def _diagonals(self, slash: Tensor, geometry: Geometry, tables: _Tables) -> Tensor:
        """bool [W, H, num_blocks]."""
        ids = torch.arange(geometry.num_blocks, device=slash.device)
        forced = (ids < self.local(geometry)).expand_as(slash)
        mass = slash // geometry.block_size
        code = encode(mass, ids, forced).sort(-1, descending=True).values
        mass, ids, forced = decode(code)
        target = (tables.queries * self.top_p).long()[:, None].expand(mass.shape[:2])
        keep = keep_top_p(mass, forced, target, *self.slashes)
        return torch.zeros_like(keep).scatter_(2, ids, keep)

    def _columns(self, summary: Summary, geometry: Geometry, tables: _Tables) -> Tensor | None:
        """int32 [B, H, groups, C]."""
        if self.columns[1] == 0:
            return None
        code = summary["columns"]  # [holders, W, H, cap]
        code = code.permute(1, 2, 0, 3).flatten(2).sort(-1, descending=True).values
        code = code[..., : self.columns[1]]
        mass, ids, forced = decode(code.clamp(min=0))
        # What lies near the probe is covered by local tiles already.
        target = (tables.queries * self.top_p).long() - tables.queries
        target = target[:, None] + summary["far"]
        keep = keep_top_p(mass, forced, target, *self.columns) & (code >= 0)
        ids = ids.masked_fill(~keep, geometry.num_tokens).int()
        ids = torch.nn.functional.pad(ids, (0, 0, 0, 0, 0, 1), value=geometry.num_tokens)
        picked = ids[tables.windows_of_group]  # [B, groups, windows, H, C]
        return picked.permute(0, 3, 1, 2, 4).flatten(3)


@dataclass(frozen=True)
class _Tables:
    """What follows from the geometry: windows, and which of them serve which rows.

    far, sink: bool [T, block], keys that may be columns of a pair's window, and its forced ones.
    ids: int64 [T, block] key positions. queries: int64 [W] fixed-point mass of a window's probe.
    order: int64 [W, cap'] places of each window's keys in the flattened pairs, T * block where none.
    window_of_row: list of int64 [B, held blocks], W where none; windows_of_group: int64 [B, groups, n].
    column_group: int64 [held blocks] or None.
    """

    probes: Probes
    far: Tensor
    sink: Tensor
    ids: Tensor
    queries: Tensor
    order: Tensor
    cap: int
    window_of_row: tuple[Tensor, ...]
    windows_of_group: Tensor
    column_group: Tensor | None


def _best_columns(vertical: Tensor, tables: _Tables) -> Tensor:
    """int64 [W, H, cap] encoded best columns of each window among the keys held here, -1 where fewer."""
    code = encode(vertical, tables.ids[:, None], tables.sink[:, None])
    code = code.masked_fill(~tables.far[:, None], -1)
    code = code.transpose(0, 1).flatten(1)  # [H, T * block]
    code = torch.nn.functional.pad(code, (0, 1), value=-1)[:, tables.order]  # [H, W, longest]
    code = code.sort(-1, descending=True).values[..., : tables.cap].transpose(0, 1)
    return torch.nn.functional.pad(code, (0, tables.cap - code.shape[2]), value=-1).contiguous()


def _tables(pattern: VerticalSlash, geometry: Geometry) -> _Tables:
    size, device = geometry.block_size, geometry.device
    if pattern.segment is not None and pattern.segment % size:
        raise ValueError(
            f"segment {pattern.segment} is not a multiple of the block size {size}; "
            f"use {-(-pattern.segment // size) * size}"
        )
    if geometry.num_tokens >= 2**ID_BITS:
        raise ValueError(
            f"{geometry.num_tokens} tokens exceed the {2**ID_BITS} that column ids hold; use another pattern"
        )
    local = pattern.local(geometry)
    probes = probe.make_probes(geometry, pattern.segment, local, pattern.probe)
    windows, tokens = probes.windows, geometry.num_tokens

    def tensor(x):
        return torch.tensor(x, dtype=torch.int64, device=device)

    document, end = tensor([w.document for w in windows]), tensor([w.end for w in windows])
    ids = probes.pair_block[:, None] * size + torch.arange(size, device=device)
    start_of_pair, end_of_pair = document[probes.pair_window, None], end[probes.pair_window, None]
    sink = (ids >= start_of_pair) & (ids < start_of_pair + pattern.sink)
    # The blocks under the probe's forced tiles are not columns: no earlier query would gain by them.
    far = (ids >= start_of_pair) & (ids < end_of_pair)
    far &= sink | ((end_of_pair - 1) // size - ids // size >= local)

    pairs = torch.bincount(probes.pair_window.cpu(), minlength=len(windows)).to(device)
    first = (pairs.cumsum(0) - pairs)[:, None] * size
    place = torch.arange(int(pairs.max()) * size if len(windows) else 0, device=device)
    order = torch.where(place < pairs[:, None] * size, first + place, len(probes.pair_window) * size)

    of_row = [[[] for _ in geometry.blocks] for _ in range(geometry.batch)]
    cut = pattern.segment or tokens
    groups = -(-tokens // cut)
    of_group = [[[] for _ in range(groups)] for _ in range(geometry.batch)]
    for index, w in enumerate(windows):
        of_group[w.batch][w.group].append(index)
        for row, block in enumerate(geometry.blocks):
            if block * size < w.end and (block + 1) * size > w.start:
                of_row[w.batch][row].append(index)
    deepest = max((len(x) for rows in of_row for x in rows), default=0)
    widest = max((len(x) for row in of_group for x in row), default=0)
    none = len(windows)
    window_of_row = tuple(
        tensor([[(x + [none] * deepest)[depth] for x in rows] for rows in of_row]) for depth in range(deepest)
    )
    windows_of_group = tensor([[x + [none] * (widest - len(x)) for x in row] for row in of_group])
    column_group = None if groups == 1 else tensor([b * size // cut for b in geometry.blocks])
    return _Tables(
        probes=probes,
        far=far,
        sink=sink,
        ids=ids,
        queries=(probes.rows >= 0).sum(1) * FIXED,
        order=order,
        cap=min(pattern.columns[1], tokens),
        window_of_row=window_of_row,
        windows_of_group=windows_of_group,
        column_group=column_group,
    )
