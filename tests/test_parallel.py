"""Whole models over gloo: loss and every gradient equal one process, with DDP, FSDP2 and sum_gradients."""

from __future__ import annotations

import copy
import functools
import itertools

import pool
import pytest
import torch
from job import MODELS, Job, run, train_step
from sampling import pairwise
from tiny_models import BLOCK, IGNORE, assert_same_step, gradients, make_batch, reference

from sparring.cp import ContextParallel
from sparring.kernels.patterns import SinkWindow, VerticalSlash

WRAPPERS = ["DDP", "FSDP2", "HSDP", "sum_gradients"]
MESHES = [(1, 2), (1, 4), (2, 2)]  # (data, context) ranks
SPARSE = {
    "sink-window": SinkWindow(sink=5, window=20),
    "vertical-slash": VerticalSlash(top_p=0.6, columns=(3, 12), slashes=(1, 4), probe=8, sink=2, window=0),
}


def each_once(first: list, second: list) -> list:
    """The product as pytest params; all but a sample that has every value once are marked `full`."""
    sample = [(x, second[i % len(second)]) for i, x in enumerate(first)]
    product = itertools.product(first, second)
    return [pytest.param(*case, marks=() if case in sample else pytest.mark.full) for case in product]


@functools.cache
def expected_step(model, name):
    batch, documents = make_batch(name)
    return reference(MODELS[model](), batch, documents)


@pytest.mark.parametrize(
    "model,name,sizes,wrapper",
    pairwise(["plain", "llama", "qwen2"], ["packed", "unequal"], MESHES, WRAPPERS),
    ids=str,
)
def test_equals_one_process(model, name, sizes, wrapper):
    """Dense against the original model; "unequal" gives the replicas very different numbers of labels."""
    results = run(sizes, train_step, wrapper, model, name)
    assert_same_step(results, expected_step(model, name))
    assert sum(result["labels"] for result in results) == results[0]["tokens"]


@pytest.mark.parametrize("wrapper,model", each_once(WRAPPERS, ["plain", "llama"]))
def test_ranks_without_labels(wrapper, model):
    """All labels on the first rank: the others take part with a loss of exactly 0."""
    results = run((1, 4), train_step, wrapper, model, "few labels", None, {"layout": "contiguous"})
    assert_same_step(results, expected_step(model, "few labels"))
    assert results[0]["labels"] == 38 and not any(result["labels"] for result in results[1:])


@functools.cache
def sparse_alone(pattern):
    """Plans and step of one process."""
    model = MODELS["plain, checkpointed"]()
    cp = ContextParallel(None, pattern=SPARSE[pattern], block_size=BLOCK, grad_reduce="sum")
    cp.attach(model)
    shard = cp.shard(make_batch("packed")[0])
    loss = cp.loss(model(**shard.inputs), shard)
    loss.backward()
    return cp.plans(shard), {"loss": loss.item(), "grads": gradients(model)}


@pytest.mark.parametrize("pattern,world,wrapper", pairwise(list(SPARSE), [2, 4], WRAPPERS))
def test_sparse_and_checkpointed(pattern, world, wrapper):
    """Sparse patterns, replayed, with activation checkpointing inside the wrapper; all transfers checked."""
    plans, expected = sparse_alone(pattern)
    options = {"pattern": SPARSE[pattern], "layout": "striped", "debug": True}
    results = run((1, world), train_step, wrapper, "plain, checkpointed", "packed", plans, options)
    assert_same_step(results, expected)


# -- accumulation -------------------------------------------------------------------------------------

MICRO_BATCHES = ["unequal", "packed", "few labels"]


def accumulate(sizes, wrapper):
    """Three micro-batches with unequal labels, all sharded before the first forward."""
    job = Job(sizes, wrapper, "plain, checkpointed")
    shards = [job.cp.shard(job.part(make_batch(name)[0])) for name in MICRO_BATCHES]
    tokens = sum(shard.tokens for shard in shards)
    losses = []
    for shard in shards:
        last = shard is shards[-1]
        with job.unsynced(last):
            losses.append(job.cp.loss(job.call(**shard.inputs), shard, tokens=tokens))
            if wrapper != "sum_gradients":
                job.backward(losses[-1], last)
    if wrapper == "sum_gradients":  # all forwards before the first backward, which is the last one's
        for loss in losses[::-1]:
            job.backward(loss, last=loss is losses[0])
    return {"loss": sum(loss.item() for loss in losses), "grads": job.gradients()}


def count_labels(batch, documents):
    """Labels with a loss: the first token of a document is nobody's next token."""
    return sum(int((batch["labels"][row, start + 1 : end] != IGNORE).sum()) for row, start, end in documents)


@functools.cache
def expected_accumulation():
    """Mean over all labels of the micro-batches together, from their means."""
    steps = [expected_step("plain, checkpointed", name) for name in MICRO_BATCHES]
    counts = [count_labels(*make_batch(name)) for name in MICRO_BATCHES]
    shares = [count / sum(counts) for count in counts]
    names = steps[0]["grads"]
    return {
        "loss": sum(step["loss"] * share for step, share in zip(steps, shares, strict=True)),
        "grads": {
            n: sum(step["grads"][n] * share for step, share in zip(steps, shares, strict=True)) for n in names
        },
    }


@pytest.mark.parametrize("sizes,wrapper", each_once(MESHES, ["FSDP2", "sum_gradients", "DDP"]), ids=str)
def test_gradient_accumulation(sizes, wrapper):
    """The mean over all labels of the optimizer step, not the mean of the micro-batches' means."""
    results = run(sizes, accumulate, wrapper)
    assert_same_step(results, expected_accumulation())


# -- several steps ------------------------------------------------------------------------------------


STEPS, RATE = ["packed", "unequal", "packed"], 0.5


def train(sizes, wrapper, forget=False):
    """Three optimizer steps: the losses, or the steps done and the error. forget: do not sum gradients."""
    job = Job(sizes, wrapper, "plain")
    optimizer = torch.optim.SGD(job.call.parameters(), lr=RATE)
    losses = []
    for name in STEPS:
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


@functools.cache
def expected_losses():
    model = MODELS["plain"]()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    losses = []
    for name in STEPS:
        step = copy.deepcopy(model)
        losses.append(reference(step, *make_batch(name))["loss"])
        for own, other in zip(model.parameters(), step.parameters(), strict=True):
            own.grad = other.grad
        optimizer.step()
    return losses


@pytest.mark.parametrize("sizes,wrapper", each_once(MESHES, ["sum_gradients", "DDP", "FSDP2"]), ids=str)
def test_training_equals_one_process(sizes, wrapper):
    for losses in run(sizes, train, wrapper):
        assert losses == pytest.approx(expected_losses(), abs=2e-6)


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_forgotten_sum_gradients_is_noticed(sizes):
    """Ranks that train apart are stopped by the second cp.shard, every one of them."""
    for steps, message in run(sizes, train, "sum_gradients", True):
        assert steps == 1 and "differ between ranks" in message and "sum_gradients" in message


def sum_what_is_reduced():
    job = Job((1, 2), "FSDP2", "plain")
    with pytest.raises(ValueError, match='needs .*grad_reduce="sum".*"mean"'):
        job.cp.sum_gradients(job.model)
    job.cp.grad_reduce = "sum"
    with pytest.raises(ValueError, match="FSDP reduces them itself"):
        job.cp.sum_gradients(job.model)


def test_gradients_are_not_summed_twice():
    pool.run(2, sum_what_is_reduced)
