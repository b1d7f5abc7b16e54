"""Queries see the keys that plans promise, in every layer; verify finds what a loss curve hides."""

from __future__ import annotations

from types import SimpleNamespace

import pool
import pytest
import tiny_models
import torch
from sampling import pairwise
from test_parallel import SPARSE, Job
from torch.utils.checkpoint import checkpoint

from sparring.cp import ContextParallel, call, run_threads
from sparring.kernels import reference

BATCHES = ["whole", "packed", "padded"]


def losing(source: int):
    """The reference steps without the keys of one source."""

    def forward_step(q, k, v, bound, of, out, lse, scale, fresh):
        if of != source:
            reference.forward_step(q, k, v, bound, of, out, lse, scale, fresh)
        elif fresh:
            out.zero_()
            lse.fill_(-torch.inf)

    return SimpleNamespace(**vars(reference) | {"forward_step": forward_step})


def train_step(world, pattern, name, **options):
    """report() of every rank after a checkpointed step; how often each layer counted."""
    batch, _ = tiny_models.make_batch(name)
    models = [tiny_models.TinyGPT(checkpointing="non-reentrant") for _ in range(world)]

    def body(transport):
        cp = ContextParallel(transport, pattern=pattern, block_size=16, grad_reduce="sum", **options)
        model = cp.attach(models[transport.rank])
        shard = cp.shard(batch)
        cp.loss(model(**shard.inputs), shard).backward()
        return cp.report(shard), {layer: len(runs) for layer, runs in shard.record.keys.items()}

    return run_threads(world, body)


@pytest.mark.parametrize(
    "world,pattern,name,exchange",
    pairwise([1, 2, 4], ["dense", *SPARSE], BATCHES, ["ring", "gather", "pull"]),
)
def test_every_layer_sees_what_its_plan_promises(world, pattern, name, exchange):
    """In recomputation too."""
    for report, runs in train_step(world, SPARSE.get(pattern, pattern), name, exchange=exchange):
        assert list(runs.values()) == [2, 2]
        for seen, promised in report.keys_by_layer.values():
            assert seen == promised > 0
        total = sum(seen for seen, _ in report.keys_by_layer.values())
        assert f"keys seen by queries: {total} of {total} promised" in str(report)


def test_only_the_first_steps_count():
    batch, _ = tiny_models.make_batch("whole")
    cp = ContextParallel(None, pattern="dense", block_size=16, count_keys=1)
    model = cp.attach(tiny_models.TinyGPT())
    for counted in (True, False):
        shard = cp.shard(batch)
        model(**shard.inputs)
        assert bool(cp.report(shard).keys_by_layer) == counted


@pytest.mark.parametrize("noticed_by", ["report", "shard"])
def test_lost_keys_are_noticed_on_every_rank(monkeypatch, noticed_by):
    """The keys of one rank are lost: an error that names both counts, not a loss that falls."""
    batch, _ = tiny_models.make_batch("whole")
    inputs = torch.randn(3, 2, 4, 110, 8, generator=torch.Generator().manual_seed(0))
    steps = losing(source=1)
    monkeypatch.setattr(call, "steps", lambda *_: steps)

    def body(transport):
        cp = ContextParallel(transport, pattern="dense", layout="striped", block_size=16)
        shard = cp.shard(batch)
        pad = torch.nn.functional.pad(inputs, (0, 0, 0, shard.geometry.num_tokens - 110))
        cp.attention(*pad[:, :, :, shard.geometry.positions], shard, layer="third")
        with pytest.raises(RuntimeError, match=r"saw \d+ keys .* promise \d+") as error:
            for _ in range(2):
                cp.report(shard) if noticed_by == "report" else cp.shard(batch)
        return str(error.value)

    for text in run_threads(3, body):
        assert "in layers ['third']" in text


def verify_on_rank(sizes, wrapper, pattern):
    job = Job(sizes, wrapper, "llama", pattern=SPARSE.get(pattern, pattern))
    batch, _ = tiny_models.make_batch("packed")
    result = job.cp.verify(job.call, batch)
    assert all(p.grad is None for p in job.model.parameters())
    return result


@pytest.mark.parametrize(
    "sizes,wrapper,pattern",
    [((1, 2), "DDP", "vertical-slash"), ((2, 2), "FSDP2", "sink-window"), ((2, 2), "sum_gradients", "dense")],
)
def test_verify_compares_outputs_gradients_and_keys(sizes, wrapper, pattern):
    detail = wrapper == "sum_gradients"
    for result in pool.run(sizes[0] * sizes[1], verify_on_rank, sizes, wrapper, pattern, detail=detail):
        assert result.error <= 1e-5 * result.scale and result.gradient_error <= 1e-5
        assert all(seen == promised > 0 for seen, promised in result.keys.values())
        assert "promised keys seen" in str(result) and result.parameter in str(result)


def test_verify_finds_gradients_that_nobody_sums():
    """grad_reduce="mean" without DDP or FSDP: every output is right, and training would diverge."""
    batch, _ = tiny_models.make_batch("whole")
    models = [tiny_models.TinyGPT() for _ in range(2)]

    def body(transport):
        cp = ContextParallel(transport, pattern="dense", block_size=16)
        return cp.verify(cp.attach(models[transport.rank]), batch)

    for result in run_threads(2, body):
        assert result.error <= 1e-5 * result.scale
        assert result.gradient_error > 0.1


def test_verify_restores_gradients_and_needs_no_labels():
    batch, _ = tiny_models.make_batch("whole")
    cp = ContextParallel(None, pattern="dense", block_size=16)
    model = cp.attach(tiny_models.TinyGPT())
    model.head.weight.grad = torch.ones_like(model.head.weight)
    assert cp.verify(model, batch).gradient_error == 0.0
    assert torch.equal(model.head.weight.grad, torch.ones_like(model.head.weight))
    del batch["labels"]
    result = cp.verify(model, batch)
    assert result.gradient_error is None and "gradients" not in str(result)


def test_checkpointed_functions_count_again():
    """A call that checkpointing repeats is counted like the first."""
    batch, _ = tiny_models.make_batch("whole")
    cp = ContextParallel(None, pattern="dense", block_size=16)
    shard = cp.shard(batch)
    q = torch.randn(2, 2, shard.local_length, 8, requires_grad=True)
    checkpoint(cp.attention, q, q, q, shard, use_reentrant=False).sum().backward()
    assert [len(runs) for runs in shard.record.keys.values()] == [2]
