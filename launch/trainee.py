"""A model in training: how it is put together, how it takes a step, and its whole state."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..cp import ContextParallel, Shard
from ..kernels.patterns import PATTERNS, Pattern, VerticalSlash
from .config import TrainConfig
from .data import PackedText, Rows
from .optimizer import Optimizer
from .world import World


@dataclass(frozen=True)
class Trainee:
    """All that changes while a model trains."""

    model: nn.Module
    cp: ContextParallel
    optimizer: Optimizer
    data: PackedText

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values, enough to go on as if nothing had happened."""
        optimizer = self.optimizer.state_dict()
        rng = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            rng["cuda"] = torch.cuda.get_rng_state()
        return {
            "model": optimizer["weights"],
            "optimizer": optimizer["state"],
            "planner": self.cp.state_dict(),
            "data": self.data.state_dict(),
            "rng": rng,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self.optimizer.load_state_dict({"weights": state["model"], "state": state["optimizer"]})
        self.cp.load_state_dict(state["planner"])
        self.data.load_state_dict(state["data"])
        torch.set_rng_state(state["rng"]["cpu"])
        if "cuda" in state["rng"]:
            torch.cuda.set_rng_state(state["rng"]["cuda"])


def assemble(config: TrainConfig, world: World, pattern: Pattern, rows: Rows) -> Trainee:
    """Model, context parallelism, optimizer and data, in the order in which they must be made."""
    from .model import build_model  # imports transformers: only once `leave_checkout` has run

    torch.manual_seed(config.seed)
    cp = ContextParallel(
        world.mesh,
        axes=("cp_outer", "cp_inner"),
        data_axes=("dp",),
        pattern=pattern,
        layout=config.layout,
        exchange=config.exchange,
        block_size=config.block_size,
        grad_reduce="sum",
        timeout=config.timeout,
    )
    model = cp.attach(build_model(config, world.device))
    if config.checkpointing:  # transformers renamed it in 5.x
        enable = getattr(model, "activation_checkpointing_enable", None)
        (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
    data = PackedText(
        rows,
        batch=config.batch,
        seed=config.seed,
        dp_rank=world.dp_rank,
        dp_size=config.dp,
    )
    return Trainee(model, cp, Optimizer(model, config), data)


def train_step(
    config: TrainConfig, world: World, trainee: Trainee, step: int
) -> tuple[Shard, dict[str, float]]:
    """One optimizer step; returns its shard, and loss, learning rate, gradient norm and speed."""
    began, cp = time.perf_counter(), trainee.cp
    batch = {name: tensor.to(world.device) for name, tensor in next(trainee.data).items()}
    shard = cp.shard(batch)
    loss = cp.loss(trainee.model(**shard.inputs), shard)
    loss.backward()
    cp.sum_gradients(trainee.model)
    norm, rate = trainee.optimizer.step(step)

    value = loss.item()  # the mean over all ranks
    if not math.isfinite(value):
        raise FloatingPointError(f"the loss of step {step} is {value}; try a lower --lr")
    seconds = time.perf_counter() - began
    return shard, {
        "loss": value,
        "lr": rate,
        "grad_norm": norm.item(),
        "seconds": seconds,
        "tokens_per_second": config.dp * config.batch * config.seq_len / seconds,
    }


def build_pattern(config: TrainConfig) -> Pattern:
    """The pattern that `config` names; vertical-slash with the budgets of `max_density`.

    One eighth of the density goes to columns (of S tokens each holds at most 2 / S of the pairs of a
    causal document), the rest to diagonals (of n blocks the m nearest hold 1 - (1 - m / n)^2).
    """
    if config.pattern not in PATTERNS:
        raise ValueError(f"pattern={config.pattern!r} must be one of {sorted(PATTERNS)}")
    if PATTERNS[config.pattern] is not VerticalSlash:
        return PATTERNS[config.pattern]()
    columns = max(32, int(config.max_density / 8 * config.seq_len / 2))
    blocks = config.seq_len / config.block_size
    slashes = max(2, int(blocks * (1 - math.sqrt(1 - config.max_density * 7 / 8))))
    return VerticalSlash(top_p=config.top_p, columns=(32, columns), slashes=(2, slashes))
