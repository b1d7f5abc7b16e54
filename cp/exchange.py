"""How keys reach the ranks that need them, from what the user asked for to a schedule."""

from __future__ import annotations

from ..balance import EXCHANGES
from ..balance.schedule import HEADS, HEADS_RING
from .transport import Transport

PAIR = ("heads", "ring")  # inside a node, and between nodes
OF_NODES = {"hierarchical": "ring", PAIR: "heads"}  # and what they are on a single node


def check_exchange(exchange: str | tuple[str, str]) -> None:
    """ValueError unless it is the name of an exchange or "auto"; NotImplementedError for pairs but one."""
    known = ("auto", *EXCHANGES, HEADS, PAIR)
    if not isinstance(exchange, str) and exchange != PAIR:
        raise NotImplementedError(f"exchange {exchange!r}; implemented are {known}")
    if exchange not in known:
        raise ValueError(f"exchange {exchange!r} is unknown; use one of {known}")


def resolve_exchange(
    exchange: str | tuple[str, str], axes: str | tuple[str, ...], transport: Transport
) -> str:
    """What an exchange stands for, by its name. axes: the context-parallel ones of the mesh."""
    names = (axes,) if isinstance(axes, str) else tuple(axes)
    if exchange == "auto":
        return "hierarchical" if transport.nodes > 1 else "ring"
    if exchange in OF_NODES and 1 == transport.nodes < transport.size and len(names) != 2:
        raise ValueError(
            f"exchange {exchange!r} needs two axes of the mesh, of nodes and of ranks inside a node, got "
            f"{names}; give both, or use exchange={OF_NODES[exchange]!r}"
        )
    return HEADS_RING if exchange == PAIR else exchange
