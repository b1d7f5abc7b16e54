"""A pool of processes per world size, started once: a distributed test then costs milliseconds.

    results = pool.run(4, body, *args)     # body(*args) on 4 ranks; what each returned, in rank order
    results = pool.run(2, body, *args, backend="nccl")      # on a GPU each, which is the current device

`body` is a function of a module under tests/; arguments and results are pickled. Every call
has a default process group of its own. A call that fails or exceeds its timeout ends only the processes of
its own pool, and the next call starts fresh ones: with gloo, forked from one server that has imported torch.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import faulthandler
import importlib.util
import inspect
import multiprocessing
import os
import pickle
import queue
import signal
import sys
import tempfile
import threading
import time
import traceback
from multiprocessing.connection import Connection, wait
from pathlib import Path

TIMEOUT = 60.0  # seconds of one call
# Seconds that a worker waits for a peer, which may compile kernels: a hang ends in its traceback, not a kill.
PATIENCE = {"gloo": 30.0, "nccl": 120.0}
START = {"gloo": "forkserver", "nccl": "spawn"}  # a fork cannot use CUDA once its parent has looked at it
PRELOAD = ["pytest", "sparring.cp", "torch.distributed.fsdp", "transformers.models.llama.modeling_llama"]
TAIL = 3000  # characters of a worker's output in a failure

_pools: dict[tuple[int, str], Pool] = {}


class PoolError(AssertionError):
    """A rank raised, died or hung. The text has its traceback and the end of every rank's output."""


def run(
    world: int, body, *args, timeout: float = TIMEOUT, detail: bool = True, backend: str = "gloo"
) -> list:
    """body(*args) on `world` ranks of torch.distributed; what each returned, in rank order.

    detail: collectives that do not match raise on all ranks (gloo). DDP crashes under it in torch 2.13.
    """
    key = world, backend
    if key not in _pools or not _pools[key].alive():
        _pools[key] = Pool(world, backend)
    reusable = False
    try:
        results, reusable = _pools[key].call(body, args, timeout, detail and backend == "gloo")
        return results
    finally:
        if not reusable:
            _pools.pop(key).close()


@atexit.register
def close() -> None:
    """Ends all pools."""
    while _pools:
        _pools.popitem()[1].close()


class Pool:
    """`world` processes that wait for calls."""

    def __init__(self, world: int, backend: str):
        import torch.distributed as dist

        context = multiprocessing.get_context(START[backend])
        if backend == "gloo":
            context.set_forkserver_preload(PRELOAD)
        self.world, self.calls = world, 0
        # The server of the store lives here and lets the system pick its port: no two pools can clash.
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.folder = tempfile.TemporaryDirectory(prefix="pool-")
        self.logs = [Path(self.folder.name, f"rank{rank}") for rank in range(world)]
        self.connections, self.workers = [], []
        for rank in range(world):
            here, there = context.Pipe()
            arguments = (rank, world, backend, self.store.port, there, self.logs[rank])
            worker = context.Process(target=_work, args=arguments, daemon=True)
            worker.start()
            there.close()
            self.connections.append(here)
            self.workers.append(worker)

    def alive(self) -> bool:
        return all(worker.is_alive() for worker in self.workers)

    def call(self, body, args: tuple, timeout: float, detail: bool) -> tuple[list, bool]:
        """What body(*args) returned on every rank, and whether the workers can run another body.

        Raises PoolError at the first rank that fails.
        """
        self.calls += 1
        message = pickle.dumps((self.calls, detail, inspect.getfile(body), body.__qualname__, args))
        for connection in self.connections:
            with contextlib.suppress(OSError):  # a dead worker is noticed below
                connection.send_bytes(message)
        results: dict[int, object] = {}
        reusable = True
        failures: dict[int, str] = {}
        deadline = time.monotonic() + timeout
        while len(results) + len(failures) < self.world:
            if failures:  # others may have failed too, perhaps first
                deadline = min(deadline, time.monotonic() + 0.2)
            done = results | failures
            waiting = {self.connections[rank]: rank for rank in range(self.world) if rank not in done}
            ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready and not failures:
                failures = dict.fromkeys(waiting.values(), f"did not finish within {timeout} s")
            if not ready:
                break
            for connection in ready:
                rank = waiting[connection]
                try:
                    good, value, unchanged = pickle.loads(connection.recv_bytes())
                    reusable = reusable and unchanged
                except (EOFError, OSError):
                    self.workers[rank].join(5)
                    good, value = False, f"died, exit code {self.workers[rank].exitcode}"
                (results if good else failures)[rank] = value
        if failures:
            texts = [f"rank {rank} of {self.world}: {text}" for rank, text in failures.items()]
            raise PoolError("\n".join([*texts, self._output()]))
        return [results[rank] for rank in range(self.world)], reusable

    def close(self) -> None:
        """Kills the workers, each with its own children, and nothing else."""
        for worker in self.workers:
            if worker.is_alive():
                with contextlib.suppress(ProcessLookupError):  # it may not have its group yet
                    os.killpg(worker.pid, signal.SIGKILL)
                worker.kill()
        for worker in self.workers:
            worker.join()
        for connection in self.connections:
            connection.close()
        self.folder.cleanup()

    def _output(self) -> str:
        """The end of what every rank wrote."""
        texts = [log.read_text(errors="replace")[-TAIL:] if log.exists() else "" for log in self.logs]
        return "\n".join(f"--- end of the output of rank {rank}:\n{text}" for rank, text in enumerate(texts))


# -- in the worker ------------------------------------------------------------------------------------


def _work(rank: int, world: int, backend: str, port: int, connection: Connection, log: Path) -> None:
    os.setsid()  # a process group of its own, by which it is killed
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    faulthandler.enable()
    calls: queue.SimpleQueue = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(connection, calls), daemon=True).start()
    if backend == "nccl":
        torch.cuda.set_device(rank)
    seconds, store = datetime.timedelta(seconds=PATIENCE[backend]), None
    while True:
        number, detail, path, name, args = pickle.loads(calls.get())
        try:
            if dist.is_initialized():  # all ranks have answered the last call, so nobody is cut off
                dist.destroy_process_group()
            store = store or dist.TCPStore("127.0.0.1", port, is_master=False, timeout=seconds)
            dist.set_debug_level(dist.DebugLevel.DETAIL if detail else dist.DebugLevel.OFF)
            own = dist.PrefixStore(str(number), store)
            dist.init_process_group(backend, store=own, rank=rank, world_size=world, timeout=seconds)
            value = getattr(_module(path), name)(*args)
            # Torch keeps the names of further groups in caches of its own (those of DTensor), where the
            # next body would find them by an equal mesh although they are gone.
            answer = True, value, len(dist.distributed_c10d._world.pg_map) <= 1
        except BaseException:  # noqa: BLE001 - raised again by the caller's process
            answer = False, traceback.format_exc(), False
        connection.send_bytes(pickle.dumps(answer))


def _listen(connection: Connection, calls: queue.SimpleQueue) -> None:
    """Passes on calls; when the caller's process has ended, so does this one, whatever it is doing."""
    try:
        while True:
            calls.put(connection.recv_bytes())
    finally:
        os._exit(1)


def _module(path: str):
    """The test module at a path, imported once under its own name."""
    name = Path(path).stem
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name]
