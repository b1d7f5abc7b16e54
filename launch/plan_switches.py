"""Which switches make a training fit, and how long a sequence each of them allows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from .config import TrainConfig
from .plan_memory import OVERHEAD, peak
from .plan_model import ModelSizes

TILES = 8  # of the feed-forward part; more gain little, as attention then needs most

#: From the cheapest in time to the dearest. Each one needs no more memory than those before it, but that full
#: checkpointing holds both norms of the layer at work at once, which counts where activations hardly do.
SETS: tuple[tuple[str, dict[str, Any]], ...] = tuple(
    (name, {"checkpointing": kind, "mlp_tiles": tiles, "offload": offload})
    for name, kind, tiles, offload in (
        ("no switches", "none", 1, False),
        ("--checkpointing selective", "selective", 1, False),
        ("--checkpointing full", "full", 1, False),
        (f"--checkpointing full --mlp-tiles {TILES}", "full", TILES, False),
        (f"--checkpointing full --mlp-tiles {TILES} --offload", "full", TILES, True),
    )
)


@dataclass(frozen=True)
class Option:
    """A set of switches: bytes that it needs for the sequence asked for, whether it fits, and the longest
    sequence that does, in tokens; 0 if none does."""

    switches: str
    bytes: float
    fits: bool
    longest: int


def options(model: ModelSizes, config: TrainConfig, gpus: int, memory: float) -> list[Option]:
    """All sets. memory: bytes of a GPU."""
    found = []
    for name, switches in SETS:
        changed = replace(config, **switches)
        needed = peak(model, changed, gpus) + OVERHEAD
        found.append(Option(name, needed, needed <= memory, longest(model, changed, gpus, memory)))
    return found


def longest(model: ModelSizes, config: TrainConfig, gpus: int, memory: float) -> int:
    """Tokens of the longest sequence that fits, in multiples of W blocks."""
    unit = gpus // config.dp * config.block_size

    def fits(count: int) -> bool:
        return peak(model, replace(config, seq_len=count * unit), gpus) + OVERHEAD <= memory

    return unit * largest(fits)


def largest(fits: Callable[[int], bool]) -> int:
    """The largest count that fits, if all below it do and some above does not; 0 if 1 does not."""
    if not fits(1):
        return 0
    low = 1
    while fits(2 * low):
        low *= 2
    high = 2 * low
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
