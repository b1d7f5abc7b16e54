"""Packed rows in an order that seed and epoch alone decide, from any position, for any number of replicas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from .config import TrainConfig
from .corpus import prepare_corpus
from .packing import Rows, pack
from .tokens import BEGIN as BEGIN
from .tokens import BYTES
from .tokens import VOCAB_SIZE as VOCAB_SIZE


def prepare_rows(config: TrainConfig, *, chief: bool) -> Rows:
    """The rows that `config` describes, of tokens in `<out>/tokens` that `chief` makes if need be."""
    corpus = prepare_corpus(
        Path(config.out) / "tokens",
        config.data,
        config.text_field,
        config.tokenizer or config.model or BYTES,
        chief=chief,
        timeout=config.timeout,
    )
    return pack(corpus, config.seq_len, config.packing)


class PackedText:
    """Endless batches of packed rows: the same on all ranks of one data-parallel coordinate.

    One endless sequence of rows, every epoch a shuffle of all of them, is dealt out from its beginning:
    batch x dp_size rows a step, in the order of dp_rank. The position is how many were dealt. So whoever
    goes on from there, with whatever batch and dp_size, neither repeats a row nor leaves one out, also
    where a step has the last rows of an epoch and the first of the next.

    Args:
        rows: from `pack`; the rows of one batch are [B=batch, S=seq_len].
        seed: with the epoch it decides the order of the rows.
        dp_rank, dp_size: the data-parallel coordinate, the only one that changes what is read.
    """

    def __init__(
        self, rows: Rows, *, batch: int = 1, seed: int = 0, dp_rank: int = 0, dp_size: int = 1
    ) -> None:
        self.rows, self.batch, self.seed = rows, batch, seed
        self.dp_rank, self.dp_size = dp_rank, dp_size
        if len(rows) < batch * dp_size:
            raise ValueError(
                f"the data holds {len(rows)} sequences of {rows.seq_len} tokens, fewer than the "
                f"{batch * dp_size} of one step (batch={batch} x dp={dp_size}); give more text"
            )
        self.dealt = 0
        self._epoch, self._order = 0, self._shuffle(0)

    def _shuffle(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.rows))

    def _row(self, position: int) -> int:
        epoch, at = divmod(position, len(self.rows))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._shuffle(epoch)
        return int(self._order[at])

    def __iter__(self) -> PackedText:
        return self

    def __next__(self) -> dict[str, torch.Tensor]:
        """The next batch of this coordinate, as `Rows.batch` has it."""
        first = self.dealt + self.dp_rank * self.batch
        self.dealt += self.batch * self.dp_size
        return self.rows.batch([self._row(first + i) for i in range(self.batch)])

    def state_dict(self) -> dict[str, Any]:
        """Where the next batch begins; the same on every rank."""
        return {"dealt": self.dealt, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken; refused if it is of other data or another order."""
        for name, now in self._identity().items():
            if state.get(name) != now:
                raise ValueError(
                    f"the data position was saved with {name}={state.get(name)}, this data has "
                    f"{name}={now}; resume with the same data, tokenizer, packing, seq_len and seed"
                )
        self.dealt = state["dealt"]

    def _identity(self) -> dict[str, Any]:
        return {"seed": self.seed, "rows": len(self.rows), "identity": self.rows.identity}
