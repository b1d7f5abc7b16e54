"""ContextParallel: what a user holds. It shards batches, runs attention across ranks and reports."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..balance import H200, Constants, Decision, Layout, resolve
from ..balance.layout import named
from ..kernels.attention import IMPLEMENTATIONS
from ..kernels.geometry import Geometry, check_length
from ..kernels.patterns import Pattern
from ..kernels.patterns.base import check_counts
from ..kernels.plan import Plan
from .agreement import check_agreement, check_parameters
from .attach import attach_model, detach_model, head_of
from .batch import IGNORE, check_batch, find_documents, position_ids, shift_labels, take
from .call import attend
from .coverage import check_keys
from .errors import Place
from .exchange import check_exchange, exchange_name, fixed_exchange
from .link import Link
from .loss import GlobalLoss, count_labels, sum_gradients, token_loss_sum
from .mesh import connect
from .patterns import patterns_by_layer
from .planning import Planning
from .report import Report, combine
from .shard import Shard, full_plans, unshard
from .transport import Alone, Distributed
from .verify import Verification, verify_model


class ContextParallel:
    """Trains a model on sequences sharded over the ranks of a mesh.

    mesh: DeviceMesh; None for one process. axes: its context-parallel axis, or two, of the nodes and of the
        ranks inside a node. data_axes: its data axes, so that losses and gradients know the whole group.
    pattern: a Pattern, the name of one, or {layer: pattern} with an optional "default".
    layout: "auto" (chosen each step), "contiguous", "zigzag", "striped", "striped(g)", or a Layout.
    exchange: how keys reach the ranks that need them: "ring"; "hierarchical", a ring of nodes around rings
        inside of them; "gather", from every rank to all others at once; "pull", of needed blocks; "heads",
        all tokens of a share of the heads; ("heads", "ring"), that inside a node and a ring of nodes; "auto":
        chosen each step by predicted time, from what attention was two steps before, among a ring
        (hierarchical if there are two axes; until attention is known it is that), a pull and heads. Not
        gather, whose memory grows with the whole sequence, a pull of more than half of the keys, or heads
        that ranks cannot share or that have plans of their own.
    machine: cost constants that times are predicted with; those of H200 GPUs, or of the machine at hand by
        `sparring.balance.read_constants` of the file that benchmarks/calibrate.py writes; equal on all ranks.
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
        machine: Constants = H200,
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
        self.patterns = patterns_by_layer(pattern)
        self.exchange = exchange_name(exchange, axes, self.transport)
        self.layout, self.machine, self.grad_reduce = layout, machine, grad_reduce
        self.deterministic, self.debug, self.impl = deterministic, debug, impl
        self.block_size, self.recall_every, self.count_keys = block_size, recall_every, count_keys
        self.model: nn.Module | None = None
        self._planning = Planning(layout, self.exchange, self.transport, block_size, machine)
        self._sharded = 0  # steps seen by this object
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
            step=self._planning.step,
            layout=decision.layout,
            decision=decision,
            transport=transport,
            geometry=geometry,
            length=length,
            labels=None if labels is None else take(labels, geometry, IGNORE),
            tokens=0,
            movable=self._planning.movable(decision) if transport is self.transport else None,
            dead_hops=self._planning.known.dead_hops if transport is self.transport else (),
            replayed=self._replay,
            sample_recall=bool(self.recall_every) and self._planning.step % self.recall_every == 0,
            count_keys=self._sharded < self.count_keys,
        )
        positions = position_ids(batch, documents, size, length)
        shard.tensors = self._tensors(batch, positions, geometry)
        shard.last_position = positions.max()
        if transport is self.transport:
            check_agreement(shard, batch)
            if self.model is not None and shard.step == 1:
                check_parameters(self.model, self.everyone)
            self._planning.add(shard.record, shard.calls)
            self._last = (shard.record, transport, shard.decision)
            self._sharded += 1
        group = self.everyone if transport is self.transport else Alone()
        shard.tokens = count_labels(shard.labels, group, shard.geometry.device)
        shard.prepare()
        return shard

    def _decide(self, documents, num_blocks: int, transport, layout: str | Layout | None) -> Decision:
        """layout: of a shard that is no step of the run, where nothing is left to choose."""
        if layout is None:
            return self._planning.decide(documents, num_blocks)
        decision = resolve(layout, documents, num_blocks, transport.size, self.block_size)
        return replace(decision, exchange=fixed_exchange(self.exchange, transport))

    def _tensors(self, batch, positions: Tensor, geometry: Geometry) -> dict[str, Tensor]:
        given = {name: batch[name] for name in ("input_ids", "inputs_embeds") if name in batch}
        return {name: take(x, geometry, 0) for name, x in (given | {"position_ids": positions}).items()}

    def unshard(self, x: Tensor, shard: Shard, dim: int = 1) -> Tensor:
        """The full tensor in logical order, without padding, from every rank's [..., S', ...] at dim."""
        return unshard(x, shard, dim)

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

            return uncompiled(attend, self, q, k, v, shard, layer, scale)
        return attend(self, q, k, v, shard, layer, scale)

    def first(self, call: Hashable, shard: Shard) -> bool:
        """Whether this step is the first with such a call."""
        return self._agreed.setdefault(call, shard.step) == shard.step

    def pattern_of(self, layer: Hashable) -> Pattern:
        return self.patterns.get(layer, self.patterns["default"])

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
        entry = self.first(("loss", group.size), shard)
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
        return combine(record, transport, decision)

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
        return self._planning.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self._planning.load_state_dict(state)
