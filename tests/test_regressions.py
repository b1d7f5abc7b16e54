"""Faults that context parallelism had elsewhere, one named test each; the docstrings cite where.

Of the same list, but tested where their subject is: see ELSEWHERE at the end, which this file checks.
"""

from __future__ import annotations

import copy
import importlib
import io

import job
import machine
import pytest
import tiny_models
import torch
from sampling import pairwise
from tiny_models import (
    BLOCK,
    IGNORE,
    TinyGPT,
    assert_same_step,
    gradients,
    llama,
    make_batch,
    parallel,
    reference,
    sharded,
)

from sparring.balance.layout import from_assignment
from sparring.cp import run_threads
from sparring.kernels.patterns import Dense, SinkWindow, VerticalSlash

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")

MODELS = {"plain": lambda: TinyGPT(kv_heads=2), "llama": llama}
SPARSE = VerticalSlash(top_p=0.6, columns=(3, 12), slashes=(1, 4), probe=8, sink=2, window=0)
LAYOUTS = ["contiguous", "zigzag", "striped", "striped(2)", "uneven"]


# -- ranks without labels, without tokens ----------------------------------------------------------


@pytest.mark.parametrize("world,layout,model", pairwise([2, 4], ["contiguous", "zigzag"], list(MODELS)))
def test_one_valid_token(world, layout, model):
    """Megatron-LM #7513: a mean over each rank's own tokens takes the only label for `world` labels."""
    batch, documents = make_batch("one label")
    model = MODELS[model]()
    expected = reference(copy.deepcopy(model), batch, documents)
    results = sharded(model, batch, world, Dense(), layout=layout)
    assert_same_step(results, expected)
    assert sorted(result["labels"] for result in results) == [0] * (world - 1) + [1]


@pytest.mark.parametrize("pattern", [Dense(), SPARSE], ids=["dense", "vertical-slash"])
@pytest.mark.parametrize("model", MODELS)
def test_a_rank_with_nothing_but_padding(model, pattern):
    """Megatron-LM #1764, #1765: it sees no key and has no label. Loss and gradients of exactly 0, not NaN."""
    batch, documents = make_batch("mostly padded")
    model = MODELS[model]()
    results = sharded(copy.deepcopy(model), batch, 4, pattern, layout="contiguous")
    for result in results[2:]:
        assert result["labels"] == 0
        for name, gradient in result["local"].items():
            assert torch.equal(gradient, torch.zeros_like(gradient)), name
    for name, gradient in results[0]["local"].items():
        assert gradient.abs().max() > 0, name
    if pattern == Dense():
        assert_same_step(results, reference(model, batch, documents))
    assert all(bool(result["output"].isfinite().all()) for result in results)


# -- layers that stay local ------------------------------------------------------------------------


def local_attention(q, k, v):
    """What a rank would compute on its own, by hand."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    hidden = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
    return (q @ k.mT * q.shape[3] ** -0.5).masked_fill(hidden, -torch.inf).softmax(-1) @ v


class ByHand(tiny_models.Attention):
    """Attention that calls no function which could lead elsewhere."""

    def forward(self, x):
        heads = self.qkv(x).unflatten(2, (-1, self.size)).transpose(1, 2)
        y = local_attention(*heads.split((self.heads, self.kv_heads, self.kv_heads), dim=1))
        return self.out(y.transpose(1, 2).flatten(2))


def test_a_transformers_layer_that_stays_local_is_noticed():
    """NeMo Automodel #3507: dense layers ran without context parallelism, and nobody noticed."""
    model = llama()
    cp = parallel(None)
    cp.attach(model)
    layer = model.model.layers[1].self_attn
    layer.forward = lambda hidden_states, **unused: (layer.o_proj(hidden_states), None)
    with pytest.raises(RuntimeError, match=r"layers \[1\] of LlamaForCausalLM ran without"):
        model(**cp.shard(make_batch("whole")[0]).inputs)


def test_a_plain_layer_that_stays_local_is_noticed_by_verify():
    """The same of a module that calls no attention function: a comparison with one process shows it."""
    right, wrong = ([copy.deepcopy(TinyGPT()) for _ in range(2)] for _ in range(2))
    for model in wrong:
        model.blocks[1].attention.__class__ = ByHand
    batch, _ = make_batch("whole")

    def errors(models):
        def body(transport):
            cp = parallel(transport)
            result = cp.verify(cp.attach(models[transport.rank]), batch)
            return result.error / result.scale

        return run_threads(2, body, timeout=60)

    assert max(errors(right)) < 1e-5
    assert min(errors(wrong)) > 1e-3


# -- labels, positions, counts ---------------------------------------------------------------------

# Over 7 blocks of 16: inside one rank, across one border, two borders, all of them; one token alone.
DOCUMENTS = [[(0, 110)], [(0, 15), (15, 17), (17, 64), (64, 65), (65, 110)], [(0, 16), (16, 96), (96, 110)]]


def layout_of(name, world):
    """For "uneven" the first rank holds all but a few of the 7 blocks, out of order."""
    if name != "uneven":
        return name
    return from_assignment([[6, 0, *range(world, 6)], *([rank] for rank in range(1, world))], BLOCK)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_labels_and_positions_at_every_border_of_shards(world, layout):
    """axolotl #3608: labels shifted after sharding lose or leak a token at every border of a shard."""
    start = 1 + 1000 * torch.arange(len(DOCUMENTS))[:, None]
    ids = start + torch.arange(110)  # a token's id tells its row and place
    batch = {"input_ids": ids, "labels": ids, "position_ids": torch.zeros_like(ids)}
    last = set()
    for row, documents in enumerate(DOCUMENTS):
        for begin, end in documents:
            batch["position_ids"][row, begin:end] = torch.arange(end - begin)
            last.add((row, end - 1))

    def body(transport):
        shard = parallel(transport, layout=layout_of(layout, world)).shard(batch)
        seen = set()
        for row, tokens in enumerate(shard.tensors["input_ids"].tolist()):
            for i, token in enumerate(tokens):
                label, place = shard.labels[row, i], (row, token - 1 - 1000 * row)
                if token == 0:
                    assert label == IGNORE
                    continue
                seen.add(place)
                assert label == (IGNORE if place in last else token + 1), place
                assert shard.tensors["position_ids"][row, i] == batch["position_ids"][place], place
        return seen

    held = run_threads(world, body, timeout=60)
    assert sum(map(len, held)) == len(set().union(*held)) == ids.numel()


@pytest.mark.parametrize("world", [1, 2])
def test_the_scale_of_the_model_is_honoured(world):
    """Peers drop the `scaling` of a transformers attention; Granite's is not 1 / sqrt(D)."""
    from transformers import GraniteConfig, GraniteForCausalLM

    batch, documents = make_batch("packed")
    model = tiny_models.build(GraniteForCausalLM, GraniteConfig, attention_multiplier=1.5)
    expected = reference(copy.deepcopy(model), batch, documents)
    assert_same_step(sharded(model, batch, world, Dense(), whole_logits=True), expected)


def tokens_of_step(sizes, wrapper):
    this = job.Job(sizes, wrapper, "plain")
    shard = this.cp.shard(this.part(make_batch("packed")[0]))
    loss = this.cp.loss(this.call(**shard.inputs), shard)
    return shard.tokens, int((shard.labels != IGNORE).sum()), loss.item()


@pytest.mark.parametrize("sizes", [(1, 2), (2, 2)], ids=str)
def test_metrics_count_every_token_once(sizes):
    """torchtitan #2990: tokens were counted once for each rank of the context-parallel group."""
    batch, documents = make_batch("packed")
    count = sum(end - start - 1 for _, start, end in documents)
    tokens, held, losses = zip(*job.run(sizes, tokens_of_step, "sum_gradients"), strict=True)
    assert set(tokens) == {count} and sum(held) == count
    assert len(set(losses)) == 1
    assert losses[0] == pytest.approx(reference(TinyGPT(kv_heads=2), batch, documents)["loss"], abs=1e-6)


@pytest.mark.parametrize(
    "world,model,mode", pairwise([1, 2], list(MODELS), [torch.no_grad, torch.inference_mode])
)
def test_evaluation_takes_the_same_path(world, model, mode):
    """torchtitan #3257: validation ran without context parallelism. Same loss, same layers, same report."""
    batch, documents = make_batch("padded")
    model = MODELS[model]().eval()
    expected = reference(copy.deepcopy(model), batch, documents)["loss"]
    replicas = [copy.deepcopy(model) for _ in range(world)]

    def body(transport):
        cp = parallel(transport)
        own = cp.attach(replicas[transport.rank])
        with mode():
            shard = cp.shard(batch)
            loss = cp.loss(own(**shard.inputs), shard)
        assert loss.item() == pytest.approx(expected, abs=1e-6) and not loss.requires_grad
        assert len(shard.record.covered) == 2 and cp.report().density == 1.0
        own.train()
        shard = cp.shard(batch)
        assert torch.equal(cp.loss(own(**shard.inputs), shard).detach(), loss)

    run_threads(world, body, timeout=60)


# -- other libraries -------------------------------------------------------------------------------


def with_adapters(model):
    """LoRA on two kinds of layers, with adapters that are not 0 at the start."""
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = LoraConfig(
            r=2,
            target_modules=["q_proj", "v_proj", "down_proj"],
            init_lora_weights=False,
            task_type="CAUSAL_LM",
        )
        return get_peft_model(model, config)


ORDERS = {  # (ContextParallel, bare model) -> model with adapters, attached
    "attach, then adapters": lambda cp, model: with_adapters(cp.attach(model)),
    "adapters, then attach": lambda cp, model: attach_base(cp, with_adapters(model)),
    "adapters, then attach, checkpointed": lambda cp, model: checkpointed(
        attach_base(cp, with_adapters(model))
    ),
}


def attach_base(cp, model):
    cp.attach(model.get_base_model())
    return model


def checkpointed(model):
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def adapter_step(order):
    """One rank of two."""
    cp = parallel(job.mesh_of((1, 2)))
    model = ORDERS[order](cp, llama())
    shard = cp.shard(make_batch("packed")[0])
    loss = cp.loss(model(**shard.inputs), shard)
    loss.backward()
    cp.sum_gradients(model)
    assert all(p.requires_grad == ("lora" in name) for name, p in model.named_parameters())
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    assert sorted(shard.record.covered) == [0, 1]
    return {"loss": loss.item(), "grads": gradients(model)}


@machine.needs("peft")
@pytest.mark.parametrize("order", ORDERS)
def test_adapters_of_peft(order):
    """Only adapters are trained, attached before or after they are made; frozen weights take no gradient."""
    results = job.pool.run(2, adapter_step, order)
    assert_same_step(results, reference(with_adapters(llama()), *make_batch("packed")))


@machine.needs("peft")
def test_the_wrapper_of_peft_is_refused_by_name():
    with pytest.raises(ValueError, match=r"PeftModelForCausalLM is a wrapper of peft.*get_base_model\(\)"):
        parallel(None).attach(with_adapters(llama()))


# -- resume ----------------------------------------------------------------------------------------


def train(transport, model, steps, state=None, keep=None, **options):
    """Losses of these steps, the final weights, and the state of everything before step `keep`."""
    cp = parallel(transport, layout="auto", **options)
    cp.attach(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    if state is not None:
        saved = torch.load(io.BytesIO(state), weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        cp.load_state_dict(saved["cp"])
    losses = []
    for step in steps:
        if step == keep:
            parts = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "cp": cp.state_dict()}
            file = io.BytesIO()
            torch.save(parts, file)
            state = file.getvalue()
        shard = cp.shard(make_batch(["packed", "whole", "padded"][step % 3])[0])
        loss = cp.loss(model(**shard.inputs), shard)
        loss.backward()
        cp.sum_gradients(model)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, model.state_dict(), state


def trained(world, steps, **options):
    models = [llama() for _ in range(world)]
    return run_threads(world, lambda t: train(t, models[t.rank], steps, **options), timeout=120)[0]


@pytest.mark.parametrize(
    "worlds", [(2, 2), (4, 1), *(pytest.param(x, marks=pytest.mark.full) for x in ((2, 4), (1, 3)))], ids=str
)
def test_training_resumes_at_any_world_size(worlds):
    """From model, optimizer and cp.state_dict: bit for bit at the same size, within 1e-5 at another."""
    same = worlds[0] == worlds[1]
    pattern = SPARSE if same else SinkWindow(sink=5, window=20)  # chosen by values only where those are equal
    whole, weights, state = trained(worlds[0], range(6), keep=3, pattern=pattern)
    losses, resumed, _ = trained(worlds[1], range(3, 6), state=state, pattern=pattern)
    assert whole[-1] < 0.99 * whole[0]
    if same:
        assert losses == whole[3:]
        assert all(torch.equal(resumed[name], x) for name, x in weights.items())
    assert max(abs(a - b) for a, b in zip(losses, whole[3:], strict=True)) <= 1e-5


# -- the rest of the list --------------------------------------------------------------------------

ELSEWHERE = {
    "labels on one rank only, under DDP, FSDP2 and sum_gradients": "test_parallel.test_ranks_without_labels",
    "gradient accumulation with unequal tokens (axolotl #4002)": "test_parallel.test_gradient_accumulation",
    "FSDP2 x CP, HSDP x CP, DDP x CP": "test_parallel.test_equals_one_process",
    "gradients that nobody summed (verl #6609)": "test_parallel.test_forgotten_sum_gradients_is_noticed",
    "gradients summed twice": "test_parallel.test_gradients_are_not_summed_twice",
    "dynamic rotary scaling": "test_rotary.test_batches_of_many_lengths_equal_the_original_model",
    "layers skipped in recomputation": "test_recomputation.test_a_layer_without_its_shard_is_refused",
    "activation checkpointing, all / one / selective": "test_recomputation.test_it_changes_no_gradient",
    "recomputation keeps a plan": "test_recomputation.test_it_uses_the_plan_of_the_forward",
    "inputs that are not contiguous": "test_tensors.test_inputs_that_are_not_contiguous",
    "stale keys": "test_tensors.test_inputs_overwritten_before_the_backward_are_noticed",
    "stale batches": "test_tensors.test_a_batch_overwritten_after_shard_changes_nothing",
    "autocast": "test_tensors.test_autocast_does_not_reach_into_attention",
    "two micro-batches in flight, transformers": "test_huggingface.test_two_micro_batches_in_flight",
    "two micro-batches in flight, plain": "test_functional.test_two_micro_batches_in_flight",
    "recomputation finds its shard": "test_functional.test_recomputation_finds_its_shard",
    "positions counted from the start of a shard": "test_trace.test_verify_tells_right_from_wrong",
    "fewer key heads than ranks (prime-rl #3042)": "test_ring.test_ring_matches_oracle",
    "values of later tokens leak": "test_ring.test_causality_of_values",
    "fewer tokens than ranks (lucidrains: 31 on 8)": "test_gloo.test_fewer_tokens_than_ranks",
    "ranks that hold different batches": "test_gloo.test_shard_proves_agreement",
    "resuming a whole run": "test_train.test_a_resumed_run_has_the_trace_of_the_uninterrupted_one",
    "200 steps, sparse": "test_trace.test_two_hundred_sparse_steps_follow_one_rank",
    "200 steps, dense": "test_trace.test_two_hundred_dense_steps_follow_the_original_model",
}


@pytest.mark.parametrize("promise", ELSEWHERE)
def test_the_rest_of_the_list_exists(promise):
    module, name = ELSEWHERE[promise].split(".")
    assert callable(getattr(importlib.import_module(module), name))
