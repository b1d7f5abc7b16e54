"""The ranks of a job: joined however it was started, and left when it ends."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ..cp.transport import gone
from .config import TrainConfig
from .measure import GIB, peak_bytes

YIELD = 2.0  # seconds


@dataclass(frozen=True)
class World:
    """This process among all: its rank, their number, its device, and the mesh.

    mesh: axes "dp", "cp_outer" (nodes that share a sequence) and "cp_inner" (ranks of each).
    control: all ranks, on the CPU, for what they agree on between steps.
    """

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh
    control: dist.ProcessGroup

    @property
    def chief(self) -> bool:
        """Whether this rank writes and prints for all."""
        return self.rank == 0

    @property
    def dp_rank(self) -> int:
        """This rank's data-parallel coordinate."""
        return self.mesh.get_local_rank("dp")

    def __str__(self) -> str:
        groups, nodes, inner = self.mesh.shape
        where = f"{nodes} nodes x {inner} processes" if nodes > 1 else "inside a node"
        return (
            f"{self.size} x {self.device.type}: {groups} data-parallel x {nodes * inner} context-parallel "
            f"({where}); mesh dp={groups}, cp_outer={nodes}, cp_inner={inner}"
        )


@contextmanager
def join_world(config: TrainConfig) -> Iterator[World]:
    """Join the process group of torchrun or Ray; a process started alone makes a group of one.

    A group that exists already is used, and left as it was; one made here is destroyed at the end.
    gloo on CPU; NCCL with one process per GPU. A rank that runs out of memory prints its peak. One that lost
    its peer raises a little later, as launchers take the first failure for the cause of all.

    ValueError after a restart by torchrun over the store of the attempt before: ranks would find addresses of
    processes that are gone (https://github.com/pytorch/pytorch/issues/135712).
    """
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    if restarts and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        raise ValueError(
            f"restart {restarts} over the store of the attempt before; start by `sparring train "
            f"--max-restarts`, or set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun"
        )
    cuda = uses_gpus(config)
    device = torch.device("cpu")
    if cuda:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    joined = not dist.is_initialized()
    if joined:
        alone = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        launched = "RANK" in os.environ
        patience = timedelta(seconds=config.timeout)
        dist.init_process_group("nccl" if cuda else "gloo", timeout=patience, **({} if launched else alone))
    try:
        rank, size = dist.get_rank(), dist.get_world_size()
        if size % config.dp:
            raise ValueError(
                f"{size} processes do not divide into dp={config.dp} groups; "
                f"start a multiple of dp, or change --dp"
            )
        nodes = nodes_of_group(size // config.dp, _processes_by_node(size, device))
        shape = (config.dp, nodes, size // config.dp // nodes)
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=("dp", "cp_outer", "cp_inner"))
        yield World(rank, size, device, mesh, cpu_group(config))
    except torch.OutOfMemoryError:
        print(f"rank {rank}: out of memory; {peak_memory(device)}", file=sys.stderr, flush=True)
        raise
    except RuntimeError as error:
        if gone(error):
            time.sleep(YIELD)
        raise
    finally:
        # NCCL cannot be left while a transfer waits for a peer. After a failure the process ends anyway.
        if joined and not (cuda and isinstance(sys.exc_info()[1], Exception)):
            dist.destroy_process_group()


def uses_gpus(config: TrainConfig) -> bool:
    """Whether each rank has a GPU."""
    return config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())


def cpu_group(config: TrainConfig) -> dist.ProcessGroup:
    """All ranks, over gloo whatever the default group is; for the use of one thread."""
    return dist.new_group(backend="gloo", timeout=timedelta(seconds=config.timeout))


def nodes_of_group(ranks: int, processes: list[int]) -> int:
    """On how many nodes a context-parallel group of so many ranks lies: nodes that it fills, or part of one.

    processes: of the node of each rank, as every rank sees its own. ValueError where inner rings would leave
    their node.
    """
    fewest, most = min(processes), max(processes)
    if fewest != most:
        raise ValueError(
            f"some nodes have {fewest} processes and some {most}; start the same number on every node"
        )
    if ranks % most and most % ranks:
        raise ValueError(
            f"context-parallel groups of {ranks} ranks do not fit nodes of {most} processes: one must divide "
            f"the other; change --dp, or the processes of a node"
        )
    return max(1, ranks // most)


def _processes_by_node(size: int, device: torch.device) -> list[int]:
    mine = torch.tensor([int(os.environ.get("LOCAL_WORLD_SIZE", size))], device=device)
    found = [torch.empty_like(mine) for _ in range(size)]
    dist.all_gather(found, mine)
    return [int(x) for x in found]


def peak_memory(device: torch.device) -> str:
    """The most memory that this process held: allocated by torch on a GPU, resident on a CPU."""
    where = f"allocated on {device}" if device.type == "cuda" else "resident"
    return f"peak {peak_bytes(device) / GIB:.2f} GiB {where}"
