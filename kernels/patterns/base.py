"""What a pattern is: a local summary of the keys, a small exchange, and a local choice of tiles.

A pattern never sees a rank. It says which small tensors it needs from all holders of the sequence
(`summarize`, in one or more stages) and how they combine; the engine moves them; `estimate` then turns
the combined summary into the plan of the query blocks held here. On one device nothing moves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..attention import check_inputs, check_scale
from ..geometry import EMPTY, Geometry
from ..plan import Plan

Op = Literal["sum", "max", "gather", "local"]


@dataclass(frozen=True)
class Field:
    """A tensor of a summary and how the holders' versions combine.

    sum: exact in any order, so either int64 or of disjoint support (each element non-zero on one holder).
    max: elementwise maximum. gather: stacked in a new leading dim; what the pattern does with it must
    not depend on the order of the holders. local: kept as it is for the next stage, not exchanged.
    """

    tensor: Tensor
    op: Op


Summary = dict[str, Tensor]


@dataclass(frozen=True)
class Traits:
    """What a pattern promises.

    causality: strict (the choice for a query never looks at later tokens), block (not beyond its block
        or declared segment) or noncausal (later tokens may influence the choice, never the values).
    comm: none (known without looking at values), summary (small collectives), keys (needs all keys).
    granularity: what it chooses, tiles ("block") or tiles and columns ("column").
    """

    causality: Literal["strict", "block", "noncausal"]
    comm: Literal["none", "summary", "keys"]
    granularity: Literal["block", "column"]


class Pattern:
    """Base of all patterns. A frozen dataclass per family; readable by its repr."""

    traits: Traits
    stages: int = 0

    def prepare(self, geometry: Geometry) -> object:
        """Tables that follow from the geometry alone, kept on it; called before the step starts."""

    def summarize(
        self, q: Tensor, k: Tensor, v: Tensor, geometry: Geometry, stage: int, summary: Summary
    ) -> dict[str, Field]:
        """Fields of one stage from local q [B, H, S, D], k, v [B, Hk, S, D] and earlier stages."""
        raise NotImplementedError

    def estimate(self, q: Tensor, summary: Summary, geometry: Geometry) -> Plan:
        """The plan of the query blocks held here against all key blocks, from combined summaries."""
        raise NotImplementedError


Combine = Callable[[dict[str, Field]], Summary]


def combine_alone(fields: dict[str, Field]) -> Summary:
    """The combined summary where one holder has the whole sequence."""
    return {n: f.tensor[None] if f.op == "gather" else f.tensor for n, f in fields.items()}


@torch.no_grad()
def make_plan(
    pattern: Pattern,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    geometry: Geometry,
    scale: float | None = None,
    combine: Combine | None = None,
) -> Plan:
    """Runs a pattern's stages and returns its plan.

    q: [B, H, S, D]; k, v: [B, Hk, S, D], whole blocks: the tokens that the geometry holds, padded. scale:
    of the scores, 1 / sqrt(D) by default. combine: exchange of one stage between the holders of the
    sequence; by default there is one holder. Raises ValueError for shapes, dtypes or devices that do not
    fit, TypeError for what is no pattern.
    """
    if not isinstance(pattern, Pattern):
        raise TypeError(f"pattern is {pattern!r}; use an object of a pattern, such as Dense()")
    check_inputs(q, k, v, geometry)
    held = len(geometry.blocks) * geometry.block_size
    if q.shape[2] != held:
        raise ValueError(
            f"q has {q.shape[2]} tokens, the geometry holds {held} in blocks of {geometry.block_size}; "
            f"pad q, k and v with zeros to whole blocks"
        )
    scale = check_scale(scale, q.shape[3])
    if scale != q.shape[3] ** -0.5:
        q = q * (scale * q.shape[3] ** 0.5)  # patterns score with 1 / sqrt(D)
    combine = combine or combine_alone
    summary: Summary = {}
    for stage in range(pattern.stages):
        summary |= combine(pattern.summarize(q, k, v, geometry, stage, summary))
    return pattern.estimate(q, summary, geometry)


@dataclass(frozen=True)
class Dense(Pattern):
    """Every visible tile: ordinary attention, by the same code as the sparse patterns."""

    traits = Traits("strict", "none", "block")

    def estimate(self, q: Tensor, summary: Summary, geometry: Geometry) -> Plan:
        return Plan.build(geometry, (geometry.tile_class != EMPTY)[:, None])


def block_distance(geometry: Geometry) -> Tensor:
    """int64 [held blocks, num_blocks]: query block minus key block, in logical ids."""
    return geometry.block_ids[:, None] - torch.arange(geometry.num_blocks, device=geometry.device)


def check_counts(**counts: int) -> None:
    """ValueError unless all are whole numbers of at least 0."""
    for name, count in counts.items():
        if not isinstance(count, int) or count < 0:
            raise ValueError(f"{name} is {count!r}; it is a count: use a whole number, 0 or more")
