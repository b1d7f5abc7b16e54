"""Weights over ranks: FSDP2, a unit for each transformer layer and one for the rest.

Trained weights, their gradients and the state of the optimizer are sharded fp32 tensors. A layer is gathered
in the dtype of the computation while it runs; gradients are averaged over all ranks in fp32.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from .config import TrainConfig
from .model import decoder_layers


def weight_mesh(config: TrainConfig, device: str, size: int) -> DeviceMesh:
    """The mesh of the weights; its last axis shards them, the one before it, if any, holds copies.

    full: over all ranks. hybrid: over the ranks that share a sequence, a copy for each data-parallel group.
    none: a copy on every rank. Groups are numbered as in the mesh of the job: data-parallel ranks first.
    """
    shapes = {"full": (size,), "hybrid": (config.dp, size // config.dp), "none": (size, 1)}
    shape = shapes[config.shard]
    return init_device_mesh(device, shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])


def shard_weights(model: nn.Module, mesh: DeviceMesh, dtype: torch.dtype) -> None:
    """Shard the weights of a model on the CPU, in place and layer by layer: no device ever holds all of them.

    After `cp.attach`, adapters and what `save_memory` changes; before the optimizer.

    dtype: of the computation. Trained weights become fp32, frozen ones `dtype`.
    """
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for unit in (*decoder_layers(model), model):
        for parameter in unit.parameters():
            if not isinstance(parameter, DTensor):
                parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else dtype)
        fully_shard(unit, mesh=mesh, mp_policy=policy)
