"""Seconds of a training step, in closed form: weights by operations, attention by the planner's prediction.

Taken to cost nothing: gathering weights and reducing gradients (behind the computation), choosing tiles, the
host. The sequence is one document, its chosen pairs spread evenly over the visible ones.
"""

from __future__ import annotations

import numpy as np

from ..balance import Call, Constants, Prediction, expected_tiles, predict
from ..balance.layout import named
from ..balance.predict import FORMULAS
from ..kernels.patterns import Dense, VerticalSlash
from .config import TrainConfig
from .plan_memory import FP32, element, share_of
from .plan_model import ModelSizes
from .trainee import build_pattern

#: Operations a second of an H200 in dense products, from its data sheet, without TF32.
PEAK = {"bfloat16": 989e12, "float32": 67e12}
#: Share of it that the weights reach, norms and activations included. Assumed, not measured.
REACHED = 0.4
#: Bytes a second from a GPU to pinned memory of the CPU and back. Assumed, not measured.
HOST_LINK = 50e9

Seconds = dict[str, float]


def step_seconds(
    model: ModelSizes, config: TrainConfig, gpus: int, nodes: int, machine: Constants
) -> tuple[Seconds, str]:
    """What a step consists of, and the exchange. nodes: on which a context-parallel group lies."""
    share, full = share_of(config, gpus), config.checkpointing == "full"
    again = model.head_flops  # chunks of logits
    again += model.layer_flops if full else 0
    # Tiles run once more for their own backward, also where the layer has been run again.
    again += model.mlp_flops if config.mlp_tiles > 1 or config.checkpointing == "selective" else 0
    flops = share.tokens * (model.flops + again)
    both = attention(model, config, share.world, nodes, machine)
    once = attention(model, config, share.world, nodes, machine, backward=False) if full else None
    calls = [both] + [once] * full
    seconds = {
        "weights": flops / (PEAK[config.dtype] * REACHED),
        "attention": model.layers * sum(call.compute for call in calls),
        "waiting for keys and ranks": model.layers * sum(call.exposed for call in calls),
        # AdamW reads weight, gradient and two means, and writes all but the gradient.
        "AdamW": 7 * FP32 * model.whole.trained / share.shards / machine.memory,
    }
    if config.offload:
        moved = 2 * model.layers * share.tokens * element(config) * model.width
        seconds["to the CPU and back"] = moved / HOST_LINK
    return seconds, both.exchange


def attention(
    model: ModelSizes, config: TrainConfig, world: int, nodes: int, machine: Constants, backward: bool = True
) -> Prediction:
    """One layer, by the exchange of `config`; auto is a ring, of nodes where there are several.

    NotImplementedError for an exchange without a formula.
    """
    exchange = config.exchange
    if exchange == "auto":
        exchange = "hierarchical" if nodes > 1 else "ring"
    if exchange not in FORMULAS:
        raise NotImplementedError(
            f"exchange {exchange!r} has no prediction; known are {', '.join(FORMULAS)}, auto"
        )
    blocks = share_of(config, world * config.dp).blocks
    layout = named("zigzag" if config.layout == "auto" else config.layout, blocks, world, config.block_size)
    documents = (((0, blocks * config.block_size),),) * config.batch
    tiles = expected_tiles(documents, blocks, config.block_size).by_source(layout) * density(config)
    elements = 2 * config.block_size * model.key_heads * model.dim  # of keys and values
    call = Call(
        heads=model.heads,
        key_heads=model.key_heads,
        key_bytes=elements * element(config),
        gradient_bytes=elements * FP32,
        exchanges=(exchange,),
        machine=machine.with_dim(model.dim),
        nodes=nodes,
        backward=backward,
    )
    return predict(exchange, call, layout, tiles, np.zeros(world), batch=config.batch)


def density(config: TrainConfig) -> float:
    """Share of the visible pairs that are computed: the most that the pattern may keep."""
    pattern = build_pattern(config)
    if isinstance(pattern, Dense):
        return 1.0
    if isinstance(pattern, VerticalSlash):
        return config.max_density
    return min(
        1.0, 2 * (pattern.sink + pattern.window) / config.seq_len
    )  # whole rows against half on average
