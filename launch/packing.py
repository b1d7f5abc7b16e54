"""Documents as rows of one length, and where each document lies in them."""

from __future__ import annotations

import hashlib
from bisect import bisect_left, insort
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from .corpus import Corpus

IGNORE = -100  #: Label where there is nothing to predict.
PAD = 0  #: Token at the end of a row that no document fills; it is masked and has no label.


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of `seq_len` tokens, each made of pieces of documents, and padding at its end.

    begins, lengths: int64 [pieces], where in `corpus.tokens` each piece lies, row after row.
    first: int64 [rows + 1], the first piece of each row, and their number.
    """

    corpus: Corpus
    seq_len: int
    begins: np.ndarray
    lengths: np.ndarray
    first: np.ndarray

    def __len__(self) -> int:
        return len(self.first) - 1

    @cached_property
    def padding(self) -> float:
        """Share of the tokens of all rows that no document fills."""
        return 1.0 - float(self.lengths.sum()) / (len(self) * self.seq_len)

    @property
    def mean_visible_context(self) -> float:
        """Mean over tokens of how many tokens a causal query sees in its document, itself included."""
        lengths = self.lengths.astype(np.float64)
        return float((lengths * (lengths + 1) / 2).sum() / lengths.sum())

    @cached_property
    def identity(self) -> str:
        """The same for the same rows, wherever their text came from and whatever packed it."""
        digest = hashlib.sha256(f"{self.corpus.digest} {self.seq_len}".encode())
        for array in (self.begins, self.lengths, self.first):
            digest.update(array.tobytes())
        return digest.hexdigest()[:16]

    def batch(self, rows: list[int]) -> dict[str, torch.Tensor]:
        """input_ids, position_ids, labels, each int64 [B=len(rows), S=seq_len].

        Positions restart at each piece of a document, whatever its tokens. Labels are the input ids, not
        shifted, IGNORE at the first token of each piece, which nothing before it can predict. Where rows are
        padded, every batch also has attention_mask, 1 at tokens and 0 at padding.
        """
        input_ids = np.full((len(rows), self.seq_len), PAD, dtype=np.int64)
        position_ids = np.zeros_like(input_ids)
        mask = np.zeros_like(input_ids)
        for at, row in enumerate(rows):
            end = 0
            for piece in range(self.first[row], self.first[row + 1]):
                begin, length = self.begins[piece], self.lengths[piece]
                input_ids[at, end : end + length] = self.corpus.tokens[begin : begin + length]
                position_ids[at, end : end + length] = np.arange(length)
                end += length
            mask[at, :end] = 1
            position_ids[at, end:] = np.arange(self.seq_len - end)  # one document of its own
        labels = np.where((position_ids == 0) | (mask == 0), IGNORE, input_ids)
        batch = {"input_ids": input_ids, "position_ids": position_ids, "labels": labels}
        if self.padding > 0:
            batch["attention_mask"] = mask
        return {name: torch.from_numpy(array) for name, array in batch.items()}


def pack(corpus: Corpus, seq_len: int, packing: str = "concat") -> Rows:
    """Rows of `seq_len` tokens of all documents; rows are independent, positions begin anew in each.

    "concat": documents end to end, cut at the ends of rows; what is left at the end is dropped. No padding.
    "best-fit": only documents longer than a row are cut, into whole rows and a rest; rests and shorter
    documents go into the row that they fill best (Ding et al., arXiv 2404.10830). No token is dropped.
    """
    begins, lengths, first = PACKINGS[packing](corpus.offsets, seq_len)
    return Rows(corpus, seq_len, begins, lengths, first)


def _concat(offsets: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rows = int(offsets[-1]) // seq_len
    if rows == 0:
        raise ValueError(
            f"the data holds {offsets[-1]} tokens, fewer than seq_len={seq_len}; "
            f"give more text or a smaller seq_len"
        )
    ends = np.arange(rows + 1, dtype=np.int64) * seq_len
    cuts = np.union1d(offsets[offsets < ends[-1]], ends)
    return cuts[:-1], np.diff(cuts), np.searchsorted(cuts, ends)


def _best_fit(offsets: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    whole, rest = np.divmod(np.diff(offsets), seq_len)
    within = np.arange(whole.sum()) - np.repeat(np.cumsum(whole) - whole, whole)  # row of its document
    full = np.repeat(offsets[:-1], whole) + within * seq_len
    begins = (offsets[1:] - rest)[rest > 0]
    rest = rest[rest > 0]

    bins: list[list[int]] = []
    with_room: defaultdict[int, list[int]] = defaultdict(list)  # tokens left in a row: rows
    rooms: list[int] = []  # its keys, sorted
    for piece in np.argsort(-rest, kind="stable").tolist():
        length = int(rest[piece])
        at = bisect_left(rooms, length)
        if at == len(rooms):
            bins.append([])
            row, room = len(bins) - 1, seq_len
        else:
            room = rooms[at]
            row = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[at]
        bins[row].append(piece)
        if room > length:
            if room - length not in with_room:
                insort(rooms, room - length)
            with_room[room - length].append(row)

    order = [piece for row in bins for piece in row]
    counts = [1] * len(full) + [len(row) for row in bins]
    return (
        np.concatenate([full, begins[order]]).astype(np.int64),
        np.concatenate([np.full(len(full), seq_len), rest[order]]).astype(np.int64),
        np.cumsum([0, *counts], dtype=np.int64),
    )


PACKINGS = {"concat": _concat, "best-fit": _best_fit}
