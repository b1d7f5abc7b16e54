"""Windows: rows that a rank shows and others read without its help (one-sided, as in MPI's windows).

A rank shows rows in the two halves of one shared buffer by turns, so one barrier a turn is enough: who has
passed the barrier of a turn knows that all ranks have read what was shown in the turn before it, and may
write there next. On CUDA all of it happens on a stream of its own; the host never waits, but for the first
turn and when rows outgrow the buffer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

ALIGNED = 512  # bytes
GROWTH = 1.25  # of a buffer at least, so that it grows a few times only
WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}

# What to read: the target [n, width], the rank, and which of its rows: int64 [n] or a slice.
Reads = Sequence[tuple[Tensor, int, Tensor | slice]]


class Shared(Protocol):
    """A buffer of every rank, of equal size, which all ranks can read. All ranks make it at once."""

    def of(self, rank: int) -> Tensor:
        """uint8 [size] of a rank. Only its own may be written to."""

    def barrier(self) -> None:
        """What any rank's current stream was given before happens before what it is given afterwards."""


class Windows:
    """Those of one rank in one channel of a group. share: makes a buffer of so many bytes on all ranks."""

    def __init__(self, rank: int, share: Callable[[int], Shared], device: torch.device):
        self.rank, self._share = rank, share
        cuda = device.type == "cuda"
        self._stream = torch.cuda.Stream(device, priority=-1) if cuda else None  # before queued computation
        self._shared: Shared | None = None
        self._size = self._turn = 0  # bytes of a half, and which one is shown

    def publish(self, x: Tensor, rows: int) -> Window:
        """Shows contiguous x [n, width]. rows: the most that any rank shows; like the width equal on all.

        All ranks call it. They read from the window before their next call.
        """
        row = x.shape[1] * x.itemsize
        if self._size < rows * row:
            if self._stream is not None:
                self._stream.synchronize()  # what is still read
            grown = max(rows * row, int(GROWTH * self._size))
            self._shared, self._size = None, -(-grown // ALIGNED) * ALIGNED
            self._shared = self._share(2 * self._size)
        self._turn = 1 - self._turn
        window = Window(self._shared, self._turn * self._size, rows, row, self._stream)
        with _aside(self._stream):
            window.of(self.rank)[: len(x)].copy_(_words(x))
            self._shared.barrier()
        if self._stream is not None:
            x.record_stream(self._stream)
        return window


@dataclass(frozen=True)
class Window:
    """What all ranks show in one turn. first: byte of the buffer. rows: at most. row: bytes of each."""

    shared: Shared
    first: int
    rows: int
    row: int
    stream: torch.cuda.Stream | None

    def of(self, rank: int) -> Tensor:
        """[rows, words]: those of a rank."""
        return _words(self.shared.of(rank)[self.first :][: self.rows * self.row].view(self.rows, self.row))

    def read(self, reads: Reads) -> Callable[[], None]:
        """Starts to fill the targets; what it returns is called before they are used."""
        with _aside(self.stream):
            for target, rank, which in reads:
                if isinstance(which, slice):  # contiguous: a GPU has engines for that
                    _words(target).copy_(self.of(rank)[which])
                else:
                    torch.index_select(self.of(rank), 0, which, out=_words(target))
        if self.stream is None:
            return lambda: None
        done = self.stream.record_event()
        return lambda: torch.cuda.current_stream(self.stream.device).wait_event(done)


def _words(x: Tensor) -> Tensor:
    """[n, width] as the longest integers that its rows are made of: they travel fastest."""
    return x.view(WORDS[math.gcd(x.shape[1] * x.itemsize, 8)])


@contextmanager
def _aside(stream: torch.cuda.Stream | None):
    """On that stream, once the current one is as far as it is told to go now; None: right here."""
    if stream is None:
        yield
        return
    stream.wait_stream(torch.cuda.current_stream(stream.device))
    with torch.cuda.stream(stream):
        yield
