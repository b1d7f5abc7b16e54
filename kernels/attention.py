"""What every attention call shares: the choice of an implementation, the carried state, checks of inputs."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import math
from numbers import Real
from types import ModuleType

import torch
from torch import Tensor

from .geometry import Geometry
from .plan import Plan

MODULES = {"reference": ".reference", "triton": ".triton_steps", "hopper": ".hopper_steps"}
IMPLEMENTATIONS = ("auto", *MODULES)


def accumulator_dtype(x: Tensor) -> torch.dtype:
    """fp64 for fp64 inputs, fp32 for all others: partial results never lose precision between steps."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def carried(q: Tensor) -> tuple[Tensor, Tensor]:
    """out and lse for the steps to write; they hold nothing yet, so that the first step is a fresh one."""
    dtype = accumulator_dtype(q)
    out, lse = (torch.empty(shape, dtype=dtype, device=q.device) for shape in (q.shape, q.shape[:3]))
    return out, lse


def output_delta(out: Tensor, dout: Tensor, dlse: Tensor) -> Tensor:
    """rowsum(out * dout) - dlse, the term that every tile of a query subtracts in the backward."""
    if out.is_cuda and out.dtype == torch.float32 and _has_triton():
        return importlib.import_module(".triton_delta", __package__).output_delta(out, dout, dlse)
    return (out * dout).sum(-1) - dlse


def steps(impl: str, q: Tensor, block_size: int, deterministic: bool = False) -> ModuleType:
    """The module that computes ring steps on queries like q: see reference.py for the four functions.

    "auto" is hopper where it can be, else triton, on GPUs with the package triton, and reference elsewhere.
    deterministic: bit-identical from run to run; also under torch.use_deterministic_algorithms.
    """
    check_impl(impl)
    if impl == "auto":
        impl = _pick(q.device, q.dtype, q.shape[3], block_size)
    elif impl != "reference" and not _has_triton():
        raise ImportError(
            f"impl {impl!r} needs the package triton, which is not installed; "
            "pip install 'triton>=3.6', or use impl='auto' or 'reference'"
        )
    if impl == "hopper" and (deterministic or torch.are_deterministic_algorithms_enabled()):
        return importlib.import_module(".hopper_deterministic_steps", __package__)
    return importlib.import_module(MODULES[impl], __package__)


@functools.cache
def _pick(device: torch.device, dtype: torch.dtype, head_dim: int, block_size: int) -> str:
    """What "auto" stands for. Logged, once in a process for each device, dtype and shape."""
    impl = "reference"
    if device.type == "cuda" and dtype != torch.float64 and _has_triton():
        hopper = torch.cuda.get_device_capability(device)[0] == 9 and dtype.itemsize == 2
        impl = (
            "hopper" if hopper and head_dim <= 128 and head_dim % 8 == 0 and block_size == 128 else "triton"
        )
    what = f"{dtype}, head dim {head_dim}, blocks of {block_size}"
    logging.getLogger(__name__).info("impl 'auto' is %r on %s for %s", impl, device, what)
    return impl


def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def check_impl(impl: str) -> None:
    """ValueError unless it is the name of an implementation or "auto"."""
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl {impl!r} is unknown; use one of {', '.join(IMPLEMENTATIONS)}")


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
