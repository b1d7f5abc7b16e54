"""Plain modules under context parallelism: a nanoGPT-like model, checkpointed or not, against itself."""

from __future__ import annotations

import copy
import gc
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import machine
import pytest
import tiny_models
import torch
from tiny_models import BLOCK, VOCAB, TinyGPT, assert_same_step, make_batch, reference, sharded
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn import functional as F
from torch.utils.checkpoint import CheckpointError, checkpoint

from sparring.cp import ContextParallel, run_threads
from sparring.kernels.patterns import Dense, SinkWindow, VerticalSlash

SPARSE = {
    "sink-window": SinkWindow(sink=5, window=20),
    "vertical-slash": VerticalSlash(top_p=0.6, columns=(3, 12), slashes=(1, 4), probe=8, sink=2, window=0),
}
# Checkpoints in checkpoints; TorchScript, of which one test makes a module.
pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs", "ignore:.*torch.jit:DeprecationWarning")
CHECKPOINTING = [None, "reentrant", "non-reentrant"]


def single(model, pattern="dense", **options):
    """The model attached in one process, and its ContextParallel."""
    cp = ContextParallel(None, pattern=pattern, block_size=BLOCK, grad_reduce="sum", **options)
    return cp.attach(model), cp


@pytest.mark.parametrize(
    ("name", "checkpointing"),
    [("packed", how) for how in CHECKPOINTING] + [("padded", None), ("few labels", None)],
)
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
        cp = ContextParallel(transport, pattern=pattern, layout="zigzag", block_size=BLOCK, grad_reduce="sum")
        cp.attach(own)
        shards, losses = [], []
        for batch in batches:
            shards.append(cp.shard(batch))
            losses.append(cp.loss(own(**shards[-1].inputs), shards[-1]))
        records = [shard.record for shard in shards]
        plans = [cp.plans(shard) for shard in shards]
        del shards
        gc.collect()  # the graph keeps them
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
    ids, positions = batch["input_ids"], torch.arange(110).expand(2, -1)
    model = TinyGPT()
    expected = model(ids, positions)
    names = [sorted(module.__dict__) for module in model.modules()]
    _, cp = single(model)
    with pytest.raises(ValueError, match="without a shard"):
        model(ids, positions)
    cp.detach(model)
    assert torch.equal(model(ids, positions), expected)
    assert [sorted(module.__dict__) for module in model.modules()] == names


def test_a_parameter_without_a_gradient_on_one_rank_counts_as_zero():
    """All ranks take part in its sum all the same."""

    def body(transport):
        cp = ContextParallel(transport, block_size=BLOCK, grad_reduce="sum")
        model = nn.Linear(3, 2)
        model.bias.requires_grad_(False)
        if transport.rank == 1:
            model.weight.grad = torch.full((2, 3), 5.0)
        cp.sum_gradients(model)
        return model.weight.grad, model.bias.grad

    for weight, bias in run_threads(3, body, timeout=5):
        assert torch.equal(weight, torch.full((2, 3), 5.0)) and bias is None


# -- what checkpointing can do to the calls --------------------------------------------------------


class Core(nn.Module):
    """A module with one call of `attention(q, k, v)`, by default the supported one."""

    def __init__(self, attention=None):
        super().__init__()
        self.linear = nn.Linear(8, 24)
        self.attention = attention or causal

    def forward(self, x, *unused):
        q, k, v = self.linear(x)[:, None].chunk(3, -1)
        return x + self.attention(q, k, v)[:, 0]


def causal(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class Stack(nn.Module):
    """Two cores; run(stack, core, x) calls one."""

    def __init__(self, run=None, attention=None):
        super().__init__()
        torch.manual_seed(0)
        self.cores = nn.ModuleList(Core(attention) for _ in range(2))
        self.norm = nn.LayerNorm(8)
        self.table = nn.Parameter(torch.ones(1))
        self.run = run or (lambda stack, core, x: core(x))

    def forward(self, inputs_embeds, position_ids=None):
        for core in self.cores:
            inputs_embeds = self.run(self, core, inputs_embeds)
        return inputs_embeds


def embeds(length):
    return {"inputs_embeds": torch.randn(1, length, 8, generator=torch.Generator().manual_seed(length))}


def in_flight(run=None, attention=None):
    """Two forwards, then their backwards in the same order; the model and what each shard covered."""
    model, cp = single(Stack(run, attention))
    shards = [cp.shard(embeds(length)) for length in (64, 96)]
    for shard in shards:
        shard.inputs["inputs_embeds"].requires_grad_()  # reentrant checkpoints need it
    outputs = [model(**shard.inputs) for shard in shards]
    for output in outputs:
        output.square().sum().backward()
    return model, [[list(map(int, x)) for x in s.record.covered.values()] for s in shards]


RUNS = {
    "a module": lambda call, stack, core, x: call(core, x),
    "a function of modules": lambda call, stack, core, x: call(lambda y: core(stack.norm(y)), x),
    "with a tensor of all shards": lambda call, stack, core, x: call(core, x, stack.table),
    "on a view": lambda call, stack, core, x: call(core, x.transpose(0, 1).transpose(0, 1)[:, :]),
    "nested": lambda call, stack, core, x: call(lambda y: call(core, stack.norm(y)), x),
}


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("what", RUNS)
def test_recomputation_finds_its_shard(what, reentrant):
    plain, expected = in_flight(partial(RUNS[what], lambda function, *args: function(*args)))
    model, covered = in_flight(partial(RUNS[what], partial(checkpoint, use_reentrant=reentrant)))
    for once, again in zip(expected, covered, strict=True):
        assert [set(runs) for runs in again] == [set(runs) for runs in once]
        assert all(len(runs) >= 2 for runs in again)
    for parameter, same in zip(model.parameters(), plain.parameters(), strict=True):
        assert (parameter.grad is None) == (same.grad is None)
        if same.grad is not None:  # reentrant checkpoints add gradients up in another order
            assert (parameter.grad - same.grad).abs().max() <= 1e-6 * same.grad.abs().max()


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_in_another_thread(reentrant):
    """As the backward of CUDA tensors is."""
    batch, documents = make_batch("packed")
    expected = reference(TinyGPT(), batch, documents)
    model, cp = single(TinyGPT(checkpointing="reentrant" if reentrant else "non-reentrant"))
    shard = cp.shard(batch)
    loss = cp.loss(model(**shard.inputs), shard)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(loss.backward).result()
    assert_same_step([{"loss": loss.item(), "grads": tiny_models.gradients(model)}], expected)
    assert [len(runs) for runs in shard.record.covered.values()] == [2, 2]


@machine.needs("gpu")
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_on_a_gpu(checkpointing):
    """Two shards in flight, computed again in autograd's own thread, without host sync."""
    batch, documents = make_batch("packed", 400)
    expected = reference(TinyGPT(kv_heads=2), batch, documents)
    cp = ContextParallel(None, pattern="dense", grad_reduce="sum")
    model = cp.attach(TinyGPT(kv_heads=2, checkpointing=checkpointing).cuda())
    batch = {name: x.cuda() for name, x in batch.items()}
    for mode in ("default", "error"):  # kernels are compiled in the first step
        model.zero_grad()
        shards = [cp.shard(batch) for _ in range(2)]
        total = shards[0].tokens * 2
        torch.cuda.set_sync_debug_mode(mode)
        try:
            losses = [cp.loss(model(**shard.inputs), shard, tokens=total) for shard in shards]
            for loss in losses:
                loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert sum(losses).item() == pytest.approx(expected["loss"], rel=1e-4)
    for name, gradient in expected["grads"].items():
        error = (dict(model.named_parameters())[name].grad.cpu() - gradient).abs().max()
        assert error <= 1e-3 * gradient.abs().max(), name
    for shard in shards:
        for runs in shard.record.covered.values():
            assert len(runs) == (1 if checkpointing is None else 2) and len({int(n) for n in runs}) == 1


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_shards_are_freed_after_their_backward(checkpointing):
    batch, _ = make_batch("whole", 90)
    model, cp = single(TinyGPT(checkpointing=checkpointing))
    shards = []
    for _ in range(3):
        shard = cp.shard(batch)
        cp.loss(model(**shard.inputs), shard).backward()
        shards.append(weakref.ref(shard))
    del shard
    gc.collect()
    assert [ref() is None for ref in shards[:2]] == [True, True]


def test_checkpoint_around_the_bare_function_reentrant():
    with pytest.raises(NotImplementedError, match="cores.0.*reentrant checkpoint.*whole modules"):
        in_flight(attention=lambda *qkv: checkpoint(causal, *qkv, use_reentrant=True))


def test_checkpoint_around_the_bare_function_non_reentrant():
    with pytest.raises(CheckpointError):
        in_flight(attention=lambda *qkv: checkpoint(causal, *qkv, use_reentrant=False))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint_around_a_module_with_unknown_arguments(reentrant):
    with pytest.raises(NotImplementedError, match="cores.1.*recomputed.*whole modules"):
        in_flight(lambda _, core, x: checkpoint(lambda y: core(2 * y), x, use_reentrant=reentrant))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint_of_one_tensor_for_two_shards(reentrant):
    model, cp = single(Stack(lambda _, core, x: checkpoint(core, x, use_reentrant=reentrant)))
    shards = [cp.shard(embeds(64)) for _ in range(2)]
    x = shards[0].inputs["inputs_embeds"].requires_grad_()
    outputs = [model(x, s.inputs["position_ids"], sparring_shard=s) for s in shards]
    with pytest.raises(NotImplementedError, match="cores.0.*recomputed"):
        outputs[0].sum().backward()


# -- refusals --------------------------------------------------------------------------------------

REFUSED = {
    "attn_mask": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, torch.ones(64, 64).tril().bool()),
        NotImplementedError,
    ),
    "dropout_p = 0.1": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=0.1, is_causal=True),
        NotImplementedError,
    ),
    "is_causal = False": (F.scaled_dot_product_attention, NotImplementedError),
    "3-D queries": (lambda q, k, v: causal(q[:, 0], k[:, 0], v[:, 0])[None], NotImplementedError),
    "32 queries and 64 keys": (lambda q, k, v: causal(q[:, :, :32], k, v), NotImplementedError),
    "2 query heads and 1 key heads": (
        lambda q, k, v: causal(q.expand(-1, 2, -1, -1), k, v),
        ValueError,
    ),
    "q has 32 tokens": (lambda q, k, v: causal(q[:, :, :32], k[:, :, :32], v[:, :, :32]), ValueError),
    "multi_head_attention_forward": (
        lambda q, k, v: nn.MultiheadAttention(8, 1)(q[:, 0], k[:, 0], v[:, 0])[0],
        NotImplementedError,
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_unsupported_calls_are_refused_by_name(what):
    attention, error = REFUSED[what]
    model, cp = single(Stack(attention=attention))
    with pytest.raises(error, match=what):
        model(**cp.shard(embeds(64)).inputs)


def test_shared_layers_are_refused():
    model, cp = single(Stack(lambda stack, core, x: stack.cores[0](x)))
    with pytest.raises(NotImplementedError, match="cores.0.*twice"):
        model(**cp.shard(embeds(64)).inputs)


def test_a_model_without_attention_is_refused():
    model, cp = single(Stack(lambda stack, core, x: stack.norm(x)))
    with pytest.raises(RuntimeError, match="without a call of scaled_dot_product_attention"):
        model(**cp.shard(embeds(64)).inputs)


def test_shards_that_do_not_fit_are_refused():
    model, cp = single(Stack())
    _, other = single(Stack())
    shard = cp.shard(embeds(64))
    with pytest.raises(ValueError, match="without a shard"):
        model(shard.inputs["inputs_embeds"])
    with pytest.raises(ValueError, match="another ContextParallel"):
        model(**other.shard(embeds(64)).inputs)
    with pytest.warns(UserWarning, match="position_ids"):
        model(shard.inputs["inputs_embeds"], sparring_shard=shard)


def wrap_inside(wrapper):
    model = Stack()
    model.cores[1] = wrapper(model.cores[1])
    return model


WRAPPED = {
    "torch.compile": lambda: torch.compile(Stack()),
    "torch.compile already": lambda: wrap_inside(lambda core: (core.compile(), core)[1]),
    "activation checkpointing": lambda: wrap_inside(checkpoint_wrapper),
    "DataParallel": lambda: nn.DataParallel(Stack()),
    "already attached": lambda: single(Stack())[0],
}


@pytest.mark.parametrize("what", WRAPPED)
def test_other_orders_than_attach_first_are_refused(what):
    with pytest.raises(ValueError, match=what):
        single(WRAPPED[what]())


def test_script_modules_are_refused():
    with pytest.raises(NotImplementedError, match="TorchScript"):
        single(wrap_inside(lambda core: torch.jit.trace(nn.LayerNorm(8), torch.ones(8))))


def test_attached_models_are_not_copied():
    model, cp = single(Stack())
    with pytest.raises(NotImplementedError, match="copied"):
        copy.deepcopy(model)
    with pytest.raises(ValueError, match="attach was called before"):
        cp.attach(Stack())


def test_import_needs_no_optional_package():
    code = (
        "import sys, sparring.cp; print([m for m in ('transformers', 'triton', 'ray') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
