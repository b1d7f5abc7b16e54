"""Typed errors of distributed execution; all can be pickled."""

from __future__ import annotations


class RingDesyncError(RuntimeError):
    """Ranks disagree on what they exchange: layout, shapes, dtypes, step or layer."""


class RingTimeoutError(RuntimeError):
    """A peer did not answer in time."""
