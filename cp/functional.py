"""Plain modules: their calls of scaled_dot_product_attention lead to ContextParallel.attention.

While an attached module runs, a TorchFunctionMode sees every call of scaled_dot_product_attention. Activation
checkpointing runs parts of the module again, after forward has returned and possibly in another thread, and
several shards may wait for that. So each wrapped forward leaves a mark, a weak reference to its shard, on
the storage of the tensors that go in and out. A part that runs again outside any forward finds its shard by
the marks of its arguments: checkpointing keeps exactly those alive. The graph keeps the shard alive.

What cannot be found is refused: checkpoint whole modules whose arguments are tensors that came from the
model's modules or its caller, not functions around a bare scaled_dot_product_attention.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode

from .attach import ATTRIBUTE, no_copy
from .shard import KEYWORD, Shard

if TYPE_CHECKING:
    from .context_parallel import ContextParallel

MARK = "_sparring_shards"  # on storages: weak references to the shards whose forward used them
SDPA = torch.nn.functional.scaled_dot_product_attention
SUPPORTED = (
    "supported is scaled_dot_product_attention(q, k, v, is_causal=True, scale=..., enable_gqa=...) with "
    "q [B, H, S', D] and k, v [B, Hk, S', D]; documents and padding belong in cp.shard(batch)"
)
ATTENTIONS = ("attention", "attn", "transformer_encoder")  # in names of functions that would stay local
CHECKPOINT = "checkpoint whole modules whose arguments are tensors that modules of the model made or got"


def attach(cp: ContextParallel, model: nn.Module, whole_logits: bool) -> None:
    """See attach_model. A plain module returns what it always returned, so whole_logits changes nothing."""
    attachment = FunctionalAttachment(cp, model)
    for module in model.modules():
        if "forward" in module.__dict__:
            attachment.replaced[module] = module.forward
        setattr(module, ATTRIBUTE, attachment)
        module.forward = MethodType(_forward, module)


def _forward(module: nn.Module, *args, **kwargs):
    """The forward of every module of an attached model. torch.compile leaves it as it is: the marks and the
    mode are not for its eyes. A block that calls cp.attention itself is compiled.
    """
    attachment: FunctionalAttachment = getattr(module, ATTRIBUTE)
    if torch.compiler.is_compiling():
        from .uncompiled import uncompiled  # imports the compiler, so not with the package

        return uncompiled(attachment.call, module, args, kwargs)
    return attachment.call(module, args, kwargs)


@dataclass
class Scope:
    """One uninterrupted run of the model, or of a part again, in one thread. shard None: not found."""

    shard: Shard | None
    frames: list[Frame] = field(default_factory=list)
    layers: set[tuple[str, int]] = field(default_factory=set)


@dataclass
class Frame:
    """A module that is running."""

    name: str
    recording: bool  # whether gradients were recorded when it started
    calls: int = 0  # of scaled_dot_product_attention


class FunctionalAttachment:
    """What attach left on a model and each of its modules."""

    head = None

    def __init__(self, cp: ContextParallel, model: nn.Module):
        self.cp, self.model = cp, model
        self.names = {module: name for name, module in model.named_modules()}
        self.replaced: dict[nn.Module, Any] = {}
        self.running = threading.local()
        self.mode = _Intercept(self)
        self.warned = False

    __reduce_ex__ = no_copy

    def detach(self, model: nn.Module) -> None:
        for module in self.names:
            del module.forward
            delattr(module, ATTRIBUTE)
            if module in self.replaced:
                module.forward = self.replaced[module]

    def call(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]):
        """Runs the module's own forward in the scope of its shard."""
        shard = kwargs.pop(KEYWORD, None)
        scope = getattr(self.running, "scope", None)
        if scope is not None:
            return self.run(scope, module, args, kwargs)
        whole = module is self.model
        if whole:
            self.check(shard, args, kwargs)
        else:
            shard = _find(args, kwargs)
        scope = self.running.scope = Scope(shard)
        try:
            with self.mode:
                output = self.run(scope, module, args, kwargs)
        finally:
            self.running.scope = None
        if whole and not scope.layers:
            raise RuntimeError(
                f"{type(self.model).__name__} finished without a call of scaled_dot_product_attention, so no "
                f"attention went over ranks; {SUPPORTED}, or call cp.attention yourself"
            )
        return output

    def run(self, scope: Scope, module: nn.Module, args: tuple, kwargs: dict[str, Any]):
        _mark(scope.shard, args, kwargs)
        scope.frames.append(Frame(self.names[module], torch.is_grad_enabled()))
        try:
            forward = self.replaced.get(module) or MethodType(type(module).forward, module)
            output = forward(*args, **kwargs)
        finally:
            scope.frames.pop()
        _mark(scope.shard, output)
        return output

    def check(self, shard: Shard | None, args: tuple, kwargs: dict[str, Any]) -> None:
        """The shard of a call of the whole model."""
        name = type(self.model).__name__
        if shard is None:
            raise ValueError(
                f"{name} is attached and was called without a shard; call model(**shard.inputs), or "
                f"model(shard.inputs['input_ids'], ..., {KEYWORD}=shard) if its arguments have other names, "
                "or cp.detach(model) first"
            )
        if shard.cp is not self.cp:
            raise ValueError(
                "the shard is of another ContextParallel than the one the model is attached to; use its shard"
            )
        positions = shard.tensors["position_ids"]
        if not self.warned and not any(x is positions for x in _tensors((args, kwargs))):
            self.warned = True
            warnings.warn(
                f"{name} was called without shard.inputs['position_ids']; positions that it counts itself "
                "are wrong, because tokens of a shard are not in order",
                stacklevel=5,
            )


class _Intercept(TorchFunctionMode):
    """Sees the torch functions that a model calls."""

    def __init__(self, attachment: FunctionalAttachment):
        super().__init__()
        self.attachment = attachment

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is SDPA:
            return self.attention(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if any(word in name for word in ATTENTIONS):
            frame = self.attachment.running.scope.frames[-1]
            raise NotImplementedError(f"{name} in module {frame.name!r}; {SUPPORTED}")
        return func(*args, **kwargs)

    def attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """Has the signature of scaled_dot_product_attention."""
        scope = self.attachment.running.scope
        shard, frame = scope.shard, scope.frames[-1]
        place = f"scaled_dot_product_attention in module {frame.name!r}"
        if shard is None:
            raise NotImplementedError(f"{place}: recomputed, and its shard is not known; {CHECKPOINT}")
        if frame.recording and not torch.is_grad_enabled():
            raise NotImplementedError(
                f"{place}: called without gradients by a module that runs with them, as by a reentrant "
                f"checkpoint around the bare function, whose recomputation would escape; {CHECKPOINT}"
            )
        _check(place, query, key, attn_mask, dropout_p, is_causal, enable_gqa)
        layer = (frame.name, frame.calls)
        frame.calls += 1
        if layer in scope.layers:
            raise NotImplementedError(
                f"{place}: the module runs twice in one forward (shared layers); its plans are kept by name"
            )
        scope.layers.add(layer)
        return self.attachment.cp.attention(query, key, value, shard, layer=layer, scale=scale)


def _check(place, query, key, attn_mask, dropout_p, is_causal, enable_gqa) -> None:
    """Refuses what scaled_dot_product_attention can do and sparse context parallelism cannot."""
    if any(isinstance(x, DTensor) for x in (query, key)):
        raise NotImplementedError(f"{place}: DTensor inputs; {SUPPORTED}")
    if attn_mask is not None:
        raise NotImplementedError(f"{place}: attn_mask; {SUPPORTED}")
    if dropout_p > 0:
        raise NotImplementedError(f"{place}: dropout_p = {dropout_p}; {SUPPORTED}")
    if not is_causal:
        raise NotImplementedError(f"{place}: is_causal = False; {SUPPORTED}")
    if query.dim() != 4 or key.dim() != 4:
        raise NotImplementedError(f"{place}: {query.dim()}-D queries, {key.dim()}-D keys; {SUPPORTED}")
    if key.shape[2] != query.shape[2]:
        raise NotImplementedError(
            f"{place}: {query.shape[2]} queries and {key.shape[2]} keys (a cache or cross-attention); "
            f"{SUPPORTED}"
        )
    if key.shape[1] != query.shape[1] and not enable_gqa:
        raise ValueError(
            f"{place}: {query.shape[1]} query heads and {key.shape[1]} key heads; give enable_gqa=True"
        )


def _tensors(value) -> Iterator[Tensor]:
    """Tensors in arguments or results, through the usual containers."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for x in value.values():
            yield from _tensors(x)
    elif isinstance(value, list | tuple):
        for x in value:
            yield from _tensors(x)
    elif is_dataclass(value) and not isinstance(value, type):
        for each in fields(value):
            yield from _tensors(getattr(value, each.name))


def _mark(shard: Shard | None, *values) -> None:
    """Notes on the storage of each tensor that a forward with this shard used it."""
    if shard is None:
        return
    mark = weakref.ref(shard)
    for x in _tensors(values):
        if x.grad_fn is not None and not any(x is own for own in shard.tensors.values()):
            x.grad_fn.metadata[MARK] = shard
        storage = _storage(x)
        marks = getattr(storage, MARK, ())
        if storage is not None and mark not in marks:
            setattr(storage, MARK, (*(m for m in marks if m() is not None), mark))


def _find(*values) -> Shard | None:
    """The shard that all marked tensors have in common, if there is just one.

    Tensors of the model itself, such as tables of positions, bear the marks of many shards.
    """
    common = None
    for x in _tensors(values):
        marks = getattr(_storage(x), MARK, ())
        if marks:
            shards = {mark() for mark in marks} - {None}
            common = shards if common is None else common & shards
    return common.pop() if common is not None and len(common) == 1 else None


def _storage(x: Tensor) -> torch.UntypedStorage | None:
    """Python keeps one object for a storage as long as the storage lives, so it can bear a mark."""
    return x.untyped_storage() if x.layout is torch.strided and not isinstance(x, DTensor) else None
