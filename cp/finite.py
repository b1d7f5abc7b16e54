"""The guard of debug mode: NaN and infinities are named where they enter attention, on every rank at once."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from .transport import Transport


def check_finite(tensors: dict[str, Tensor], layer: Hashable, transport: Transport) -> None:
    """FloatingPointError, on every rank of the group, if any rank has NaN or infinities in its tensors.

    All ranks call it with the same names. Synchronises.
    """
    bad = torch.stack([(~x.detach().isfinite()).sum() for x in tensors.values()])
    table = transport.all_gather(bad).tolist()
    found = [
        f"{count} in {name} on rank {rank}"
        for rank, row in enumerate(table)
        for name, count in zip(tensors, row, strict=True)
        if count
    ]
    if found:
        raise FloatingPointError(
            f"attention layer {layer!r} got NaN or infinite elements: {', '.join(found)} of {transport.size} "
            "ranks; look at the layers before it and at the last optimizer step (learning rate, gradients)"
        )
