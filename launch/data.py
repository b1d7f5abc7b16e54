"""Long text as packed sequences of bytes, in an order that seed and epoch alone decide."""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

BEGIN = 256  #: Token that opens every document.
VOCAB_SIZE = 257  #: The 256 bytes and BEGIN.
IGNORE = -100  #: Label where there is nothing to predict.

_SKIPPED = {"test", "tests", "idle_test", "idlelib", "site-packages", "dist-packages"}


def encode(text: bytes) -> np.ndarray:
    """One document as tokens: BEGIN, then its bytes. uint16 [len(text) + 1]."""
    return np.concatenate([[BEGIN], np.frombuffer(text, dtype=np.uint8)]).astype(np.uint16)


def decode(tokens: torch.Tensor) -> str:
    """The text of a sequence of tokens [S]; BEGIN reads as a line of its own."""
    parts = bytes(b for t in tokens.tolist() for b in (b"\n<begin>\n" if t == BEGIN else [t]))
    return parts.decode("utf-8", errors="replace")


def standard_library() -> Iterator[bytes]:
    """Sources of the running interpreter's standard library: one document per folder, sorted.

    A document is the .py files of one package joined (the top-level modules make one too), so that
    documents are long and what happens late in them depends on what was defined far before.
    """
    root = sysconfig.get_path("stdlib")
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(set(subfolders) - _SKIPPED)
        sources = [Path(folder, name) for name in sorted(names) if name.endswith(".py")]
        if sources:
            yield b"\n".join(path.read_bytes() for path in sources)


def text_files(path: Path) -> Iterator[bytes]:
    """One document per file: `path` itself, or every visible text file below it, sorted."""
    if path.is_file():
        yield path.read_bytes()
        return
    for file in sorted(path.rglob("*")):
        hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
        if file.is_file() and not hidden:
            content = file.read_bytes()
            if content and b"\0" not in content[:8192]:
                yield content


def read_documents(data: str | None) -> list[np.ndarray]:
    """The documents of `--data` (a file or a folder), or of the standard library, as tokens."""
    if data is not None and not Path(data).exists():
        raise ValueError(f"--data {data}: no such file or folder")
    texts = standard_library() if data is None else text_files(Path(data))
    return [encode(text) for text in texts]


@dataclass(frozen=True, eq=False)
class Rows:
    """Packed text: tokens uint16 [rows, seq_len], and their positions in document, int32 alike."""

    tokens: np.ndarray
    positions: np.ndarray

    @property
    def mean_visible_context(self) -> float:
        """Mean over tokens of how many tokens a causal query sees in its document, itself included."""
        return float(self.positions.mean(dtype=np.float64)) + 1.0


def pack(documents: list[np.ndarray], seq_len: int) -> Rows:
    """Lay documents end to end and cut rows of `seq_len` tokens; what is left at the end is dropped.

    A document longer than a row goes on in the next one, where its positions begin anew: rows are
    independent. Long documents so make long visible contexts.
    """
    total = sum(len(document) for document in documents)
    rows = total // seq_len
    if rows == 0:
        raise ValueError(
            f"the data holds {total} tokens, fewer than seq_len={seq_len}; "
            f"give more text or a smaller seq_len"
        )
    tokens = np.concatenate(documents)[: rows * seq_len].reshape(rows, seq_len)
    column = np.arange(seq_len, dtype=np.int32)
    begins = np.where(tokens == BEGIN, column, np.int32(0))
    return Rows(tokens, column - np.maximum.accumulate(begins, axis=1))


class PackedText:
    """Endless batches of packed rows: the same on all ranks of one data-parallel coordinate.

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
        count, seq_len = rows.tokens.shape
        if count < batch * dp_size:
            raise ValueError(
                f"the data holds {count} sequences of {seq_len} tokens, fewer than the "
                f"{batch * dp_size} of one step (batch={batch} x dp={dp_size}); give more text"
            )
        self.epoch, self.row = 0, 0
        self._order = self._shuffle()

    def _shuffle(self) -> np.ndarray:
        return np.random.default_rng([self.seed, self.epoch]).permutation(len(self.rows.tokens))

    def __iter__(self) -> PackedText:
        return self

    def __next__(self) -> dict[str, torch.Tensor]:
        """input_ids, position_ids, labels, each int64 [B, S].

        Positions restart at each document. Labels are the input ids, not shifted, IGNORE at the
        first token of each document, which nothing before it can predict.
        """
        if self.row + self.batch * self.dp_size > len(self._order):
            self.epoch, self.row = self.epoch + 1, 0
            self._order = self._shuffle()
        first = self.row + self.dp_rank * self.batch
        rows = self._order[first : first + self.batch]
        self.row += self.batch * self.dp_size

        input_ids = torch.from_numpy(self.rows.tokens[rows].astype(np.int64))
        position_ids = torch.from_numpy(self.rows.positions[rows].astype(np.int64))
        labels = input_ids.masked_fill(position_ids == 0, IGNORE)
        return {"input_ids": input_ids, "position_ids": position_ids, "labels": labels}

    def state_dict(self) -> dict[str, int]:
        """Where the next batch begins; the same on every rank."""
        return {"epoch": self.epoch, "row": self.row, **self._identity()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where `state` was taken; refused if it is of other data or another order."""
        for name, now in self._identity().items():
            if state[name] != now:
                raise ValueError(
                    f"the data position was saved with {name}={state[name]}, this data has "
                    f"{name}={now}; resume with the same data, seq_len and seed"
                )
        self.epoch, self.row = state["epoch"], state["row"]
        self._order = self._shuffle()

    def _identity(self) -> dict[str, int]:
        return {"seed": self.seed, "rows": len(self.rows.tokens)}
