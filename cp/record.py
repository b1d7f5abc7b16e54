"""What one step's plans were: counted on the device as integers, combined over ranks when asked."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ..balance import Statistics
from ..balance.statistics import layer_groups
from ..kernels.attention import accumulator_dtype
from ..kernels.bound import BoundPlan
from ..kernels.columns import column_counts
from ..kernels.geometry import EMPTY, Geometry
from ..kernels.plan import Plan
from .link import Waits
from .pull import needed_blocks
from .transport import Transport


@dataclass
class Record:
    """Counts of one shard, by layer. Filled by the attention, read by the planner and by reports.

    elements: int64 [3] = (pairs in tiles, pairs in columns outside them, visible pairs) times heads.
    work: float64 [steps + 1], tiles of each step and column work, mean over heads.
    vectors: int64 [5, num_blocks], the planner's statistics in units of heads (and tokens for columns).
    covered: chosen tiles each time the layer ran, recomputation included.
    least: int64 [2], bytes that this rank must get of other ranks' keys and values, in the dtype they travel
        in, and give of their gradients, in full precision, in one forward and one backward: each block of a
        key head that its tiles touch, twice, and once.
    keys: what count_keys returned each time the layer ran, recomputation included; first steps only.
    loads: what moving query blocks of a layer costs, and the work of those held here in tiles, float64 [];
        empty where none may move. moved: how many did, on all ranks, and the worker imbalance before.
    waits: for messages of other ranks, in all layers. exchange: of this step.
    """

    exchange: str = ""
    heads: int = 0
    elements: dict = field(default_factory=dict)
    work: dict = field(default_factory=dict)
    least: dict = field(default_factory=dict)
    recall: dict = field(default_factory=dict)
    covered: dict = field(default_factory=dict)
    keys: dict = field(default_factory=dict)
    loads: dict = field(default_factory=dict)
    moved: dict = field(default_factory=dict)
    bytes: Counter = field(default_factory=Counter)
    vectors: dict = field(default_factory=dict)
    waits: Waits = field(default_factory=Waits)

    def add(self, layer, bound: BoundPlan, heads: int, k: Tensor) -> Tensor:
        """Counts a new plan of a layer with `heads` query heads and k [B, Hk, S', D], this rank's keys.

        Returns float64 [2, rows], tiles and column work of each query block in tiles, mean over heads.
        """
        plan, geometry = bound.plan, bound.plan.geometry
        self.heads = heads
        tiles = plan.tiles_bool()
        chosen = tiles.sum(1, dtype=torch.int64) * (heads // plan.mask_heads)  # [B, rows, num_blocks]
        pairs = (tiles * geometry.visible_elements[:, None]).sum(dtype=torch.int64)
        column_pairs = torch.zeros((), dtype=torch.int64, device=tiles.device)
        columns = torch.zeros(chosen.shape[:2], dtype=torch.int64, device=tiles.device)
        if plan.columns is not None:
            outside, used = column_counts(bound)
            share = heads // outside.shape[1]
            column_pairs = outside.sum() * share
            columns = used.sum(1) * share  # tokens times heads
        visible = geometry.visible_elements.sum(dtype=torch.int64) * heads
        self.elements[layer] = torch.stack((pairs * (heads // plan.mask_heads), column_pairs, visible))
        column_work = columns.sum().double() / (geometry.block_size * heads)
        self.work[layer] = torch.cat((bound.work.sum(0), column_work[None]))
        self.least[layer] = least_bytes(plan, k)
        self.vectors[layer] = _statistics(chosen, columns, geometry, heads)
        tokens = torch.stack((chosen.sum((0, 2)) * geometry.block_size, columns.sum(0)))
        return tokens.double() / (geometry.block_size * heads)

    def ran(self, layer, bound: BoundPlan) -> None:
        self.covered.setdefault(layer, []).append(bound.row_ptr[-1].clone())

    def statistics(self, transport: Transport, block_size: int) -> Statistics | None:
        """Combined over ranks, of groups of layers in the order in which they ran first.

        At most `layer_groups`, of equally many layers or one less; None if no layer ran. All ranks call it.
        """
        if not self.vectors:
            return None
        layers = torch.stack(list(self.vectors.values()))
        groups = min(layer_groups(transport.size), len(layers))
        total = torch.stack([part.sum(0) for part in layers.tensor_split(groups)])
        transport.all_reduce(total).wait()
        vectors = total.cpu().numpy().astype(np.float64) / self.heads
        vectors[:, 3] /= block_size
        return Statistics.from_vector(vectors.reshape(len(vectors), -1))


def least_bytes(plan: Plan, k: Tensor) -> Tensor:
    """int64 [2], see `Record.least`. k: [B, Hk, S', D], this rank's keys."""
    needed = needed_blocks(plan, k.shape[1])
    remote = needed.sum() - needed[:, :, plan.geometry.block_ids].sum()
    block = 2 * plan.geometry.block_size * k.shape[3]  # elements of keys and values
    return torch.stack((remote * (2 * block * k.itemsize), remote * (block * accumulator_dtype(k).itemsize)))


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
