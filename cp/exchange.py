"""How keys reach the ranks that need them, from what the user asked for to those that may be chosen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..balance import EXCHANGES
from ..balance.schedule import HEADS, HEADS_RING
from .transport import Transport

if TYPE_CHECKING:
    from .planning import CallShape

PAIR = ("heads", "ring")  # inside a node, and between nodes
OF_NODES = {"hierarchical": "ring", PAIR: "heads"}  # and what they are on a single node
MOST_PULLED = 0.5  # of the keys of others: a pull that is chosen may be expected to make a rank hold so many


def check_exchange(exchange: str | tuple[str, str]) -> None:
    """ValueError unless it is the name of an exchange or "auto"; NotImplementedError for pairs but one."""
    known = ("auto", *EXCHANGES, HEADS, PAIR)
    if not isinstance(exchange, str) and exchange != PAIR:
        raise NotImplementedError(f"exchange {exchange!r}; implemented are {known}")
    if exchange not in known:
        raise ValueError(f"exchange {exchange!r} is unknown; use one of {known}")


def exchange_name(exchange: str | tuple[str, str], axes: str | tuple[str, ...], transport: Transport) -> str:
    """What an exchange is called, "auto" included. axes: the context-parallel ones of the mesh."""
    names = (axes,) if isinstance(axes, str) else tuple(axes)
    if exchange in OF_NODES and 1 == transport.nodes < transport.size and len(names) != 2:
        raise ValueError(
            f"exchange {exchange!r} needs two axes of the mesh, of nodes and of ranks inside a node, got "
            f"{names}; give both, or use exchange={OF_NODES[exchange]!r}"
        )
    return HEADS_RING if exchange == PAIR else exchange


def fixed_exchange(exchange: str, transport: Transport) -> str:
    """The exchange of a step of whose attention nothing is known."""
    if exchange != "auto":
        return exchange
    return "hierarchical" if transport.nodes > 1 else "ring"


def offered(exchange: str, transport: Transport) -> tuple[str, ...]:
    """The exchanges that may be chosen for any step, the fixed one first.

    Not "gather", whose memory grows with the whole sequence.
    """
    fixed = fixed_exchange(exchange, transport)
    return (fixed,) if exchange != "auto" or transport.size == 1 else (fixed, "pull")


def may_share_heads(exchange: str, transport: Transport, calls: Sequence[CallShape]) -> bool:
    """Whether heads (and a ring over several nodes) may be chosen. calls: of all layers of a step.

    Only where the ranks of a node divide the heads of all of them, and all heads have one plan: what heads
    with plans of their own have to do is known on average alone, and by heads they must be equal.
    """
    inner = transport.size // transport.nodes
    return exchange == "auto" and inner > 1 and all(call.alike and call.divides(inner) for call in calls)
