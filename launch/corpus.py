"""Tokenized documents on disk: written once, by one rank, and mapped into memory by all.

    <root>/<key>/tokens.bin    all documents end to end, uint16 or uint32 by the size of the vocabulary
                /offsets.bin   int64: where each document begins in it, and the end
                /meta.json     dtype, vocab_size, and a digest of the tokens and offsets

A folder appears by an atomic rename when it is whole. How documents are packed into rows does not change it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from .documents import Source, find_sources
from .tokens import VOCAB_SIZE, Tokenizer, load_tokenizer, tokenizer_files

FORMAT = 1
_AT_ONCE = 64  # documents that a tokenizer gets in one call


@dataclass(frozen=True, eq=False)
class Corpus:
    """Documents as tokens.

    tokens: uint16 or uint32 [N], end to end. offsets: int64 [documents + 1], where each begins, and N.
    vocab_size: more than every token. digest: of tokens and offsets, all that training sees of the data.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    vocab_size: int
    digest: str

    @classmethod
    def of(cls, documents: Sequence[np.ndarray], vocab_size: int = VOCAB_SIZE) -> Corpus:
        """In memory."""
        tokens = np.concatenate(documents).astype(dtype_of(vocab_size))
        offsets = np.cumsum([0, *map(len, documents)], dtype=np.int64)
        digest = hashlib.sha256(tokens.tobytes() + offsets.tobytes()).hexdigest()
        return cls(tokens, offsets, vocab_size, digest)


def dtype_of(vocab_size: int) -> np.dtype:
    """The smallest of uint16 and uint32 that holds every token."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def prepare_corpus(
    root: Path, data: str | None, field: str, tokenizer: str, *, chief: bool, timeout: float
) -> Corpus:
    """The documents of `data` as tokens, from `root` if they are there already.

    data, field: as for `find_sources`. tokenizer: a folder, or BYTES.
    chief: whether this rank writes what is missing, for all. The others wait as long as it makes progress,
    at most `timeout` seconds without: RuntimeError. `root` must be a folder that all ranks see.
    """
    sources = find_sources(data)
    folder = root / key_of(sources, field, tokenizer)
    if chief and not folder.exists():
        texts = (text for source in sources for text in source.read(source.path, field))
        write_corpus(folder, texts, load_tokenizer(tokenizer))
    elif not chief:
        await_folder(folder, timeout)
    return open_corpus(folder)


def key_of(sources: Sequence[Source], field: str, tokenizer: str) -> str:
    """A name that changes with path, size or time of change of any file that decides the tokens."""
    files = [file for source in sources for file in source.files()]
    groups = [
        [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in group]
        for group in (files, tokenizer_files(tokenizer))
    ]
    described = json.dumps([FORMAT, field, *groups])
    return hashlib.sha256(described.encode()).hexdigest()[:16]


def write_corpus(folder: Path, texts: Iterable[bytes], tokenizer: Tokenizer) -> None:
    """Tokenize and write; `folder` appears when all is done. ValueError if there is no token."""
    partial = _partial(folder)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    dtype, digest, offsets = dtype_of(tokenizer.vocab_size), hashlib.sha256(), [0]
    with open(partial / "tokens.bin", "wb") as file:
        for some in _groups(texts):
            for tokens in tokenizer.encode(some):
                content = tokens.astype(dtype).tobytes()
                digest.update(content)
                file.write(content)
                offsets.append(offsets[-1] + len(tokens))
            file.flush()  # those who wait look at its size
    if offsets[-1] == 0:
        raise ValueError(f"the data has {len(offsets) - 1} documents and 0 tokens; give some text")
    content = np.array(offsets, dtype="<i8").tobytes()
    digest.update(content)
    (partial / "offsets.bin").write_bytes(content)
    meta = {"dtype": dtype.str, "vocab_size": tokenizer.vocab_size, "digest": digest.hexdigest()}
    (partial / "meta.json").write_text(json.dumps(meta) + "\n", encoding="utf-8")
    os.replace(partial, folder)


def open_corpus(folder: Path) -> Corpus:
    """What `write_corpus` wrote, tokens mapped into memory. ValueError if files were cut since."""
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        offsets = np.fromfile(folder / "offsets.bin", dtype="<i8")
        tokens = np.memmap(folder / "tokens.bin", dtype=np.dtype(meta["dtype"]), mode="r")
        whole = len(tokens) == offsets[-1]
        corpus = Corpus(tokens, offsets, meta["vocab_size"], meta["digest"])
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{folder}: damaged ({error}); remove it, it is made again") from error
    if not whole:
        raise ValueError(
            f"{folder}: damaged: {len(tokens)} tokens, offsets say {offsets[-1]}; remove it, it is made again"
        )
    return corpus


def await_folder(folder: Path, timeout: float) -> None:
    """Wait until another rank has written `folder`, at most `timeout` seconds without progress of it."""
    file, seen, since = _partial(folder) / "tokens.bin", -1, time.monotonic()
    while not folder.exists():
        try:
            size = file.stat().st_size
        except FileNotFoundError:  # not begun, or just renamed
            size = 0
        if size != seen:
            seen, since = size, time.monotonic()
        elif time.monotonic() - since > timeout:
            raise RuntimeError(
                f"{folder} was not written: {size} bytes so far, none in {timeout:g} s; see the error of "
                f"rank 0, or raise --timeout; all nodes must see the same data and out"
            )
        time.sleep(0.05)


def _partial(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.partial")


def _groups(texts: Iterable[bytes]) -> Iterator[list[bytes]]:
    texts = iter(texts)
    while some := list(islice(texts, _AT_ONCE)):
        yield some
