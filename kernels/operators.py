"""attend: block-sparse attention on one device, as operators of torch.

`sparring::attend` and `sparring::attend_backward` are opaque to torch.compile, torch.export and selective
activation checkpointing, which know their shapes and their derivative. An operator takes tensors and
numbers, so a plan goes in as the tensors of its lists, `PARTS`, and is put together again inside.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from .attention import (
    accumulator_dtype,
    carried,
    check_impl,
    check_inputs,
    check_mask_heads,
    check_scale,
    output_delta,
    steps,
)
from .bound import BoundPlan, bind
from .columns import gather_columns, scatter_columns
from .geometry import Geometry
from .plan import Plan

OF_PLAN = ("tiles", "columns", "column_group")
OF_BOUND = tuple(
    f.name for f in fields(BoundPlan) if f.name not in ("plan", "num_sources", "blocks_per_source")
)
PARTS = (*OF_BOUND, *OF_PLAN)  # tensors, or None


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan | BoundPlan,
    *,
    scale: float | None = None,
    impl: str = "auto",
    deterministic: bool = False,
) -> tuple[Tensor, Tensor]:
    """Softmax attention over the pairs that a plan chose, differentiable (once) in q, k and v.

    q: [B, H, S, D]; k, v: [B, Hk, S, D] with H divisible by Hk; fp16, bf16, fp32 (fp64: reference).
    plan: holds every block of a sequence of S tokens. Bound before, `bind(plan, (plan.geometry.blocks,))`,
    it serves many calls, and code that torch.compile compiles has no graph break.
    scale: 1 / sqrt(D) by default.
    impl: "reference" (plain PyTorch), "triton", "hopper" (compute capability 9, blocks of 128, bf16 or
    fp16, head dims up to 128 that divide by 8), or "auto": the best of them for these tensors.
    deterministic: bit-identical results from run to run; only the backward of "hopper" is not otherwise.
    Returns out like q and the natural-log normaliser lse [B, H, S] (fp32, fp64 for fp64 inputs), both
    differentiable. A query that sees nothing gives out 0, lse -inf and gradient 0.
    Raises ValueError for shapes, dtypes or devices that do not fit, TypeError for what is no tensor or
    plan, NotImplementedError for value heads of another width than key heads and for second derivatives.
    Values are not looked at: NaN and infinities in q, k or v spread to the queries of all chosen tiles
    that hold them.
    """
    if not isinstance(plan, Plan | BoundPlan):
        raise TypeError(
            f"plan is a {type(plan).__name__}; make a Plan, by Plan.build or by make_plan of a pattern"
        )
    bound = plan if isinstance(plan, BoundPlan) else None
    if bound is not None:
        plan = bound.plan
    geometry = plan.geometry
    check_impl(impl)
    check_inputs(q, k, v, geometry)
    check_mask_heads(plan, q.shape[1], k.shape[1])
    if geometry.blocks != tuple(range(geometry.num_blocks)):
        raise ValueError(
            f"the plan holds {len(geometry.blocks)} of {geometry.num_blocks} blocks or another order; "
            "attend needs all of them in logical order (a shard goes through ContextParallel.attention)"
        )
    length = q.shape[2]
    if not geometry.num_tokens - geometry.block_size < length <= geometry.num_tokens:
        raise ValueError(
            f"q has {length} tokens, the plan covers {geometry.num_tokens} in blocks of "
            f"{geometry.block_size}; build the geometry for length {length}"
        )
    scale = check_scale(scale, q.shape[3])
    if bound is None:
        if torch.compiler.is_compiling():
            torch._dynamo.graph_break(
                "bind the plan before: attend(q, k, v, bind(plan, (plan.geometry.blocks,)))"
            )
        bound = bind(plan, (geometry.blocks,))
    elif bound.num_sources != 1:
        raise ValueError(f"the plan is bound to {bound.num_sources} sources; attend has one, see bind")
    pad = (0, 0, 0, geometry.num_tokens - length)
    q, k, v = (torch.nn.functional.pad(x, pad) if pad[3] else x.contiguous() for x in (q, k, v))
    numbers = (scale, impl, deterministic, geometry.block_size)
    out, lse, _ = torch.ops.sparring.attend(q, k, v, *numbers, *parts_of(bound))
    return out[:, :, :length], lse[:, :, :length]


def parts_of(bound: BoundPlan) -> list[Tensor | None]:
    """The PARTS of a bound plan."""
    return [getattr(bound.plan if name in OF_PLAN else bound, name) for name in PARTS]


def _assemble(block_size: int, parts: tuple[Tensor | None, ...]) -> BoundPlan:
    """The inverse: a bound plan of one source that holds all blocks in logical order."""
    given = dict(zip(PARTS, parts, strict=True))
    lo, hi, rows = given["lo"], given["hi"], given["tiles"].shape[2]
    geometry = _made(
        Geometry, block_size=block_size, num_tokens=lo.shape[1], lo=lo, hi=hi, blocks=range(rows)
    )
    if given["columns"] is not None:  # on the device, where to make it of `blocks` would wait for the device
        geometry.__dict__["block_ids"] = torch.arange(rows, device=lo.device)
    plan = _made(Plan, geometry=geometry, **{name: given.pop(name) for name in OF_PLAN})
    return _made(BoundPlan, plan=plan, num_sources=1, blocks_per_source=rows, **given)


def _made(kind: type, **values: Any) -> Any:
    """An object of a frozen dataclass, without the checks of its making, which read values, once more."""
    made = object.__new__(kind)
    made.__dict__.update(values)
    return made


# -- the operators ---------------------------------------------------------------------------------

_INPUTS = "Tensor q, Tensor k, Tensor v"
_NUMBERS = ("float scale", "str impl", "bool deterministic", "int block_size")
_PLAN = ", ".join((*_NUMBERS, *(f"Tensor? {name}" for name in PARTS)))
_SCHEMAS = (
    f"attend({_INPUTS}, {_PLAN}) -> (Tensor out, Tensor lse, Tensor exact)",
    f"attend_backward({_INPUTS}, Tensor exact, Tensor lse, Tensor dout, Tensor dlse, {_PLAN})"
    " -> (Tensor dq, Tensor dk, Tensor dv)",
)
_LIBRARY = torch.library.Library("sparring", "DEF")
for _schema in _SCHEMAS:
    _LIBRARY.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))


def _forward(q, k, v, scale, impl, deterministic, block_size, *parts):
    """out like q, lse, and `exact`: out before it was rounded to the dtype of q, for the backward."""
    bound, run = _assemble(block_size, parts), steps(impl, q, block_size, deterministic)
    with torch.autocast(q.device.type, enabled=False):
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        exact, lse = carried(q)
        run.forward_step(q, k, v, bound, 0, exact, lse, scale, fresh=True)
        if bound.columns is not None:
            ck, cv = gather_columns(k, bound.plan), gather_columns(v, bound.plan)
            run.forward_columns(q, ck, cv, bound, exact, lse, scale)
        return exact.to(q.dtype, copy=True), lse, exact  # an operator may not return one tensor twice


def _backward(q, k, v, exact, lse, dout, dlse, scale, impl, deterministic, block_size, *parts):
    """dq, dk, dv like q, k, v."""
    bound, run = _assemble(block_size, parts), steps(impl, q, block_size, deterministic)
    with torch.autocast(q.device.type, enabled=False):
        q, k, v, dout = q.contiguous(), k.contiguous(), v.contiguous(), dout.contiguous()
        delta = output_delta(exact, dout, dlse)
        dq, dk, dv = (torch.zeros(x.shape, dtype=exact.dtype, device=x.device) for x in (q, k, v))
        run.backward_step(q, k, v, dout, lse, delta, bound, 0, dq, dk, dv, scale)
        if bound.columns is not None:
            ck, cv = gather_columns(k, bound.plan), gather_columns(v, bound.plan)
            dck, dcv = (torch.zeros(x.shape, dtype=exact.dtype, device=x.device) for x in (ck, cv))
            run.backward_columns(q, ck, cv, dout, lse, delta, bound, dq, dck, dcv, scale)
            scatter_columns(dck, bound.plan, dk)
            scatter_columns(dcv, bound.plan, dv)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


class _Attend(torch.autograd.Function):
    """The derivative of sparring::attend."""

    @staticmethod
    def forward(ctx, q, k, v, *plan):
        with torch._C._AutoDispatchBelowAutograd():
            out, lse, exact = torch.ops.sparring.attend(q, k, v, *plan)
        ctx.numbers = plan[: len(_NUMBERS)]
        ctx.save_for_backward(q, k, v, exact, lse, *plan[len(_NUMBERS) :])
        ctx.mark_non_differentiable(exact)
        ctx.set_materialize_grads(False)  # that of exact would be as large as it
        return out, lse, exact

    @staticmethod
    def backward(ctx, dout, dlse, _):
        q, k, v, exact, lse, *parts = ctx.saved_tensors
        dout = torch.zeros_like(q) if dout is None else dout
        dlse = torch.zeros_like(lse) if dlse is None else dlse
        plan = (*ctx.numbers, *parts)
        grads = torch.ops.sparring.attend_backward(q, k, v, exact, lse, dout, dlse, *plan)
        return *grads, *[None] * len(plan)


def _refuse(ctx, *grads):
    raise NotImplementedError("the second derivative of attend; supported is the first")


def _forward_shapes(q, k, v, *plan):
    dtype = accumulator_dtype(q)
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=dtype), q.new_empty(q.shape, dtype=dtype)


def _backward_shapes(q, k, v, *rest):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


_LIBRARY.impl("attend", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("attend", _Attend.apply, "Autograd")  # register_autograd would add 0.1 ms to each call
_LIBRARY.impl("attend_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_autograd("sparring::attend_backward", _refuse, lib=_LIBRARY)
torch.library.register_fake("sparring::attend", _forward_shapes, lib=_LIBRARY)
torch.library.register_fake("sparring::attend_backward", _backward_shapes, lib=_LIBRARY)
