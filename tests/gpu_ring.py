"""What GPU ring tests share: inputs, patterns, one step of a ring, and the answer of one device."""

from __future__ import annotations

import poison
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from sparring.cp import ContextParallel
from sparring.kernels import attend
from sparring.kernels.patterns import Dense, SinkWindow, VerticalSlash

PATTERNS = {
    "dense": Dense(),
    "sink-window": SinkWindow(sink=20, window=300),
    "vertical-slash": VerticalSlash(0.8, columns=(16, 200), slashes=(2, 8)),
    "segments": VerticalSlash(0.8, columns=(16, 200), slashes=(2, 8), segment=1024),
}
LENGTH, HEADS, KV_HEADS, DIM = 5000, 8, 2, 128


def make_batch() -> dict:
    tokens = torch.arange(LENGTH, device="cuda")[None]
    return {"input_ids": tokens, "document_ids": (tokens > 3100).long()}


def tensors(dtype):
    """q, k, v, dout: values with structure, so that a lost tile shows."""
    g = torch.Generator("cuda").manual_seed(0)

    def normal(heads):
        return torch.randn(1, heads, LENGTH, DIM, generator=g, device="cuda")

    q, k, v, dout = normal(HEADS), normal(KV_HEADS), normal(KV_HEADS) + 1, normal(HEADS) + 0.5
    return [x.to(dtype) for x in (q, k, v, dout)]


def one_device(q, k, v, dout, plan, dtype=torch.float32, impl="reference"):
    """out, dq, dk, dv of the same plan without any ring, from the same (rounded) inputs."""
    leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
    out, _ = attend(*leaves, plan, impl=impl)
    return out, *torch.autograd.grad(out, leaves, dout.to(dtype))


def on_ring(cp, q, k, v, dout, sync="default"):
    """The shard, and out, dq, dk, dv in logical order. sync: what waiting for the device does in between."""
    shard = cp.shard(make_batch())
    at, pad = shard.geometry.positions, (0, 0, 0, shard.geometry.num_tokens - q.shape[2])
    local = [torch.nn.functional.pad(x, pad)[:, :, at] for x in (q, k, v, dout)]
    leaves = [x.requires_grad_() for x in local[:3]]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode(sync)
    try:
        out = cp.attention(*leaves, shard)
        grads = torch.autograd.grad(out, leaves, local[3])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return shard, [cp.unshard(x, shard, dim=2) for x in (out, *grads)]


def on_nccl(name: str, dtype: torch.dtype, exchange: str | tuple[str, str]) -> dict:
    """A step over NCCL that may not wait for the device, against one device; run by the pool.

    A ring of nodes takes every GPU for one.
    """
    axes, world = ("nodes", "ranks"), dist.get_world_size()
    shape = (world, 1) if exchange in ("hierarchical", ("heads", "ring")) else (1, world)
    mesh = init_device_mesh("cuda", shape, mesh_dim_names=axes)
    cp = ContextParallel(mesh, axes, pattern=PATTERNS[name], layout="auto", exchange=exchange, recall_every=1)
    inputs = tensors(dtype)
    with poison.poisoned():
        on_ring(cp, *inputs)  # makes communicators and kernels
        shard, actual = on_ring(cp, *inputs, sync="error")
    plan, report = cp.plans(shard)[0], cp.report(shard)
    expected, alone = one_device(*inputs, plan), one_device(*inputs, plan, dtype, "auto")
    return {
        "errors": [relative(x, y) for x, y in zip(actual, expected, strict=True)],
        "alone": [relative(x, y) for x, y in zip(alone, expected, strict=True)],
        "density": report.density,
        "recall": report.recall,
    }


def relative(actual, expected) -> float:
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).abs().max() / expected.abs().max())
