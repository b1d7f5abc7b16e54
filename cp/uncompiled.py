"""Calls that torch.compile must not look into: one graph break each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


@torch.compiler.disable(reason="sparse attention over ranks")
def uncompiled(function: Callable, *args: Any) -> Any:
    """function(*args), as if nothing were compiled."""
    return function(*args)
