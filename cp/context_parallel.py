"""ContextParallel: what a user holds. It shards batches, runs attention across ranks and reports."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..balance import (
    H200,
    Decision,
    Layout,
    PlannerState,
    Schedule,
    Statistics,
    resolve,
    schedule_of,
    step_of_source,
)
from ..balance.layout import named
from ..kernels.attention import IMPLEMENTATIONS, check_inputs, check_mask_heads, check_scale, steps
from ..kernels.geometry import Geometry, check_length
from ..kernels.patterns import PATTERNS, Pattern
from ..kernels.patterns.base import check_counts
from ..kernels.plan import Plan
from .attach import attach_model, detach_model, head_of
from .batch import (
    IGNORE,
    KNOWN,
    check_batch,
    find_documents,
    fingerprint,
    position_ids,
    shift_labels,
)
from .coverage import check_keys, count_keys
from .errors import Place
from .estimate import sampled_recall
from .exchange import check_exchange, resolve_exchange
from .finite import check_finite
from .heads import sharded_attention
from .isolated import isolated
from .link import Link
from .loss import GlobalLoss, checksum, sum_gradients, token_loss_sum
from .mesh import connect
from .move import MOVABLE, movable_layers
from .record import Record
from .report import Report, combine
from .shard import Shard, full_plans
from .transport import Alone, Distributed, Transport, agree
from .verify import Verification, verify_model

Known = tuple[Statistics | None, list[str]]  # of a step: for the planner, and where queries may move


class ContextParallel:
    """Trains a model on sequences sharded over the ranks of a mesh.

    mesh: DeviceMesh; None for one process. axes: its context-parallel axis, or two, of the nodes and of the
        ranks inside a node. data_axes: its data axes, so that losses and gradients know the whole group.
    pattern: a Pattern, the name of one, or {layer: pattern} with an optional "default".
    layout: "auto" (chosen each step), "contiguous", "zigzag", "striped", "striped(g)", or a Layout.
    exchange: how keys reach the ranks that need them: "ring"; "hierarchical", a ring of nodes around rings
        inside of them; "gather", from every rank to all others at once; "pull", of needed blocks; "heads",
        all tokens of a share of the heads; ("heads", "ring"), that inside a node and a ring of nodes; "auto":
        hierarchical if there are two axes, else ring.
    grad_reduce: "mean" if FSDP or DDP average gradients over data and context-parallel ranks, "sum" with
        `sum_gradients` (or anything else that sums).
    deterministic: bit-identical from run to run, at some cost in the backward on Hopper GPUs.
    debug: check a header at every transfer, and that q, k and v of every layer are finite: all ranks
        raise FloatingPointError that names tensor, layer and rank. Slow: it waits for the device. Without
        it values are not looked at: NaN and infinities spread to the queries whose tiles hold them.
    block_size: tokens in a block. recall_every: steps between two samples of recall, 0 for never.
    count_keys: first steps in which every layer counts the keys that its queries see (one forward more);
        `report`, or `shard` two steps later, raises RuntimeError if the plans promise others.
    impl: kernels, "auto", "reference" or "triton". timeout: seconds to wait for another rank before
        RingTimeoutError.
    """

    def __init__(
        self,
        mesh,
        axes: tuple[str, ...] = ("cp",),
        data_axes: tuple[str, ...] = (),
        *,
        pattern: Pattern | str | Mapping[Hashable, Pattern | str] = "vertical-slash",
        layout: str | Layout = "auto",
        exchange: str | tuple[str, str] = "auto",
        grad_reduce: str = "mean",
        deterministic: bool = False,
        debug: bool = False,
        block_size: int = 128,
        recall_every: int = 10,
        count_keys: int = 1,
        impl: str = "auto",
        timeout: float = 300.0,
    ):
        check_exchange(exchange)
        if grad_reduce not in ("mean", "sum"):
            raise ValueError(f"grad_reduce {grad_reduce!r} is unknown; use 'mean' (FSDP, DDP) or 'sum'")
        if impl not in IMPLEMENTATIONS:
            raise ValueError(f"impl {impl!r} is unknown; use one of {', '.join(IMPLEMENTATIONS)}")
        check_length(1, block_size)
        check_counts(recall_every=recall_every, count_keys=count_keys)
        if not 0 < timeout < math.inf:
            raise ValueError(f"timeout is {timeout} seconds; use a finite number above 0")
        if not isinstance(layout, Layout) and layout != "auto":
            named(layout, 1, 1, block_size)  # raises if there is no such layout
        groups = connect(mesh, axes, data_axes, timeout)
        self.transport, self.everyone = groups.ring, groups.everyone
        self.patterns = _patterns(pattern)
        self.exchange = resolve_exchange(exchange, axes, self.transport)
        self.layout, self.grad_reduce = layout, grad_reduce
        self.deterministic, self.debug, self.impl = deterministic, debug, impl
        self.block_size, self.recall_every, self.count_keys = block_size, recall_every, count_keys
        self.model: nn.Module | None = None
        self._step = self._sharded = 0  # steps of the run, and those seen by this object
        self._planner = PlannerState()
        self.machine = H200  # what moving query blocks is weighed by
        self._statistics: Statistics | None = None
        self._movable: list[str] = []  # layers where moving query blocks could have paid
        self._pending: deque = deque()  # records of steps whose statistics have not been used yet
        self._last: tuple | None = None  # record, transport and decision of the last shard
        self._replay: dict[Hashable, Plan] | None = None
        self._agreed: dict = {}  # kinds of calls, and the step in which all ranks compared theirs
        if self.everyone.rank == 0:
            print(self)

    def __repr__(self) -> str:
        pattern = self.patterns["default"] if len(self.patterns) == 1 else self.patterns
        return (
            f"ContextParallel(cp {self.transport.size} of {self.everyone.size} ranks, pattern={pattern}, "
            f"layout={self.layout}, exchange={self.exchange}, grad_reduce={self.grad_reduce}, "
            f"block_size={self.block_size})"
        )

    # -- the model --------------------------------------------------------------------------------

    def attach(self, model: nn.Module, *, whole_logits: bool = False) -> nn.Module:
        """Routes the model's attention through this object; returns the model.

        Call it before checkpointing, compilation, FSDP, DDP. transformers models then return hidden
        states in `logits` and `loss` applies their head in chunks, unless whole_logits. Unsupported
        layers raise NotImplementedError by name.
        """
        if self.model is not None:
            raise ValueError("attach was called before; detach the first model or use another object")
        attach_model(self, model, whole_logits)
        self.model = model
        return model

    def detach(self, model: nn.Module) -> nn.Module:
        """Undoes `attach`."""
        if self.model is not model:
            raise ValueError("this model is not attached to this object; detach the one that attach returned")
        detach_model(model)
        self.model = None
        return model

    def close(self) -> None:
        """Releases the process groups made here; all ranks call it, and nothing else afterwards."""
        for transport in {self.transport, self.everyone}:
            if isinstance(transport, Distributed):
                transport.close()

    # -- a batch ----------------------------------------------------------------------------------

    def shard(self, batch: Mapping[str, Tensor]) -> Shard:
        """This rank's part of a batch that all ranks of the context-parallel group hold in full.

        batch: input_ids [B, S, ...] (or inputs_embeds [B, S, E]); optional labels (as transformers has them,
        not shifted) or shift_labels; documents by document_ids or restarting position_ids; a padding
        attention_mask. Labels are shifted, the length is padded to ranks x block_size, the layout of
        this step is chosen, ranks check that they agree. Synchronises; not part of the step path.
        """
        return self._shard(batch, self.transport)

    def _shard(self, batch: Mapping[str, Tensor], transport, layout: str | Layout | None = None) -> Shard:
        batch = dict(batch)
        size, length = check_batch(batch, self.block_size)
        documents = find_documents(batch, size, length)
        unit = transport.size * self.block_size
        if isinstance(self.layout, Layout) and layout is None:
            unit = self.block_size  # a layout of one's own may be uneven
        padded = -(-length // unit) * unit
        decision = self._decide(documents, padded // self.block_size, transport, layout)
        held = decision.layout.assignment[transport.rank]
        tokens = batch.get("input_ids", batch.get("inputs_embeds"))
        geometry = Geometry.causal(size, length, self.block_size, documents).pad_to(padded)
        geometry = geometry.to(tokens.device).select(held)
        labels = shift_labels(batch, documents, length)
        shard = Shard(
            cp=self,
            step=self._step,
            layout=decision.layout,
            decision=decision,
            transport=transport,
            geometry=geometry,
            length=length,
            labels=None if labels is None else _take(labels, geometry, IGNORE),
            tokens=0,
            movable=self._movable if self._may_move(transport) else None,
            replayed=self._replay,
            sample_recall=bool(self.recall_every) and self._step % self.recall_every == 0,
            count_keys=self._sharded < self.count_keys,
        )
        positions = position_ids(batch, documents, size, length)
        shard.tensors = self._tensors(batch, positions, geometry)
        shard.last_position = positions.max()
        if transport is self.transport:
            self._check_agreement(shard, batch)
            self._check_parameters()
            self._pending.append(shard.record)
            self._last = (shard.record, transport, shard.decision)
            self._step, self._sharded = self._step + 1, self._sharded + 1
        shard.tokens = self._count_labels(shard)
        shard.prepare()
        return shard

    def _decide(self, documents, num_blocks: int, transport, layout) -> Decision:
        wanted = self.layout if layout is None else layout
        own = transport is self.transport
        if own:
            self._collect_statistics()
        decision = resolve(
            wanted,
            documents,
            num_blocks,
            transport.size,
            self.block_size,
            self._statistics,
            self._planner,
            step_of_source(self.exchange, transport.size, transport.nodes),
        )
        if own:
            self._planner = decision.state
        return decision

    def _collect_statistics(self) -> None:
        """Reduces the plans of all but the last step: at step n the planner knows those of step n - 2."""
        while len(self._pending) > 1:
            known = self._reduced(self._pending.popleft())
            if known[0] is not None:
                self._statistics, self._movable = known

    def _reduced(self, step: Record | Known) -> Known:
        if not isinstance(step, Record):
            return step
        check_keys(step.keys, self.transport)
        statistics = step.statistics(self.transport, self.block_size)
        return statistics, movable_layers(step.loads, self.transport)

    def _may_move(self, transport) -> bool:
        """Whether query blocks may move inside layers: only where the planner chooses who holds what."""
        return self.layout == "auto" and self.exchange in MOVABLE and transport.size > 1

    def _tensors(self, batch, positions: Tensor, geometry: Geometry) -> dict[str, Tensor]:
        given = {name: batch[name] for name in ("input_ids", "inputs_embeds") if name in batch}
        return {name: _take(x, geometry, 0) for name, x in (given | {"position_ids": positions}).items()}

    def _count_labels(self, shard: Shard) -> int:
        """Over all ranks; replicas without labels count as zero and take part all the same."""
        count = torch.zeros((), dtype=torch.int64, device=shard.geometry.device)
        if shard.labels is not None:
            count += (shard.labels != IGNORE).sum()
        group = self.everyone if shard.transport is self.transport else Alone()
        group.all_reduce(count).wait()
        return int(count)

    def _check_agreement(self, shard: Shard, batch: dict[str, Tensor]) -> None:
        """Ranks prove that they hold the same batch and chose the same layout."""
        names = ("step", "batch size", "length", *KNOWN, "layout")
        contents = [fingerprint(batch[name]) if name in batch else 0 for name in KNOWN]
        values = [self._step, shard.geometry.batch, shard.length, *contents, shard.layout.digest()]
        agree(self.transport, dict(zip(names, values, strict=True)), shard.geometry.device)

    def _check_parameters(self) -> None:
        """At the second shard: replicated parameters must still be equal, or gradients were not summed."""
        if self.model is None or self._step != 1:
            return
        sums = checksum(self.model.parameters())
        if sums is not None:
            table = self.everyone.all_gather(sums)
            differing = (table != table[0]).any(0).nonzero()[:, 0].tolist()
            if differing:
                names = [n for n, p in self.model.named_parameters() if not hasattr(p, "placements")]
                raise ValueError(
                    f"{len(differing)} of {len(names)} replicated parameters differ between ranks, first "
                    f"{names[differing[0]]}; start from one seed and call cp.sum_gradients(model) before "
                    "the optimizer step, or wrap the model in DDP or FSDP over data and cp axes"
                )

    def unshard(self, x: Tensor, shard: Shard, dim: int = 1) -> Tensor:
        """The full tensor in logical order, without padding, from every rank's [..., S', ...] at dim."""
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

    # -- inside the step --------------------------------------------------------------------------

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, shard: Shard, layer: Hashable = 0, scale: float | None = None
    ) -> Tensor:
        """Attention of this rank's queries over the whole sequence; differentiable.

        q: [B, H, S', D]; k, v: [B, Hk, S', D], this rank's tokens in the order of the shard. layer: key
        of the plan; give every attention layer its own. scale: 1 / sqrt(D) by default. In code that
        torch.compile compiles the call is one graph break.
        """
        if torch.compiler.is_compiling():
            from .uncompiled import uncompiled  # imports the compiler, so not with the package

            return uncompiled(self._attention, q, k, v, shard, layer, scale)
        return self._attention(q, k, v, shard, layer, scale)

    def _attention(
        self, q: Tensor, k: Tensor, v: Tensor, shard: Shard, layer: Hashable, scale: float | None
    ) -> Tensor:
        if not isinstance(shard, Shard):
            raise TypeError(f"shard is a {type(shard).__name__}; pass what cp.shard(batch) returned")
        if shard.cp is not self:
            raise ValueError("the shard is of another ContextParallel; pass what cp.shard(batch) returned")
        if any(isinstance(x, DTensor) for x in (q, k, v)):
            raise NotImplementedError("q, k or v is a DTensor; pass local tensors, x.to_local()")
        check_inputs(q, k, v, shard.geometry)
        if q.shape[2] != shard.local_length:
            raise ValueError(
                f"q has {q.shape[2]} tokens, this rank holds {shard.local_length} of the sequence; pass "
                "the model shard.inputs, and no cache"
            )
        scale = check_scale(scale, q.shape[3])
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        with isolated(q.device):
            first = self._check_call(q, k, shard, layer)
            if self.debug:
                check_finite({"q": q, "k": k, "v": v}, layer, shard.transport)
            bound = shard.plan(layer, q.detach(), k.detach(), v.detach(), scale)
            check_mask_heads(bound.plan, q.shape[1], k.shape[1])
            shard.record.ran(layer, bound)
            around = shard.ring(layer, steps(self.impl, q, self.block_size, self.deterministic), first)
            if shard.count_keys:  # before the attention, after which recomputation may stop
                shard.record.keys.setdefault(layer, []).append(count_keys(q, k, v, bound, around, scale))
            out, lse = sharded_attention(q, k, v, bound, around, scale)
            if shard.sample_recall and layer not in shard.record.recall:
                with torch.no_grad():
                    shard.record.recall[layer] = sampled_recall(
                        q, k, lse, shard.geometry, shard.link("recall", layer), scale
                    )
        return out

    def _check_call(self, q: Tensor, k: Tensor, shard: Shard, layer: Hashable) -> bool:
        """Ranks prove that they are in the same layer with equal shapes; returns whether they did.

        In every forward, recomputation and backward of the first step with such a call, in debug always.
        Synchronises then. What travels in a ring must have the same size everywhere, and gloo aborts the
        process, or fills tensors with rubbish, where it has not.
        """
        call = {"query heads": q.shape[1], "key heads": k.shape[1], "head dim": q.shape[3], "dtype": q.dtype}
        first = self._first((layer, *call.values(), shard.transport.size), shard)
        shard.link("forward", layer, first).enter(q.device, **call)
        return first

    def _first(self, call: Hashable, shard: Shard) -> bool:
        """Whether this step is the first with such a call."""
        return self._agreed.setdefault(call, shard.step) == shard.step

    def pattern_of(self, layer: Hashable) -> Pattern:
        return self.patterns.get(layer, self.patterns["default"])

    def schedule(self, transport: Transport) -> Schedule:
        return schedule_of(self.exchange, transport.rank, transport.size, transport.nodes)

    def loss(
        self,
        output: Any,
        shard: Shard,
        *,
        tokens: int | None = None,
        head: nn.Module | None = None,
    ) -> Tensor:
        """Mean cross-entropy over all valid labels of the step; its value is equal on all ranks.

        output: of an attached transformers model, or logits [B, S', V], or hidden states [B, S', E] with
        the `head` that makes logits of them. tokens: valid labels of the whole optimizer step, the sum
        of shard.tokens over its micro-batches; this batch's by default. The gradient is this rank's
        share, to be averaged or summed over data and context-parallel ranks as grad_reduce says.
        """
        if shard.labels is None:
            raise ValueError("the batch had no labels; give cp.shard labels or shift_labels")
        hidden = output if isinstance(output, Tensor) else getattr(output, "logits", None)
        if not isinstance(hidden, Tensor):
            raise ValueError(f"output is a {type(output).__name__}; pass the logits that are in it, a tensor")
        if tokens is not None and tokens < 1:
            raise ValueError(f"tokens is {tokens}; give the sum of shard.tokens over the micro-batches")
        if head is None and not isinstance(output, Tensor):
            head = head_of(self.model)
        vocab = hidden.shape[-1] if head is None else head.weight.shape[0]
        total = token_loss_sum(hidden, shard.labels, head, vocab)
        count = shard.tokens if tokens is None else tokens
        group = self.everyone if shard.transport is self.transport else Alone()
        entry = self._first(("loss", group.size), shard)
        group = Link(group, Place(shard.step, phase="loss"), {}, self.debug, entry)
        group.enter(total.device, labels=count)
        scale = group.size if self.grad_reduce == "mean" else 1
        return GlobalLoss.apply(total / max(1, count), group, scale)

    def sum_gradients(self, model: nn.Module) -> None:
        """Sums .grad over data and context-parallel ranks: the plain loop's stand-in for DDP."""
        if self.grad_reduce != "sum":
            raise ValueError(
                'sum_gradients needs ContextParallel(grad_reduce="sum"); with "mean" the loss is scaled '
                "for the average that DDP or FSDP take"
            )
        sum_gradients(model.parameters(), self.everyone)

    # -- knowing ----------------------------------------------------------------------------------

    def report(self, shard: Shard | None = None) -> Report:
        """What was done with a shard (the last one) over the group, and predicted. All ranks call it."""
        if shard is None and self._last is None:
            raise ValueError("nothing to report yet; call shard and run the model first")
        of = self._last if shard is None else (shard.record, shard.transport, shard.decision)
        record, transport, decision = of
        check_keys(record.keys, transport)
        return combine(record, transport, decision, self.exchange)

    def plans(self, shard: Shard) -> dict[Hashable, Plan]:
        """Plans of the whole sequence by layer, for `replay`. All ranks call it."""
        return full_plans(shard)

    @contextmanager
    def replay(self, plans: dict[Hashable, Plan]) -> Iterator[None]:
        """Shards made inside use these plans (of the whole sequence, from `plans`) and estimate none."""
        before, self._replay = self._replay, plans
        try:
            yield
        finally:
            self._replay = before

    def verify(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Verification:
        """Compares the sharded model with one process on the same short batch and the same plans."""
        return verify_model(self, model, batch)

    def state_dict(self) -> dict[str, Any]:
        """The planner's memory, plain numbers and lists. All ranks call it, between steps."""
        self._pending = deque(map(self._reduced, self._pending))
        known = [(self._statistics, self._movable), *self._pending]
        vectors = [None if each is None else each.to_vector().tolist() for each, _ in known]
        state = {"step": self._step, "planner": self._planner.to_dict(), "statistics": vectors}
        return state | {"movable": [layers for _, layers in known]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self._step = state["step"]
        self._planner = PlannerState.from_dict(state["planner"])
        known = [v if v is None else Statistics.from_vector(np.array(v)) for v in state["statistics"]]
        (self._statistics, self._movable), *pending = zip(known, state["movable"], strict=True)
        self._pending = deque(pending)


def _take(x: Tensor, geometry: Geometry, fill: int) -> Tensor:
    """[B, S, ...] -> this rank's tokens [B, S', ...] in physical order, padding filled."""
    tail = geometry.num_tokens - x.shape[1]
    pad = (0, 0) * (x.dim() - 2) + (0, tail)
    return torch.nn.functional.pad(x, pad, value=fill)[:, geometry.positions].contiguous()


def _patterns(pattern) -> dict[Hashable, Pattern]:
    """{layer: Pattern} with a "default"."""
    table = dict(pattern) if isinstance(pattern, Mapping) else {"default": pattern}
    table.setdefault("default", "vertical-slash")
    for layer, choice in table.items():
        if isinstance(choice, str):
            if choice not in PATTERNS:
                raise ValueError(f"pattern {choice!r} is unknown; use one of {list(PATTERNS)} or an object")
            table[layer] = PATTERNS[choice]()
        elif not isinstance(choice, Pattern):
            raise ValueError(
                f"pattern {choice!r} of layer {layer!r} is neither a Pattern nor a name; use an object, or "
                f"one of {list(PATTERNS)}"
            )
    return table
