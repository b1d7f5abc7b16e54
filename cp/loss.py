"""Token losses whose value and gradient do not depend on how tokens are spread over ranks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from .batch import IGNORE
from .transport import Transport

CHUNK = 2**25  # logits of one chunk, in elements


def token_loss_sum(
    hidden: Tensor, labels: Tensor, head: Callable[[Tensor], Tensor] | None, vocab: int
) -> Tensor:
    """Sum of cross-entropies over tokens with a label, fp32 (fp64 for fp64), connected to the graph.

    hidden: [B, S, E] and a head that maps [n, E] to logits [n, vocab], applied in chunks whose logits
    are recomputed in the backward; or logits [B, S, vocab] and head None. labels: [B, S].
    """
    rows, targets = hidden.flatten(0, 1), labels.flatten()
    if rows.shape[0] != targets.shape[0]:
        raise ValueError(
            f"output has {rows.shape[0]} tokens, the shard has {targets.shape[0]} labels; pass "
            "what the model returned for this shard"
        )
    size = rows.shape[0] if head is None else max(1, CHUNK // vocab)
    total = hidden.new_zeros((), dtype=_precision(hidden))
    for part, target in zip(rows.split(size), targets.split(size), strict=True):
        if head is None:
            total = total + _cross_entropy(part, target, None)
        else:
            total = total + checkpoint(_cross_entropy, part, target, head, use_reentrant=False)
    return total


def _cross_entropy(rows: Tensor, targets: Tensor, head: Callable[[Tensor], Tensor] | None) -> Tensor:
    logits = rows if head is None else head(rows)
    return torch.nn.functional.cross_entropy(
        logits.to(_precision(logits)), targets, ignore_index=IGNORE, reduction="sum"
    )


def _precision(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def count_labels(labels: Tensor | None, group: Transport, device: torch.device) -> int:
    """Over all ranks; replicas without labels count as zero and take part all the same. Synchronises."""
    count = torch.zeros((), dtype=torch.int64, device=device)
    if labels is not None:
        count += (labels != IGNORE).sum()
    group.all_reduce(count).wait()
    return int(count)


class GlobalLoss(torch.autograd.Function):
    """Value: the sum over all ranks. Gradient: of this rank's share, times `scale`."""

    @staticmethod
    def forward(ctx, share: Tensor, everyone: Transport, scale: float) -> Tensor:
        ctx.scale = scale
        total = share.detach().clone()
        everyone.all_reduce(total).wait()
        return total

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return gradient * ctx.scale, None, None


def sum_gradients(parameters, everyone: Transport) -> None:
    """Sums .grad over the group, in fp32; a parameter without a gradient counts as zero everywhere."""
    for parameter in parameters:
        if not parameter.requires_grad:
            continue
        if isinstance(parameter, DTensor):
            raise ValueError("sum_gradients on sharded (FSDP) parameters; FSDP reduces them itself")
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        total = parameter.grad.to(_precision(parameter.grad)).contiguous()
        everyone.all_reduce(total).wait()
        parameter.grad = total.to(parameter.dtype)


def checksum(parameters) -> Tensor | None:
    """int64 [n]: the bits of an fp64 sum of every replicated parameter; None if all are sharded."""
    sums = [p.detach().double().sum() for p in parameters if not isinstance(p, DTensor)]
    return torch.stack(sums).view(torch.int64) if sums else None
