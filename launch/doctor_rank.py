"""What each process that `sparring doctor` starts does: it joins, exchanges known numbers and measures.

It tells every phase as it begins and ends, so that the doctor knows where a process was that hangs or dies.
"""

from __future__ import annotations

import faulthandler
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.queues import SimpleQueue
from statistics import median

import torch
from torch import Tensor

from ..balance import H200
from ..cp.exchange import may_share_heads, offered
from ..cp.mesh import connect
from ..cp.planning import Planning
from ..cp.transport import Transport, gone
from .config import TrainConfig
from .doctor_finding import LONGEST, MIB, Rate
from .doctor_process import GRACE
from .world import YIELD, join_world

RING_SIZES = tuple(2**n for n in range(16, 29, 2))  # bytes, 64 KiB to 256 MiB
ALL_TO_ALL_SIZE = 64 * MIB  # bytes that each rank has for all
REPEATS = 3
BLOCK, BLOCKS = 128, 64  # of a rank, in the sequence that layout and exchange are asked for
AXES = ("cp_outer", "cp_inner")


def work(queue: SimpleQueue, device: str, limit: float) -> None:
    """One rank. queue: takes (rank, phase, "begun" | "done" | "failed", what it found or the error).

    limit: seconds of every phase. A rank that fails or that is stuck ends at once.
    """
    rank = int(os.environ["RANK"])

    @contextmanager
    def told(phase: str) -> Iterator[Callable[[object], None]]:
        faulthandler.dump_traceback_later(limit + GRACE, exit=True)  # errors come first
        queue.put((rank, phase, "begun", None))
        found = []
        try:
            yield found.append
        except Exception as error:
            text = f"{type(error).__name__}: {error}".splitlines()[0]
            queue.put((rank, phase, "failed", text[:LONGEST]))
            if isinstance(error, RuntimeError) and gone(error):
                time.sleep(YIELD)  # the one that has gone is the cause, and to be found first
            os._exit(1)  # NCCL cannot be left while a transfer waits for a peer
        queue.put((rank, phase, "done", found[0] if found else None))
        faulthandler.cancel_dump_traceback_later()

    with ExitStack() as stack, told("formed") as tell:
        began = time.perf_counter()
        world = stack.enter_context(join_world(TrainConfig(device=device, timeout=limit)))
        transport = connect(world.mesh, AXES, (), limit).ring
        tell(f"{world}; in {time.perf_counter() - began:.1f} s")
        leave = stack.pop_all()
    for phase in phases(transport.size):
        with told(phase) as tell:
            tell(CHECKS[phase](transport, world.device))
    with told("left"):
        leave.close()


def phases(processes: int) -> list[str]:
    """Those between "formed" and "left", in order. A process alone has nobody to exchange with."""
    return list(CHECKS) if processes > 1 else ["auto"]


def all_reduce(transport: Transport, device: torch.device) -> str:
    """Sums, and the largest, of numbers that differ by rank."""
    mine = torch.arange(2**16, device=device, dtype=torch.float32) + transport.rank  # exact in fp32
    first, size = mine - transport.rank, transport.size
    for op, expected in (("sum", size * first + size * (size - 1) // 2), ("max", first + size - 1)):
        x = mine.clone()
        transport.all_reduce(x, op).wait()
        _same(x, expected, f"all-reduce {op}")
    return "right"


def exchange(transport: Transport, device: torch.device) -> str:
    """A hop of the ring, one way and the other."""
    rank, size = transport.rank, transport.size
    for step in (1, -1):
        send = torch.arange(2**16, device=device, dtype=torch.float32) + rank
        receive, source = torch.empty_like(send), (rank - step) % size
        transport.exchange([send], (rank + step) % size, [receive], source, "keys").wait()
        _same(receive, send - rank + source, f"received from rank {source}")
    return "right both ways"


def all_to_all(transport: Transport, device: torch.device) -> str:
    """r + 1 rows for rank r, which hold the sender."""
    rank, size = transport.rank, transport.size
    sends, receives = range(1, size + 1), [rank + 1] * size
    send = torch.full((sum(sends), 64), float(rank), device=device)
    receive = torch.full((sum(receives), 64), -1.0, device=device)
    transport.all_to_all(send, sends, receive, receives, "keys").wait()
    senders = torch.arange(size, device=device, dtype=torch.float32).repeat_interleave(rank + 1)
    _same(receive, senders[:, None].expand_as(receive), "received by all-to-all")
    return "right with uneven rows"


def one_sided(transport: Transport, device: torch.device) -> str:
    """Whether a pull reads from other GPUs, or keys are sent."""
    return "read by the GPU that needs them" if transport.one_sided(device) else "sent"


def bandwidth(transport: Transport, device: torch.device) -> list[Rate]:
    """Of a ring hop by size, and of an all-to-all: medians of this rank, both ways at once."""
    rank, size = transport.rank, transport.size
    longest = max(*RING_SIZES, ALL_TO_ALL_SIZE)
    send, receive = (torch.ones(longest, dtype=torch.uint8, device=device) for _ in range(2))

    def hop(n: int) -> None:
        to, source = (rank + 1) % size, (rank - 1) % size
        transport.exchange([send[:n]], to, [receive[:n]], source, "keys").wait()

    def to_all(n: int) -> None:
        rows = [n // size] * size
        transport.all_to_all(send[: sum(rows)], rows, receive[: sum(rows)], rows, "keys").wait()

    found = [Rate("ring hop", n, n / _seconds(hop, n, device) / 1e9) for n in RING_SIZES]
    sent = ALL_TO_ALL_SIZE // size * (size - 1)
    return [*found, Rate("all-to-all", sent, sent / _seconds(to_all, ALL_TO_ALL_SIZE, device) / 1e9)]


def _seconds(transfer: Callable[[int], None], size: int, device: torch.device) -> float:
    """The median over a few, after one that is not counted."""
    seconds = []
    for _ in range(1 + REPEATS):
        _synchronize(device)
        began = time.perf_counter()
        transfer(size)
        _synchronize(device)
        seconds.append(time.perf_counter() - began)
    return median(seconds[1:])


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def choice(transport: Transport, device: torch.device) -> str:
    """What layout="auto" and exchange="auto" take first for a causal sequence, and may take later."""
    blocks = BLOCKS * transport.size
    planning = Planning("auto", "auto", transport, BLOCK, H200)
    decision = planning.decide((((0, blocks * BLOCK),),), blocks)
    later = [*offered("auto", transport), *(["heads"] if may_share_heads("auto", transport, ()) else [])]
    return (
        f"first layout {decision.layout.name}, exchange {decision.exchange}; "
        f"then what is faster of {', '.join(later)}"
    )


def _same(found: Tensor, expected: Tensor, what: str) -> None:
    """ValueError unless all values are equal."""
    wrong = int((found != expected).sum())
    if wrong:
        raise ValueError(f"{what}: {wrong} of {found.numel()} values are wrong")


CHECKS: dict[str, Callable[[Transport, torch.device], str | list[Rate]]] = {
    "all-reduce": all_reduce,
    "exchange": exchange,
    "all-to-all": all_to_all,
    "one-sided": one_sided,
    "bandwidth": bandwidth,
    "auto": choice,
}
