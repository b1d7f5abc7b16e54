"""Rotary embeddings whose frequencies depend on the longest position: shown that of the whole batch.

transformers' "dynamic" frequencies follow max(position_ids) and remember the longest so far, "longrope" has
two sets for short and long sequences. A rank that looked at its own tokens would choose others than its
peers. So while a model is attached, such a module gets one more position, the last of the whole batch, and
what it returns for that one is dropped.
"""

from __future__ import annotations

from types import MethodType
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .attach import ATTRIBUTE, no_copy

if TYPE_CHECKING:
    from .shard import Shard

STATIC = {"default", "linear", "llama3", "proportional", "yarn"}  # the same at every length


def rope_types(module: nn.Module) -> set[str]:
    """Names of the rotary frequencies that a module makes: one, or one for each type of layer."""
    kind = getattr(module, "rope_type", None)
    return set(kind.values()) if isinstance(kind, dict) else {kind} - {None}


class Rotaries:
    """The modules of a model whose frequencies depend on the longest position, while it is attached."""

    def __init__(self, model: nn.Module):
        self.running: Shard | None = None  # whose forward the model is in
        self.replaced = {
            module: module.__dict__.get("forward")
            for module in model.modules()
            if rope_types(module) - STATIC
        }
        for module in self.replaced:
            setattr(module, ATTRIBUTE, self)
            module.forward = MethodType(_forward, module)

    def detach(self) -> None:
        for module, forward in self.replaced.items():
            del module.forward
            if forward is not None:
                module.forward = forward
            delattr(module, ATTRIBUTE)

    __reduce_ex__ = no_copy


def _forward(module: nn.Module, x: Tensor, position_ids: Tensor, *args, **kwargs):
    """The module's own forward, for one more position."""
    rotaries: Rotaries = getattr(module, ATTRIBUTE)
    if rotaries.running is None:
        raise NotImplementedError(
            f"{type(module).__name__} ({', '.join(sorted(rope_types(module)))}) runs outside the forward of "
            "its attached model, called alone or recomputed by activation checkpointing, where the longest "
            "position of the batch is not known; call the whole model, checkpoint modules without it"
        )
    last = rotaries.running.last_position.expand(*position_ids.shape[:-1], 1)
    position_ids = torch.cat((position_ids, last), -1)
    forward = rotaries.replaced[module] or MethodType(type(module).forward, module)
    output = forward(x, position_ids, *args, **kwargs)
    if isinstance(output, Tensor):
        return _drop_last(output, position_ids.shape[-1], module)
    return tuple(_drop_last(part, position_ids.shape[-1], module) for part in output)


def _drop_last(part: Tensor, length: int, module: nn.Module) -> Tensor:
    """[..., length, D] -> [..., length - 1, D]."""
    if part.shape[-2] != length:
        raise NotImplementedError(
            f"{type(module).__name__} returns {tuple(part.shape)} for {length} positions; supported are "
            "cosines and sines [batch, length, dim]"
        )
    return part[..., :-1, :]
