"""Swap: the all-to-alls in which ranks give their share of the tokens for a share of the heads, and back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from .link import Link


@dataclass(frozen=True)
class Swap:
    """All-to-alls of x [B, H, tokens, F], or with any number of rows for a block in place of tokens.

    link: to the ranks that swap. blocks: how many each of them holds. sent: bytes sent, by traffic class.
    Both methods start a transfer and return a function that waits for it and returns what arrived.
    """

    link: Link
    blocks: tuple[int, ...]
    sent: Counter

    def to_heads(self, x: Tensor, rows: int, channel: str = "keys") -> Callable[[], Tensor]:
        """x [B, H, own rows, F] -> [B, heads of this rank, all rows, F]. rows: of a block."""
        send = shares_of(x, self.link.size).permute(1, 3, 0, 2, 4).flatten(0, 1)
        arrived = self._start(send, [x.shape[2]] * self.link.size, self._rows(rows), channel)
        return lambda: arrived().permute(1, 2, 0, 3).contiguous()

    def to_tokens(self, x: Tensor, rows: int, channel: str = "keys") -> Callable[[], Tensor]:
        """x [B, heads of this rank, all rows, F] -> [B, heads of all ranks, own rows, F]."""
        size, counts = self.link.size, self._rows(rows)
        own = counts[self.link.rank]
        arrived = self._start(x.permute(2, 0, 1, 3), counts, [own] * size, channel)
        parts = (size, own)
        return lambda: arrived().unflatten(0, parts).permute(2, 0, 3, 1, 4).flatten(1, 2).contiguous()

    def _rows(self, rows: int) -> list[int]:
        return [blocks * rows for blocks in self.blocks]

    def _start(
        self, send: Tensor, sends: Sequence[int], receives: Sequence[int], channel: str
    ) -> Callable[[], Tensor]:
        received = send.new_empty(sum(receives), *send.shape[1:])
        away = sum(sends) - sends[self.link.rank]
        self.sent["heads"] += away * send.shape[1:].numel() * send.itemsize
        pending = self.link.all_to_all(send.contiguous(), sends, received, receives, channel)

        def finish() -> Tensor:
            pending.wait()
            return received

        return finish


def shares_of(x: Tensor, ranks: int) -> Tensor:
    """[B, H, ...] -> [B, ranks, heads of each, ...]; where there are fewer heads, some have the same one."""
    if x.shape[1] < ranks:
        x = x.repeat_interleave(ranks // x.shape[1], 1)
    return x.unflatten(1, (ranks, -1))
