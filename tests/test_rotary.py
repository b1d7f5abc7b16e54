"""Rotary embeddings that look at the longest position: every rank sees that of the whole batch."""

from __future__ import annotations

import copy
import re

import job
import machine
import pytest
import tiny_models
import torch
import transformers
from tiny_models import BLOCK, VOCAB, assert_same_step, gradients, llama, reference, rope

from sparring.cp import ContextParallel, run_threads
from sparring.cp.rotary import rope_types
from sparring.kernels.patterns import Dense, VerticalSlash

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")

LENGTH = 64  # beyond which frequencies change
# Grows, grows, is remembered by "dynamic", is forgotten (shorter than LENGTH), grows again.
LENGTHS = [50, 100, 120, 90, 40, 70]


def small(name, **options):
    sizes = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, head_dim=8)
    sizes |= dict(
        num_attention_heads=4, num_key_value_heads=2, bos_token_id=0, eos_token_id=0, pad_token_id=0
    )
    config = getattr(transformers, name.replace("ForCausalLM", "TextConfig" if "Gemma" in name else "Config"))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return getattr(transformers, name)(config(**sizes | options)).train()


def by_layer_type():
    """Gemma 3 has frequencies for each type of layer; these are of one type."""
    options = rope("dynamic", LENGTH)
    parameters = {"full_attention": options["rope_parameters"], "sliding_attention": {"rope_type": "default"}}
    parameters["sliding_attention"]["rope_theta"] = 1e4
    return small(
        "Gemma3ForCausalLM",
        layer_types=["full_attention"] * 2,
        max_position_embeddings=LENGTH,
        rope_parameters=parameters,
        attn_implementation="sdpa",
    )


def phi3():
    """Its sequence length is in original_max_position_embeddings of the config, too."""
    return small("Phi3ForCausalLM", original_max_position_embeddings=LENGTH, **rope("longrope", LENGTH))


MODELS = {
    "dynamic": lambda: llama(**rope("dynamic", LENGTH)),
    "longrope": lambda: llama(**rope("longrope", LENGTH)),
    "Gemma 3, dynamic": by_layer_type,
    "Phi 3, longrope": phi3,
}


def cases(worlds):
    """(world, model); of Gemma 3 and Phi 3 one world size, the others in the whole product."""
    pairs = [(world, name) for world in worlds for name in MODELS]
    often = {(world, name) for world, name in pairs if name in ("dynamic", "longrope") or world == 2}
    return [pytest.param(*pair, marks=() if pair in often else pytest.mark.full) for pair in pairs]


def make_batch(length, rows=2):
    """Two rows of one document each; the second is 10 tokens shorter."""
    ids = torch.randint(VOCAB, (rows, length), generator=torch.Generator().manual_seed(length))
    documents = [(row, 0, length - 10 * row) for row in range(rows)]
    mask = torch.zeros_like(ids)
    for row, start, end in documents:
        mask[row, start:end] = 1
    return {"input_ids": ids, "labels": ids, "attention_mask": mask}, documents


def steps_of_original(model):
    """A forward and backward for each length."""
    steps = []
    for length in LENGTHS:
        model.zero_grad()
        steps.append(reference(model, *make_batch(length)))
    return steps


def train(model, world, change=lambda shard: None, **options):
    """A forward and backward for each length; what every rank has after each."""
    replicas = [copy.deepcopy(model) for _ in range(world)]
    options = {"pattern": Dense(), "layout": "contiguous", "block_size": BLOCK} | options

    def body(transport):
        cp = ContextParallel(transport, grad_reduce="sum", **options)
        own = cp.attach(replicas[transport.rank])
        steps = []
        for length in LENGTHS:
            shard = cp.shard(make_batch(length)[0])
            change(shard)
            own.zero_grad()
            loss = cp.loss(own(**shard.inputs), shard)
            loss.backward()
            cp.sum_gradients(own)
            steps.append({"loss": loss.item(), "grads": gradients(own)})
        return steps

    return run_threads(world, body, timeout=60)


@pytest.mark.parametrize("world,name", cases([1, 2, 4]))
def test_batches_of_many_lengths_equal_the_original_model(world, name):
    """One after another, on a contiguous layout: only the last rank itself has the longest position."""
    model = MODELS[name]()
    results = train(model, world)
    for step, expected in enumerate(steps_of_original(model)):
        assert_same_step([result[step] for result in results], expected)


@pytest.mark.parametrize("world,name", cases([2]))
def test_the_longest_position_of_one_rank_would_differ(world, name):
    """The power of the test above: what a rank sees without the positions of its peers is wrong."""

    def local(shard):
        shard.last_position = shard.tensors["position_ids"].max()

    steps = train(MODELS[name](), world, local)[0]
    wrong = []
    for step, expected in zip(steps, steps_of_original(MODELS[name]()), strict=True):
        errors = [(step["grads"][n] - g).abs().max() / g.abs().max() for n, g in expected["grads"].items()]
        wrong.append(bool(max(errors) > 1e-3))
    assert wrong == [length > LENGTH for length in LENGTHS]


@pytest.mark.parametrize("reentrant", [None, True, False])
@pytest.mark.parametrize("name", ["dynamic", "longrope"])
def test_two_micro_batches_in_flight(name, reentrant):
    """A long and a short one, whose forwards both precede the backwards, recomputed or not."""
    lengths, world = [100, 50], 2
    model = MODELS[name]()
    replicas = [copy.deepcopy(model) for _ in range(world)]
    batches = [make_batch(length) for length in lengths]

    def body(transport):
        cp = ContextParallel(transport, pattern=Dense(), block_size=BLOCK, grad_reduce="sum")
        own = cp.attach(replicas[transport.rank])
        if reentrant is not None:
            own.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        shards = [cp.shard(batch) for batch, _ in batches]
        losses = [cp.loss(own(**shard.inputs), shard) for shard in shards]
        for loss in losses:
            loss.backward()
        cp.sum_gradients(own)
        return {"loss": sum(losses).item(), "grads": gradients(own)}

    steps = [reference(model, *batch) for batch in batches]  # gradients add up
    expected = {"loss": sum(step["loss"] for step in steps), "grads": steps[-1]["grads"]}
    assert_same_step(run_threads(world, body, timeout=60), expected)


@pytest.mark.parametrize("wrapper", ["FSDP2", "DDP"])
def test_under_wrappers(wrapper):
    batch, documents = tiny_models.make_batch("whole")
    expected = reference(job.MODELS["llama, dynamic"](), batch, documents)
    results = job.run((1, 2), job.train_step, wrapper, "llama, dynamic", "whole")
    assert_same_step(results, expected)


@machine.needs("gpu")
@pytest.mark.parametrize("name", MODELS)
def test_on_a_gpu(name):
    model = MODELS[name]()
    expected = steps_of_original(copy.deepcopy(model))
    cp = ContextParallel(None, pattern="dense", grad_reduce="sum")
    cp.attach(model.cuda())
    for length, step in zip(LENGTHS, expected, strict=True):
        shard = cp.shard({key: x.cuda() for key, x in make_batch(length)[0].items()})
        model.zero_grad()
        loss = cp.loss(model(**shard.inputs), shard)
        loss.backward()
        assert loss.item() == pytest.approx(step["loss"], rel=1e-4)
        for key, gradient in gradients(model).items():
            error = (gradient.cpu() - step["grads"][key]).abs().max()
            assert error <= 1e-3 * step["grads"][key].abs().max(), key


def test_frequencies_of_a_compiled_model():
    batch, documents = make_batch(100)
    expected = reference(MODELS["dynamic"](), batch, documents)
    cp = ContextParallel(None, pattern="dense", block_size=BLOCK, grad_reduce="sum")
    model = cp.attach(MODELS["dynamic"]())
    model.compile(backend="eager")
    shard = cp.shard(batch)
    loss = cp.loss(model(**shard.inputs), shard)
    loss.backward()
    assert_same_step([{"loss": loss.item(), "grads": gradients(model)}], expected)


@pytest.mark.parametrize("name", MODELS)
def test_detach_gives_the_module_back(name):
    model = MODELS[name]()
    before = {key: sorted(module.__dict__) for key, module in model.named_modules()}
    cp = ContextParallel(None, pattern=VerticalSlash(), block_size=BLOCK)
    cp.detach(cp.attach(model))
    assert {key: sorted(module.__dict__) for key, module in model.named_modules()} == before


def test_called_without_its_model_it_is_refused_by_name():
    """As by a checkpoint around it, whose recomputation does not know the batch any more."""
    cp = ContextParallel(None, pattern="dense", block_size=BLOCK)
    model = cp.attach(MODELS["dynamic"]())
    shard = cp.shard(make_batch(100)[0])
    with pytest.raises(
        NotImplementedError, match=r"LlamaRotaryEmbedding \(dynamic\) runs outside the forward"
    ):
        model.model(**shard.inputs)
    model.model.layers[0].forward = None  # a forward that fails leaves nothing behind
    with pytest.raises(TypeError):
        model(**shard.inputs)
    with pytest.raises(NotImplementedError, match="runs outside the forward"):
        model.model.rotary_emb(torch.ones(1, 4, 8), torch.arange(4)[None])


def test_what_it_returns_must_have_a_row_for_each_position():
    cp = ContextParallel(None, pattern="dense", block_size=BLOCK)
    model = MODELS["dynamic"]()
    own = model.model.rotary_emb.forward
    model.model.rotary_emb.forward = lambda x, ids: tuple(part.mT for part in own(x, ids))
    cp.attach(model)
    expected = re.escape("LlamaRotaryEmbedding returns (2, 8, 113) for 113 positions")
    with pytest.raises(NotImplementedError, match=expected):
        model(**cp.shard(make_batch(100)[0]).inputs)


def test_frequencies_of_an_unknown_module_are_refused():
    """The config asks for frequencies by length, and no module is known that makes them."""
    model = MODELS["longrope"]()
    model.model.rotary_emb.rope_type = None
    cp = ContextParallel(None, pattern="dense", block_size=BLOCK)
    with pytest.raises(
        NotImplementedError, match="longrope rotary frequencies in a module without rope_type"
    ):
        cp.attach(model)
    assert rope_types(MODELS["longrope"]().model.rotary_emb) == {"longrope"}
