"""A model in training: how it is put together, how it takes a step, and its whole state."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.profiler import record_function

from ..cp import ContextParallel, Shard
from ..kernels.patterns import PATTERNS, Pattern, VerticalSlash
from .config import TrainConfig
from .data import PackedText
from .nonfinite import find_nonfinite
from .optimizer import build_optimizer, update
from .packing import Rows
from .prefetch import Prefetch
from .world import World

TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)  # checkpoints have no frozen weights


@dataclass(frozen=True)
class Trainee:
    """All that changes while a model trains."""

    model: nn.Module
    cp: ContextParallel
    optimizer: torch.optim.AdamW
    data: Prefetch

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values, enough to go on as if nothing had happened. All ranks call it.

        Trained weights and the state of each by its name, sharded as they are (DTensor).
        """
        weights = get_model_state_dict(self.model)
        rng = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            rng["cuda"] = torch.cuda.get_rng_state()
        return {
            "model": {name: weights[name] for name in self._trained()},
            "optimizer": get_optimizer_state_dict(self.model, self.optimizer, options=TRAINED)["state"],
            "planner": self.cp.state_dict(),
            "data": self.data.state_dict(),
            "rng": rng,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`; learning rate and decay follow from the configuration."""
        found = set_model_state_dict(self.model, state["model"], options=TRAINED)
        missing = [name for name in self._trained() if name in found.missing_keys]
        if differing := missing + found.unexpected_keys:
            raise ValueError(
                f"the saved weights do not fit the model, in {len(differing)} names, first {differing[0]}; "
                f"resume with the model that was saved"
            )
        groups = get_optimizer_state_dict(self.model, self.optimizer, options=TRAINED)["param_groups"]
        optimizer = {"state": state["optimizer"], "param_groups": groups}
        set_optimizer_state_dict(self.model, self.optimizer, optimizer, options=TRAINED)
        self.cp.load_state_dict(state["planner"])
        self.data.load_state_dict(state["data"])
        torch.set_rng_state(state["rng"]["cpu"])
        if "cuda" in state["rng"]:
            torch.cuda.set_rng_state(state["rng"]["cuda"])

    def _trained(self) -> list[str]:
        """Names of the weights that are trained; one of a weight in two places, as a tied embedding."""
        return [name for name, parameter in self.model.named_parameters() if parameter.requires_grad]


def assemble(config: TrainConfig, world: World, pattern: Pattern, rows: Rows) -> Trainee:
    """Model, context parallelism, optimizer and data, in the order in which they must be made."""
    torch.manual_seed(config.seed)
    cp = ContextParallel(
        world.mesh,
        axes=("cp_outer", "cp_inner"),
        data_axes=("dp",),
        pattern=pattern,
        layout=config.layout,
        exchange=config.exchange,
        block_size=config.block_size,
        grad_reduce="mean",
        timeout=config.timeout,
    )
    model = prepare_model(config, world, cp, rows.corpus.vocab_size)
    data = PackedText(
        rows,
        batch=config.batch,
        seed=config.seed,
        dp_rank=world.dp_rank,
        dp_size=config.dp,
    )
    ahead = Prefetch(data, world.device, timeout=config.timeout)
    return Trainee(model, cp, build_optimizer(model, config), ahead)


def prepare_model(config: TrainConfig, world: World, cp: ContextParallel, vocab_size: int) -> nn.Module:
    """The model of `config`, ready for a step: attached, with its adapters, lean as asked, sharded."""
    from .memory import save_memory  # these import transformers: only once `leave_checkout` has run
    from .model import add_adapters, build_model
    from .parallel import shard_weights, weight_mesh

    model = cp.attach(build_model(config, vocab_size))
    if config.lora_rank:
        add_adapters(model, config)
    save_memory(model, config)
    mesh = weight_mesh(config, world.device.type, world.size)
    shard_weights(model, mesh, getattr(torch, config.dtype))
    return model


def train_step(
    config: TrainConfig, world: World, trainee: Trainee, step: int
) -> tuple[Shard, dict[str, float]]:
    """One optimizer step; returns its shard, and loss, learning rate, gradient norm and speed.

    FloatingPointError if the loss or the gradients are not finite, which says where that began; weights are
    those from before the step then.
    """
    began, cp = time.perf_counter(), trainee.cp
    batch = {name: tensor.to(world.device, non_blocking=True) for name, tensor in next(trainee.data).items()}
    with record_function("sparring.shard"):
        shard = cp.shard(batch)

    def forward() -> Tensor:
        return cp.loss(trainee.model(**shard.inputs), shard)

    with record_function("sparring.forward"):
        loss = forward()
    with record_function("sparring.backward"):
        loss.backward()
    value = loss.item()  # the mean over all ranks
    try:
        if not math.isfinite(value):
            raise FloatingPointError(f"the loss of step {step} is {value}")
        with record_function("sparring.optimizer"):
            norm, rate = update(trainee.optimizer, config, step)
    except FloatingPointError as error:
        del loss
        found = find_nonfinite(trainee.model, forward, world.control)
        raise FloatingPointError(f"{error}: {found}; try a lower --lr") from None
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
