"""Shard: what travels with a call of the model: this rank's part of one batch and its plans by layer."""

from __future__ import annotations

import zlib
from collections.abc import Hashable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..balance import Decision, Layout
from ..kernels.bound import BoundPlan, bind
from ..kernels.geometry import Geometry
from ..kernels.patterns.base import make_plan
from ..kernels.plan import Plan
from .attention import Ring
from .errors import Place
from .estimate import combine_over
from .link import Link, Waits
from .record import Record
from .transport import Transport

if TYPE_CHECKING:
    from .context_parallel import ContextParallel

KEYWORD = "sparring_shard"  # the model keyword that carries a shard to its attention layers


class Shard:
    """This rank's part of a batch, made by ContextParallel.shard.

    tensors: input_ids [B, S'] or inputs_embeds [B, S', E], and position_ids [B, S'].
    labels: int64 [B, S'], shifted before sharding, or None. S' is this rank's share of the padded length.
    tokens: number of labels with a loss in this batch, over all data and context-parallel ranks.
    last_position: int64 [], the largest position id of the whole batch.
    length: tokens a row before padding. layout, decision: who holds what, and why.
    plans: logical plans by layer, made in the first forward and used by recomputation and backward.

    Not a dataclass: FSDP and DDP take those among a model's arguments apart and build them anew.
    """

    def __init__(
        self,
        *,
        cp: ContextParallel,
        step: int,
        layout: Layout,
        decision: Decision,
        transport: Transport,
        geometry: Geometry,
        length: int,
        labels: Tensor | None,
        tokens: int,
        replayed: dict[Hashable, Plan] | None = None,
        sample_recall: bool = False,
        count_keys: bool = False,
    ):
        self.cp, self.step, self.transport = cp, step, transport
        self.layout, self.decision = layout, decision
        self.geometry, self.length = geometry, length
        self.labels, self.tokens = labels, tokens
        self.replayed, self.sample_recall, self.count_keys = replayed, sample_recall, count_keys
        self.tensors: dict[str, Tensor] = {}
        self.last_position: Tensor | None = None
        self.plans: dict[Hashable, Plan] = {}
        self.record = Record(waits=Waits(geometry.device))

    @property
    def inputs(self) -> dict[str, Any]:
        """Keywords for the model. Made when asked: a shard that held itself would outlive its step."""
        return self.tensors | {KEYWORD: self}

    @property
    def local_length(self) -> int:
        """Tokens a row held here, S'."""
        return len(self.geometry.blocks) * self.geometry.block_size

    def plan(self, layer: Hashable, q: Tensor, k: Tensor, v: Tensor, scale: float) -> BoundPlan:
        """The plan of a layer, estimated by its pattern on the first call, the same one afterwards."""
        new = layer not in self.plans
        if new and self.replayed is not None:
            if layer not in self.replayed:
                raise ValueError(
                    f"replay has no plan for layer {layer!r}, only for {list(self.replayed)}; "
                    "use plans of the same model"
                )
            self.plans[layer] = self.replayed[layer].rows(self.geometry)
        elif new:
            pattern = self.cp.pattern_of(layer)
            combine = combine_over(self.link("plan", layer))
            self.plans[layer] = make_plan(pattern, q, k, v, self.geometry, scale, combine)
        bound = bind(self.plans[layer], self.layout.assignment)
        if new:
            self.record.add(layer, bound, q.shape[1])
        return bound

    def ring(self, layer: Hashable, steps, first: bool = False) -> Ring:
        """The surroundings of one attention call. first: ranks agree at the beginning of its backward."""
        link = self.link("forward", layer, first)
        return Ring(link, self.cp.schedule(self.transport), steps, self.record.bytes)

    def link(self, phase: str, layer: Hashable, entry: bool = False) -> Link:
        """The transport as a call in this phase of this layer sees it."""
        header: dict[str, object] = {"layout": self.layout.digest()}
        if self.cp.debug and layer in self.plans:
            header["plan"] = _common(self.plans[layer])
        place = Place(self.step, layer, phase)
        return Link(self.transport, place, header, self.cp.debug, entry, self.record.waits)


def full_plans(shard: Shard) -> dict[Hashable, Plan]:
    """Plans of the whole sequence by layer, in logical order; what `replay` takes. All ranks call it."""
    blocks = tuple(range(shard.geometry.num_blocks))
    geometry = shard.geometry.select(blocks)
    order = torch.tensor(
        [block for held in shard.layout.assignment for block in held], dtype=torch.int64
    ).argsort()
    width = max(shard.layout.blocks_per_rank)

    def gather(x: Tensor, dim: int) -> Tensor:
        """Local rows along dim -> all rows in logical order."""
        x = x.movedim(dim, 0)
        padded = torch.nn.functional.pad(x, (0, 0) * (x.dim() - 1) + (0, width - x.shape[0]))
        parts = shard.transport.all_gather(padded.contiguous())
        held = [part[:n] for part, n in zip(parts, shard.layout.blocks_per_rank, strict=True)]
        return torch.cat(held)[order.to(x.device)].movedim(0, dim)

    return {
        layer: Plan(
            geometry,
            gather(plan.tiles, 2).contiguous(),
            plan.columns,
            None if plan.column_group is None else gather(plan.column_group, 0),
        )
        for layer, plan in shard.plans.items()
    }


def _common(plan: Plan) -> str:
    """What must be equal in the plans of all ranks: heads, blocks, columns. Synchronises."""
    columns = b"" if plan.columns is None else plan.columns.cpu().contiguous().numpy().tobytes()
    blocks = f"{plan.geometry.num_blocks} blocks of {plan.geometry.block_size}"
    return f"{plan.mask_heads} heads, {blocks}, columns {zlib.crc32(columns):08x}"
