"""Long text as packed sequences of bytes, in an order that seed and epoch alone decide."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
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
    root = Path(sysconfig.get_path("stdlib"))
    sources: dict[Path, list[Path]] = {}
    for path in sorted(root.rglob("*.py")):
        folder = path.parent.relative_to(root)
        if _SKIPPED.isdisjoint(folder.parts):
            sources.setdefault(folder, []).append(path)
    for paths in sources.values():
        yield b"\n".join(path.read_bytes() for path in paths)


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


def pack(documents: list[np.ndarray], seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Lay documents end to end and cut rows of `seq_len` tokens; what is left at the end is dropped.

    A document longer than a row goes on in the next one, where its positions begin anew: rows are
    independent. Long documents so make long visible contexts.

    Returns tokens uint16 [rows, seq_len] and position in document int32 [rows, seq_len].
    """
    total = sum(len(document) for document in documents)
    rows = total // seq_len
    if rows == 0:
        raise ValueError(
            f"the data holds {total} tokens, fewer than seq_len={seq_len}; "
            f"give more text or a smaller seq_len"
        )
    tokens = np.concatenate(documents)[: rows * seq_len]
    index = np.arange(rows * seq_len)
    begins = np.where((tokens == BEGIN) | (index % seq_len == 0), index, 0)
    positions = index - np.maximum.accumulate(begins)
    return tokens.reshape(rows, seq_len), positions.astype(np.int32).reshape(rows, seq_len)


def mean_visible_context(positions: np.ndarray | torch.Tensor) -> float:
    """Mean over tokens of how many tokens a causal query sees in its own document, itself included."""
    return float(np.asarray(positions, dtype=np.float64).mean()) + 1.0


class PackedText:
    """Endless batches of packed rows: the same on all ranks of one data-parallel coordinate.

    Args:
        documents: token arrays, from `read_documents`.
        seq_len, batch: shape of one batch [B=batch, S=seq_len].
        seed: with the epoch it decides the order of the rows.
        dp_rank, dp_size: the data-parallel coordinate, the only one that changes what is read.
    """

    def __init__(
        self,
        documents: list[np.ndarray],
        *,
        seq_len: int,
        batch: int = 1,
        seed: int = 0,
        dp_rank: int = 0,
        dp_size: int = 1,
    ) -> None:
        self.tokens, self.positions = pack(documents, seq_len)
        self.batch, self.seed, self.dp_rank, self.dp_size = batch, seed, dp_rank, dp_size
        if len(self.tokens) < batch * dp_size:
            raise ValueError(
                f"the data holds {len(self.tokens)} sequences of {seq_len} tokens, fewer than the "
                f"{batch * dp_size} of one step (batch={batch} x dp={dp_size}); give more text"
            )
        self.epoch, self.row = 0, 0
        self._order = self._shuffle()

    @property
    def mean_visible_context(self) -> float:
        """Over all the data."""
        return mean_visible_context(self.positions)

    def _shuffle(self) -> np.ndarray:
        return np.random.default_rng([self.seed, self.epoch]).permutation(len(self.tokens))

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

        input_ids = torch.from_numpy(self.tokens[rows].astype(np.int64))
        position_ids = torch.from_numpy(self.positions[rows].astype(np.int64))
        labels = input_ids.masked_fill(position_ids == 0, IGNORE)
        return {"input_ids": input_ids, "position_ids": position_ids, "labels": labels}

    def state_dict(self) -> dict[str, int]:
        """Where the next batch begins; the same on every rank."""
        return {"epoch": self.epoch, "row": self.row, "seed": self.seed, "rows": len(self.tokens)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where `state` was taken; refused if it is of other data or another order."""
        for name, now in (("seed", self.seed), ("rows", len(self.tokens))):
            if state[name] != now:
                raise ValueError(
                    f"the data position was saved with {name}={state[name]}, this data has "
                    f"{name}={now}; resume with the same data, seq_len and seed"
                )
        self.epoch, self.row = state["epoch"], state["row"]
        self._order = self._shuffle()
