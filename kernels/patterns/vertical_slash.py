"""Vertical-slash: per head, the key columns and the diagonals that a probe of late queries attends to.

MInference (arXiv 2407.02490) observed the two shapes; MTraining (arXiv 2510.18830) trains with them,
choosing per head the smallest sets that hold a share p of the probe's attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from ..estimates import FIXED, Probes, operations
from ..geometry import Geometry
from ..plan import Plan
from ..select import ID_BITS, Contest, encode, ids_of, make_contest
from . import probes as probe
from .base import Field, Pattern, Summary, Traits, block_distance, check_counts


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
        probes, ops = tables.probes, operations(k)
        if stage == 0:
            return {"rows": Field(probe.gather_rows(q, probes), "sum")}
        given = summary["rows"], k
        if stage == 1:
            return {"peak": Field(ops.peaks(*given, probes), "max")}
        if stage == 2:
            return {"total": Field(ops.totals(*given, summary["peak"], probes), "sum")}
        share = (FIXED / summary["total"].clamp(min=1).double()).to(summary["peak"].dtype)
        slash, far, codes = ops.masses(*given, summary["peak"], share, tables.tail, probes)
        best = ops.top_k(codes, tables.contest)
        return {"slash": Field(slash, "sum"), "far": Field(far, "sum"), "columns": Field(best, "gather")}

    def estimate(self, q: Tensor, summary: Summary, geometry: Geometry) -> Plan:
        tables, ops = self.prepare(geometry), operations(q)
        local = self.local(geometry)
        if not len(tables.probes.rows):
            distance = block_distance(geometry)
            near = (distance >= 0) & (distance < local)
            return Plan.build(geometry, near.expand(geometry.batch, 1, -1, -1))
        codes = (summary["slash"] // geometry.block_size << ID_BITS) + tables.diagonal_tail
        target = (tables.queries * self.top_p).long()[:, None].expand(codes.shape[:2]).contiguous()
        chosen = codes >= ops.threshold(codes, target, *self.slashes)[..., None]
        tiles = ops.tiles_of_diagonals(chosen, geometry, local, tables.window_of_row)
        return Plan(geometry, tiles, self._columns(summary, geometry, tables, ops), tables.column_group)

    def _columns(
        self, summary: Summary, geometry: Geometry, tables: _Tables, ops: ModuleType
    ) -> Tensor | None:
        """int32 [B, H, groups, C]."""
        if self.columns[1] == 0:
            return None
        code = summary["columns"].permute(2, 1, 0, 3).flatten(2)  # [W, H, holders * cap]
        if code.shape[2] > tables.contest.keep:
            code = code.topk(tables.contest.keep, sorted=False).values
        # What lies near the probe is covered by local tiles already.
        target = (tables.queries * self.top_p).long() - tables.queries
        target = target[:, None] + summary["far"]
        kept = code >= ops.threshold(code, target, *self.columns)[..., None]
        ids = torch.where(kept, ids_of(code), geometry.num_tokens).int()
        ids = torch.nn.functional.pad(ids, (0, 0, 0, 0, 0, 1), value=geometry.num_tokens)
        picked = ids[tables.windows_of_group]  # [B, groups, windows, H, C], all different
        return picked.permute(0, 3, 1, 2, 4).flatten(3).sort(-1).values


@dataclass(frozen=True)
class _Tables:
    """What follows from the geometry: windows, and which of them serve which rows.

    tail: int64 [T, block], the code of a key without mass, -1 where its window may not have it as a column.
    diagonal_tail: int64 [num_blocks], the same of block diagonals.
    queries: int64 [W] fixed-point mass of a window's probe. contest: the keys of each window, and its cap.
    window_of_row: int64 [B, held blocks, depth], W where none; windows_of_group: int64 [B, groups, n].
    column_group: int32 [held blocks] or None.
    """

    probes: Probes
    tail: Tensor
    diagonal_tail: Tensor
    queries: Tensor
    contest: Contest
    window_of_row: Tensor
    windows_of_group: Tensor
    column_group: Tensor | None


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
    windows, tokens = probe.find_windows(geometry, pattern.segment, local), geometry.num_tokens
    probes = probe.make_probes(geometry, windows, pattern.probe)

    def tensor(x):
        return torch.tensor(x, dtype=torch.int64, device=device)

    document, end = tensor([w.document for w in windows]), tensor([w.end for w in windows])
    ids = probes.pairs[:, 2, None] * size + torch.arange(size, device=device)
    start_of_pair, end_of_pair = document[probes.pairs[:, 0], None], end[probes.pairs[:, 0], None]
    sink = (ids >= start_of_pair) & (ids < start_of_pair + pattern.sink)
    # The blocks under the probe's forced tiles are not columns: no earlier query would gain by them.
    far = (ids >= start_of_pair) & (ids < end_of_pair)
    far &= sink | ((end_of_pair - 1) // size - ids // size >= local)

    tail = torch.where(far, encode(torch.zeros_like(ids), ids, sink), -1)
    diagonals = torch.arange(geometry.num_blocks, device=device)
    counts = torch.bincount(probes.pairs[:, 0].cpu(), minlength=len(windows))
    ends = (counts.cumsum(0) * size).tolist()
    bounds = tuple((end - count * size, end) for end, count in zip(ends, counts.tolist(), strict=True))

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
    window_of_row = tensor([[x + [none] * (deepest - len(x)) for x in rows] for rows in of_row])
    windows_of_group = tensor([[x + [none] * (widest - len(x)) for x in row] for row in of_group])
    column_group = None if groups == 1 else tensor([b * size // cut for b in geometry.blocks])
    return _Tables(
        probes=probes,
        tail=tail,
        diagonal_tail=encode(torch.zeros_like(diagonals), diagonals, diagonals < local),
        queries=(probes.rows >= 0).sum(1) * FIXED,
        contest=make_contest(bounds, min(pattern.columns[1], tokens), device),
        window_of_row=window_of_row.view(geometry.batch, len(geometry.blocks), deepest),
        windows_of_group=windows_of_group,
        column_group=None if column_group is None else column_group.int(),
    )
