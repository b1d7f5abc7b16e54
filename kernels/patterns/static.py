"""Patterns that are known without looking at values."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..geometry import Geometry
from ..plan import Plan
from .base import Pattern, Summary, Traits, block_distance, check_counts


@dataclass(frozen=True)
class SinkWindow(Pattern):
    """A-shape: the first tokens of the document and a local window (StreamingLLM, arXiv 2309.17453).

    sink: first tokens of every document, seen by all its queries; they are columns, gathered once.
    window: local tokens, rounded up to whole blocks: a query sees its own block and the blocks before it
        that hold the `window` preceding tokens of the first token of its block.
    """

    sink: int = 64
    window: int = 1024

    traits = Traits("strict", "none", "column")

    def __post_init__(self):
        check_counts(sink=self.sink, window=self.window)

    def prepare(self, geometry: Geometry) -> Tensor | None:
        return geometry.memo(("sinks", self.sink), lambda: sink_columns(geometry, self.sink))

    def estimate(self, q: Tensor, summary: Summary, geometry: Geometry) -> Plan:
        distance = block_distance(geometry)
        near = (distance >= 0) & (distance <= -(-self.window // geometry.block_size))
        tiles = near.expand(geometry.batch, 1, -1, -1)
        columns = self.prepare(geometry)
        return Plan.build(geometry, tiles, columns)


def sink_columns(geometry: Geometry, sink: int) -> Tensor | None:
    """int32 [B, 1, 1, C]: the first `sink` tokens of every document of each row; None without any."""
    rows = [
        [t for start, end in ranges for t in range(start, min(end, start + sink))]
        for ranges in geometry.documents
    ]
    width = max(map(len, rows))
    if width == 0:
        return None
    padded = [row + [geometry.num_tokens] * (width - len(row)) for row in rows]
    return torch.tensor(padded, dtype=torch.int32, device=geometry.device)[:, None, None]
