"""Planning: layout and exchange of every step, from its documents and from what step n - 2 was.

Ranks plan alike: what they know was summed over all of them, or proven equal, and is that of a fixed step,
however far ahead batches are sharded.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import astuple, dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from ..balance import Call, Constants, Decision, Layout, PlannerState, Statistics, resolve, step_of_source
from ..balance.by_heads import consider_heads
from ..balance.tiles import Documents
from ..kernels.attention import accumulator_dtype
from ..kernels.plan import Plan
from .coverage import check_keys
from .exchange import MOST_PULLED, fixed_exchange, may_share_heads, offered
from .hops import layers_with_dead_hops
from .move import MOVABLE, movable_layers
from .record import Record
from .transport import Transport


@dataclass(frozen=True, order=True)
class CallShape:
    """What the planner must know of an attention call; equal on all ranks.

    heads, key_heads, dim: of queries and keys. key_bytes, gradient_bytes: of one element of the keys as they
    travel, and of their gradients. alike: whether all heads have one plan, and so equal work.
    """

    heads: int
    key_heads: int
    dim: int
    key_bytes: int
    gradient_bytes: int
    alike: bool

    def divides(self, ranks: int) -> bool:
        """Whether so many ranks can share the heads, see `HeadShares.check`."""
        return not self.heads % ranks and (not self.key_heads % ranks or not ranks % self.key_heads)


def call_shape(q: Tensor, k: Tensor, plan: Plan) -> CallShape:
    """q: [B, H, S', D]; k: [B, Hk, S', D]; plan: of this layer."""
    alike = plan.mask_heads == 1 and (plan.columns is None or plan.columns.shape[1] == 1)
    return CallShape(q.shape[1], k.shape[1], q.shape[3], k.itemsize, accumulator_dtype(k).itemsize, alike)


@dataclass(frozen=True, eq=False)
class Known:
    """What is known of a step. statistics: of its plans; movable: layers, by repr, in which moving query
    blocks could have paid; calls: the different ones of its layers, ascending; dead_hops: exchange and layer
    where nobody needed some hop. No result depends on the last, which is not saved."""

    statistics: Statistics | None = None
    movable: tuple[str, ...] = ()
    calls: tuple[CallShape, ...] = ()
    dead_hops: tuple[tuple[str, str], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists."""
        vector = None if self.statistics is None else self.statistics.to_vector().tolist()
        calls = [list(astuple(call)) for call in self.calls]
        return {"statistics": vector, "movable": list(self.movable), "calls": calls}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Known:
        """The inverse of `to_dict`."""
        vector, calls = values["statistics"], tuple(CallShape(*call) for call in values["calls"])
        statistics = None if vector is None else Statistics.from_vector(np.array(vector))
        return Known(statistics, tuple(values["movable"]), calls)


@dataclass(frozen=True, eq=False)
class Ran:
    """A step whose plans nobody has looked at yet. calls: filled as its layers run."""

    record: Record
    calls: set[CallShape]


class Planning:
    """What ranks of one group planned, and what they know. All make the same calls.

    layout, exchange: as the user asked for them, the latter by name. machine: by which times are predicted.
    """

    def __init__(
        self,
        layout: str | Layout,
        exchange: str,
        transport: Transport,
        block_size: int,
        machine: Constants,
    ):
        self.layout, self.exchange, self.transport = layout, exchange, transport
        self.block_size, self.machine = block_size, machine
        self.step = 0  # of the run, the next to be planned
        self.state = PlannerState()
        self.known = Known()
        self.pending: deque[Known | Ran] = deque()  # steps that no decision has used yet

    def decide(self, documents: Documents, num_blocks: int) -> Decision:
        """The layout and the exchange of the next step. Synchronises."""
        self._collect()
        transport, known = self.transport, self.known
        fixed, call = fixed_exchange(self.exchange, transport), self._call()
        decision = resolve(
            self.layout,
            documents,
            num_blocks,
            transport.size,
            self.block_size,
            known.statistics,
            self.state,
            step_of_source(fixed, transport.size, transport.nodes),
            call,
        )
        if call is not None and may_share_heads(self.exchange, transport, known.calls):
            decision = consider_heads(decision, call, len(documents), self.state.exchange)
        if decision.exchange is None:
            decision = replace(decision, exchange=fixed)
        self.state = PlannerState(decision.layout.name, decision.exchange)
        return replace(decision, state=self.state, given=self.exchange != "auto")

    def movable(self, decision: Decision) -> tuple[str, ...] | None:
        """Layers in which query blocks may move; None where the user gave a layout, or not all keys come."""
        if self.layout != "auto" or decision.exchange not in MOVABLE or self.transport.size == 1:
            return None
        return self.known.movable

    def add(self, record: Record, calls: set[CallShape]) -> None:
        """Remembers the step that was planned last."""
        self.pending.append(Ran(record, calls))
        self.step += 1

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and lists: all that later decisions depend on. All ranks call it, between steps."""
        self.pending = deque(map(self._reduced, self.pending))
        known = [each.to_dict() for each in (self.known, *self.pending)]
        return {"step": self.step, "planner": self.state.to_dict(), "known": known}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self.step = state["step"]
        self.state = PlannerState.from_dict(state["planner"])
        self.known, *pending = map(Known.from_dict, state["known"])
        self.pending = deque(pending)

    def _collect(self) -> None:
        """Looks at all but the last step: at step n the planner knows those up to step n - 2."""
        while len(self.pending) > 1:
            known = self._reduced(self.pending.popleft())
            if known.statistics is not None:
                self.known = known

    def _reduced(self, step: Known | Ran) -> Known:
        if isinstance(step, Known):
            return step
        check_keys(step.record.keys, self.transport)
        return Known(
            step.record.statistics(self.transport, self.block_size),
            tuple(movable_layers(step.record.loads, self.transport)),
            tuple(sorted(step.calls)),
            layers_with_dead_hops(step.record, self.transport),
        )

    def _call(self) -> Call | None:
        """The widest of the attention calls; None while none is known.

        None as well where the exchange is given and moves the same bytes under every layout: those are then
        weighed by work alone, which is known better than times.
        """
        if not self.known.calls or self.exchange not in ("auto", "pull"):
            return None
        call = max(self.known.calls, key=lambda call: (call.heads * call.dim, call))
        elements = 2 * self.block_size * call.key_heads * call.dim  # of keys and values
        return Call(
            call.heads,
            call.key_heads,
            elements * call.key_bytes,
            elements * call.gradient_bytes,
            offered(self.exchange, self.transport),
            self.machine.with_dim(call.dim),
            self.transport.nodes,
            most_pulled=1.0 if self.exchange == "pull" else MOST_PULLED,
        )
