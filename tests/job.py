"""One rank of a training job over gloo: meshes, wrappers and one step, for tests through the pool."""

from __future__ import annotations

import contextlib

import pool
import tiny_models
from tiny_models import BLOCK, IGNORE, TinyGPT, make_batch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from sparring.cp import ContextParallel
from sparring.kernels.patterns import Dense

MODELS = {
    "plain": lambda: TinyGPT(kv_heads=2),
    "plain, checkpointed": lambda: TinyGPT(checkpointing="non-reentrant"),
    "llama": tiny_models.llama,
    "qwen2": tiny_models.qwen2,
    "llama, dynamic": lambda: tiny_models.llama(**tiny_models.rope("dynamic", 64)),
}


def run(sizes, body, wrapper, *args):
    """body(sizes, wrapper, *args) on every rank. DDP and FSDP2 fail under DETAIL in some torch versions."""
    return pool.run(sizes[0] * sizes[1], body, sizes, wrapper, *args, detail=wrapper == "sum_gradients")


def mesh_of(sizes):
    """(data, context) ranks."""
    return init_device_mesh("cpu", sizes, mesh_dim_names=("dp", "cp"))


class Job:
    """One rank of a training job: mesh, ContextParallel and a model in its wrapper."""

    def __init__(self, sizes, wrapper, model, **options):
        data, _ = sizes
        # First of all, so that it is the default group: DTensor keeps specs, with the names of their groups,
        # from the process groups of earlier tests.
        everyone = init_device_mesh("cpu", (sizes[0] * sizes[1],), mesh_dim_names=("everyone",))
        mesh = mesh_of(sizes)
        options = {"pattern": Dense(), "layout": "zigzag", "block_size": BLOCK} | options
        reduce = "sum" if wrapper == "sum_gradients" else "mean"
        self.cp = ContextParallel(mesh, data_axes=("dp",), grad_reduce=reduce, **options)
        self.model = self.cp.attach(MODELS[model]())
        self.call, self.wrapper = self.model, wrapper
        if wrapper == "DDP":
            self.call = DistributedDataParallel(self.model, process_group=everyone.get_group())
        elif wrapper in ("FSDP2", "HSDP"):
            over = everyone if wrapper == "FSDP2" else mesh  # HSDP: replicas over dp, shards over cp
            for block in self.model.blocks if "plain" in model else self.model.model.layers:
                fully_shard(block, mesh=over)
            fully_shard(self.model, mesh=over)
        replica = mesh["dp"].get_local_rank()
        self.rows = slice(replica, replica + 1) if data > 1 else slice(None)

    def part(self, batch):
        """The rows of this replica."""
        return {name: x[self.rows] for name, x in batch.items()}

    def backward(self, loss, last=True):
        """Gradients of all micro-batches are reduced with the last."""
        if self.wrapper in ("FSDP2", "HSDP"):
            self.model.set_requires_gradient_sync(last)
        loss.backward()
        if self.wrapper == "sum_gradients" and last:
            self.cp.sum_gradients(self.model)

    def unsynced(self, last):
        """Around the forward and backward of a micro-batch."""
        return self.call.no_sync() if self.wrapper == "DDP" and not last else contextlib.nullcontext()

    def gradients(self):
        full = {}
        for name, parameter in self.model.named_parameters():
            gradient = parameter.grad
            full[name] = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient.clone()
        return full


def train_step(sizes, wrapper, model, name, plans=None, options=None):
    """Loss and gradients of one step on one rank; the labels that it held."""
    job = Job(sizes, wrapper, model, **(options or {}))
    batch, _ = make_batch(name)
    with contextlib.nullcontext() if plans is None else job.cp.replay(plans):
        shard = job.cp.shard(job.part(batch))
    loss = job.cp.loss(job.call(**shard.inputs), shard)
    job.backward(loss)
    labels = int((shard.labels != IGNORE).sum())
    return {"loss": loss.item(), "grads": job.gradients(), "labels": labels, "tokens": shard.tokens}
