"""How keys reach the ranks that need them, from what the user asked for to a schedule."""

from __future__ import annotations

from ..balance import EXCHANGES
from .transport import Transport

LATER = ("pull", "heads")


def check_exchange(exchange: str) -> None:
    """ValueError unless it is the name of an exchange or "auto"; NotImplementedError for one of later."""
    known = ("auto", *EXCHANGES)
    if exchange in LATER or not isinstance(exchange, str):
        raise NotImplementedError(f"exchange {exchange!r}; implemented are {known}")
    if exchange not in known:
        raise ValueError(f"exchange {exchange!r} is unknown; use one of {known}")


def resolve_exchange(exchange: str, axes: str | tuple[str, ...], transport: Transport) -> str:
    """What an exchange stands for, the name of a schedule. axes: the context-parallel ones of the mesh."""
    names = (axes,) if isinstance(axes, str) else tuple(axes)
    if exchange == "auto":
        return "hierarchical" if transport.nodes > 1 else "ring"
    if exchange == "hierarchical" and 1 == transport.nodes < transport.size and len(names) != 2:
        raise ValueError(
            f"exchange 'hierarchical' needs two axes of the mesh, of nodes and of ranks inside a node, got "
            f"{names}; give both, or use exchange='ring'"
        )
    return exchange
