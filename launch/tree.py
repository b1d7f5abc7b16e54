"""A nested state as JSON, with references to its tensors, and tensors by name."""

from __future__ import annotations

from typing import Any

from torch import Tensor

_TENSOR = "__tensor__"


def split(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """`value` as JSON, its tensors moved to `tensors` under their paths, such as "layer.0.weight"."""
    if isinstance(value, Tensor):
        if path in tensors:
            raise ValueError(f"two tensors are called {path!r}; keys with dots must not collide")
        tensors[path] = value
        return {_TENSOR: path}
    prefix = f"{path}." if path else ""
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"{prefix}{key!r}: this key is not a string")
        return {key: split(item, prefix + key, tensors) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [split(item, f"{prefix}{i}", tensors) for i, item in enumerate(value)]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{path}: {type(value).__name__} is neither a tensor nor JSON")


def join(value: Any, tensors: dict[str, Tensor]) -> Any:
    """The inverse of `split` (tuples come back as lists)."""
    if isinstance(value, dict):
        if value.keys() == {_TENSOR}:
            return tensors[value[_TENSOR]]
        return {key: join(item, tensors) for key, item in value.items()}
    return [join(item, tensors) for item in value] if isinstance(value, list) else value


def names(value: Any) -> list[str]:
    """Of all tensors that a split value refers to."""
    if isinstance(value, dict):
        if value.keys() == {_TENSOR}:
            return [value[_TENSOR]]
        value = list(value.values())
    return [name for item in value for name in names(item)] if isinstance(value, list) else []
