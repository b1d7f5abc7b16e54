"""Whether processes of this machine can form a group and exchange messages, and how fast.

Processes start as those of `sparring train` do. Every phase has a limit, in the processes and here.
"""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.queues import SimpleQueue

from ..balance import H200
from .doctor_finding import LONGEST, Finding, Rate, check, size_text
from .doctor_process import GRACE, listen
from .doctor_rank import phases, work

START = 120.0  # seconds until processes have imported what they need
SLOW = 0.5  # of the bandwidth that "auto" predicts with
_INTERFACES = (
    "let processes of this machine reach each other: host name in /etc/hosts, firewall, "
    "NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME (an interface that is up; lo); NCCL_DEBUG=INFO says more"
)
_MESSAGES = (
    "see gpu.links and machine.shm above; NCCL_P2P_DISABLE=1 tells whether peer access is at fault (then "
    "turn off ACS and the IOMMU), a larger /dev/shm (docker run --shm-size=8g) whether shared memory is"
)
_REMEDIES = {"formed": _INTERFACES, "left": "NCCL_DEBUG=INFO says more; trainings may not end by themselves"}
_MULTICAST = (
    "exchange='pull' sends instead: set TORCH_SYMM_MEM_DISABLE_MULTICAST=1 where GPUs have peer access, "
    "and it reads"
)
Work = Callable[[SimpleQueue, str, float], None]


@dataclass(frozen=True)
class Told:
    """What a rank told: see `work`."""

    rank: int
    phase: str
    state: str
    value: str | list[Rate] | None


def check_group(processes: int, device: str, limit: float) -> tuple[list[Finding], list[Rate]]:
    """Starts so many processes on "cpu" or "cuda"; what they found, and the rates of the slowest rank.

    limit: seconds of each phase; the first that fails or exceeds it is the last finding. Never longer, and
    no process is left.
    """
    phase, count = limit + GRACE, 2 + len(phases(processes))
    told, _ = listen(launch, (work, processes, device, limit), START + count * phase)
    return judge([Told(*each) for each in told], processes, device, limit)


def launch(queue: SimpleQueue, work: Work, processes: int, device: str, limit: float) -> None:
    """Runs `work` on every rank as `torchrun --standalone` does, in a process of its own, to be ended."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # as `sparring train` has it
    logging.disable()  # ranks tell what is wrong
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    try:
        elastic_launch(config, work)(queue, device, limit)
    except ChildFailedError as error:
        for rank, failure in error.failures.items():
            if failure.exitcode != 1:  # a rank that ends itself has told why, or was stuck
                queue.put((rank, "exit", "failed", f"ended with exit code {failure.exitcode}"))
        raise SystemExit(1) from None
    except Exception as error:
        text = f"its launcher ended: {' '.join(str(error).split())}"
        for rank in range(processes):
            queue.put((rank, "exit", "failed", text[:LONGEST]))
        raise SystemExit(1) from None


def judge(told: list[Told], processes: int, device: str, limit: float) -> tuple[list[Finding], list[Rate]]:
    """Findings of all phases up to the first that not all ranks have done, and the slowest rates."""
    found, rates = [], []
    for phase in ("formed", *phases(processes), "left"):
        done = {each.rank: each.value for each in told if (each.phase, each.state) == (phase, "done")}
        if len(done) < processes:
            why, remedy = _why(told, phase, processes, limit), _REMEDIES.get(phase, _MESSAGES)
            return [*found, Finding(f"group.{phase}", "fail", why, remedy)], rates
        if phase == "bandwidth":
            by_size = zip(*done.values(), strict=True)
            rates = [min(each, key=lambda rate: rate.gigabytes_per_second) for each in by_size]
            found.append(_check_rate(rates, device))
        elif phase == "one-sided":
            reads = device == "cpu" or done[0].startswith("read")
            found.append(check("group.one-sided", reads, f"pulled keys are {done[0]}", _MULTICAST, "warn"))
        elif phase != "left":
            found.append(Finding(f"group.{phase}", "ok", done[0]))
    return found, rates


def _why(told: list[Told], phase: str, processes: int, limit: float) -> str:
    """What the ranks were at that have not done this phase."""
    parts = []
    for rank in range(processes):
        mine = [each for each in told if each.rank == rank]
        states = {each.state: each.value for each in mine if each.phase == phase}
        exits = [each.value for each in mine if each.phase == "exit"]
        if "failed" in states:
            parts.append(f"rank {rank}: {states['failed']}")
        elif "done" not in states:
            stuck = f"not done within {limit:g} s" if "begun" in states else "never began"
            parts.append(f"rank {rank}: {exits[0] if exits else stuck}")
    return "; ".join(parts)


def _check_rate(rates: list[Rate], device: str) -> Finding:
    """Against the bandwidth that times are predicted with."""
    hop = max((rate for rate in rates if rate.what == "ring hop"), key=lambda rate: rate.bytes)
    expected = hop.bytes / H200.inside.seconds(hop.bytes) / 1e9
    return check(
        "group.bandwidth",
        device == "cpu" or hop.gigabytes_per_second >= SLOW * expected,
        f"{hop.gigabytes_per_second:.3g} GB/s at {size_text(hop.bytes)}, each way",
        f"'auto' predicts with {expected:.0f} GB/s; measure this machine by benchmarks/calibrate.py and give "
        "ContextParallel(machine=read_constants(FILE))",
        "warn",
    )
