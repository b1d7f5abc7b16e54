"""Patterns: rules that choose tiles and columns. One family a file."""

from .base import Dense, Field, Pattern, Traits, make_plan
from .static import SinkWindow
from .vertical_slash import VerticalSlash

PATTERNS = {"dense": Dense, "sink-window": SinkWindow, "vertical-slash": VerticalSlash}

__all__ = [
    "PATTERNS",
    "Dense",
    "Field",
    "Pattern",
    "SinkWindow",
    "Traits",
    "VerticalSlash",
    "make_plan",
]
