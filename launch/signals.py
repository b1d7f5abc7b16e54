"""SIGINT and SIGTERM end a job in order, or at least in time."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

GRACE = 3.0  # seconds
GRACE_TO_SAVE = 25.0  # seconds; torchrun kills after 30
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stop:
    """Whether a signal asked this process to end: `number` is that signal, or 0."""

    def __init__(self) -> None:
        self.number, self.postponed = 0, False

    @contextmanager
    def postpone(self) -> Iterator[None]:
        """Inside, a signal only sets `number`: look at it, save, `leave`. At the end it raises after all."""
        self.postponed = True
        try:
            yield
        finally:
            self.postponed = False
        if self.number:
            leave(self.number)


def leave(number: int) -> None:
    """SystemExit with the exit code of a process that a signal ended: 130 or 143."""
    raise SystemExit(128 + number)


@contextmanager
def orderly_signals() -> Iterator[Stop]:
    """Inside, SIGINT and SIGTERM raise SystemExit: process groups are left, and the exit code is 130 or 143.

    Where that is postponed, the program has GRACE_TO_SAVE seconds. Python cannot raise while native code
    waits, say for a peer that is gone: such a process ends GRACE (or GRACE_TO_SAVE) seconds after the signal
    with the same exit code. For the main thread.
    """
    stop = Stop()

    def receive(number, frame):
        stop.number = number
        if not stop.postponed:
            leave(number)

    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    handlers = {number: signal.signal(number, receive) for number in SIGNALS}
    wakeup = signal.set_wakeup_fd(writer)  # written to at once, whatever the main thread is doing
    threading.Thread(target=_end_in_time, args=(reader, stop), daemon=True).start()
    try:
        yield stop
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        os.close(writer)


def _end_in_time(reader: int, stop: Stop) -> None:
    """Ends the process some time after a signal; returns when the context is left."""
    number = os.read(reader, 1)
    if number:  # the pipe stays open, as signals may come twice
        time.sleep(GRACE_TO_SAVE if stop.postponed else GRACE)
        os._exit(128 + number[0])
    os.close(reader)
