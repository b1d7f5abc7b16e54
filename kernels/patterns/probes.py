"""Probe windows: the last queries of every document (or segment of it), and the keys that they see."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..estimates import Probes
from ..geometry import Geometry

LENGTHS = (16, 32, 64)  # rows of a table of probe queries, so that kernels need not mask them


@dataclass(frozen=True)
class Window:
    """Queries [start, end) whose choice one probe makes. The probe is the last tokens of the range."""

    batch: int
    document: int  # first token of the document: keys [document, end) are visible to the probe
    start: int
    end: int
    group: int  # segment number, 0 without segments


def find_windows(geometry: Geometry, segment: int | None, local: int) -> tuple[Window, ...]:
    """One window per document, or per piece of it inside segments of `segment` tokens.

    Pieces whose keys all lie in the `local` block diagonals nearest to their queries need no probe.
    """
    size, windows = geometry.block_size, []
    for batch, ranges in enumerate(geometry.documents):
        for document, end in ranges:
            cut = segment or geometry.num_tokens
            for start in range(document - document % cut, end, cut):
                piece = (max(start, document), min(start + cut, end))
                if (piece[1] - 1) // size - document // size >= local:
                    windows.append(Window(batch, document, *piece, start // cut))
    return tuple(windows)


def make_probes(geometry: Geometry, windows: tuple[Window, ...], length: int) -> Probes:
    """Tables of windows of up to `length` <= 64 probe queries each, on the device of the geometry."""
    size, device = geometry.block_size, geometry.device
    padded = min(x for x in LENGTHS if x >= length)
    rows, pairs = [], []
    held = sorted((block, slot) for slot, block in enumerate(geometry.blocks))
    for index, w in enumerate(windows):
        first = max(w.start, w.end - length)
        rows.append([*range(first, w.end), *[-1] * (padded - (w.end - first))])
        for block, slot in held:
            if block * size < w.end and (block + 1) * size > w.document:
                pairs.append((index, slot, block, w.batch))
    pairs = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 4).to(device)
    rows = torch.tensor(rows, dtype=torch.int64).reshape(-1, padded).to(device)
    batch = torch.tensor([w.batch for w in windows], dtype=torch.int64, device=device)
    # A missing query sees nothing.
    at, missing = (batch[:, None], rows.clamp(min=0)), rows < 0
    intervals = [(geometry.lo, geometry.num_tokens), (geometry.hi, -1)]
    if geometry.prefix_lo is not None:
        intervals += [(geometry.prefix_lo, geometry.num_tokens), (geometry.prefix_hi, -1)]
    bounds = torch.stack([x[at].masked_fill(missing, nothing) for x, nothing in intervals])
    slot = torch.full((geometry.num_blocks,), -1, dtype=torch.int64, device=device)
    slot[geometry.block_ids] = torch.arange(len(geometry.blocks), device=device)
    place = slot[at[1] // size].masked_fill(missing, -1)
    token = torch.where(place >= 0, place * size + at[1] % size, -1)
    return Probes(size, geometry.num_blocks, rows, batch, token, bounds, pairs)


def gather_rows(q: Tensor, probes: Probes) -> Tensor:
    """[W, H, P, D] probe queries, zeros where not held here: the holders' sum is the whole probe."""
    if not q.shape[2]:
        return q.new_zeros(len(probes.rows), q.shape[1], probes.rows.shape[1], q.shape[3])
    rows = q[probes.window_batch[:, None], :, probes.token.clamp(min=0)]  # [W, P, H, D]
    return rows.masked_fill_((probes.token < 0)[..., None, None], 0).transpose(1, 2).contiguous()
