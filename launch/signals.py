"""SIGINT and SIGTERM end a job in order, or at least in time."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

GRACE = 3.0  # seconds
SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def orderly_signals() -> Iterator[None]:
    """Inside, SIGINT and SIGTERM raise SystemExit: process groups are left, and the exit code is 130 or 143.

    Python cannot raise while native code waits, say for a peer that is gone. Such a process ends GRACE
    seconds later with the same exit code. For the main thread.
    """

    def leave(number, frame):
        raise SystemExit(128 + number)

    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    handlers = {number: signal.signal(number, leave) for number in SIGNALS}
    wakeup = signal.set_wakeup_fd(writer)  # written to at once, whatever the main thread is doing
    threading.Thread(target=_end_in_time, args=(reader,), daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        os.close(writer)


def _end_in_time(reader: int) -> None:
    """Ends the process GRACE seconds after a signal; returns when the context is left."""
    number = os.read(reader, 1)
    os.close(reader)
    if number:
        time.sleep(GRACE)
        os._exit(128 + number[0])
