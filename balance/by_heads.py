"""Attention by heads: what it is predicted to take, and whether it is chosen in place of a ring.

Ranks of a node swap tokens for heads (`cp/heads.py`), so all of them have the same work where heads have;
what is left is a ring of nodes, each as one rank with a share of the heads.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from .decision import SWITCH, Decision
from .layout import Layout
from .predict import Call, Prediction, predict
from .schedule import HEADS, HEADS_RING

RINGS = ("ring", "hierarchical")  # whose steps tell the work of each node with the keys of each


def consider_heads(decision: Decision, call: Call, batch: int, in_use: str | None) -> Decision:
    """The same layout by heads instead of in a ring, if that is predicted to be faster by `SWITCH`.

    Heads must have equal work and be divisible by the ranks of a node. in_use: the exchange of the step
    before, which stays unless the other is that much faster. A pull is left as it is: it was faster than a
    ring and moves no queries.
    """
    if decision.exchange not in RINGS:
        return decision
    chosen = decision.chosen
    ring, heads = chosen.best, predict_by_heads(call, decision.layout, chosen.work, batch)
    wins = heads.seconds * SWITCH < ring.seconds
    if in_use == heads.exchange:
        wins = heads.seconds <= ring.seconds * SWITCH
    best, other = (heads, ring) if wins else (ring, heads)
    weighed = replace(chosen, best=best, others=(*chosen.others, (other.exchange, other.seconds)))
    table = tuple(weighed if candidate is chosen else candidate for candidate in decision.table)
    return replace(decision, table=table, exchange=best.exchange)


def predict_by_heads(call: Call, layout: Layout, work: np.ndarray, batch: int = 1) -> Prediction:
    """Seconds under a layout. work: float64 [W, steps + 1], tiles in a ring, hierarchical over several nodes.

    Before the attention queries, keys and values are swapped, after it outputs; in the backward gradients of
    outputs, then those of queries, keys and values. Nothing is computed meanwhile.
    """
    nodes, inner = call.nodes, layout.world // call.nodes
    copies = max(1.0, inner / call.key_heads)  # ranks that have the same key head
    rest = predict(
        "hierarchical",
        replace(
            call,
            heads=call.heads // inner,
            key_bytes=call.key_bytes * copies / inner,
            gradient_bytes=call.gradient_bytes * copies / inner,
        ),
        _of_nodes(layout, nodes),
        _by_source(work, nodes),
        work[:, -1].reshape(nodes, inner).sum(1),
        batch=batch,
    )
    seconds = sum(call.machine.inside.seconds(size) for size in swapped(call, layout, batch))
    name = HEADS if nodes == 1 else HEADS_RING
    return Prediction(name, float(np.round(rest.seconds + seconds, 9)), rest.compute)


def swapped(call: Call, layout: Layout, batch: int = 1) -> list[float]:
    """Bytes that the rank with the most tokens sends in each swap, but for lse and plans, which are small."""
    inner = layout.world // call.nodes
    queries, copies = call.key_bytes / 2 * call.heads / call.key_heads, max(1.0, inner / call.key_heads)
    # Copies are added up by the owner, in full precision.
    gradients = call.key_bytes if copies == 1 else call.gradient_bytes * copies
    blocks = [queries + call.key_bytes * copies, queries]
    blocks += [queries, queries + gradients] * call.backward
    away = max(layout.blocks_per_rank) * batch * (inner - 1) / inner
    return [size * away for size in blocks]


def _of_nodes(layout: Layout, nodes: int) -> Layout:
    """Each node as one rank."""
    inner = layout.world // nodes
    held = (layout.assignment[first : first + inner] for first in range(0, layout.world, inner))
    return Layout(layout.block_size, layout.num_blocks, tuple(sum(each, ()) for each in held), layout.name)


def _by_source(work: np.ndarray, nodes: int) -> np.ndarray:
    """[nodes, nodes]: in round a of a hierarchical ring node n computes with the keys of node n - a."""
    by_round = work[:, :-1].reshape(nodes, len(work) // nodes, nodes, -1).sum((1, 3))
    ranks = np.arange(nodes)
    return np.stack([by_round[ranks, (ranks - source) % nodes] for source in range(nodes)], axis=1)
