"""Blocks of a sharded model under torch.compile: one graph break, at attention, and the numbers of eager."""

from __future__ import annotations

import job
import machine
import pytest
import torch
from tiny_models import BLOCK, VOCAB, TinyGPT, gradients, llama, make_batch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from sparring.cp import ContextParallel
from sparring.kernels.patterns import SinkWindow

INDUCTOR = pytest.param("inductor", marks=(machine.needs("c++ compiler"), pytest.mark.full))
BACKENDS = ["eager", "aot_eager", INDUCTOR]


@pytest.fixture(autouse=True)
def _nothing_compiled():
    torch._dynamo.reset()
    counters.clear()


class OwnBlock(nn.Module):
    """Calls cp.attention itself."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.norm, self.qkv = layer, nn.LayerNorm(32), nn.Linear(32, 64)
        self.out, self.up = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x, shard):
        heads = self.qkv(self.norm(x)).unflatten(-1, (8, 8)).transpose(1, 2)
        q, k, v = heads.split((4, 2, 2), 1)
        y = shard.cp.attention(q, k, v, shard, layer=self.layer)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.up(x).relu()


class OwnModel(nn.Module):
    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.tokens, self.head = nn.Embedding(VOCAB, 32), nn.Linear(32, VOCAB)
            self.blocks = nn.ModuleList(OwnBlock(i) for i in range(2))

    def forward(self, shard):
        x = self.tokens(shard.tensors["input_ids"])
        for block in self.blocks:
            x = block(x, shard)
        return self.head(x)


def step(mesh, kind, backend=None):
    """Loss, gradients, and how many graphs were compiled. Two steps: the second shard compiles nothing."""
    cp = ContextParallel(
        mesh, pattern=SinkWindow(sink=5, window=40), layout="zigzag", block_size=BLOCK, grad_reduce="sum"
    )
    model = {"own": OwnModel, "llama": llama, "plain": lambda: TinyGPT(kv_heads=2)}[kind]()
    if kind != "own":
        cp.attach(model)
    counter = CompileCounterWithBackend(backend)
    if backend is not None:
        for block in model.model.layers if kind == "llama" else model.blocks:
            block.compile(backend=counter)
    for _ in range(2):
        model.zero_grad()
        shard = cp.shard(make_batch("packed")[0])
        loss = cp.loss(model(shard) if kind == "own" else model(**shard.inputs), shard)
        loss.backward()
        cp.sum_gradients(model)
    return loss.item(), gradients(model), counter.frame_count


def same(actual, expected):
    assert actual[0] == pytest.approx(expected[0], abs=1e-6)
    for name, gradient in expected[1].items():
        assert (actual[1][name] - gradient).abs().max() <= 1e-5 * gradient.abs().max(), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["own", "llama"])
def test_a_block_has_one_graph_break(kind, backend):
    """Two graphs, the parts before and after attention, which all layers share.

    Attention lies in functions that the block calls. Torch resumes there, and not once in each of them, if
    nested_graph_breaks is set. Before torch 2.12 the number of the first layer, an attribute of our block,
    counts as a constant: its first part has a graph of its own, which no further layer needs.
    """
    constant = kind == "own" and torch.__version__ < (2, 12)
    expected = step(None, kind)
    with torch._dynamo.config.patch(nested_graph_breaks=True):
        actual = step(None, kind, backend)
    same(actual, expected)
    assert actual[2] == (3 if constant else 2)
    assert all("sparse attention over ranks" in reason for reason in counters["graph_break"])


@pytest.mark.parametrize("kind", ["own", "llama"])
def test_nothing_but_attention_breaks_a_graph_by_default(kind):
    same(step(None, kind, "eager"), step(None, kind))
    assert counters["graph_break"]
    assert all("sparse attention over ranks" in reason for reason in counters["graph_break"])


def ranks_step(kind, backend):
    """One rank of two."""
    return step(job.mesh_of((1, 2)), kind, backend)


@pytest.mark.parametrize("kind", ["own", "llama"])
def test_two_ranks(kind):
    expected = step(None, kind)
    for actual in job.pool.run(2, ranks_step, kind, "aot_eager"):
        same(actual, expected)


def test_modules_whose_attention_is_intercepted_run_as_they_are():
    """They are not compiled: one graph break, no graph."""
    actual = step(None, "plain", "eager")
    same(actual, step(None, "plain"))
    assert actual[2] == 0
