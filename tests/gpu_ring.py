"""What GPU ring tests share: inputs, patterns, one step of a ring, and the answer of one device."""

from __future__ import annotations

from contextlib import contextmanager

import poison
import torch
import torch.distributed as dist
from rings import Wrapped
from torch.distributed.device_mesh import init_device_mesh

from sparring.balance import EXCHANGES, zigzag
from sparring.cp import ContextParallel
from sparring.cp.attention import forward
from sparring.cp.ring import Ring, step_blocks
from sparring.kernels import Geometry, Plan, attend, bind
from sparring.kernels.attention import steps
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
    pad = (0, 0, 0, plan.geometry.num_tokens - q.shape[2])  # to whole blocks of every rank
    q, k, v, dout = (torch.nn.functional.pad(x.to(dtype), pad) for x in (q, k, v, dout))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, _ = attend(*leaves, plan, impl=impl)
    return [x[:, :, :LENGTH] for x in (out, *torch.autograd.grad(out, leaves, dout))]


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


@contextmanager
def on_own_stream(transport, gpus: int = 2):
    """A rank that is a thread on one of some GPUs, node by node, with a stream of its own."""
    device = torch.device("cuda", transport.rank * gpus // transport.size)
    torch.cuda.set_device(device)
    with torch.cuda.stream(torch.cuda.Stream(device)), torch.autograd.set_multithreading_enabled(False):
        yield device


class SlowLink(Wrapped):
    """What comes from other nodes takes 4e8 clock cycles longer. flight: before and after these."""

    def __init__(self, inner, device):
        super().__init__(inner)
        self.device, self.flight = device, [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def exchange(self, send, send_to, receive, recv_from, channel):
        if channel != "outer keys":
            return super().exchange(send, send_to, receive, recv_from, channel)
        stream = self.inner.stream(channel, self.device)
        self.flight[0].record(stream)
        with torch.cuda.stream(stream):
            torch.cuda._sleep(400_000_000)
        self.flight[1].record(stream)
        return super().exchange(send, send_to, receive, recv_from, channel)


class Timed:
    """Functions that compute steps. spans: events before and after each, on the stream of the kernels."""

    def __init__(self, computes):
        self.computes, self.spans = computes, []

    def __getattr__(self, name):
        return getattr(self.computes, name)

    def forward_step(self, *arguments, **options):
        span = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        span[0].record()
        self.computes.forward_step(*arguments, **options)
        span[1].record()
        self.spans.append(span)


def flight_and_steps(transport) -> tuple[float, list[tuple[float, float]]]:
    """The second of two forwards over 2 nodes of 2 ranks with a slow link between the nodes.

    Milliseconds from when its outer transfer started: when that was over; begin and end of every step.
    """
    tokens, size = 16384, 128
    layout = zigzag(tokens // size, transport.size, size)
    with on_own_stream(transport) as device:
        geometry = Geometry.causal(1, tokens, size, device=device).select(layout.assignment[transport.rank])
        blocks = geometry.num_blocks
        every = torch.ones(1, 1, len(geometry.blocks), blocks, dtype=torch.bool, device=device)
        schedule = EXCHANGES["hierarchical"](transport.rank, transport.size, 2)
        bound = bind(Plan.build(geometry, every), step_blocks(schedule, layout.assignment))
        local = len(geometry.blocks) * size
        q, k, v = (torch.randn(1, h, local, DIM, device=device).bfloat16() for h in (HEADS, *[KV_HEADS] * 2))
        for _ in range(2):  # the first one compiles
            torch.cuda.synchronize(device)  # of all ranks on it: none may have begun
            transport.swap(None, "control")
            timed, link = Timed(steps("auto", q, size, False)), SlowLink(transport, device)
            forward(q, k, v, bound, Ring(link, schedule, timed, local), DIM**-0.5)
            torch.cuda.synchronize(device)
        began, over = link.flight
        spans = [tuple(began.elapsed_time(event) for event in span) for span in timed.spans]
        return began.elapsed_time(over), spans


def relative(actual, expected) -> float:
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).abs().max() / expected.abs().max())
