"""AdamW on fp32 weights, whatever the dtype of the model, with a cosine schedule."""

from __future__ import annotations

import math

import torch
from torch import nn

from .config import TrainConfig


class Optimizer:
    """AdamW with gradient clipping; parameters that are not fp32 get an fp32 copy to step on.

    Only matrices decay. Gradients must be complete (summed over ranks) before `step`.
    """

    def __init__(self, model: nn.Module, config: TrainConfig) -> None:
        self.config = config
        self.parameters = dict(model.named_parameters())
        self.weights = {
            name: p if p.dtype == torch.float32 else nn.Parameter(p.detach().float())
            for name, p in self.parameters.items()
        }
        matrices = [w for w in self.weights.values() if w.ndim >= 2]
        others = [w for w in self.weights.values() if w.ndim < 2]
        groups = [
            {"params": matrices, "weight_decay": config.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        self.adamw = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95))

    def step(self, step: int) -> tuple[torch.Tensor, float]:
        """One update with the learning rate of `step` (from 0); clears the gradients.

        Returns the gradient norm before clipping (0-d, on the device) and the learning rate.
        """
        for name, parameter in self.parameters.items():
            weight = self.weights[name]
            if weight is not parameter and parameter.grad is not None:
                weight.grad, parameter.grad = parameter.grad.float(), None
        norm = nn.utils.clip_grad_norm_(self.weights.values(), self.config.clip)
        rate = learning_rate(self.config, step)
        for group in self.adamw.param_groups:
            group["lr"] = rate
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        self._publish()
        return norm, rate

    @torch.no_grad()
    def _publish(self) -> None:
        """Copy the fp32 weights into the model's own, where those are of another dtype."""
        for name, parameter in self.parameters.items():
            if self.weights[name] is not parameter:
                parameter.copy_(self.weights[name])

    def state_dict(self) -> dict:
        """{"weights": fp32 weights, "state": AdamW's tensors}, both by parameter name."""
        state = {name: dict(self.adamw.state[w]) for name, w in self.weights.items()}
        return {"weights": {n: w.detach() for n, w in self.weights.items()}, "state": state}

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        """Restore weights (the model's too) and AdamW's state exactly."""
        for name, weight in self.weights.items():
            saved = state["weights"].get(name)
            if saved is None or saved.shape != weight.shape:
                shape = None if saved is None else tuple(saved.shape)
                raise ValueError(
                    f"parameter {name} has shape {tuple(weight.shape)}, the saved one {shape}; "
                    f"resume with the model that was saved"
                )
            weight.copy_(saved)
            self.adamw.state[weight] = {
                key: value.to(value.device if key == "step" else weight.device).clone()
                for key, value in state["state"][name].items()
            }
        self._publish()


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warmup over `warmup` steps, then a cosine down to a tenth of `lr` at the last step."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    done = (step - config.warmup) / max(1, config.steps - 1 - config.warmup)
    return config.lr * (0.1 + 0.45 * (1.0 + math.cos(math.pi * min(1.0, done))))
