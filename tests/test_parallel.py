"""Whole models over gloo: loss and every gradient equal one process, with DDP, FSDP2 and sum_gradients."""

from __future__ import annotations

import contextlib
import copy

import pool
import pytest
import tiny_models
import torch
import torch.distributed as dist
from tiny_models import BLOCK, IGNORE, VOCAB, TinyGPT, assert_same_step, gradients, reference
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from sparring.cp import ContextParallel
from sparring.kernels.patterns import Dense, SinkWindow, VerticalSlash

MODELS = {
    "plain": lambda: TinyGPT(kv_heads=2),
    "plain, checkpointed": lambda: TinyGPT(checkpointing="non-reentrant"),
    "llama": tiny_models.llama,
    "qwen2": tiny_models.qwen2,
}
WRAPPERS = ["DDP", "FSDP2", "sum_gradients"]
MESHES = [(1, 2), (1, 4), (2, 2)]  # (data, context) ranks
VERTICAL = VerticalSlash(top_p=0.6, columns=(3, 12), slashes=(1, 4), probe=8, sink=2, window=0)


def make_batch(name: str) -> tuple[dict, list]:
    """tiny_models.make_batch, and "unequal": the first row has 4 labels, the second has all."""
    batch, documents = tiny_models.make_batch("whole" if name == "unequal" else name)
    if name == "unequal":
        batch["labels"][0, 5:] = IGNORE
    return batch, documents


class Job:
    """One rank of a training job: mesh, ContextParallel and a model in its wrapper."""

    def __init__(self, sizes, wrapper, model, **options):
        data, _ = sizes
        mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("dp", "cp"))
        everyone = mesh["dp", "cp"]._flatten("everyone")
        options = {"pattern": Dense(), "layout": "zigzag", "block_size": BLOCK} | options
        reduce = "sum" if wrapper == "sum_gradients" else "mean"
        self.cp = ContextParallel(mesh, data_axes=("dp",), grad_reduce=reduce, **options)
        self.model = self.cp.attach(MODELS[model]())
        self.call, self.wrapper = self.model, wrapper
        if wrapper == "DDP":
            self.call = DistributedDataParallel(self.model, process_group=everyone.get_group())
        elif wrapper == "FSDP2":
            for block in self.model.blocks if "plain" in model else self.model.model.layers:
                fully_shard(block, mesh=everyone)
            fully_shard(self.model, mesh=everyone)
        replica = mesh["dp"].get_local_rank()
        self.rows = slice(replica, replica + 1) if data > 1 else slice(None)

    def part(self, batch):
        """The rows of this replica."""
        return {name: x[self.rows] for name, x in batch.items()}

    def backward(self, loss, last=True):
        """Gradients of all micro-batches are reduced with the last."""
        if self.wrapper == "FSDP2":
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


def train_step(sizes, wrapper, model, name, plans=None, **options):
    """Loss and gradients of one step on one rank; the labels that it held."""
    job = Job(sizes, wrapper, model, **options)
    batch, _ = make_batch(name)
    with contextlib.nullcontext() if plans is None else job.cp.replay(plans):
        shard = job.cp.shard(job.part(batch))
    loss = job.cp.loss(job.call(**shard.inputs), shard)
    job.backward(loss)
    labels = int((shard.labels != IGNORE).sum())
    return {"loss": loss.item(), "grads": job.gradients(), "labels": labels, "tokens": shard.tokens}


def expected_step(model, name):
    batch, documents = make_batch(name)
    return reference(MODELS[model](), batch, documents)


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("sizes", MESHES)
@pytest.mark.parametrize("model,name", [("plain", "packed"), ("plain", "unequal"), ("llama", "packed")])
def test_equals_one_process(model, name, sizes, wrapper):
    """Dense against the original model; the second process group holds the row with all the labels."""
    results = pool.run(sizes[0] * sizes[1], train_step, sizes, wrapper, model, name)
    assert_same_step(results, expected_step(model, name))
    assert sum(result["labels"] for result in results) == results[0]["tokens"]


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("model", ["plain", "llama"])
def test_ranks_without_labels(model, wrapper):
    """All labels on the first rank: the others take part with a loss of exactly 0."""
    results = pool.run(4, labels_first, wrapper, model)
    assert_same_step(results, expected_step(model, "few labels"))
    assert results[0]["labels"] == 38 and not any(result["labels"] for result in results[1:])


def labels_first(wrapper, model):
    return train_step((1, 4), wrapper, model, "few labels", layout="contiguous")


def plans_alone(name, pattern):
    """Plans and step of one process, whatever its pattern."""
    model = MODELS["plain, checkpointed"]()
    cp = ContextParallel(None, pattern=pattern, block_size=BLOCK, grad_reduce="sum")
    cp.attach(model)
    shard = cp.shard(make_batch(name)[0])
    loss = cp.loss(model(**shard.inputs), shard)
    loss.backward()
    return cp.plans(shard), {"loss": loss.item(), "grads": gradients(model)}


def train_step_replayed(sizes, wrapper, name, plans, pattern):
    return train_step(sizes, wrapper, "plain, checkpointed", name, plans, pattern=pattern, layout="striped")


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("pattern", [SinkWindow(sink=5, window=20), VERTICAL], ids=["sink-window", "vertical"])
def test_sparse_and_checkpointed(pattern, world, wrapper):
    """Sparse patterns, replayed, with activation checkpointing inside the wrapper."""
    plans, expected = plans_alone("packed", pattern)
    arguments = ((1, world), wrapper, "packed", plans, pattern)
    assert_same_step(pool.run(world, train_step_replayed, *arguments), expected)


# -- accumulation -------------------------------------------------------------------------------------

MICRO_BATCHES = ["unequal", "packed", "few labels"]


def accumulate(sizes, wrapper):
    """Three micro-batches with unequal labels, all sharded before the first backward."""
    job = Job(sizes, wrapper, "plain, checkpointed")
    shards = [job.cp.shard(job.part(make_batch(name)[0])) for name in MICRO_BATCHES]
    tokens = sum(shard.tokens for shard in shards)
    total = 0.0
    for shard in shards:
        last = shard is shards[-1]
        with job.unsynced(last):
            loss = job.cp.loss(job.call(**shard.inputs), shard, tokens=tokens)
            job.backward(loss, last)
        total += loss.item()
    return {"loss": total, "grads": job.gradients()}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("sizes", MESHES)
def test_gradient_accumulation(sizes, wrapper):
    """The mean over all labels of the optimizer step, not the mean of the micro-batches' means."""
    model, counts, losses = MODELS["plain, checkpointed"](), [], []
    for name in MICRO_BATCHES:
        batch, documents = make_batch(name)
        last = {(row, end - 1) for row, _, end in documents}
        labels = batch["labels"].clone()
        labels[:, 0] = IGNORE
        for row, end in last:
            if end + 1 < labels.shape[1]:
                labels[row, end + 1] = IGNORE
        counts.append(int((labels != IGNORE).sum()))
        losses.append((batch, documents))
    grads: dict = {}
    total = 0.0
    for (batch, documents), count in zip(losses, counts, strict=True):
        step = reference(copy.deepcopy(model), batch, documents)
        share = count / sum(counts)
        total += step["loss"] * share
        for name, gradient in step["grads"].items():
            grads[name] = grads.get(name, 0.0) + gradient * share
    assert_same_step(pool.run(sizes[0] * sizes[1], accumulate, sizes, wrapper), {"loss": total, "grads": grads})


# -- several steps ------------------------------------------------------------------------------------


def train(sizes, wrapper, forget=False):
    """Three optimizer steps; the losses and the parameters after them, or the error."""
    job = Job(sizes, wrapper, "plain")
    optimizer = torch.optim.SGD(job.call.parameters(), lr=0.5)
    losses = []
    for name in ("packed", "unequal", "packed"):
        try:
            shard = job.cp.shard(job.part(make_batch(name)[0]))
        except ValueError as error:
            return len(losses), str(error)
        loss = job.cp.loss(job.call(**shard.inputs), shard)
        optimizer.zero_grad()
        if forget:
            loss.backward()
        else:
            job.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("sizes", MESHES)
def test_training_equals_one_process(sizes, wrapper):
    model = MODELS["plain"]()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    expected = []
    for name in ("packed", "unequal", "packed"):
        step = copy.deepcopy(model)
        expected.append(reference(step, *make_batch(name))["loss"])
        for own, other in zip(model.parameters(), step.parameters(), strict=True):
            own.grad = other.grad
        optimizer.step()
    for losses in pool.run(sizes[0] * sizes[1], train, sizes, wrapper):
        assert losses == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize("sizes", MESHES)
def test_forgotten_sum_gradients_is_noticed(sizes):
    """Ranks that train apart are stopped by the second cp.shard, every one of them."""
    for steps, message in pool.run(sizes[0] * sizes[1], train, sizes, "sum_gradients", True):
        assert steps == 1 and "differ between ranks" in message and "sum_gradients" in message


def sum_twice():
    cp = ContextParallel(None, grad_reduce="mean")
    with pytest.raises(ValueError, match='grad_reduce="sum"'):
        cp.sum_gradients(torch.nn.Linear(2, 2))
    job = Job((1, dist.get_world_size()), "FSDP2", "plain")
    job.cp.grad_reduce = "sum"
    with pytest.raises(ValueError, match="FSDP reduces them itself"):
        job.cp.sum_gradients(job.model)


def test_gradients_are_not_summed_twice():
    pool.run(2, sum_twice)


def vocabulary():
    return VOCAB
