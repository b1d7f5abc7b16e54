"""What one step's plans were: counted on the device as integers, combined over ranks when asked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ..balance import Statistics, step_imbalance, worker_imbalance
from ..kernels.bound import BoundPlan
from ..kernels.geometry import EMPTY, Geometry
from .link import Waits
from .transport import Transport


@dataclass
class Record:
    """Counts of one shard, by layer. Filled by the attention, read by the planner and by reports.

    elements: int64 [3] = (pairs in tiles, pairs in columns outside them, visible pairs) times heads.
    work: float64 [steps + 1], tiles of each step and column work, mean over heads.
    vector: int64 [5, num_blocks], the planner's statistics in units of heads (and tokens for columns).
    covered: chosen tiles each time the layer ran, recomputation included.
    keys: what count_keys returned each time the layer ran, recomputation included; first steps only.
    waits: for messages of other ranks, in all layers.
    """

    heads: int = 0
    elements: dict = field(default_factory=dict)
    work: dict = field(default_factory=dict)
    recall: dict = field(default_factory=dict)
    covered: dict = field(default_factory=dict)
    keys: dict = field(default_factory=dict)
    bytes: Counter = field(default_factory=Counter)
    vector: Tensor | None = None
    waits: Waits = field(default_factory=Waits)

    def add(self, layer, bound: BoundPlan, heads: int) -> None:
        """Counts a new plan of a layer with `heads` query heads."""
        plan, geometry = bound.plan, bound.plan.geometry
        self.heads = heads
        tiles = plan.tiles_bool()
        chosen = tiles.sum(1, dtype=torch.int64) * (heads // plan.mask_heads)  # [B, rows, num_blocks]
        pairs = (tiles * geometry.visible_elements[:, None]).sum(dtype=torch.int64)
        column_pairs = torch.zeros((), dtype=torch.int64, device=tiles.device)
        columns = torch.zeros(chosen.shape[:2], dtype=torch.int64, device=tiles.device)
        if plan.columns is not None:
            outside = plan.column_elements()
            share = heads // outside.shape[1]
            column_pairs = outside.sum(dtype=torch.int64) * share
            columns = (outside > 0).sum((1, 3), dtype=torch.int64) * share  # tokens times heads
        visible = geometry.visible_elements.sum(dtype=torch.int64) * heads
        self.elements[layer] = torch.stack((pairs * (heads // plan.mask_heads), column_pairs, visible))
        column_work = columns.sum().double() / (geometry.block_size * heads)
        self.work[layer] = torch.cat((bound.work.sum(0), column_work[None]))
        vector = _statistics(chosen, columns, geometry, heads)
        self.vector = vector if self.vector is None else self.vector + vector

    def ran(self, layer, bound: BoundPlan) -> None:
        self.covered.setdefault(layer, []).append(bound.row_ptr[-1].clone())

    def statistics(self, transport: Transport, block_size: int) -> Statistics | None:
        """Combined over the group; None if no layer ran. All ranks call it."""
        if self.vector is None:
            return None
        total = self.vector.clone()
        transport.all_reduce(total).wait()
        vector = total.cpu().numpy().astype(np.float64) / self.heads
        vector[3] /= block_size
        return Statistics.from_vector(vector.ravel())

    def report(self, transport: Transport, layout, exchange: str) -> Report:
        """Combined over the group. All ranks call it."""
        layers = list(self.elements)
        if not layers:
            raise ValueError("no attention ran with this shard; call the model with **shard.inputs first")
        elements = torch.stack([self.elements[layer] for layer in layers])
        transport.all_reduce(elements).wait()
        tiles, columns, visible = elements.double().cpu().T
        work = transport.all_gather(torch.stack([self.work[layer] for layer in layers]).sum(0))
        by_step = work.cpu().numpy()
        recall = {layer: float(value) for layer, value in self.recall.items()}
        moved = torch.tensor([self.bytes[channel] for channel in _CHANNELS], dtype=torch.int64)
        moved = transport.all_gather(moved.to(elements.device)).sum(0).tolist()
        moved = {name: count for name, count in zip(_CHANNELS, moved, strict=True) if count}
        keys = {layer: torch.stack(runs).sum(0)[:2] for layer, runs in self.keys.items()}
        for total in keys.values():
            transport.all_reduce(total).wait()
        waits = torch.tensor(self.waits.seconds(), dtype=torch.float64)
        waited, elapsed = transport.all_gather(waits.to(elements.device)).cpu().T
        return Report(
            layout=layout.name,
            exchange=exchange,
            density=float((tiles + columns).sum() / visible.sum()),
            density_tiles=float(tiles.sum() / visible.sum()),
            density_by_layer=dict(zip(layers, ((tiles + columns) / visible).tolist(), strict=True)),
            recall=sum(recall.values()) / len(recall) if recall else None,
            recall_by_layer=recall,
            worker_imbalance=worker_imbalance(by_step),
            step_imbalance=step_imbalance(by_step),
            work=by_step,
            bytes_moved=moved,
            waited=tuple(waited.tolist()),
            straggler=find_straggler(waited.tolist(), float(elapsed.max()), transport.ranks),
            keys_by_layer={layer: tuple(total.tolist()) for layer, total in keys.items()},
        )


_CHANNELS = ("keys", "grads", "columns", "outer keys", "outer grads", "needs", "heads")


@dataclass(frozen=True, eq=False)
class Report:
    """One step over the whole group.

    density, density_tiles: computed pairs / visible pairs, with and without columns. recall: share of
    the attention mass that the plans hold, of sampled queries, or None where not sampled this step.
    work: float64 [W, steps + 1], tiles of each rank in each step, column work last, summed over layers.
    bytes_moved: by traffic class, over all ranks and layers, forward and backward; classes without any are
    left out. What a hierarchical ring moves between nodes has classes of its own, and so have the headers
    in which ranks say what they need of each other.
    waited: seconds that each rank of the group waited for messages of others in attention; on CUDA, that
    its stream did. straggler: global rank that the others waited for, if there is one.
    keys_by_layer: (pairs that queries saw, pairs that plans promised) summed over the times that the layer
    ran, recomputation included; in the first steps only.
    """

    layout: str
    exchange: str
    density: float
    density_tiles: float
    density_by_layer: dict
    recall: float | None
    recall_by_layer: dict
    worker_imbalance: float
    step_imbalance: float
    work: np.ndarray
    bytes_moved: dict[str, int]
    waited: tuple[float, ...] = field(compare=False)
    straggler: int | None = field(compare=False)
    keys_by_layer: dict[Hashable, tuple[int, int]]

    def __str__(self) -> str:
        keys = ""
        if self.keys_by_layer:
            seen, promised = (sum(x) for x in zip(*self.keys_by_layer.values(), strict=True))
            keys = f"\nkeys seen by queries: {seen} of {promised} promised, in all layers and ranks"
        recall = "not sampled" if self.recall is None else f"{self.recall:.4f}"
        mean = sum(self.waited) / len(self.waited)
        late = "" if self.straggler is None else f": the others waited for rank {self.straggler}"
        moved = ", ".join(f"{name} {count / 2**20:.1f}" for name, count in self.bytes_moved.items())
        return (
            f"layout {self.layout}, exchange {self.exchange}\n"
            f"density {self.density:.4f} (tiles {self.density_tiles:.4f}), recall {recall}\n"
            f"imbalance: worker {self.worker_imbalance:.3f}, step {self.step_imbalance:.3f} (max / mean)\n"
            f"MiB moved: {moved}\n"
            f"waited for other ranks: {mean:.2f} s on average, {min(self.waited):.2f} s at least{late}{keys}"
        )


def find_straggler(waited: list[float], elapsed: float, ranks: tuple[int, ...]) -> int | None:
    """The rank that all others waited for: it waited least, by more than a tenth of the time of the step."""
    least = min(range(len(waited)), key=waited.__getitem__)
    others = (sum(waited) - waited[least]) / max(1, len(waited) - 1)
    return ranks[least] if others - waited[least] > 0.1 * elapsed else None


def _statistics(chosen: Tensor, columns: Tensor, geometry: Geometry, heads: int) -> Tensor:
    """int64 [5, num_blocks] as balance.measure defines them: exact sums, so equal in any order."""
    depth, distance, offset, visible = geometry.memo("statistics", lambda: _indices(geometry))
    blocks = geometry.num_blocks
    out = chosen.new_zeros(5, blocks + 1)  # the last entry takes what is not visible
    out[0].index_add_(0, depth.flatten(), torch.full_like(depth, heads).flatten())
    counted = chosen * visible
    out[1].index_add_(0, distance.flatten(), counted.flatten())
    out[2].index_add_(0, offset.flatten(), counted.flatten())
    out[3].index_add_(0, depth.flatten(), columns.flatten())
    out[4].index_add_(0, depth.flatten(), counted.sum(2).flatten())
    return out[:, :blocks]


def _indices(geometry: Geometry) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    seen = geometry.tile_class != EMPTY
    blocks = geometry.num_blocks
    rows, keys = geometry.block_ids[:, None], torch.arange(blocks, device=seen.device)
    first = seen.int().argmax(2)  # first visible block of each row
    depth = torch.where(seen.any(2), geometry.block_ids - first, -1)
    distance = (rows - keys).expand_as(seen)
    offset = keys - first[..., None]
    visible = seen & (distance >= 0) & (offset >= 0)
    bin_of = [torch.where(visible, x, blocks) for x in (distance, offset)]
    return torch.where(depth < 0, blocks, depth), *bin_of, visible
