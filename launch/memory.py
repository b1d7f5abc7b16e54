"""What takes the memory of long sequences, activations, and how to hold fewer of them. Every way is exact."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from .config import TrainConfig
from .model import decoder_layers

ATTENTION, FEED_FORWARD = "self_attn", "mlp"  # parts of a layer, in all models of transformers but a few


def save_memory(model: nn.Module, config: TrainConfig) -> None:
    """Make the transformer layers hold as few activations as `config` says, in place.

    checkpointing: "full" keeps the input of each layer alone and runs the layer again in the backward;
    "selective" does so with each part of a layer but its attention, which runs once. offload: the inputs
    that "full" keeps wait in pinned memory of the CPU. mlp_tiles: feed-forward parts work on so many parts
    of the tokens, one after another (as ALST does, arXiv 2506.13996), and keep their inputs alone.

    After `cp.attach`, before the weights are sharded. NotImplementedError if layers have other parts.
    """
    for layer in decoder_layers(model):
        parts = dict(layer.named_children())
        if missing := {ATTENTION, FEED_FORWARD} - parts.keys():
            raise NotImplementedError(
                f"{type(layer).__name__} has no part {min(missing)}; supported are layers of {ATTENTION}, "
                f"{FEED_FORWARD} and norms"
            )
        del parts[ATTENTION]
        if config.mlp_tiles > 1:
            part = parts.pop(FEED_FORWARD)
            part.forward = partial(tiled, part.forward, config.mlp_tiles)
        if config.checkpointing == "selective":
            for part in parts.values():
                part.forward = partial(recomputed, part.forward)
        elif config.checkpointing == "full":
            layer.forward = partial(offloaded if config.offload else recomputed, layer.forward)


def recomputed(function: Callable, *args: Any, **kwargs: Any) -> Any:
    """function(...), whose backward runs it again."""
    return checkpoint(function, *args, use_reentrant=False, **kwargs)


def offloaded(function: Callable, *args: Any, **kwargs: Any) -> Any:
    """The same; its positional arguments wait for the backward in pinned memory of the CPU."""
    with save_on_cpu(pin_memory=True):
        return recomputed(function, *args, **kwargs)


def tiled(function: Callable, tiles: int, x: Tensor) -> Tensor:
    """function(x) of x [B, S, E], which treats every token by itself, in `tiles` parts of S.

    Gradients of weights in low precision are rounded once more for every tile.
    """
    parts = x.tensor_split(tiles, dim=1)
    return torch.cat([recomputed(function, part) for part in parts], dim=1)
