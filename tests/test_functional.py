"""Plain modules under context parallelism: a nanoGPT-like model, checkpointed or not, against itself."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import tiny_models
import torch
from tiny_models import BLOCK, VOCAB, TinyGPT, assert_same_step, make_batch, reference, sharded
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import CheckpointError, checkpoint

from sparring.cp import ContextParallel, run_threads
from sparring.kernels.patterns import Dense, SinkWindow, VerticalSlash

SPARSE = {
    "sink-window": SinkWindow(sink=5, window=20),
    "vertical-slash": VerticalSlash(top_p=0.6, columns=(3, 12), slashes=(1, 4), probe=8, sink=2, window=0),
}
CHECKPOINTING = [None, "reentrant", "non-reentrant"]


def single(model, pattern="dense", **options):
    """The model attached in one process, and its ContextParallel."""
    cp = ContextParallel(None, pattern=pattern, block_size=BLOCK, grad_reduce="sum", **options)
    return cp.attach(model), cp


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("name", ["packed", "padded", "few labels"])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_dense_equals_the_original_model(world, name, checkpointing):
    batch, documents = make_batch(name)
    model = TinyGPT(kv_heads=2, checkpointing=checkpointing)
    expected = reference(copy.deepcopy(model), batch, documents)
    layout = "contiguous" if name == "few labels" else "auto"
    results = sharded(model, batch, world, Dense(), layout=layout)
    assert_same_step(results, expected)
    if name == "few labels" and world > 1:
        assert 0 in [result["labels"] for result in results]
    for result in results:
        for row, start, end in documents:
            difference = (result["output"] - expected["output"])[row, start:end]
            assert difference.abs().max() <= 1e-5


@pytest.mark.parametrize("layout", ["auto", "striped"])
@pytest.mark.parametrize("pattern", SPARSE)
@pytest.mark.parametrize("world", [2, 4])
def test_sparse_equals_one_process(world, pattern, layout):
    batch, _ = make_batch("packed")
    model = TinyGPT(kv_heads=2, checkpointing="non-reentrant")
    [expected] = sharded(model, batch, 1, SPARSE[pattern])
    assert_same_step(
        sharded(model, batch, world, SPARSE[pattern], plans=expected["plans"], layout=layout), expected
    )


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("world", [1, 2])
def test_two_micro_batches_in_flight(world, checkpointing):
    """shard(n+1) and its forward before backward(n), which runs last: each finds its own plans again."""
    batches = [make_batch("packed")[0], make_batch("whole", 90)[0]]
    model = TinyGPT(checkpointing=checkpointing)
    replicas = [copy.deepcopy(model) for _ in range(world)]
    pattern = SPARSE["vertical-slash"]

    def body(transport):
        own = replicas[transport.rank]
        cp = ContextParallel(
            transport, pattern=pattern, layout="zigzag", block_size=BLOCK, grad_reduce="sum"
        )
        cp.attach(own)
        shards, losses = [], []
        for batch in batches:
            shards.append(cp.shard(batch))
            losses.append(cp.loss(own(**shards[-1].inputs), shards[-1]))
        records = [shard.record for shard in shards]
        plans = [cp.plans(shard) for shard in shards]
        del shards  # the graph keeps them
        losses[1].backward()
        losses[0].backward()
        cp.sum_gradients(own)
        return tiny_models.gradients(own), plans, [record.covered for record in records]

    parts = [sharded(TinyGPT(), batch, 1, pattern)[0]["grads"] for batch in batches]
    for grads, plans, covered in run_threads(world, body, timeout=60):
        if world == 1:
            for name in grads:
                whole = parts[0][name] + parts[1][name]
                assert (grads[name] - whole).abs().max() <= 1e-5 * whole.abs().max(), name
        assert all(len(each) == 2 for each in plans)
        for shard in covered:
            assert sorted(shard) == [("blocks.0.attention", 0), ("blocks.1.attention", 0)]
            for runs in shard.values():
                assert len(runs) == (1 if checkpointing is None else 2)
                assert len({int(n) for n in runs}) == 1 and int(runs[0]) > 0


@pytest.mark.parametrize("pattern", ["dense", "sink-window"])
def test_outputs_do_not_depend_on_later_tokens(pattern):
    pattern = Dense() if pattern == "dense" else SPARSE[pattern]
    batch, documents = make_batch("packed")
    before = sharded(TinyGPT(), batch, 2, pattern)[0]["output"]
    row, start, end = documents[1]
    cut = start + 50
    changed = {name: x.clone() for name, x in batch.items()}
    changed["input_ids"][row, cut:end] = (changed["input_ids"][row, cut:end] + 1) % VOCAB
    after = sharded(TinyGPT(), changed, 2, pattern)[0]["output"]
    differs = (before != after).any(-1)
    assert differs[row, cut:end].all()
    differs[row, cut:end] = False
    assert not differs.any()


def test_detach_gives_the_original_model_back():
    batch, _ = make_batch("whole")
    ids, positions = batch["input_ids"], torch.arange(150).expand(2, -1)
    model = TinyGPT()
    expected = model(ids, positions)
    names = [sorted(module.__dict__) for module in model.modules()]
    _, cp = single(model)
    with pytest.raises(ValueError, match="without a shard"):
        model(ids, positions)
    cp.detach(model)
    assert torch.equal(model(ids, positions), expected)
    assert [sorted(module.__dict__) for module in model.modules()] == names


def test_evaluation_without_gradients():
    batch, documents = make_batch("padded")
    expected = reference(TinyGPT(), batch, documents)
    model, cp = single(TinyGPT().eval())
    with torch.no_grad():
        shard = cp.shard(batch)
        loss = cp.loss(model(**shard.inputs), shard)
    assert loss.item() == pytest.approx(expected["loss"], rel=1e-6)


# -- what checkpointing can do to the calls --------------------------------------------------------


class Core(nn.Module):
    """A module with one attention call, made by a function that a test gives."""

    def __init__(self, call=None):
        super().__init__()
        self.linear = nn.Linear(8, 24)
        self.call = call or attend

    def forward(self, x, *rest):
        return x + self.call(self, x, *rest)


def attend(module, x, *rest):
    q, k, v = project(module, x)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)[:, 0]


def project(module, x):
    return module.linear(x)[:, None].chunk(3, -1)


class Stack(nn.Module):
    """Two cores; run(core, x) says how each is called."""

    def __init__(self, run, call=None):
        super().__init__()
        self.cores = nn.ModuleList(Core(call) for _ in range(2))
        self.norm = nn.LayerNorm(8)
        self.table = nn.Parameter(torch.ones(1))
        self.run = run

    def forward(self, x):
        for core in self.cores:
            x = self.run(self, core, x)
        return x


def in_flight(run, call=None, count=2):
    """Forward of `count` shards, then their backwards in the same order; the shards' covered counts."""
    torch.manual_seed(0)
    model, cp = single(Stack(run, call))
    shards = [cp.shard({"inputs_embeds": torch.randn(1, 64 + 32 * n, 8)}) for n in range(count)]
    with pytest.warns(UserWarning, match="position_ids"):
        outputs = [model(s.inputs["inputs_embeds"].requires_grad_(), sparring_shard=s) for s in shards]
    for output in outputs:
        output.sum().backward()
    covered = [
        [[int(n) for n in runs] for runs in shard.record.covered.values()] for shard in shards
    ]
    return model, covered


RUNS = {
    "a module": lambda stack, core, x, **o: checkpoint(core, x, **o),
    "a function of modules": lambda stack, core, x, **o: checkpoint(lambda y: core(stack.norm(y)), x, **o),
    "a table of the model among its arguments": lambda stack, core, x, **o: checkpoint(
        core, x, stack.table, **o
    ),
    "a view of the activation": lambda stack, core, x, **o: checkpoint(core, x.view(1, -1, 8)[:, :], **o),
    "a module in a module": lambda stack, core, x, **o: checkpoint(nn.Sequential(core, nn.Identity()), x, **o),
}


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("what", RUNS)
def test_recomputation_finds_its_shard(what, reentrant):
    plain, expected = in_flight(lambda stack, core, x: core(RUNS_PLAIN.get(what, nn.Identity())(x)))
    if what == "a function of modules":
        plain, expected = in_flight(lambda stack, core, x: core(stack.norm(x)))
    model, covered = in_flight(lambda *a: RUNS[what](*a, use_reentrant=reentrant))
    for once, twice in zip(expected, covered, strict=True):
        assert twice == [runs * 2 for runs in once]
    for name, parameter in model.named_parameters():
        gradient = dict(plain.named_parameters())[name].grad
        assert gradient is None or torch.equal(parameter.grad, gradient), name
