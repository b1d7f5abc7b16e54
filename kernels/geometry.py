"""Geometry: which keys every query may see, and which blocks of the sequence are held here.

A mask is written as at most two visible intervals per query, in logical token positions: the main one
`[lo, hi]` and an optional prefix. Causal, document, sliding-window, prefix-LM and full masks are all of
this form, and it does not care in which order blocks lie in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from functools import cached_property
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

Documents = tuple[tuple[tuple[int, int], ...], ...]  # per batch row: (start, end) of each document

EMPTY, FULL, PARTIAL = 0, 1, 2  # values of Geometry.tile_class
_CHUNK = 2**24  # elements of temporaries in visible_elements


class Memo:
    """Tables that follow from a frozen object, made once and kept with it; copies start without them."""

    def memo(self, key: Hashable, build: Callable[[], Any]) -> Any:
        """build() of the first call with this key."""
        cache = self.__dict__.setdefault("_memo", {})
        if key not in cache:
            cache[key] = build()
        return cache[key]


@dataclass(frozen=True)
class Geometry(Memo):
    """Visible intervals of a batch and the blocks held here. Positions are logical tokens.

    block_size: tokens in a block.
    num_tokens: padded length N, a multiple of block_size.
    documents: per batch row the (start, end) ranges of its documents; tokens outside are padding.
    lo, hi: int32 [B, N], inclusive; a query that sees nothing has lo = N and hi = -1.
    prefix_lo, prefix_hi: int32 [B, N] or None, a second interval disjoint from the first.
    blocks: logical ids of the blocks held here, in physical order; queries and keys alike.
    """

    block_size: int
    num_tokens: int
    documents: Documents
    lo: Tensor
    hi: Tensor
    blocks: tuple[int, ...]
    prefix_lo: Tensor | None = None
    prefix_hi: Tensor | None = None

    def __post_init__(self) -> None:
        check_batch(self.batch)
        check_documents(self.documents, self.batch, self.num_tokens)
        wrong = [b for b in self.blocks if not isinstance(b, int) or not 0 <= b < self.num_blocks]
        if wrong or len(set(self.blocks)) != len(self.blocks):
            raise ValueError(
                f"blocks hold {len(self.blocks)} ids, {len(set(self.blocks))} of them different, "
                f"{len(wrong)} of them wrong (first: {wrong[:4]}); use different int ids of the "
                f"{self.num_blocks} blocks 0..{self.num_blocks - 1}, in any order"
            )

    @staticmethod
    def causal(
        batch: int,
        length: int,
        block_size: int = 128,
        documents: Documents | None = None,
        blocks: tuple[int, ...] | None = None,
        device: torch.device | str = "cpu",
    ) -> Geometry:
        """Causal attention inside each document; one document of `length` tokens by default."""
        check_batch(batch)
        check_length(length, block_size)
        documents = (((0, length),),) * batch if documents is None else documents
        check_documents(documents, batch, length)
        lo = torch.full((batch, length), length, dtype=torch.int32)
        hi = torch.full((batch, length), -1, dtype=torch.int32)
        for row, ranges in enumerate(documents):
            for start, end in ranges:
                lo[row, start:end] = start
                hi[row, start:end] = torch.arange(start, end, dtype=torch.int32)
        return Geometry.from_intervals(
            lo.to(device), hi.to(device), block_size, documents=documents, blocks=blocks
        )

    @staticmethod
    def from_intervals(
        lo: Tensor,
        hi: Tensor,
        block_size: int = 128,
        prefix: tuple[Tensor, Tensor] | None = None,
        documents: Documents | None = None,
        blocks: tuple[int, ...] | None = None,
    ) -> Geometry:
        """Geometry of any mask given as inclusive int intervals [B, S]; pads S up to whole blocks.

        Intervals may reach beyond the tokens; one with lo > hi is empty.
        """
        bounds = (lo, hi, *(prefix or ()))
        check_intervals(bounds)
        batch, length = lo.shape
        check_length(length, block_size)
        documents = (((0, length),),) * batch if documents is None else documents
        check_documents(documents, batch, length)
        num_tokens = -(-length // block_size) * block_size
        lo, hi = _normalise(lo, hi, num_tokens)
        prefix_lo = prefix_hi = None
        if prefix is not None:
            # Disjoint intervals let elements be counted by addition.
            overlap = torch.where(lo <= hi, lo - 1, num_tokens)
            clipped = torch.minimum(prefix[1].int(), overlap[:, :length])
            prefix_lo, prefix_hi = _normalise(prefix[0], clipped, num_tokens)
        return Geometry(
            block_size=block_size,
            num_tokens=num_tokens,
            documents=documents,
            lo=lo,
            hi=hi,
            blocks=tuple(range(num_tokens // block_size)) if blocks is None else tuple(blocks),
            prefix_lo=prefix_lo,
            prefix_hi=prefix_hi,
        )

    def select(self, blocks: tuple[int, ...]) -> Geometry:
        """The same mask, seen by a holder of other blocks."""
        return replace(self, blocks=tuple(blocks))

    def pad_to(self, num_tokens: int) -> Geometry:
        """The same mask with padding at the end up to num_tokens; all blocks are held."""
        if num_tokens < self.num_tokens or num_tokens % self.block_size:
            raise ValueError(
                f"cannot pad {self.num_tokens} tokens to {num_tokens}; use a multiple of the block size "
                f"{self.block_size} that is not smaller"
            )
        tail = (0, num_tokens - self.num_tokens)
        pad = torch.nn.functional.pad
        bounds = {
            name: pad(getattr(self, name), tail, value=value)
            for name, value in dict(lo=num_tokens, hi=-1, prefix_lo=num_tokens, prefix_hi=-1).items()
            if getattr(self, name) is not None
        }
        for low, high in (("lo", "hi"), ("prefix_lo", "prefix_hi")):
            if low in bounds:  # queries that see nothing say so by the new length
                bounds[low] = bounds[low].masked_fill(bounds[low] > bounds[high], num_tokens)
        blocks = tuple(range(num_tokens // self.block_size))
        return replace(self, num_tokens=num_tokens, blocks=blocks, **bounds)

    def to(self, device: torch.device | str) -> Geometry:
        """The same geometry with its intervals on a device."""
        names = [n for n in ("lo", "hi", "prefix_lo", "prefix_hi") if getattr(self, n) is not None]
        return replace(self, **{name: getattr(self, name).to(device) for name in names})

    @property
    def batch(self) -> int:
        return self.lo.shape[0]

    @property
    def num_blocks(self) -> int:
        return self.num_tokens // self.block_size

    @property
    def device(self) -> torch.device:
        return self.lo.device

    @cached_property
    def block_ids(self) -> Tensor:
        """int64 [held blocks], on the device of the intervals."""
        return torch.tensor(self.blocks, dtype=torch.int64, device=self.device)

    @cached_property
    def positions(self) -> Tensor:
        """int64 [held tokens]: logical position of every token held here, in physical order."""
        inside = torch.arange(self.block_size, device=self.device)
        return (self.block_ids[:, None] * self.block_size + inside).flatten()

    @cached_property
    def intervals(self) -> tuple[tuple[Tensor, Tensor], ...]:
        """One or two pairs of int32 [B, held tokens]: intervals of the queries held here."""
        pairs = [(self.lo, self.hi)]
        if self.prefix_lo is not None:
            pairs.append((self.prefix_lo, self.prefix_hi))
        return tuple(
            (low[:, self.positions].contiguous(), high[:, self.positions].contiguous()) for low, high in pairs
        )

    @cached_property
    def tile_class(self) -> Tensor:
        """int8 [B, held blocks, num_blocks]: EMPTY (invisible), FULL (no mask needed) or PARTIAL."""
        first = torch.arange(self.num_blocks, device=self.device) * self.block_size
        last = first + self.block_size - 1
        empty = torch.ones((), dtype=torch.bool, device=self.device)
        full = torch.zeros((), dtype=torch.bool, device=self.device)
        for lo, hi in self.intervals:
            lo = lo.unflatten(1, (len(self.blocks), self.block_size))
            hi = hi.unflatten(1, (len(self.blocks), self.block_size))
            seen = (first <= hi.amax(2)[..., None]) & (last >= lo.amin(2)[..., None])
            covered = (first >= lo.amax(2)[..., None]) & (last <= hi.amin(2)[..., None])
            empty, full = empty & ~seen, full | covered
        return torch.where(empty, EMPTY, torch.where(full, FULL, PARTIAL)).to(torch.int8)

    @cached_property
    def visible_elements(self) -> Tensor:
        """int32 [B, held blocks, num_blocks]: how many (query, key) pairs of a tile are visible."""
        first = torch.arange(self.num_blocks, device=self.device, dtype=torch.int32)
        first = first * self.block_size
        last = first + self.block_size - 1
        step = max(1, _CHUNK // (self.batch * self.block_size * self.num_blocks))
        chunks = []
        for start in range(0, max(1, len(self.blocks)), step):
            count = torch.zeros((), dtype=torch.int32, device=self.device)
            for lo, hi in self.intervals:
                lo = lo.unflatten(1, (len(self.blocks), self.block_size))[:, start : start + step, :, None]
                hi = hi.unflatten(1, (len(self.blocks), self.block_size))[:, start : start + step, :, None]
                width = torch.minimum(hi, last) - torch.maximum(lo, first) + 1
                count = count + width.clamp_(min=0).sum(2, dtype=torch.int32)
            chunks.append(count)
        return torch.cat(chunks, 1)

    @cached_property
    def num_visible_tiles(self) -> int:
        """Tiles that a dense plan holds here, over the batch. Synchronises; call it at set-up."""
        return int((self.tile_class != EMPTY).sum())

    def visible(self, keys: Tensor) -> Tensor:
        """bool [B, held tokens, K]: whether each query held here sees logical key positions [K]."""
        seen = [(lo[..., None] <= keys) & (keys <= hi[..., None]) for lo, hi in self.intervals]
        return seen[0] if len(seen) == 1 else seen[0] | seen[1]


def _normalise(lo: Tensor, hi: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
    """Intervals end where the tokens end, empty ones become (N, -1), the tail is padded with empty ones."""
    lo, hi = lo.int().clamp(min=0), hi.int().clamp(max=lo.shape[1] - 1)
    empty = lo > hi
    lo, hi = lo.masked_fill(empty, num_tokens), hi.masked_fill(empty, -1)
    tail = (0, num_tokens - lo.shape[1])
    pad = torch.nn.functional.pad
    return pad(lo, tail, value=num_tokens), pad(hi, tail, value=-1)


def check_batch(batch: int) -> None:
    """ValueError unless there is at least one row."""
    if not isinstance(batch, Integral) or batch < 1:
        raise ValueError(f"batch size is {batch}; it needs at least 1 row")


def check_length(length: int, block_size: int) -> None:
    """ValueError unless there is at least one token and the block size is a power of two >= 16."""
    if not isinstance(length, Integral) or length < 1:
        raise ValueError(f"sequence length is {length}; attention needs at least 1 token")
    if not isinstance(block_size, Integral) or block_size < 16 or block_size & (block_size - 1):
        raise ValueError(f"block_size {block_size} must be a power of two of at least 16; use 128")


def check_intervals(bounds: tuple[Tensor, ...]) -> None:
    """ValueError unless all are integer tensors [batch, length] of one shape on one device."""
    if not all(isinstance(x, Tensor) for x in bounds):
        raise TypeError(f"lo, hi, prefix are {[type(x).__name__ for x in bounds]}; use int32 tensors")
    shapes, dtypes, devices = ([getattr(x, n) for x in bounds] for n in ("shape", "dtype", "device"))
    if len(bounds) not in (2, 4) or len(set(shapes)) > 1 or bounds[0].dim() != 2:
        raise ValueError(
            f"lo, hi and prefix (lo, hi) have shapes {list(map(tuple, shapes))}; all must be the same "
            "[batch, length]"
        )
    if not set(dtypes) <= {torch.int32, torch.int64}:
        raise ValueError(f"lo, hi, prefix are {dtypes}; use token positions of torch.int32 or torch.int64")
    if len(set(devices)) > 1:
        raise ValueError(f"lo, hi, prefix are on {devices}; use one device")


def check_documents(documents: Documents, batch: int, length: int) -> None:
    """ValueError unless every row's documents are non-empty, ascending, disjoint and inside."""
    if len(documents) != batch:
        raise ValueError(f"documents of {len(documents)} rows for a batch of {batch}; give one tuple a row")
    for row, ranges in enumerate(documents):
        last = 0
        for start, end in ranges:
            whole = isinstance(start, Integral) and isinstance(end, Integral)
            if not whole or not last <= start < end <= length:
                raise ValueError(
                    f"document ({start}, {end}) of row {row} is empty, overlaps or leaves the {length} "
                    "tokens; documents are ascending (start, end) ranges of whole numbers with start < end"
                )
            last = end
