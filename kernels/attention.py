"""attend: block-sparse attention on one device, and the choice of its implementation."""

from __future__ import annotations

import importlib
import importlib.util
import math
from numbers import Real
from types import ModuleType

import torch
from torch import Tensor

from .bound import BoundPlan, bind
from .columns import gather_columns, scatter_columns
from .geometry import Geometry
from .plan import Plan

MODULES = {"reference": ".reference", "triton": ".triton_steps", "hopper": ".hopper_steps"}
IMPLEMENTATIONS = ("auto", *MODULES)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    *,
    scale: float | None = None,
    impl: str = "auto",
    deterministic: bool = False,
) -> tuple[Tensor, Tensor]:
    """Softmax attention over the pairs that a plan chose, differentiable in q, k and v.

    q: [B, H, S, D]; k, v: [B, Hk, S, D] with H divisible by Hk; fp16, bf16, fp32 (fp64: reference).
    plan: holds every block of a sequence of S tokens. scale: 1 / sqrt(D) by default.
    impl: "reference" (plain PyTorch), "triton", "hopper" (compute capability 9, blocks of 128, bf16 or
    fp16; the forward over tiles, triton for the rest), or "auto" (triton on a GPU that has it).
    deterministic: bit-identical results from run to run; every present implementation is.
    Returns out like q and the natural-log normaliser lse [B, H, S] (fp32, fp64 for fp64 inputs), both
    differentiable. A query that sees nothing gives out 0, lse -inf and gradient 0.
    Raises ValueError for shapes, dtypes or devices that do not fit, TypeError for what is no tensor or
    plan, NotImplementedError for value heads of another width than key heads. Values are not looked at:
    NaN and infinities in q, k or v spread to the queries of all chosen tiles that hold them.
    """
    if not isinstance(plan, Plan):
        raise TypeError(
            f"plan is a {type(plan).__name__}; make a Plan, by Plan.build or by make_plan of a pattern"
        )
    geometry = plan.geometry
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
    pad = (0, 0, 0, geometry.num_tokens - length)
    q, k, v = (torch.nn.functional.pad(x, pad) if pad[3] else x.contiguous() for x in (q, k, v))
    scale = check_scale(scale, q.shape[3])
    bound = bind(plan, (geometry.blocks,))
    out, lse = _Attend.apply(q, k, v, bound, scale, steps(impl, q))
    return out[:, :, :length], lse[:, :, :length]


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, bound: BoundPlan, scale: float, impl: ModuleType):
        out, lse = start(q)
        impl.forward_step(q, k, v, bound, 0, out, lse, scale)
        if bound.columns is not None:
            ck, cv = gather_columns(k, bound.plan), gather_columns(v, bound.plan)
            impl.forward_columns(q, ck, cv, bound, out, lse, scale)
        ctx.bound, lists = bound.split()
        ctx.save_for_backward(q, k, v, out, lse, *lists)
        ctx.scale, ctx.impl = scale, impl
        return out.to(q.dtype), lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout, dlse):
        q, k, v, out, lse, *lists = ctx.saved_tensors
        bound, scale, impl = ctx.bound.join(lists), ctx.scale, ctx.impl
        dout = dout.contiguous()
        delta = output_delta(out, dout, dlse)
        dq, dk, dv = (torch.zeros(x.shape, dtype=out.dtype, device=x.device) for x in (q, k, v))
        impl.backward_step(q, k, v, dout, lse, delta, bound, 0, dq, dk, dv, scale)
        if bound.columns is not None:
            ck, cv = gather_columns(k, bound.plan), gather_columns(v, bound.plan)
            dck, dcv = (torch.zeros(x.shape, dtype=out.dtype, device=x.device) for x in (ck, cv))
            impl.backward_columns(q, ck, cv, dout, lse, delta, bound, dq, dck, dcv, scale)
            scatter_columns(dck, bound.plan, dk)
            scatter_columns(dcv, bound.plan, dv)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None


def accumulator_dtype(x: Tensor) -> torch.dtype:
    """fp64 for fp64 inputs, fp32 for all others: partial results never lose precision between steps."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def start(q: Tensor) -> tuple[Tensor, Tensor]:
    """Accumulators of a query that has seen nothing: out 0 and lse -inf."""
    dtype = accumulator_dtype(q)
    lse = torch.full(q.shape[:3], -math.inf, dtype=dtype, device=q.device)
    return torch.zeros(q.shape, dtype=dtype, device=q.device), lse


def output_delta(out: Tensor, dout: Tensor, dlse: Tensor) -> Tensor:
    """rowsum(out * dout) - dlse, the term that every tile of a query subtracts in the backward."""
    return (out * dout).sum(-1) - dlse


def steps(impl: str, x: Tensor) -> ModuleType:
    """The module that computes ring steps on tensors like x: see reference.py for the four functions."""
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl {impl!r} is unknown; use one of {', '.join(IMPLEMENTATIONS)}")
    has_triton = impl != "reference" and importlib.util.find_spec("triton") is not None
    if impl == "auto":
        impl = "triton" if x.is_cuda and has_triton and x.dtype != torch.float64 else "reference"
    if impl != "reference" and not has_triton:
        raise ImportError(
            f"impl {impl!r} needs the package triton, which is not installed; "
            "pip install 'triton>=3.6', or use impl='auto' or 'reference'"
        )
    return importlib.import_module(MODULES[impl], __package__)


def check_scale(scale: float | None, head_dim: int) -> float:
    """The scale of scores, 1 / sqrt(head_dim) by default. ValueError unless it is a finite number."""
    if scale is None:
        return head_dim**-0.5
    if not isinstance(scale, Real) or not math.isfinite(scale):
        raise ValueError(f"scale is {scale!r}; use a finite number, or None for 1 / sqrt({head_dim})")
    return float(scale)


def check_inputs(q: Tensor, k: Tensor, v: Tensor, geometry: Geometry) -> None:
    """Shapes, dtypes and devices of q, k, v against each other and the geometry."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(
                f"{name} is a {type(x).__name__}; use a tensor [batch, heads, sequence, head_dim]"
            )
        if x.layout != torch.strided or x.is_nested:
            raise NotImplementedError(f"{name} is a nested or sparse tensor; only dense tensors")
    if not q.dim() == k.dim() == v.dim() == 4:
        raise ValueError(
            f"q, k, v have {q.dim()}, {k.dim()}, {v.dim()} dims; all must be "
            "[batch, heads, sequence, head_dim]"
        )
    if v.shape[:3] == k.shape[:3] and q.shape[3] == k.shape[3] != v.shape[3]:
        raise NotImplementedError(
            f"value head dim {v.shape[3]} differs from key head dim {k.shape[3]} (MLA); only equal dims"
        )
    expected = (q.shape[0], k.shape[1], q.shape[2], q.shape[3])
    if tuple(k.shape) != expected or v.shape != k.shape:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit; batch, sequence and "
            "head dim must agree"
        )
    heads, kv_heads, head_dim = q.shape[1], k.shape[1], q.shape[3]
    if head_dim < 1:
        raise ValueError("head dim is 0; it needs at least 1 element")
    if heads < 1 or kv_heads < 1 or heads % kv_heads:
        raise ValueError(
            f"{heads} query heads are not divisible by {kv_heads} key heads; every key head serves the "
            "same number of query heads, at least one"
        )
    if not (q.dtype == k.dtype == v.dtype) or not q.dtype.is_floating_point or q.dtype.itemsize < 2:
        raise ValueError(
            f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; all must be one of fp16, bf16, fp32, fp64"
        )
    if not (q.device == k.device == v.device == geometry.device):
        raise ValueError(
            f"q, k, v, geometry are on {q.device}, {k.device}, {v.device}, {geometry.device}; use one device"
        )
    if q.shape[0] != geometry.batch:
        raise ValueError(
            f"batch {q.shape[0]} of q differs from batch {geometry.batch} of the plan; plan the same batch"
        )


def check_mask_heads(plan: Plan, heads: int, kv_heads: int) -> None:
    """Masks of a plan must be shared by all heads, by the queries of a key head, or by none."""
    masks = [plan.mask_heads] + ([] if plan.columns is None else [plan.columns.shape[1]])
    for mask_heads in masks:
        if mask_heads not in (1, kv_heads, heads):
            raise ValueError(
                f"the plan has {mask_heads} mask heads; use 1, {kv_heads} (key heads) or {heads} (query)"
            )
