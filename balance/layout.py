"""Layout: which rank holds which blocks of the sequence, and in which order.

A layout permutes whole blocks only (so a block's positions stay consecutive) and holds every block once.
Everything else, token indices and their inverse, is derived from the assignment.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from operator import index

import numpy as np

NAMES = "contiguous, zigzag, striped, striped(g)"  # what `named` understands


@dataclass(frozen=True, repr=False)
class Layout:
    """An assignment of all blocks of a sequence to ranks.

    block_size: tokens in a block. num_blocks: blocks of the whole sequence.
    assignment: for each rank the logical ids of its blocks in physical order; a rank may hold none.
    name: how the layout was made; two layouts with equal assignments agree whatever their names.

    Raises ValueError unless every block of range(num_blocks) is assigned exactly once.
    """

    block_size: int
    num_blocks: int
    assignment: tuple[tuple[int, ...], ...]
    name: str

    def __post_init__(self) -> None:
        if self.block_size < 1:
            raise ValueError(f"block_size is {self.block_size}; it must be at least 1 token")
        if not self.assignment:
            raise ValueError("the assignment names 0 ranks; give one tuple of blocks for each rank")
        if not np.array_equal(np.sort(self.order), np.arange(self.num_blocks)):
            held = set(self.order.tolist())
            missing = sorted(set(range(self.num_blocks)) - held)
            raise ValueError(
                f"the assignment holds {len(self.order)} blocks, {len(held)} of them different, and misses "
                f"{len(missing)} of the {self.num_blocks} blocks of the sequence (first missing: "
                f"{missing[:4]}); assign each of 0..{self.num_blocks - 1} to exactly one rank"
            )

    @property
    def world(self) -> int:
        """Number of ranks W."""
        return len(self.assignment)

    @property
    def blocks_per_rank(self) -> tuple[int, ...]:
        """Number of blocks that each rank holds, [W]."""
        return tuple(len(blocks) for blocks in self.assignment)

    @cached_property
    def order(self) -> np.ndarray:
        """int64 [num_blocks]: all blocks, rank after rank, in physical order."""
        return np.fromiter(chain.from_iterable(self.assignment), dtype=np.int64)

    @cached_property
    def bounds(self) -> np.ndarray:
        """int64 [W + 1]: the blocks of rank r are order[bounds[r] : bounds[r + 1]]."""
        return np.concatenate([[0], np.cumsum(self.blocks_per_rank)])

    @cached_property
    def source_of_block(self) -> np.ndarray:
        """int32 [num_blocks]: the rank that holds each block."""
        return self._scatter(np.repeat(np.arange(self.world), self.blocks_per_rank))

    @cached_property
    def slot_of_block(self) -> np.ndarray:
        """int32 [num_blocks]: the place of each block in the physical order of its rank."""
        return self._scatter(np.concatenate([np.arange(count) for count in self.blocks_per_rank]))

    def token_index(self, rank: int) -> np.ndarray:
        """int64 [blocks of rank * block_size]: logical positions of the rank's tokens, physical order.

        `full[token_index(rank)]` is the rank's shard of a full sequence.
        """
        blocks = np.array(self.assignment[rank], dtype=np.int64)
        return (blocks[:, None] * self.block_size + np.arange(self.block_size)).ravel()

    @cached_property
    def inverse(self) -> np.ndarray:
        """int64 [num_blocks * block_size]: `concatenated shards[inverse]` is in logical order again."""
        blocks = self.bounds[self.source_of_block] + self.slot_of_block
        return (blocks[:, None] * self.block_size + np.arange(self.block_size)).ravel()

    def digest(self) -> int:
        """Stable 63-bit hash of block size and assignment, by which ranks prove that they agree."""
        text = repr((self.block_size, self.assignment)).encode()
        return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest()) >> 1

    def __repr__(self) -> str:
        counts = sorted(set(self.blocks_per_rank))
        share = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        return (
            f"Layout({self.name}: {self.num_blocks} blocks of {self.block_size} tokens on "
            f"{self.world} ranks, {share} each)"
        )

    def _scatter(self, values: np.ndarray) -> np.ndarray:
        """int32 [num_blocks]: values, given in rank-major physical order, by logical block id."""
        result = np.empty(self.num_blocks, dtype=np.int32)
        result[self.order] = values
        return result


def contiguous(num_blocks: int, world: int, block_size: int) -> Layout:
    """Rank r holds the r-th of W runs of consecutive blocks."""
    _check_sizes(num_blocks, world)
    return Layout(block_size, num_blocks, _cut(0, num_blocks, world), "contiguous")


def zigzag(num_blocks: int, world: int, block_size: int) -> Layout:
    """Rank r holds chunks r and 2W-1-r of 2W: equal work for a dense causal mask.

    If the blocks per rank are odd, chunks differ by one block; the two chunks of a rank even that out.
    """
    _check_sizes(num_blocks, world)
    chunks = _cut(0, num_blocks, 2 * world)
    assignment = tuple(chunks[rank] + chunks[-1 - rank] for rank in range(world))
    return Layout(block_size, num_blocks, assignment, "zigzag")


def striped(num_blocks: int, world: int, block_size: int, stripe: int = 1) -> Layout:
    """Stripes of `stripe` blocks are dealt to the ranks in turn (MTraining, arXiv 2510.18830).

    What is left after the last full round of `stripe * world` blocks is dealt in one round of narrower
    stripes, so ranks hold equal counts whenever `num_blocks` is a multiple of `world`.
    """
    if stripe < 1:
        raise ValueError(f"stripe is {stripe} blocks; it must be at least 1")
    _check_sizes(num_blocks, world)
    width = stripe * world
    rounds = [_cut(start, min(start + width, num_blocks), world) for start in range(0, num_blocks, width)]
    assignment = tuple(sum((cut[rank] for cut in rounds), ()) for rank in range(world))
    return Layout(block_size, num_blocks, assignment, "striped" if stripe == 1 else f"striped({stripe})")


def from_assignment(assignment: Sequence[Sequence[int]], block_size: int, name: str = "custom") -> Layout:
    """Any layout: the logical block ids of each rank in physical order; counts may differ, or be 0.

    Raises ValueError unless the ids are a permutation of 0..n-1, TypeError unless they are integers.
    """
    blocks = tuple(tuple(index(block) for block in blocks) for blocks in assignment)
    return Layout(block_size, sum(map(len, blocks)), blocks, name)


def named(name: str, num_blocks: int, world: int, block_size: int) -> Layout:
    """The layout called `name`: contiguous, zigzag, striped or striped(g). ValueError for other names."""
    if name == "contiguous":
        return contiguous(num_blocks, world, block_size)
    if name == "zigzag":
        return zigzag(num_blocks, world, block_size)
    match = re.fullmatch(r"striped(?:\((\d+)\))?", str(name))
    if match is None:
        raise ValueError(f"unknown layout {name!r}; use one of {NAMES}, auto, or a Layout object")
    return striped(num_blocks, world, block_size, int(match[1] or 1))


def _check_sizes(num_blocks: int, world: int) -> None:
    if num_blocks < 0 or world < 1:
        raise ValueError(
            f"a layout of {num_blocks} blocks on {world} ranks; it needs 0 blocks and 1 rank at least"
        )


def _cut(start: int, stop: int, parts: int) -> tuple[tuple[int, ...], ...]:
    """range(start, stop) in `parts` consecutive runs whose lengths differ by at most one."""
    bounds = [start + part * (stop - start) // parts for part in range(parts + 1)]
    return tuple(tuple(range(a, b)) for a, b in zip(bounds, bounds[1:], strict=False))
