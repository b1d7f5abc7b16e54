"""Documents as token ids: their bytes, or the tokens of any tokenizer on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

BEGIN = 256  #: Byte tokens: opens every document.
VOCAB_SIZE = 257  #: Byte tokens: the 256 bytes and BEGIN.
BYTES = "bytes"  #: The name of the tokenizer that needs no folder.
_LOCAL = {
    "local_files_only": True,
    "trust_remote_code": False,
}  # nothing is fetched, no code of a folder runs
_REMEDY = "give a folder that save_pretrained of a tokenizer wrote, or --tokenizer bytes"


class Tokenizer(Protocol):
    """Ids are less than `vocab_size`."""

    vocab_size: int

    def encode(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """The ids of each text, a whole document, with what marks its beginning or end."""
        ...


class ByteTokenizer:
    """BEGIN, then the bytes. Needs no files, and every text has its tokens."""

    vocab_size = VOCAB_SIZE

    def encode(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """uint16 [len(text) + 1] of each text."""
        return [encode(text) for text in texts]


class LocalTokenizer:
    """A transformers tokenizer from a folder; nothing is fetched, and no code of the folder runs.

    A document begins with the tokenizer's BOS token, or without one ends with its EOS token. Bytes that are
    no UTF-8 read as U+FFFD.
    """

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer  # slow to import: only where it is used

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(str(folder), **_LOCAL)
        except Exception as error:  # of many kinds, as tokenizers are
            reason = " ".join(str(error).split())
            raise ValueError(f"{folder}: no tokenizer that loads ({reason}); {_REMEDY}") from error
        ids = set(self._tokenizer.get_vocab().values())
        if not ids.difference(self._tokenizer.all_special_ids):  # made up by transformers for want of files
            raise ValueError(f"{folder}: a tokenizer of {len(ids)} tokens, all of them special; {_REMEDY}")
        self.vocab_size = max(ids) + 1

    def encode(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """int64 ids of each text."""
        begin, end = self._tokenizer.bos_token_id, self._tokenizer.eos_token_id
        before = [] if begin is None else [begin]
        after = [end] if begin is None and end is not None else []
        words = [text.decode("utf-8", errors="replace") for text in texts]
        found = self._tokenizer(words, add_special_tokens=False, return_attention_mask=False, verbose=False)
        return [np.array([*before, *ids, *after], dtype=np.int64) for ids in found["input_ids"]]


def tokenizer_files(name: str) -> list[Path]:
    """The files of a tokenizer's folder; none for BYTES. ValueError if there is no such folder."""
    if name == BYTES:
        return []
    if not Path(name).is_dir():
        raise ValueError(f"--tokenizer {name}: no such folder; {_REMEDY}")
    return sorted(path for path in Path(name).iterdir() if path.is_file())


def load_tokenizer(name: str) -> Tokenizer:
    """BYTES, or the tokenizer of a folder."""
    return ByteTokenizer() if name == BYTES else LocalTokenizer(Path(name))


def encode(text: bytes) -> np.ndarray:
    """One document as byte tokens: BEGIN, then its bytes. uint16 [len(text) + 1]."""
    return np.concatenate([[BEGIN], np.frombuffer(text, dtype=np.uint8)]).astype(np.uint16)
