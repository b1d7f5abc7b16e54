"""`sparring train`: starts a process for each rank, by torchrun or by Ray; each runs `train.run`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec

from .config import Command, parse_command


@dataclass(frozen=True)
class Launcher:
    """Where processes come from. Without --nnodes everything stays on this machine."""

    engine: str = "torchrun"  # torchrun | ray. Processes that torchrun has started already run as they are.
    max_restarts: int = 0  # Times that all processes start again from the newest checkpoint if one fails.

    nproc_per_node: int | None = None  # torchrun: processes of this machine; default: its GPUs, 2 without.
    nnodes: int = 1  # torchrun: machines, each of which runs this command.
    rdzv_endpoint: str | None = None  # torchrun, several machines: HOST:PORT of one of them.
    rdzv_id: str | None = None  # torchrun, several machines: name of this job alone, which resumes by it.
    node_rank: int | None = None  # torchrun, several machines: place of this one; default: as they come.
    local_addr: str | None = None  # torchrun, several machines: address at which others reach this one.

    num_workers: int | None = None  # Ray: processes in all; default: the GPUs of this machine, 2 without.
    ray_address: str | None = None  # Ray: a running cluster; default: one of this machine, for this job.
    allow_unauthenticated_ray: bool = False  # Ray: join a cluster where anyone may run code.

    def __post_init__(self) -> None:
        if self.engine not in _OTHERS:
            raise ValueError(f"engine={self.engine!r} must be one of {tuple(_OTHERS)}")
        for name in ("nproc_per_node", "nnodes", "num_workers"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name}={value} must be greater than 0")
        if self.max_restarts < 0:
            raise ValueError(f"max_restarts={self.max_restarts} must not be less than 0")
        for name in _OTHERS[self.engine]:
            if (value := getattr(self, name)) != getattr(type(self), name):
                raise ValueError(f"{name}={value!r} is not a setting of engine={self.engine!r}; leave it out")
        several = {name: getattr(self, name) for name in ("rdzv_endpoint", "rdzv_id")}
        for name, value in several.items():
            if self.nnodes > 1 and value is None:
                raise ValueError(
                    f"nnodes={self.nnodes} and {name}=None; give {name}, the same on all machines"
                )
        for name, value in (several | {n: getattr(self, n) for n in ("node_rank", "local_addr")}).items():
            if self.nnodes == 1 and value is not None:
                raise ValueError(f"{name}={value!r} and nnodes=1; give nnodes, or leave {name} out")
        if self.node_rank is not None and self.max_restarts:
            raise ValueError(
                f"node_rank={self.node_rank} and max_restarts={self.max_restarts}: machines in a fixed order "
                f"cannot meet again; leave node_rank out"
            )

    def torchrun(self, gpus: int) -> list[str]:
        """Arguments of torchrun, before those of the program. gpus: of this machine that the job may use."""
        words = ["--nproc-per-node", self.nproc_per_node or gpus or 2, "--max-restarts", self.max_restarts]
        if self.nnodes == 1:
            return [*map(str, words), "--standalone"]  # a rendezvous that only this machine reaches
        words += ["--nnodes", self.nnodes, "--rdzv-endpoint", self.rdzv_endpoint, "--rdzv-id", self.rdzv_id]
        if self.local_addr is not None:
            words += ["--local-addr", self.local_addr]
        if self.node_rank is not None:
            words += ["--rdzv-backend", "static", "--node-rank", self.node_rank]
            return list(map(str, words))
        words += ["--rdzv-backend", "c10d"]
        if self.local_addr is not None:  # torchrun would ask the name of this machine, which may mean another
            host = self.rdzv_endpoint.rpartition(":")[0]
            words += ["--rdzv-conf", f"is_host={int(host == self.local_addr)}"]
        return list(map(str, words))


#: Settings that belong to another engine.
_OTHERS = {
    "torchrun": ("num_workers", "ray_address", "allow_unauthenticated_ray"),
    "ray": ("nproc_per_node", "nnodes", "rdzv_endpoint", "rdzv_id", "node_rank", "local_addr"),
}


@dataclass(frozen=True)
class Start(Command):
    """Train a transformer on long text with sparse context parallelism.

    Starts one process for each GPU of this machine, or 2 without any.
    """

    launcher: Launcher = field(default_factory=Launcher)


def main(arguments: Sequence[str]) -> None:
    """`sparring train [OPTIONS]`."""
    import torch
    import tyro

    start = parse_command(Start, arguments)  # so that mistakes are told once, and not by every rank
    _, rest = tyro.cli(Launcher, args=arguments, return_unknown_args=True, add_help=False)
    config, launcher = start.settings, start.launcher
    gpus = 0 if config.device == "cpu" else torch.cuda.device_count()
    if "RANK" in os.environ:
        from .train import main as train

        if launcher != Launcher():
            raise ValueError(f"torchrun has started rank {os.environ['RANK']} already; leave out {launcher}")
        train(rest)
    elif launcher.engine == "ray":
        if find_spec("ray") is None:
            raise ImportError("engine='ray' needs Ray; pip install 'sparring[ray]'")
        from .ray_train import fit

        fit(
            config,
            launcher.num_workers or gpus or 2,
            max_failures=launcher.max_restarts,
            address=launcher.ray_address,
            allow_unauthenticated=launcher.allow_unauthenticated_ray,
        )
    else:
        from torch.distributed.run import main as torchrun

        os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # see join_world
        torchrun([*launcher.torchrun(gpus), "-m", f"{__package__}.train", *rest])
