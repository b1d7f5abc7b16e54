"""Selection of the heaviest entries: exact integer masses, ties to the lower id, no host sync."""

from __future__ import annotations

import torch
from torch import Tensor

ID_BITS = 24  # ids up to 16.7 million
_FORCED = 1 << 61


def encode(mass: Tensor, ids: Tensor, forced: Tensor) -> Tensor:
    """One int64 that sorts descending by (forced, mass, lower id first). mass < 2^37, 0 <= ids < 2^24."""
    return (mass << ID_BITS) + ((1 << ID_BITS) - 1 - ids) + forced * _FORCED


def decode(code: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """mass, ids and forced of encoded entries; an invalid entry is negative."""
    forced = code >= _FORCED
    code = code - forced * _FORCED
    return code >> ID_BITS, (1 << ID_BITS) - 1 - (code & ((1 << ID_BITS) - 1)), forced


def keep_top_p(mass: Tensor, forced: Tensor, target: Tensor, floor: int, cap: int | Tensor) -> Tensor:
    """bool like mass: which of the entries, sorted by encode() in the last dim, are kept.

    The shortest prefix whose mass reaches `target` (int64, mass still to be covered), but at least
    `floor` and at most `cap` entries; forced entries (they come first) within the cap.
    """
    before = mass.cumsum(-1) - mass
    place = torch.arange(mass.shape[-1], device=mass.device)
    wanted = (before < target[..., None]) | (place < floor) | forced
    return wanted & (place < cap)
