"""What callers do to tensors before, during and after a step: strides, overwritten buffers, autocast."""

from __future__ import annotations

import machine
import pytest
import torch
from tiny_models import assert_same_step, gradients, llama, make_batch, parallel, reference, sharded

from sparring.cp import run_threads
from sparring.kernels.patterns import Dense, VerticalSlash

SPARSE = VerticalSlash(top_p=0.6, columns=(3, 12), slashes=(1, 4), probe=8, sink=2, window=0)


def attention_step(transport, q, k, v, change=None, **options):
    """Output and gradients of one call on this rank; change(q, k, v) runs between forward and backward."""
    cp = parallel(transport, **options)
    shard = cp.shard({"input_ids": torch.zeros(2, 64, dtype=torch.int64, device=q.device)})
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out = cp.attention(*views(q, k, v), shard)
    if change is not None:
        with torch.no_grad():
            change(q, k, v)
    weight = torch.linspace(-1, 1, out.numel(), device=q.device).view(out.shape)
    return out.detach(), torch.autograd.grad((out * weight).sum(), (q, k, v))


def views(q, k, v):
    """[B, S, H, D] leaves as transposed views, every second head of k, and one head of v expanded to all."""
    k = k.transpose(1, 2)[:, ::2]
    return q.transpose(1, 2), k, v.transpose(1, 2).expand(-1, k.shape[1], -1, -1)


def tensors(rank, length=32):
    g = torch.Generator().manual_seed(rank)
    return [torch.randn(2, length, heads, 16, generator=g) for heads in (4, 4, 1)]


@pytest.mark.parametrize("world", [1, 2])
def test_inputs_that_are_not_contiguous(world):
    """NeMo Automodel #2384: strides were ignored. Bit for bit as the same values in fresh memory."""

    def body(transport):
        inputs = tensors(transport.rank, 64 // world)
        out, grads = attention_step(transport, *inputs)
        cp = parallel(transport)
        shard = cp.shard({"input_ids": torch.zeros(2, 64, dtype=torch.int64)})
        fresh = [x.clone(memory_format=torch.contiguous_format).requires_grad_() for x in views(*inputs)]
        again = cp.attention(*fresh, shard)
        weight = torch.linspace(-1, 1, out.numel()).view(out.shape)
        dq, dk, dv = torch.autograd.grad((again * weight).sum(), fresh)
        assert torch.equal(again, out) and torch.equal(dq.transpose(1, 2), grads[0])
        assert torch.equal(dk.transpose(1, 2), grads[1][:, :, ::2]) and not grads[1][:, :, 1::2].any()
        assert torch.equal(dv.sum(1, keepdim=True).transpose(1, 2), grads[2])

    run_threads(world, body, timeout=60)


def test_a_batch_of_strided_slices():
    """The same for what a loader hands over: slices of a longer buffer, rows that share their positions."""
    batch, documents = make_batch("packed")
    wide = {name: torch.stack((x, torch.zeros_like(x)), -1)[..., 0] for name, x in batch.items()}
    assert not any(x.is_contiguous() for x in wide.values())
    assert_same_step(sharded(llama(), wide, 2, Dense()), reference(llama(), batch, documents))


@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("gradient", [True, False])
def test_inputs_overwritten_before_the_backward_are_noticed(name, gradient):
    """NeMo Automodel #3157: backward used the keys of another micro-batch. Here autograd's version error."""

    def body(transport):
        cp = parallel(transport)
        shard = cp.shard({"input_ids": torch.zeros(2, 64, dtype=torch.int64)})
        inputs = {n: x.transpose(1, 2).contiguous() for n, x in zip("qkv", tensors(0), strict=True)}
        inputs["v"] = inputs["v"].repeat(1, 4, 1, 1)
        for n, x in inputs.items():
            x.requires_grad_(gradient or n != name)
        out = cp.attention(*inputs.values(), shard)
        with torch.no_grad():
            inputs[name].mul_(2)  # as a buffer that is filled for the next micro-batch
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()

    run_threads(2, body, timeout=60)


def test_views_overwritten_before_the_backward_keep_their_old_values():
    """The same for inputs that are not contiguous: the copy that was attended to is differentiated."""

    def overwrite(*leaves):
        for leaf in leaves:
            leaf.mul_(2)

    def body(transport):
        inputs = [x.clone() for x in tensors(transport.rank)]
        expected = attention_step(transport, *tensors(transport.rank))
        out, grads = attention_step(transport, *inputs, change=overwrite)
        assert torch.equal(out, expected[0])
        assert all(torch.equal(a, b) for a, b in zip(grads, expected[1], strict=True))

    run_threads(2, body, timeout=60)


def test_a_batch_overwritten_after_shard_changes_nothing():
    """The same for a loader that fills its buffers again while the step runs."""
    batch, documents = make_batch("packed")
    expected = reference(llama(), batch, documents)
    model, cp = llama(), parallel(None)
    cp.attach(model)
    batch["shift_labels"] = cp.shard(batch).labels[:, :110].clone()
    for names in (("input_ids", "labels", "position_ids"), ("input_ids", "shift_labels", "position_ids")):
        buffers = {name: batch[name].clone() for name in names}
        shard = cp.shard(buffers)
        for x in buffers.values():
            x.zero_()
        model.zero_grad()
        loss = cp.loss(model(**shard.inputs), shard)
        loss.backward()
        assert_same_step([{"loss": loss.item(), "grads": gradients(model)}], expected)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=machine.needs("gpu"))])
def test_autocast_does_not_reach_into_attention(device):
    """Scores and accumulators stay in the precision of the inputs, in the backward and in plans too."""

    def body(transport):
        inputs = [x.to(device) for x in tensors(transport.rank)]
        with torch.autograd.set_multithreading_enabled(False):  # threads of one GPU share its backward thread
            outside = attention_step(transport, *inputs, pattern=SPARSE)
            with torch.autocast(device, torch.bfloat16):
                inside = attention_step(transport, *inputs, pattern=SPARSE)
        assert torch.equal(inside[0], outside[0]) and inside[0].dtype == torch.float32
        assert all(torch.equal(a, b) for a, b in zip(inside[1], outside[1], strict=True))

    run_threads(2, body, timeout=60)
