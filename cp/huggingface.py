"""transformers models: their attention and mask registries lead to ContextParallel.attention.

The shard reaches the attention function as a keyword of the model, which transformers hands from layer to
layer and which activation checkpointing keeps with its other arguments.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from .attach import ATTRIBUTE, ORDER, no_copy
from .rotary import STATIC, Rotaries, rope_types
from .shard import KEYWORD, Shard

if TYPE_CHECKING:
    from .context_parallel import ContextParallel

NAME = "sparring"  # in the registries of transformers
SUPPORTED = "supported is full causal self-attention without dropout, over the documents of a shard"
CALL = (
    "call model(**cp.shard(batch).inputs); to generate, or to run the model without a shard, "
    "cp.detach(model) first"
)
DROPOUTS = ("attention_dropout", "attn_pdrop", "attn_dropout", "attention_probs_dropout_prob")
LOGIT_RULES = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")
# Keywords that reach attention functions and ask nothing of them.
HARMLESS = {
    "position_ids", "position_embeddings", "cache_position", "use_cache", "output_hidden_states",
    "num_items_in_batch", "return_dict", "logits_to_keep",
}  # fmt: skip


def attach(cp: ContextParallel, model: nn.Module, whole_logits: bool) -> None:
    """See attach_model. Unless whole_logits, the model then returns hidden states in place of logits."""
    from transformers import AttentionInterface, AttentionMaskInterface

    _check(model, whole_logits)
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, attention_mask)
    attachment = HuggingFaceAttachment(cp, model)
    setattr(model, ATTRIBUTE, attachment)
    model.set_attn_implementation(NAME)
    model.config.use_cache = False
    if model.config._attn_implementation != NAME:
        attachment.detach(model)
        raise NotImplementedError(f"the attention of {type(model).__name__} cannot be replaced; {SUPPORTED}")
    if not whole_logits:
        attachment.head = Head(model.get_output_embeddings(), model)


class HuggingFaceAttachment:
    """What attach changed, to undo it, and which module runs which layer."""

    def __init__(self, cp: ContextParallel, model: nn.Module):
        self.cp = cp
        self.head: Head | None = None
        self.implementation = model.config._attn_implementation
        self.use_cache = getattr(model.config, "use_cache", None)
        self.arguments = tuple(inspect.signature(model.forward).parameters)
        self.modules = set(model.modules())
        self.layers: dict[int, nn.Module] = {}
        self.rotaries = Rotaries(model)
        self.hooks = (
            model.register_forward_pre_hook(_before_forward, with_kwargs=True),
            model.register_forward_hook(_after_forward, with_kwargs=True),
            model.register_forward_hook(_end_forward, always_call=True),
        )

    def detach(self, model: nn.Module) -> None:
        for hook in self.hooks:
            hook.remove()
        if self.head is not None:
            self.head.detach()
        self.rotaries.detach()
        model.set_attn_implementation(self.implementation)
        model.config.use_cache = self.use_cache
        delattr(model, ATTRIBUTE)

    __reduce_ex__ = no_copy


class Head:
    """The output embedding of an attached model. In the model it passes hidden states through.

    Its parameters are then used after the forward, so DDP must not search for unused ones
    (find_unused_parameters=True raises; whole_logits avoids it).
    """

    def __init__(self, module: nn.Module, model: nn.Module):
        self.module, self.model = module, model
        self.passed: Tensor | None = None  # what the running forward passed through
        self._replaced = module.__dict__.get("forward")
        setattr(module, ATTRIBUTE, self)
        module.forward = MethodType(_pass_through, module)

    @property
    def weight(self) -> Tensor:
        """Whole, gathered by FSDP2 if need be: it is used after the forward and before the backward."""
        for unit in (self.module, self.model):
            if isinstance(self.module.weight, DTensor) and isinstance(unit, FSDPModule):
                unit.unshard()
        if isinstance(self.module.weight, DTensor):
            raise ValueError(
                "the weight of the output embedding is sharded where the loss needs it; leave it to the "
                "outermost fully_shard or give it one of its own, or cp.attach(model, whole_logits=True)"
            )
        return self.module.weight

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of hidden states [..., E], as the model itself makes them."""
        forward = self._replaced or MethodType(type(self.module).forward, self.module)
        return forward(hidden.to(self.weight.dtype))

    def detach(self) -> None:
        del self.module.forward
        if self._replaced is not None:
            self.module.forward = self._replaced
        delattr(self.module, ATTRIBUTE)


def _pass_through(module: nn.Module, hidden: Tensor) -> Tensor:
    hidden = hidden.clone()  # models slice it before their head, and FSDP warns of outputs that are views
    if not torch.compiler.is_compiling():
        getattr(module, ATTRIBUTE).passed = hidden
    return hidden


def _before_forward(model: nn.Module, args: tuple, kwargs: dict[str, Any]):
    """Checks how the model is called; the mask tells transformers not to look for documents itself."""
    attachment: HuggingFaceAttachment = getattr(model, ATTRIBUTE)
    given = dict(zip(attachment.arguments, args, strict=False)) | kwargs
    shard = given.get(KEYWORD)
    if shard is None:
        raise ValueError(f"{type(model).__name__} is attached and was called without a shard; {CALL}")
    if shard.cp is not attachment.cp:
        raise ValueError(f"the shard is of another ContextParallel than the model is attached to; {CALL}")
    if model.config._attn_implementation != NAME:
        raise RuntimeError(
            f"the attention implementation became {model.config._attn_implementation!r} after attach; "
            f"it must stay {NAME!r} (do models share one config? give each a copy)"
        )
    for name, instead in (
        ("labels", "cp.shard(batch | {'labels': labels}) and cp.loss(output, shard)"),
        ("attention_mask", "cp.shard(batch | {'attention_mask': mask})"),
    ):
        if given.get(name) is not None:
            raise ValueError(f"{name} must not be passed to an attached model; use {instead}")
    if given.get("position_ids") is None:
        raise ValueError(f"position_ids are missing: tokens of a shard are not in order; {CALL}")
    for name in ("past_key_values", "use_cache", "output_attentions", "output_router_logits"):
        if given.get(name) is not None and given[name] is not False:
            raise NotImplementedError(f"{name} of an attached model; {SUPPORTED}")
    if not torch.compiler.is_compiling():
        # Without a mask transformers looks for packed documents in position_ids, waiting for the device.
        size = (shard.geometry.batch, shard.local_length)
        mask = torch.ones(size, dtype=torch.bool, device=shard.geometry.device)
        setattr(mask, ATTRIBUTE, True)
        given["attention_mask"] = mask
    attachment.rotaries.running = shard
    return (), given


def _after_forward(model: nn.Module, args: tuple, kwargs: dict[str, Any], output):
    """Every layer must have come through `attention`, and hidden states untouched through the head."""
    attachment: HuggingFaceAttachment = getattr(model, ATTRIBUTE)
    covered = kwargs[KEYWORD].record.covered
    missing = [layer for layer in range(model.config.num_hidden_layers) if layer not in covered]
    if missing:
        raise RuntimeError(
            f"layers {missing} of {type(model).__name__} ran without sparse context-parallel attention, so "
            "they saw this rank's tokens only"
        )
    head = attachment.head
    if head is not None and not torch.compiler.is_compiling():
        passed, head.passed = head.passed, None
        if passed is None or getattr(output, "logits", output[0]) is not passed:
            raise NotImplementedError(
                f"{type(model).__name__} changes logits after its output embedding; "
                "cp.attach(model, whole_logits=True)"
            )


def _end_forward(model: nn.Module, args: tuple, output) -> None:
    """Called after a failure too."""
    getattr(model, ATTRIBUTE).rotaries.running = None


@torch.compiler.disable(reason="sparse attention over ranks")
def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """The registered attention function: out [B, S', H, D] from q [B, H, S', D] and k, v [B, Hk, S', D]."""
    shard: Shard | None = kwargs.pop(KEYWORD, None)
    if shard is None:
        raise ValueError(f"no shard reached {type(module).__name__}; {CALL}")
    layer = _layer(module, shard)
    features = {"attention_mask": attention_mask, "dropout": dropout if module.training else None}
    features |= {name: x for name, x in kwargs.items() if name not in HARMLESS and name != "is_causal"}
    for name, x in features.items():
        if isinstance(x, Tensor) or x not in (None, False, 0):
            detail = "" if isinstance(x, Tensor) else f" = {x}"
            raise NotImplementedError(f"{name}{detail} in {type(module).__name__} {layer}; {SUPPORTED}")
    if not kwargs.get("is_causal", True) or not getattr(module, "is_causal", True):
        raise NotImplementedError(f"bidirectional {type(module).__name__} {layer}; {SUPPORTED}")
    if key.shape[2] != query.shape[2]:
        raise NotImplementedError(
            f"{query.shape[2]} queries and {key.shape[2]} keys in {type(module).__name__} {layer} (a cache "
            f"or cross-attention); {SUPPORTED}"
        )
    if isinstance(query, DTensor):
        raise NotImplementedError(f"DTensor queries in {type(module).__name__} {layer}; pass local tensors")
    out = shard.cp.attention(query, key, value, shard, layer=layer, scale=scaling)
    return out.transpose(1, 2).contiguous(), None


def attention_mask(*args, attention_mask: Tensor | None = None, use_vmap: bool = False, **kwargs) -> None:
    """The registered mask function. Masks follow from the shard, so there is none to make."""
    if attention_mask is not None and not hasattr(attention_mask, ATTRIBUTE):
        raise ValueError(
            "attention_mask must not be passed to an attached model; use "
            "cp.shard(batch | {'attention_mask': mask})"
        )
    if use_vmap:
        raise NotImplementedError(f"the model adds a mask function of its own; {SUPPORTED}")


def _layer(module: nn.Module, shard: Shard) -> int:
    """The key of an attention module's plans."""
    attachment = getattr(shard.cp.model, ATTRIBUTE, None)
    if attachment is None or module not in attachment.modules:
        raise ValueError(f"the shard is of another ContextParallel than the model is attached to; {CALL}")
    layer = module.layer_idx
    if attachment.layers.setdefault(layer, module) is not module:
        raise NotImplementedError(f"two attention modules of one layer, {layer}; {SUPPORTED}")
    return layer


def _check(model: nn.Module, whole_logits: bool) -> None:
    """Refuses at attach what would fail, or be wrong, in a forward."""
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        raise ValueError(f"gradient checkpointing is enabled already; {ORDER}")
    if model.config._attn_implementation == NAME:
        raise ValueError(
            "the model shares its config with an attached model; give each model its own, "
            "copy.deepcopy(config)"
        )
    reasons = list(_unsupported(model))
    if not reasons and not getattr(model, "supports_context_parallel", True):
        reasons = ["supports_context_parallel = False"]
    if reasons:
        raise NotImplementedError(f"{type(model).__name__} has {', '.join(reasons)}; {SUPPORTED}")
    rules = [n for n in LOGIT_RULES if getattr(model.config, n, None) not in (None, 1)]
    weight = getattr(model.get_output_embeddings(), "weight", None)
    if not whole_logits and (rules or not isinstance(weight, Tensor) or weight.dim() != 2):
        raise NotImplementedError(
            f"{type(model).__name__} makes logits by {' and '.join(rules) or 'a head without a weight'}, "
            "which the loss by chunks does not apply; cp.attach(model, whole_logits=True)"
        )


def _unsupported(model: nn.Module) -> Iterator[str]:
    """Features by name."""
    config = model.config
    if getattr(config, "is_encoder_decoder", False):
        yield "an encoder and a decoder"
        return
    if config.get_text_config() is not config:
        yield "several towers (multimodal)"
        return
    if model.get_output_embeddings() is None:
        yield "no language-model head"
    if getattr(model, "_is_stateful", False):
        yield "recurrent (linear attention, state-space) layers"
    if not getattr(model, "_supports_attention_backend", False):
        yield "attention that does not go through AttentionInterface"
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None:
        others = sorted(set(layer_types) - {"full_attention"})
        if others:
            yield f"layers of type {', '.join(others)}"
    elif getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        yield f"a sliding window of {config.sliding_window}"
    for name in ("attn_logit_softcapping", "output_attentions", "output_router_logits"):
        if getattr(config, name, None):
            yield f"{name} = {getattr(config, name)}"
    for name in DROPOUTS:
        if isinstance(getattr(config, name, 0), float) and getattr(config, name) > 0:
            yield f"{name} = {getattr(config, name)}"
    modules = list(model.modules())
    if any(getattr(module, "is_causal", True) is False for module in modules):
        yield "bidirectional or cross-attention"
    numbered = {getattr(module, "layer_idx", None) for module in modules}
    if not numbered.issuperset(range(config.num_hidden_layers)):
        yield "attention modules without layer_idx"
    parameters = getattr(config, "rope_parameters", None) or {}
    asked = {x.get("rope_type") for x in (parameters, *parameters.values()) if isinstance(x, dict)}
    for name in sorted(asked - {None} - STATIC - set().union(*map(rope_types, modules))):
        yield f"{name} rotary frequencies in a module without rope_type"
