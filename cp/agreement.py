"""Agreement: before a step ranks prove that they hold the same batch, the same choices and parameters."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from .batch import KNOWN, fingerprint
from .loss import checksum
from .shard import Shard
from .transport import Transport, agree


def check_agreement(shard: Shard, batch: Mapping[str, Tensor]) -> None:
    """RingDesyncError on every rank unless all hold the same batch and chose the same layout and exchange.

    batch: the whole one, as the user gave it. Synchronises; all ranks of the shard's group call it.
    """
    names = ("step", "batch size", "length", *KNOWN, "exchange", "layout")
    contents = [fingerprint(batch[name]) if name in batch else 0 for name in KNOWN]
    contents = [*contents, shard.exchange]
    values = [shard.step, shard.geometry.batch, shard.length, *contents, shard.layout.digest()]
    agree(shard.transport, dict(zip(names, values, strict=True)), shard.geometry.device)


def check_parameters(model: nn.Module, everyone: Transport) -> None:
    """ValueError on every rank if replicated parameters differ. Synchronises; all ranks call it.

    After the first step they still are equal, or gradients were not summed.
    """
    sums = checksum(model.parameters())
    if sums is None:
        return
    table = everyone.all_gather(sums)
    differing = (table != table[0]).any(0).nonzero()[:, 0].tolist()
    if differing:
        names = [n for n, p in model.named_parameters() if not hasattr(p, "placements")]
        raise ValueError(
            f"{len(differing)} of {len(names)} replicated parameters differ between ranks, first "
            f"{names[differing[0]]}; start from one seed and call cp.sum_gradients(model) before "
            "the optimizer step, or wrap the model in DDP or FSDP over data and cp axes"
        )
