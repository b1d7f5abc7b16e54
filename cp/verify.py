"""A self-check on the user's own model: the sharded run against one process, same plans."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .transport import Alone

if TYPE_CHECKING:
    from .context_parallel import ContextParallel


@dataclass(frozen=True)
class Verification:
    """Largest absolute difference of the model's outputs, the outputs' largest value, and token counts."""

    error: float
    scale: float
    tokens: int
    world: int

    def __str__(self) -> str:
        return (
            f"{self.world} ranks against one on {self.tokens} tokens: max error {self.error:.2e}, "
            f"outputs up to {self.scale:.2e}"
        )


@torch.no_grad()
def verify_model(cp: ContextParallel, model: nn.Module, batch: Mapping[str, Tensor]) -> Verification:
    """Runs the first 2 blocks per rank of a batch sharded, then whole on every rank with equal plans."""
    length = 2 * cp.block_size * cp.transport.size
    batch = {name: x[:, :length] for name, x in batch.items()}
    shard = cp.shard(batch)
    sharded = cp.unshard(_output(model(**shard.inputs)), shard)
    with cp.replay(cp.plans(shard)):
        alone = cp._shard(batch, Alone(), "contiguous")
    whole = _output(model(**alone.inputs))[:, : alone.length]
    error = torch.stack(((sharded - whole).abs().max(), whole.abs().max())).double()
    cp.transport.all_reduce(error, "max").wait()
    return Verification(float(error[0]), float(error[1]), alone.length, cp.transport.size)


def _output(output) -> Tensor:
    return output if isinstance(output, Tensor) else output.logits
