"""The next batches are made in a thread while the device works on this one."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import torch

from .data import PackedText

DEPTH = 2  # batches that are made before they are asked for

_Batch = dict[str, torch.Tensor]


class Prefetch:
    """Batches of `data`, in its order, made ahead by one thread; pinned for the way to a CUDA `device`.

    An error in the thread is raised by the `next` that would have had the batch, and ends the iteration.
    Nothing is read before the first `next`. `close` leaves no thread behind.

    Args:
        timeout: seconds that `next` waits for a batch, else TimeoutError.
    """

    def __init__(self, data: PackedText, device: torch.device, *, timeout: float = 300.0) -> None:
        self._data, self._timeout = data, timeout
        self._state = data.state_dict()
        self._pin = device.type == "cuda"
        # A thread of its own begins on GPU 0, and would take memory there.
        setting = {"initializer": torch.cuda.set_device, "initargs": (device,)} if self._pin else {}
        self._thread = ThreadPoolExecutor(1, "prefetch", **setting)
        self._ahead: deque[Future[tuple[_Batch, dict[str, Any]]]] = deque()

    def __iter__(self) -> Prefetch:
        return self

    def __next__(self) -> _Batch:
        while len(self._ahead) <= DEPTH:  # one of them is for now
            self._ahead.append(self._thread.submit(self._make))
        try:
            batch, self._state = self._ahead[0].result(self._timeout)
        except BaseException:
            self.close()
            raise
        self._ahead.popleft()
        return batch

    def _make(self) -> tuple[_Batch, dict[str, Any]]:
        batch = next(self._data)
        if self._pin:
            batch = {name: tensor.pin_memory() for name, tensor in batch.items()}
        return batch, self._data.state_dict()

    def state_dict(self) -> dict[str, Any]:
        """The position of `data` after the batch that was handed out last."""
        return self._state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken; batches made ahead are forgotten."""
        self._settle()
        self._ahead.clear()
        self._data.load_state_dict(state)
        self._state = self._data.state_dict()

    def close(self) -> None:
        """End the thread, when the batch that it makes is done; waits for that as long as `next` does."""
        self._thread.shutdown(wait=self._settle(), cancel_futures=True)

    def _settle(self) -> bool:
        """Cancel what the thread has not begun, wait for what it has; whether it is idle then."""
        begun = [future for future in self._ahead if not future.cancel()]
        return not wait(begun, self._timeout).not_done
