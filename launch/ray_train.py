"""The job on Ray Train: its workers are the ranks, and run the same function as those of torchrun."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import ray
import ray.train
import torch
from ray.train.torch import TorchConfig, TorchTrainer

from .cli import leave_checkout
from .config import TrainConfig
from .world import uses_gpus

STORE = 128 * 2**20  # bytes of Ray's object store, through which no tensor goes


def fit(
    config: TrainConfig,
    num_workers: int,
    *,
    max_failures: int = 0,
    address: str | None = None,
    allow_unauthenticated: bool = False,
    train: Callable[..., Any] | None = None,
) -> ray.train.Result:
    """Train as `config` says on Ray workers, one for each rank; metrics go to `config.out` as they always do.

    Uses the cluster that this process is connected to, the one at `address`, or one that it starts on this
    machine without a dashboard and ends again. Workers are packed onto few nodes. `config.out` must be the
    same folder for all of them.

    Args:
        num_workers: ranks; all of them from the first step to the last.
        max_failures: how often all workers start again, from the newest checkpoint, if one fails.
        allow_unauthenticated: join a cluster at `address` without token authentication.
        train: run(config, job) of launch/train.py, or a function that takes the same.

    Raises ray.train.WorkerGroupError, whose `worker_failures` has the exception of each rank that raised.
    """
    if not isinstance(num_workers, int):
        raise ValueError(
            f"num_workers={num_workers} is elastic, but a group that shares a sequence keeps its ranks; "
            f"give one number, such as {num_workers[-1]}"
        )
    if num_workers % config.dp:
        raise ValueError(
            f"{num_workers} workers do not divide into dp={config.dp} groups; use a multiple of dp"
        )
    config = config.absolute()  # workers have a working directory of their own
    connected = ray.is_initialized() and address is None
    if not connected:
        connect(num_workers, config, address, allow_unauthenticated)
    try:
        return TorchTrainer(
            work,
            train_loop_config={"config": asdict(config), "job": uuid.uuid4().hex, "train": train},
            torch_config=TorchConfig(timeout_s=max(1, round(config.timeout))),
            scaling_config=ray.train.ScalingConfig(
                num_workers=num_workers, use_gpu=uses_gpus(config), placement_strategy="PACK"
            ),
            run_config=ray.train.RunConfig(
                name="ray",
                storage_path=config.out,
                failure_config=ray.train.FailureConfig(max_failures=max_failures),
            ),
        ).fit()
    finally:
        if not connected:
            ray.shutdown()


def work(given: dict[str, Any]) -> None:
    """What every worker runs. Its process group, RANK, LOCAL_RANK and LOCAL_WORLD_SIZE are there already."""
    leave_checkout()
    from .train import run

    (given["train"] or run)(TrainConfig(**given["config"]), given["job"])


def connect(num_workers: int, config: TrainConfig, address: str | None, allow_unauthenticated: bool) -> None:
    """Start a cluster of this machine with room for the job, or join the one at `address`.

    Anyone who reaches a cluster without token authentication can run code on it (CVE-2023-48022): ValueError
    for such an `address`, unless allowed.
    """
    if address is None:
        gpus = torch.cuda.device_count() if uses_gpus(config) else 0
        if uses_gpus(config) and num_workers > gpus:
            raise ValueError(f"{num_workers} workers and {gpus} GPUs; give each worker one, or device cpu")
        ray.init(
            "local", num_cpus=num_workers, num_gpus=gpus, object_store_memory=STORE, include_dashboard=False
        )
    else:
        mode = os.environ.get("RAY_AUTH_MODE", "unset")
        if mode.lower() != "token" and not allow_unauthenticated:
            raise ValueError(
                f"RAY_AUTH_MODE={mode}: the cluster at {address} would be joined without authentication; set "
                f"RAY_AUTH_MODE=token and its token, or pass --allow-unauthenticated-ray"
            )
        ray.init(address)
    print(f"Ray at {address or 'this machine'}, authentication: {os.environ.get('RAY_AUTH_MODE', 'unset')}")
