"""Where NaN and infinities of a step come from: the step runs once more, and every tensor is looked at."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .gather import Group, gather

Tensors = Iterable[tuple[str, Tensor]]


def find_nonfinite(model: nn.Module, loss: Callable[[], Tensor], group: Group) -> str:
    """Names the first tensor that is not finite, which tells its layer, and the ranks that have bad elements.

    Looks at weights; at the inputs and outputs of modules, as they run; at the gradients of those, as the
    backward makes them; and at the gradients of weights, from the loss on. Those of a weight are named by the
    rank that holds that part of it.

    All ranks call it. loss: runs the forward of the step again. group: all ranks. The gradients that the
    model has are lost. Slow: it waits for the device at every tensor.
    """
    weights = list(model.named_parameters())
    model.zero_grad()
    stages = (
        lambda: _count((f"weight {name}", _local(weight)) for name, weight in weights),
        lambda: _run(model, loss),
        lambda: _count((f"gradient of {n}", _local(w.grad)) for n, w in weights[::-1] if w.grad is not None),
    )
    for stage in stages:
        if (found := _first(stage(), group)) is not None:
            return found
    return "when the step ran again, all of its tensors were finite"


def _first(counts: list[tuple[str, int]], group: Group) -> str | None:
    """The first of the named counts that is not 0 on some rank; names are equal on all of them."""
    own = next((i for i, (_, bad) in enumerate(counts) if bad), len(counts))
    rows = gather(group, [own, counts[own][1] if own < len(counts) else 0])
    place = min(at for at, _ in rows)
    if place == len(counts):
        return None
    ranks = [f"{bad} on rank {rank}" for rank, (at, bad) in enumerate(rows) if at == place]
    return f"{counts[place][0]} has NaN or infinite elements: {', '.join(ranks)}"


def _run(model: nn.Module, loss: Callable[[], Tensor]) -> list[tuple[str, int]]:
    """Counts of a forward and a backward: of what each module takes and gives, of the gradients of those."""
    counts: list[tuple[str, int]] = []

    def look(name: str, values: Any) -> None:
        for x in _tensors(values):
            counts.extend(_count([(name, x)]))
            if x.requires_grad:
                x.register_hook(lambda gradient: counts.extend(_count([(f"gradient of {name}", gradient)])))

    def before(name, module, args):
        look(f"input of {name}", args)

    def after(name, module, args, output):
        look(f"output of {name}", output)

    handles = []
    for name, module in model.named_modules():
        if name:
            handles.append(module.register_forward_pre_hook(partial(before, name)))
            handles.append(module.register_forward_hook(partial(after, name)))
    value = loss()
    for handle in handles:  # recomputation runs the modules again
        handle.remove()
    counts.extend(_count([("the loss", value)]))
    value.backward()
    return counts


def _count(tensors: Tensors) -> list[tuple[str, int]]:
    return [(name, int((~x.detach().isfinite()).sum())) for name, x in tensors]


def _local(x: Tensor) -> Tensor:
    return x.to_local() if isinstance(x, DTensor) else x


def _tensors(values: Any) -> list[Tensor]:
    """The floating-point tensors in nested lists, tuples and mappings."""
    if isinstance(values, Tensor):
        return [values] if values.is_floating_point() else []
    if isinstance(values, Mapping):
        values = values.values()
    elif not isinstance(values, list | tuple):
        return []
    return [x for value in values for x in _tensors(value)]
