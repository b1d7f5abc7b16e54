"""AdamW on the trained weights, with clipped gradients and a cosine schedule."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .config import TrainConfig


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW of the parameters that are trained, wherever they are sharded. Only matrices decay."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), fused=True)


def update(optimizer: torch.optim.AdamW, config: TrainConfig, step: int) -> tuple[Tensor, float]:
    """One update with the learning rate of `step` (from 0); clears the gradients, which must be complete.

    Returns the norm of all gradients before clipping (0-d, on the device) and the learning rate.

    FloatingPointError, before anything is changed, if the norm is not finite. Waits for the device.
    """
    rate = learning_rate(config, step)
    for group in optimizer.param_groups:
        group["lr"] = rate
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    norm = nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
    total = norm.full_tensor() if isinstance(norm, DTensor) else norm
    if not total.isfinite():
        raise FloatingPointError(f"the norm of the gradients of step {step} is {total.item()}")
    nn.utils.clip_grads_with_norm_(trained, config.clip, norm)
    optimizer.step()
    optimizer.zero_grad()
    return total, rate


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warmup over `warmup` steps, then a cosine down to a tenth of `lr` at the last step."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    done = (step - config.warmup) / max(1, config.steps - 1 - config.warmup)
    return config.lr * (0.1 + 0.45 * (1.0 + math.cos(math.pi * min(1.0, done))))
