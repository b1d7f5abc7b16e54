"""attach: routes a model's attention through a ContextParallel, by the way that fits the model.

transformers models have a registry of attention functions (huggingface.py); any other module is expected to
call torch.nn.functional.scaled_dot_product_attention (functional.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import torch
from torch import nn
from torch.distributed.tensor import DTensor

if TYPE_CHECKING:
    from .context_parallel import ContextParallel

ATTRIBUTE = "_sparring"  # where an attached module keeps its Attachment
ORDER = "attach the bare model first, then checkpointing, compile, fully_shard or DDP, optimizer"
WRAPPERS = {
    "CheckpointWrapper": "activation checkpointing",
    "DataParallel": "DataParallel",
    "DistributedDataParallel": "DDP",
    "FullyShardedDataParallel": "FSDP1",
    "OptimizedModule": "torch.compile",
}


class Attachment(Protocol):
    """What attach leaves on a model. Neither copied nor pickled: groups of processes cannot be."""

    head: Callable | None

    def detach(self, model: nn.Module) -> None: ...


def attach_model(cp: ContextParallel, model: nn.Module, whole_logits: bool) -> None:
    """Routes the model's attention through `cp`.

    ValueError: the model is attached, wrapped, sharded, compiled or checkpointing already.
    NotImplementedError: it has a feature that sparse context parallelism does not implement, by name.
    """
    check_order(model)
    if is_transformers(model):
        from . import huggingface as route
    else:
        from . import functional as route
    route.attach(cp, model, whole_logits)


def detach_model(model: nn.Module) -> None:
    """Leaves the model as it was before attach_model."""
    getattr(model, ATTRIBUTE).detach(model)


def head_of(model: nn.Module | None) -> Callable | None:
    """The module that makes logits of the hidden states that the model returns, with its `weight`.

    None if the model is not attached or returns logits itself.
    """
    attachment = getattr(model, ATTRIBUTE, None)
    return None if attachment is None else attachment.head


def check_order(model: nn.Module) -> None:
    """ValueError if something that must follow attach has already happened to the model."""
    for name, module in model.named_modules():
        place = f"{type(module).__name__} {name!r}" if name else type(module).__name__
        if hasattr(module, ATTRIBUTE):
            raise ValueError(f"{place} is already attached; cp.detach(model) before attaching it again")
        wrapper = WRAPPERS.get(type(module).__name__)
        if getattr(module, "_compiled_call_impl", None) is not None:
            wrapper = "torch.compile"
        if wrapper is not None:
            raise ValueError(f"{place} is wrapped by {wrapper} already; {ORDER}")
        if any(base.__name__ == "PeftModel" for base in type(module).__mro__):
            raise ValueError(
                f"{place} is a wrapper of peft; cp.attach(model.get_base_model()), or attach the bare model "
                "before get_peft_model"
            )
        if isinstance(module, torch.jit.ScriptModule):
            raise NotImplementedError(f"{place} is TorchScript; only Python modules can be attached")
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            raise ValueError(f"parameter {name} is a DTensor (FSDP or tensor parallelism) already; {ORDER}")


def is_transformers(model: nn.Module) -> bool:
    """Whether it is a PreTrainedModel, told by name so that transformers is not imported here."""
    return any(
        base.__name__ == "PreTrainedModel" and base.__module__.startswith("transformers.")
        for base in type(model).__mro__
    )


def no_copy(attachment: Attachment, protocol: int = 0):
    """For __reduce_ex__ of attachments: a copy would answer for the original model."""
    raise NotImplementedError("an attached model cannot be copied or pickled whole; detach or copy it first")
