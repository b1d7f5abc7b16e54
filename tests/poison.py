"""Uninitialised memory is NaN: what is read before it is written shows.

Not torch's own filling of uninitialised memory, which comes with deterministic algorithms: those would hide
an order of summation that is not fixed.
"""

from __future__ import annotations

import contextlib
from unittest import mock

import torch

MAKERS = ((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (torch.Tensor, "new_empty"))


@contextlib.contextmanager
def poisoned():
    """In all threads: fresh memory holds NaN, or 127 for integers and True for bool."""
    with contextlib.ExitStack() as stack:
        for owner, name in MAKERS:
            stack.enter_context(mock.patch.object(owner, name, _filled(getattr(owner, name))))
        yield


def _filled(make):
    def filled(*args, **options):
        x = make(*args, **options)
        with torch.no_grad():  # x may be a leaf that requires a gradient
            return x.fill_(torch.nan if x.is_floating_point() else 127)

    return filled
