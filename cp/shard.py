"""Shard: what travels with a call of the model: this rank's part of one batch and its plans by layer."""

from __future__ import annotations

import zlib
from collections.abc import Collection, Hashable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.profiler import record_function

from ..balance import Decision, Layout
from ..balance.lever import move_cost
from ..balance.schedule import schedule_of
from ..kernels.bound import BoundPlan, bind, bind_to_slots, prepare, slots_of
from ..kernels.geometry import Geometry
from ..kernels.patterns.base import make_plan
from ..kernels.plan import Plan
from .errors import Place
from .estimate import combine_over
from .heads import HeadRing, HeadShares, share_heads
from .hops import Hops, share_hops
from .link import Link, Waits
from .move import Moved, MovedRing, move_queries
from .pull import Needs, Pull, exchange_needs, prepare_needs
from .record import Record
from .ring import Ring, step_blocks
from .transport import Transport

if TYPE_CHECKING:
    from .context_parallel import ContextParallel
    from .planning import CallShape

KEYWORD = "sparring_shard"  # the model keyword that carries a shard to its attention layers


class Shard:
    """This rank's part of a batch, made by ContextParallel.shard.

    tensors: input_ids [B, S'] or inputs_embeds [B, S', E], and position_ids [B, S'].
    labels: int64 [B, S'], shifted before sharding, or None. S' is this rank's share of the padded length.
    tokens: number of labels with a loss in this batch, over all data and context-parallel ranks.
    last_position: int64 [], the largest position id of the whole batch.
    length: tokens a row before padding. layout, exchange, decision: who holds what, how it moves, and why.
    plans: logical plans by layer, made in the first forward and used by recomputation and backward.
    movable: layers, by repr, where query blocks may move, expected to be unequal; None if nowhere.
    dead_hops: exchanges and layers, by repr, where some hops are expected to be needed by nobody.

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
        movable: Collection[str] | None = None,
        dead_hops: Collection[tuple[str, str]] = (),
        replayed: dict[Hashable, Plan] | None = None,
        sample_recall: bool = False,
        count_keys: bool = False,
    ):
        self.cp, self.step, self.transport = cp, step, transport
        self.layout, self.exchange, self.decision = layout, decision.exchange, decision
        self.geometry, self.length = geometry, length
        self.labels, self.tokens = labels, tokens
        self.movable, self.moved = movable, dict[Hashable, Moved]()
        self.dead_hops, self.hops = dead_hops, dict[Hashable, Hops]()
        self.replayed, self.sample_recall, self.count_keys = replayed, sample_recall, count_keys
        self.tensors: dict[str, Tensor] = {}
        self.last_position: Tensor | None = None
        self.plans: dict[Hashable, Plan] = {}
        self.needs: dict[Hashable, Needs] = {}  # of plans by layer, where blocks are pulled
        self.heads: HeadShares | None = share_heads(self.exchange, geometry, layout.assignment, transport)
        self.head_plans: dict[Hashable, Plan] = {}  # of this rank's heads by layer, where ranks share heads
        if self.heads is None:
            self.schedule = schedule_of(self.exchange, transport.rank, transport.size, transport.nodes)
        else:
            self.schedule = self.heads.schedule
        held = layout.assignment if self.heads is None else self.heads.held
        self.step_blocks = step_blocks(self.schedule, held)
        self.record = Record(self.exchange, waits=Waits(geometry.device))
        self.calls: set[CallShape] = set()  # kinds of attention calls that ran

    @property
    def inputs(self) -> dict[str, Any]:
        """Keywords for the model. Made when asked: a shard that held itself would outlive its step."""
        return self.tensors | {KEYWORD: self}

    @property
    def local_length(self) -> int:
        """Tokens a row held here, S'."""
        return len(self.geometry.blocks) * self.geometry.block_size

    def prepare(self) -> None:
        """Makes the tables that a step needs. They wait for the device, which a step must not."""
        prepare(self.geometry, self.step_blocks)
        counts = self.geometry.visible_elements  # of which records are made
        del counts
        if self.pulls:
            prepare_needs(self.geometry, self.layout.assignment, self.schedule)
        if self.heads is not None:
            prepare(self.heads.geometry, self.step_blocks)
        for pattern in self.cp.patterns.values():
            pattern.prepare(self.geometry)

    @property
    def pulls(self) -> bool:
        return self.schedule.name == "pull"

    def plan(self, layer: Hashable, q: Tensor, k: Tensor, v: Tensor, scale: float) -> BoundPlan:
        """The plan of a layer, estimated by its pattern on the first call, the same one afterwards."""
        if self.heads is not None:
            self.heads.check(q.shape[1], k.shape[1])
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
            with record_function("sparring.estimate"):
                self.plans[layer] = make_plan(pattern, q, k, v, self.geometry, scale, combine)
        plan = self.plans[layer]
        if new and self.pulls:
            link = self.link("needs", layer)
            blocks = self.layout.assignment
            self.needs[layer] = exchange_needs(plan, blocks, self.schedule, link, k.shape[1])
            self.record.bytes["needs"] += self.needs[layer].header
        bound = self.needs[layer].bind(plan) if self.pulls else bind(plan, self.step_blocks)
        if new:
            work = self.record.add(layer, bound, q.shape[1], k)
            if self.movable is not None:
                self._move(layer, work, q)
            if (self.exchange, repr(layer)) in self.dead_hops:
                computed = self._moved_bound(layer) if layer in self.moved else bound
                link, sent = self.link("hops", layer), self.record.bytes
                self.hops[layer] = share_hops(computed, self.schedule, link, sent)
        return bound

    def _move(self, layer: Hashable, work: Tensor, q: Tensor) -> None:
        """Moves query blocks of a layer with a new plan, if that pays."""
        held, nodes = max(self.layout.blocks_per_rank), self.transport.nodes
        shape = (self.layout.block_size, *q.shape[:2], q.shape[3], q.itemsize)
        cost = move_cost(self.cp.machine, nodes, held, *shape)
        self.record.loads[layer] = cost, work.sum()
        if repr(layer) in self.movable:
            plan, link = self.plans[layer], self.link("move", layer)
            moved = move_queries(plan, work, self.layout, cost, link, self.record.bytes)
            if moved is not None:
                self.moved[layer] = moved
                self.record.moved[layer] = moved.blocks, moved.imbalance

    def ring(self, layer: Hashable, steps, first: bool = False) -> Ring:
        """The surroundings of one attention call. first: ranks agree at the beginning of its backward."""
        link = self.link("forward", layer, first)
        parts = (link, self.schedule, steps, max(self.layout.blocks_per_rank) * self.layout.block_size)
        if self.pulls:
            return Pull(*parts, self.record.bytes, needs=self.needs[layer])
        if self.heads is not None:
            return self._head_ring(layer, link, steps)
        if layer in self.moved:
            moved, bound = self.moved[layer], self._moved_bound(layer)
            self.record.work[layer] = moved.work(bound)
            return MovedRing(*parts, self.record.bytes, self.hops.get(layer), move=moved.move, bound=bound)
        return Ring(*parts, self.record.bytes, self.hops.get(layer))

    def _moved_bound(self, layer: Hashable) -> BoundPlan:
        """The plan of the query blocks that are computed here, where some have moved."""
        return bind_to_slots(self.moved[layer].plan, slots_of(self.geometry, self.step_blocks))

    def _head_ring(self, layer: Hashable, link: Link, steps) -> HeadRing:
        new = layer not in self.head_plans
        if new:
            self.head_plans[layer] = self.heads.plan(self.plans[layer], link, self.record.bytes)
        bound = bind(self.head_plans[layer], self.step_blocks)
        if new:
            self.record.work[layer] = self.heads.work(bound, self.record.heads)
        return self.heads.ring(link, bound, steps, self.record.bytes)

    def link(self, phase: str, layer: Hashable, entry: bool = False) -> Link:
        """The transport as a call in this phase of this layer sees it."""
        header: dict[str, object] = {"layout": self.layout.digest()}
        if self.cp.debug and layer in self.plans:
            header["plan"] = _common(self.plans[layer])
        place = Place(self.step, layer, phase)
        return Link(self.transport, place, header, self.cp.debug, entry, self.record.waits)


def unshard(x: Tensor, shard: Shard, dim: int) -> Tensor:
    """See ContextParallel.unshard."""
    width = max(shard.layout.blocks_per_rank) * shard.layout.block_size
    if x.shape[dim] != shard.local_length:
        raise ValueError(
            f"dim {dim} has {x.shape[dim]} entries, this rank holds {shard.local_length} tokens; "
            "say which dim is the sequence"
        )
    x = x.detach().movedim(dim, 0).contiguous()
    pad = (0, 0) * (x.dim() - 1) + (0, width - x.shape[0])
    parts = shard.transport.all_gather(torch.nn.functional.pad(x, pad))
    counts = [n * shard.layout.block_size for n in shard.layout.blocks_per_rank]
    physical = torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)])
    inverse = torch.from_numpy(shard.layout.inverse).to(x.device)
    return physical[inverse][: shard.length].movedim(0, dim)


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
