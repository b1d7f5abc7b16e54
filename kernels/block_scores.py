"""What estimates of whole tiles share: the choice of an implementation, checks of queries and keys."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType
from typing import Literal

from torch import Tensor, float64

from .geometry import Geometry


def operations(x: Tensor, name: Literal["pooled", "antidiagonal"]) -> ModuleType:
    """The module that computes these scores on tensors like x: kernels on a GPU, else the specification."""
    kernels = x.is_cuda and x.dtype != float64 and importlib.util.find_spec("triton") is not None
    return importlib.import_module(f".triton_{name}" if kernels else f".{name}", __package__)


def check_held(name: str, x: Tensor, geometry: Geometry) -> None:
    """ValueError unless x is [B, heads, held tokens, D] of the geometry."""
    check_shape(name, x, (geometry.batch, len(geometry.blocks) * geometry.block_size))


def check_shape(name: str, x: Tensor, expected: tuple[int, int]) -> None:
    """ValueError unless x is [batch, heads, length, D] of the expected batch and length."""
    if x.dim() != 4 or (x.shape[0], x.shape[2]) != expected:
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}; the geometry needs [{expected[0]}, heads, {expected[1]}, "
            "head_dim]: as many batch rows, and whole blocks"
        )


def check_pair(q: Tensor, k: Tensor) -> None:
    """ValueError unless heads, head dims, dtypes and devices of queries and keys fit each other."""
    if k.shape[1] < 1 or q.shape[1] % k.shape[1] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"queries {tuple(q.shape)} and keys {tuple(k.shape)} do not fit; head dims must agree, and every "
            "key head serve the same number of query heads"
        )
    if q.dtype != k.dtype or q.device != k.device:
        raise ValueError(
            f"queries are {q.dtype} on {q.device}, keys {k.dtype} on {k.device}; use one dtype and one device"
        )
