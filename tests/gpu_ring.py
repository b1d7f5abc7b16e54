"""What GPU ring tests share: inputs, patterns, and the answer of one device."""

from __future__ import annotations

import torch

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


def relative(actual, expected) -> float:
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).abs().max() / expected.abs().max())
