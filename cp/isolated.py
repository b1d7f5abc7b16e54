"""Attention computes by itself: what surrounds a model must not reach into it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils._mode_utils import no_dispatch


@contextmanager
def isolated(device: torch.device) -> Iterator[None]:
    """Code in here runs without autocast and without the caller's dispatch modes.

    Autocast would compute accumulators and scores in low precision, and backward in another one than
    forward. Selective activation checkpointing (a dispatch mode) pairs saved with recomputed operations by
    their order, but recomputation repeats the attention and not the estimate of its plan.
    """
    with torch.autocast(device.type, enabled=False), no_dispatch():
        yield
