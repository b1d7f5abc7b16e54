"""A self-check on the user's own model: the sharded run against one process, same plans."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .coverage import check_keys
from .loss import sum_gradients
from .shard import Shard
from .transport import Alone

if TYPE_CHECKING:
    from .context_parallel import ContextParallel


@dataclass(frozen=True)
class Verification:
    """How a sharded run differs from one process.

    error, scale: largest absolute difference of the model's outputs, and their largest value.
    gradient_error: of the parameter that differs most, largest absolute difference over its largest
    gradient; parameter: its name. Both None where the batch has no labels.
    keys: by layer, (pairs of query and key seen, pairs promised by the plan), sharded run.
    tokens: compared, in each row. world: ranks.
    """

    error: float
    scale: float
    gradient_error: float | None
    parameter: str | None
    keys: dict[Hashable, tuple[int, int]]
    tokens: int
    world: int

    def __str__(self) -> str:
        gradients = ""
        if self.parameter is not None:
            gradients = f", gradients to {self.gradient_error:.2e} (relative, {self.parameter})"
        seen, promised = (sum(x) for x in zip(*self.keys.values(), strict=True))
        return (
            f"{self.world} ranks against one on {self.tokens} tokens: max error {self.error:.2e}, "
            f"outputs up to {self.scale:.2e}{gradients}; {seen} of {promised} promised keys seen"
        )


def verify_model(cp: ContextParallel, model: nn.Module, batch: Mapping[str, Tensor]) -> Verification:
    """Runs the first 2 blocks per rank of a batch sharded, then whole on every rank with equal plans.

    The batch of the first data rank is used by all. With labels, gradients are compared after the
    reduction that trains the model (DDP, FSDP or cp.sum_gradients); .grad is as before afterwards.
    Raises RuntimeError if a layer's queries saw other keys than its plan promised.
    """
    length = 2 * cp.block_size * cp.transport.size
    batch = {name: cp.everyone.all_gather(x[:, :length].contiguous())[0] for name, x in batch.items()}
    shard = cp.shard(batch)
    sharded, gradients = _run(cp, model, shard)
    with cp.replay(cp.plans(shard)):
        alone = cp._shard(batch, Alone(), "contiguous")
    whole, expected = _run(cp, model, alone)
    check_keys(shard.record.keys, shard.transport)
    outputs = cp.unshard(sharded, shard)
    whole = whole[:, : alone.length]
    errors = [torch.stack(((outputs - whole).abs().max(), whole.abs().max())).double()]
    errors += [
        torch.stack(((a - b).abs().max(), b.abs().max())) for a, b in zip(gradients, expected, strict=True)
    ]
    table = torch.stack(errors)
    cp.everyone.all_reduce(table, "max").wait()
    (error, scale), *rest = table.tolist()
    relative = [difference / max(largest, 1e-30) for difference, largest in rest]
    worst = max(range(len(relative)), key=relative.__getitem__) if relative else None
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    return Verification(
        error=error,
        scale=scale,
        gradient_error=None if worst is None else relative[worst],
        parameter=None if worst is None else names[worst],
        keys=cp.report(shard).keys_by_layer,
        tokens=alone.length,
        world=cp.transport.size,
    )


def _run(cp: ContextParallel, model: nn.Module, shard: Shard) -> tuple[Tensor, list[Tensor]]:
    """The model's output, and with labels the gradient of every trained parameter (of its local part)."""
    trained = [p for p in model.parameters() if p.requires_grad]  # in the forward FSDP puts whole ones there
    shard.count_keys = True
    labelled = shard.labels is not None
    with nullcontext() if labelled else torch.no_grad():
        output = model(**shard.inputs)
    values = (output if isinstance(output, Tensor) else output.logits).detach()
    if not labelled:
        return values, []
    before = [p.grad for p in trained]
    for parameter in trained:
        parameter.grad = None
    loss = cp.loss(output, shard)
    if cp.grad_reduce == "sum" and shard.transport is not cp.transport:
        loss = loss / cp.everyone.size  # every rank has the whole gradient, and all are summed
    loss.backward()
    if cp.grad_reduce == "sum" and not any(isinstance(p, DTensor) for p in trained):
        sum_gradients(trained, cp.everyone)
    gradients = [_local(p).double() for p in trained]
    for parameter, gradient in zip(trained, before, strict=True):
        parameter.grad = gradient
    return values, gradients


def _local(parameter: nn.Parameter) -> Tensor:
    """The gradient held here; zero where the loss does not depend on the parameter."""
    gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    gradient = gradient.to_local() if isinstance(gradient, DTensor) else gradient
    return torch.zeros(1, device=gradient.device) if gradient.numel() == 0 else gradient.detach().clone()
