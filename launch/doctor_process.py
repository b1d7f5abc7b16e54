"""A process of its own for what may crash or hang: all that it tells, until it ends or its time is over."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from multiprocessing.queues import SimpleQueue
from typing import Any

GRACE = 5.0  # seconds to end in, once told to


def listen(target: Callable[..., None], arguments: tuple, limit: float) -> tuple[list[Any], int | None]:
    """Runs target(queue, *arguments). What it put into the queue, and its exit code.

    limit: seconds; then it is told to end, is killed if it does not, and the exit code is None. Messages must
    not be longer than a pipe takes at once, as a process that is killed would leave half of one.
    """
    context = multiprocessing.get_context("spawn")  # a fork cannot use CUDA
    queue = context.SimpleQueue()
    process = context.Process(target=_run, args=(target, queue, *arguments))
    process.start()
    told: list[Any] = []
    try:
        end = time.monotonic() + limit
        while process.is_alive() and time.monotonic() < end:
            told += _drain(queue)
            process.join(0.05)
        code = process.exitcode
    finally:
        process.terminate()
        process.join(GRACE)
        process.kill()
        process.join()
        told += _drain(queue)
        queue.close()
    return told, code


def _run(target: Callable[..., None], queue: SimpleQueue, *arguments: Any) -> None:
    os.dup2(2, 1)  # compilers and NCCL_DEBUG print: stdout is that of the doctor alone
    target(queue, *arguments)


def _drain(queue: SimpleQueue) -> Iterator[Any]:
    while not queue.empty():
        yield queue.get()
