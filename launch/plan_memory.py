"""Memory of a rank in training, in closed form. All sizes are bytes; b is an element of the computation.

A step is taken at five moments, and the one that needs most counts:

    choosing     activations of all layers, and the last one's tiles being counted
    loss         activations of all layers, logits of a chunk and their gradients
    last layer   activations of all layers, and the backward of the last one at work
    first layer  sharded gradients of all layers, and the backward of the first one at work
    end          the same gradients, and those of embedding and head, being reduced

Every formula is that of code that it names. Documents, padding and values do not count; work is taken to be
even over ranks. Not counted: what a layer of experts needs to sort tokens, and copies of checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..cp.loss import CHUNK
from ..kernels.patterns import VerticalSlash
from ..kernels.plan import WORD
from .config import TrainConfig
from .plan_model import ModelSizes
from .trainee import build_pattern

#: Of a GPU beside the tensors of a step: CUDA context, compiled kernels, buffers of NCCL, what the allocator
#: cannot use. Assumed, not measured; `torch.cuda.max_memory_allocated` does not count it.
OVERHEAD = 3 * 2**30
FP32, INT32 = 4, 4
COUNTED = 1 + INT32  # of each tile, chosen or not: whether it is, and its visible pairs

Items = dict[str, float]  # bytes by what takes them


@dataclass(frozen=True)
class Share:
    """What a rank holds. world: W. shards: ranks that share the weights. rows, blocks: query blocks of a
    sequence held here, and all its blocks; tokens: over the batch."""

    world: int
    shards: int
    rows: int
    blocks: int
    tokens: int


def share_of(config: TrainConfig, gpus: int) -> Share:
    """ValueError if the ranks do not divide into data-parallel groups."""
    if gpus % config.dp:
        raise ValueError(
            f"{gpus} GPUs do not divide into dp={config.dp} groups; plan a multiple of dp, or change --dp"
        )
    world = gpus // config.dp
    shards = {"full": gpus, "hybrid": world, "none": 1}[config.shard]
    rows = -(-config.seq_len // (world * config.block_size))
    return Share(world, shards, rows, rows * world, config.batch * rows * config.block_size)


def worst_moment(model: ModelSizes, config: TrainConfig, gpus: int) -> tuple[str, Items]:
    """The moment that needs most, and its items; their sum is what torch allocates at most."""
    found = moments(model, config, gpus)
    return max(found.items(), key=lambda moment: sum(moment[1].values()))


def peak(model: ModelSizes, config: TrainConfig, gpus: int) -> float:
    """Most bytes that torch allocates on a rank."""
    return sum(worst_moment(model, config, gpus)[1].values())


def moments(model: ModelSizes, config: TrainConfig, gpus: int) -> dict[str, Items]:
    """All items at each moment."""
    share, b = share_of(config, gpus), element(config)
    bits, lists, counts = plan_bytes(model, config, share)
    kept = share.tokens * kept_by_layer(model, config)
    kept += 0 if config.checkpointing == "full" else lists
    root, layer = model.root, model.largest_layer
    always = {
        # launch/parallel.py: trained weights are fp32, frozen ones of the computation's dtype.
        "weights": (FP32 * model.whole.trained + b * model.whole.frozen) / share.shards,
        "AdamW": 2 * FP32 * model.whole.trained / share.shards,  # two means
        "embedding and head, gathered": b * root.count,  # FSDP2 keeps the root for the whole step
        # The shard keeps the bits of every layer until the step ends; tables of one head serve all.
        "plans": model.layers * bits + config.batch * share.rows * share.blocks * COUNTED,
    }
    head = b * model.head.trained  # its gradient, summed in the dtype of the computation
    work = {
        "layer at work": share.tokens * at_work(model, config, share.world)
        + working_columns(model, config)
        + (lists + 2 * bits if config.checkpointing == "full" else 0),
        # Two layers are gathered, in use and on their way; one gradient is made, one is reduced in fp32.
        "layers, gathered": 2 * b * layer.count + (b + FP32) * layer.trained,
        "gradient of embedding and head": head,
    }
    gradients = FP32 * model.all_layers.trained / share.shards
    keys = 2 * model.key_heads * model.dim * b * shards_of_keys(config, share.world)
    again = saved_by_norm(model, b) + b * model.width + saved_by_attention(model, b)
    full = config.checkpointing == "full"
    return {
        "choosing": always
        | {"activations": model.layers * kept}
        | {"layer at work": share.tokens * (keys + again * full) + lists * full + counts}
        | {"layers, gathered": 2 * b * layer.count},
        "loss": always
        | {"activations": model.layers * kept}
        | {"logits": logits(model, config, share.tokens), "gradient of embedding and head": 2 * head},
        "last layer": always | {"activations": model.layers * kept} | work,
        "first layer": always | {"gradients": gradients, "activations": kept} | work,
        "end": always
        | {"gradients": gradients + FP32 * root.trained / share.shards}
        | {"gradient of embedding and head": (b + FP32) * root.trained},
    }


def element(config: TrainConfig) -> int:
    """b"""
    return getattr(torch, config.dtype).itemsize


def saved_by_attention(model: ModelSizes, b: int) -> int:
    """For a token: q, k, v, out and lse in fp32 (cp/attention.py), and out as the projection takes it."""
    queries, keys = model.heads * model.dim, model.key_heads * model.dim
    return b * (2 * queries + 2 * keys) + FP32 * (queries + model.heads)


def saved_by_norm(model: ModelSizes, b: int) -> int:
    """For a token: the input in fp32, its scale, the normalised input. The output is counted elsewhere."""
    return (FP32 + b) * model.width + FP32


def saved_by_mlp(model: ModelSizes, config: TrainConfig) -> float:
    """For a token beside the input: gate, its activation, up, their product. Of one tile alone if tiled."""
    return 4 * element(config) * model.mlp / config.mlp_tiles


def kept_by_layer(model: ModelSizes, config: TrainConfig) -> float:
    """For a token, from the forward to the backward of a layer (launch/memory.py)."""
    b = element(config)
    if config.checkpointing == "full":
        return 0 if config.offload else b * model.width
    attention = b * model.width + saved_by_attention(model, b)  # and the input of q, k, v
    if config.checkpointing == "selective":
        return attention + 3 * b * model.width  # inputs of two norms and of the feed-forward part
    mlp = b * model.width + (saved_by_mlp(model, config) if config.mlp_tiles == 1 else 0)
    return 2 * saved_by_norm(model, b) + attention + mlp


def at_work(model: ModelSizes, config: TrainConfig, world: int) -> float:
    """For a token, in the backward of one layer beside what it kept: what it computes again, and gradients.

    The most of three moments: in the feed-forward part, in the norm before it, in attention.
    """
    b, width = element(config), model.width
    queries, keys = model.heads * model.dim, model.key_heads * model.dim
    attention = b * width + saved_by_attention(model, b)
    norm, mlp = saved_by_norm(model, b), saved_by_mlp(model, config)
    full, selective = config.checkpointing == "full", config.checkpointing == "selective"
    before = (norm + attention if full else 0) + (b * width if config.offload else 0)
    again = norm + b * width if full else norm if selective else 0  # the second norm, input of the mlp
    rerun = mlp if full or selective or config.mlp_tiles > 1 else 0
    feed_forward = again * full + rerun + b * (3 * width + 2 * model.mlp / config.mlp_tiles)
    second_norm = again + 2 * b * width + 3 * FP32 * width
    # Gradient of out as it comes and in order, delta and gradient of lse, dq in fp32, results in b.
    backward = b * (width + 2 * queries) + FP32 * (2 * model.heads + queries) + b * (queries + 2 * keys)
    backward += 2 * keys * (b * shards_of_keys(config, world) + FP32 * shards_of_gradients(config, world))
    return before + max(feed_forward, second_norm, backward)


def shards_of_keys(config: TrainConfig, world: int) -> int:
    """Shards of keys and values that a rank holds at once, own ones included (cp/ring.py, cp/pull.py).

    In a ring own ones, those in use and those that arrive; with gather all, and half of those of others once
    more in one piece. pull is taken at its worst. auto is taken as a ring, which it falls back to.
    """
    ring = min(world, 3)
    return max(ring, world + (world - 1) // 2) if config.exchange in ("gather", "pull") else ring


def shards_of_gradients(config: TrainConfig, world: int) -> int:
    """The same of their fp32 gradients: in a ring one is made, one arrives and one leaves."""
    ring = 1 if world == 1 else 3
    return max(ring, world + (world - 1) // 2) if config.exchange in ("gather", "pull") else ring


def plan_bytes(model: ModelSizes, config: TrainConfig, share: Share) -> tuple[float, float, float]:
    """Of one layer: bitmask and columns (kernels/plan.py), lists by row and by key (kernels/bound.py), and
    what it takes to count its tiles (cp/record.py).

    Lists have room for every visible tile, however few are chosen. Vertical-slash chooses for each head.
    """
    heads = model.heads if config.pattern == "vertical-slash" else 1
    lines = config.batch * heads
    bits = lines * share.rows * -(-share.blocks // WORD) * INT32
    bits += config.batch * columns_of(model, config) * INT32
    visible = share.rows * (share.blocks + 1) / 2
    pointers = 2 * share.rows * share.world + 2 * share.blocks
    return bits, INT32 * lines * (2 * visible + pointers), lines * share.rows * share.blocks * COUNTED


def columns_of(model: ModelSizes, config: TrainConfig) -> int:
    """Columns of all heads, at most, where heads have their own."""
    pattern = build_pattern(config)
    return model.heads * pattern.columns[1] if isinstance(pattern, VerticalSlash) else 0


def working_columns(model: ModelSizes, config: TrainConfig) -> float:
    """Keys and values of columns and their gradients, in fp32 and being summed (cp/attention.py)."""
    count = config.batch * columns_of(model, config) * model.dim
    return 2 * count * (element(config) + 2 * FP32)


def logits(model: ModelSizes, config: TrainConfig, tokens: int) -> float:
    """Last norm and hidden states, their gradient, and a chunk of logits (cp/loss.py): in the dtype of the
    computation, log-probabilities and two gradients in fp32."""
    b = element(config)
    chunk = min(CHUNK, tokens * model.vocab)
    return tokens * (saved_by_norm(model, b) + 4 * b * model.width) + chunk * (b + 3 * FP32)
