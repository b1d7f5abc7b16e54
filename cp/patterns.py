"""The pattern of every layer, from what a user may give."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

from ..kernels.patterns import PATTERNS, Pattern


def patterns_by_layer(pattern: Pattern | str | Mapping[Hashable, Pattern | str]) -> dict[Hashable, Pattern]:
    """{layer: Pattern} with a "default". ValueError for what is neither a Pattern nor the name of one."""
    table = dict(pattern) if isinstance(pattern, Mapping) else {"default": pattern}
    table.setdefault("default", "vertical-slash")
    for layer, choice in table.items():
        if isinstance(choice, str):
            if choice not in PATTERNS:
                raise ValueError(f"pattern {choice!r} is unknown; use one of {list(PATTERNS)} or an object")
            table[layer] = PATTERNS[choice]()
        elif not isinstance(choice, Pattern):
            raise ValueError(
                f"pattern {choice!r} of layer {layer!r} is neither a Pattern nor a name; use an object, or "
                f"one of {list(PATTERNS)}"
            )
    return table
