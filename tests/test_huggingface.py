"""transformers models under context parallelism, against the same model on its own."""

from __future__ import annotations

import copy
import gc
import re

import machine
import pytest
import tiny_models
import torch
import torch.distributed as dist
import transformers
from tiny_models import BLOCK, VOCAB, assert_same_step, llama, make_batch, qwen2, reference, sharded
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from sparring.cp import ContextParallel, run_threads
from sparring.kernels.patterns import Dense, SinkWindow, VerticalSlash

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")

MODELS = {"llama": llama, "qwen2": qwen2}
SPARSE = {
    "sink-window": SinkWindow(sink=5, window=20),
    "vertical-slash": VerticalSlash(top_p=0.6, columns=(3, 12), slashes=(1, 4), probe=8, sink=2, window=0),
}


def single(model, pattern="dense", whole_logits=False, **options):
    """The model attached in one process, and its ContextParallel."""
    cp = ContextParallel(None, pattern=pattern, block_size=BLOCK, **{"grad_reduce": "sum"} | options)
    return cp.attach(model, whole_logits=whole_logits), cp


def checkpointed(reentrant):
    """Switches activation checkpointing of a model on."""
    if reentrant is None:
        return lambda model: None
    return lambda model: model.gradient_checkpointing_enable(
        gradient_checkpointing_kwargs={"use_reentrant": reentrant}
    )


@pytest.mark.parametrize("name", ["packed", "padded", "few labels"])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("world", [1, 2, 4])
def test_dense_equals_the_original_model(world, model, name):
    batch, documents = make_batch(name)
    model = MODELS[model]()
    expected = reference(copy.deepcopy(model), batch, documents)
    layout = "contiguous" if name == "few labels" else "auto"
    results = sharded(model, batch, world, Dense(), layout=layout, whole_logits=name == "padded")
    assert_same_step(results, expected)
    if name == "few labels" and world > 1:
        assert 0 in [result["labels"] for result in results]
    if name == "padded":
        for result in results:
            for row, start, end in documents:
                difference = (result["output"] - expected["output"])[row, start:end]
                assert difference.abs().max() <= 1e-5


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("pattern", SPARSE)
@pytest.mark.parametrize("world", [2, 4])
def test_sparse_equals_one_process(world, pattern, model):
    batch, _ = make_batch("packed")
    model = MODELS[model]()
    [expected] = sharded(model, batch, 1, SPARSE[pattern])
    results = sharded(
        model, batch, world, SPARSE[pattern], plans=expected["plans"], prepare=checkpointed(False)
    )
    assert_same_step(results, expected)


@pytest.mark.parametrize("reentrant", [None, True, False])
@pytest.mark.parametrize("world", [1, 2])
def test_two_micro_batches_in_flight(world, reentrant):
    """shard(n+1) and its forward before backward(n), which runs last; equal counts when computed again."""
    batches = [make_batch("packed")[0], make_batch("whole", 90)[0]]
    model, pattern = llama(), SPARSE["vertical-slash"]
    replicas = [copy.deepcopy(model) for _ in range(world)]

    def body(transport):
        own = replicas[transport.rank]
        cp = ContextParallel(transport, pattern=pattern, layout="zigzag", block_size=BLOCK, grad_reduce="sum")
        cp.attach(own)
        checkpointed(reentrant)(own)
        shards, losses = [], []
        for batch in batches:
            shards.append(cp.shard(batch))
            losses.append(cp.loss(own(**shards[-1].inputs), shards[-1]))
        records = [shard.record for shard in shards]
        del shards
        gc.collect()  # the graph keeps them
        losses[1].backward()
        losses[0].backward()
        cp.sum_gradients(own)
        return tiny_models.gradients(own), [record.covered for record in records]

    for grads, covered in run_threads(world, body, timeout=60):
        if world == 1:
            parts = [sharded(model, batch, 1, pattern)[0]["grads"] for batch in batches]
            for name in grads:
                whole = parts[0][name] + parts[1][name]
                assert (grads[name] - whole).abs().max() <= 1e-5 * whole.abs().max(), name
        for shard in covered:
            assert sorted(shard) == [0, 1]
            for runs in shard.values():
                assert len(runs) == (1 if reentrant is None else 2)
                assert len({int(n) for n in runs}) == 1 and int(runs[0]) > 0


@pytest.mark.parametrize("pattern", ["dense", "sink-window"])
def test_outputs_do_not_depend_on_later_tokens(pattern):
    pattern = Dense() if pattern == "dense" else SPARSE[pattern]
    batch, documents = make_batch("packed")
    before = sharded(llama(), batch, 2, pattern)[0]["output"]
    row, start, end = documents[1]
    cut = start + 50
    changed = {name: x.clone() for name, x in batch.items()}
    changed["input_ids"][row, cut:end] = (changed["input_ids"][row, cut:end] + 1) % VOCAB
    after = sharded(llama(), changed, 2, pattern)[0]["output"]
    differs = (before != after).any(-1)
    assert differs[row, cut:end].all()
    differs[row, cut:end] = False
    assert not differs.any()


def test_attached_models_return_hidden_states_and_the_loss_applies_their_head():
    batch, documents = make_batch("padded")
    model, cp = single(llama())
    shard = cp.shard(batch)
    output = model(**shard.inputs)
    assert output.logits.shape == (2, shard.local_length, model.config.hidden_size)
    model, cp = single(llama(), whole_logits=True)
    shard = cp.shard(batch)
    whole = model(**shard.inputs)
    assert whole.logits.shape == (2, shard.local_length, VOCAB)
    assert torch.equal(model.lm_head(output.logits), whole.logits)


def test_a_head_with_a_bias():
    batch, documents = make_batch("packed")
    model = llama()
    model.lm_head = nn.Linear(32, VOCAB)
    expected = reference(copy.deepcopy(model), batch, documents)
    assert_same_step(sharded(model, batch, 2, Dense()), expected)


@pytest.mark.parametrize("whole_logits", [True, False])
def test_detach_gives_the_original_model_back(whole_logits):
    ids = make_batch("whole")[0]["input_ids"]
    model = llama()
    expected = model(ids, labels=ids)
    before = {name: sorted(module.__dict__) for name, module in model.named_modules()}
    _, cp = single(model, whole_logits=whole_logits)
    assert model.config._attn_implementation == "sparring" and model.config.use_cache is False
    cp.detach(model)
    after = model(ids, labels=ids)
    assert torch.equal(after.logits, expected.logits) and torch.equal(after.loss, expected.loss)
    assert model.config._attn_implementation == "sdpa" and model.config.use_cache is True
    assert {name: sorted(module.__dict__) for name, module in model.named_modules()} == before


def test_compiled_models():
    batch, documents = make_batch("packed")
    expected = reference(llama(num_hidden_layers=1), batch, documents)
    model, cp = single(llama(num_hidden_layers=1))
    model.compile(backend="eager")
    shard = cp.shard(batch)
    loss = cp.loss(model(**shard.inputs), shard)
    loss.backward()
    assert_same_step([{"loss": loss.item(), "grads": tiny_models.gradients(model)}], expected)


@machine.needs("gpu")
@pytest.mark.parametrize("reentrant", [None, True, False])
def test_on_a_gpu_without_host_sync(reentrant):
    """Computed again in autograd's own thread; two micro-batches in flight."""
    batch, documents = make_batch("packed", 400)
    expected = reference(llama(), batch, documents)
    cp = ContextParallel(None, pattern="dense", grad_reduce="sum")
    model = cp.attach(llama().cuda())
    checkpointed(reentrant)(model)
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
            assert len(runs) == (1 if reentrant is None else 2) and len({int(n) for n in runs}) == 1


# -- FSDP2 and DDP ---------------------------------------------------------------------------------


@pytest.fixture
def one_process_group(tmp_path):
    """A gloo group of this process alone, and its mesh."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,), mesh_dim_names=("cp",))
    dist.destroy_process_group()


WRAPS = {
    "layers and root": lambda model, **to: fully_shard(model, **to),
    "root resharded": lambda model, **to: fully_shard(model, reshard_after_forward=True, **to),
    "head alone": lambda model, **to: [fully_shard(x, **to) for x in (model.lm_head, model)][1],
    "DDP": lambda model, mesh: nn.parallel.DistributedDataParallel(model),
}


@pytest.mark.parametrize("in_flight", [1, 2])
@pytest.mark.parametrize(
    ("model", "wrap"),  # a tied head, as of qwen2, cannot be sharded alone
    [("llama", wrap) for wrap in WRAPS] + [("qwen2", wrap) for wrap in WRAPS if wrap != "head alone"],
)
def test_wrapped_after_attach(one_process_group, model, wrap, in_flight):
    """The head's weight is used after the forward, and again before the rest of the backward."""
    batch, documents = make_batch("packed")
    expected = reference(MODELS[model](), batch, documents)
    model, cp = single(MODELS[model](), grad_reduce="mean")
    checkpointed(False)(model)
    if wrap != "DDP":
        for layer in model.model.layers:
            fully_shard(layer, mesh=one_process_group)
    runner = WRAPS[wrap](model, mesh=one_process_group)
    for _ in range(2):
        model.zero_grad()
        shards = [cp.shard(batch) for _ in range(in_flight)]
        total = in_flight * shards[0].tokens
        losses = [cp.loss(runner(**shard.inputs), shard, tokens=total) for shard in shards]
        for loss in losses:
            loss.backward()
    grads = {n: p.grad if wrap == "DDP" else p.grad.full_tensor() for n, p in model.named_parameters()}
    assert_same_step([{"loss": sum(losses).item(), "grads": grads}], expected)


def test_mixed_precision_under_fsdp(one_process_group):
    batch, documents = make_batch("packed")
    expected = reference(llama(), batch, documents)
    model, cp = single(llama(), grad_reduce="mean")
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.float32)
    fully_shard(model, mesh=one_process_group, mp_policy=policy)
    shard = cp.shard(batch)
    output = model(**shard.inputs)
    assert output.logits.dtype == torch.float32 and list(shard.record.covered) == [0, 1]
    loss = cp.loss(output, shard)
    loss.backward()
    assert loss.item() == pytest.approx(expected["loss"], rel=1e-2)
    grads = {n: p.grad.full_tensor() for n, p in model.named_parameters()}
    for name, gradient in expected["grads"].items():
        assert (grads[name] - gradient).abs().max() <= 5e-2 * gradient.abs().max(), name


def test_a_head_that_stays_sharded_is_refused(one_process_group):
    model, cp = single(llama())
    shard = cp.shard(make_batch("packed")[0])
    output = model(**shard.inputs)
    sharded = distribute_tensor(model.lm_head.weight.detach(), one_process_group, [Shard(0)])
    model.lm_head.weight = nn.Parameter(sharded)
    with pytest.raises(ValueError, match="is sharded where the loss needs it.*whole_logits=True"):
        cp.loss(output, shard)


# -- refusals --------------------------------------------------------------------------------------


def test_wrong_orders_are_refused(one_process_group):
    with pytest.raises(ValueError, match="already attached"):
        single(single(llama())[0])
    with pytest.raises(ValueError, match="DDP already; attach the bare model first"):
        single(nn.parallel.DistributedDataParallel(llama()))
    with pytest.raises(ValueError, match="is a DTensor.*attach the bare model first"):
        single(fully_shard(llama(), mesh=one_process_group))
    with pytest.raises(ValueError, match="torch.compile already"):
        single(torch.compile(llama()))
    model = llama()
    checkpointed(False)(model)
    with pytest.raises(ValueError, match="gradient checkpointing is enabled already; attach the bare"):
        single(model)
    model = llama()
    twin = type(model)(model.config)
    single(model)
    with pytest.raises(ValueError, match="shares its config"):
        single(twin)
    with pytest.raises(NotImplementedError, match="copied"):
        copy.deepcopy(model)


def bert():
    sizes = dict(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    return transformers.BertForMaskedLM(transformers.BertConfig(**sizes))


def small(name, **options):
    """A model by the name of its class."""
    sizes = dict(vocab_size=8, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, head_dim=4)
    sizes |= dict(num_key_value_heads=1, intermediate_size=8, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    config = getattr(transformers, name.replace("ForCausalLM", "Config"))
    return getattr(transformers, name)(config(**sizes | options))


def t5():
    sizes = dict(vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes))


UNSUPPORTED = {
    "layers of type sliding_attention": lambda: qwen2(
        layer_types=["full_attention", "sliding_attention"], use_sliding_window=True, sliding_window=8
    ),
    "a sliding window of 16": lambda: small("MistralForCausalLM", sliding_window=16),
    "layers of type linear_attention": lambda: small(
        "Qwen3NextForCausalLM",
        layer_types=["full_attention", "linear_attention"],
        num_experts=2,
        moe_intermediate_size=4,
        shared_expert_intermediate_size=4,
    ),
    "recurrent": lambda: small("MambaForCausalLM", state_size=4),
    "attention that does not go through AttentionInterface": lambda: small("BloomForCausalLM"),
    "attn_logit_softcapping = 50.0": lambda: small("Gemma2ForCausalLM", layer_types=["full_attention"] * 2),
    "attention_dropout = 0.1": lambda: llama(attention_dropout=0.1),
    "output_attentions = True": lambda: llama(output_attentions=True, attn_implementation="eager"),
    "output_router_logits = True": lambda: small(
        "MixtralForCausalLM", num_local_experts=2, output_router_logits=True
    ),
    "an encoder and a decoder": t5,
    "bidirectional": bert,
    "no language-model head": lambda: llama().model,
}


@pytest.mark.parametrize("what", UNSUPPORTED)
def test_unsupported_models_are_refused_by_name(what):
    model = UNSUPPORTED[what]()
    with pytest.raises(NotImplementedError, match=re.escape(what)):
        single(model)
    assert "sparring" not in str(model.config._attn_implementation)


@pytest.mark.parametrize(
    ("what", "name", "options"),
    [
        ("final_logit_softcapping", "Gemma2ForCausalLM", {"attn_logit_softcapping": None}),
        ("logit_scale", "CohereForCausalLM", {}),
        ("logits_scaling", "GraniteForCausalLM", {"logits_scaling": 2.0}),
    ],
)
def test_rules_after_the_head_need_whole_logits(what, name, options):
    options = {"layer_types": ["full_attention"] * 2} | options if name.startswith("Gemma") else options
    with pytest.raises(NotImplementedError, match=f"{what}.*whole_logits=True"):
        single(small(name, **options))
    single(small(name, **options), whole_logits=True)


def test_logits_that_change_after_the_head_are_noticed():
    class Scaled(type(llama())):
        def forward(self, **inputs):
            output = super().forward(**inputs)
            output.logits = output.logits * 2
            return output

    model = llama()
    model.__class__ = Scaled
    single(model)
    shard = model._sparring.cp.shard(make_batch("whole")[0])
    with pytest.raises(NotImplementedError, match="changes logits after its output embedding.*whole_logits"):
        model(**shard.inputs)


CALLS = {
    "labels": (ValueError, "labels must not be passed", lambda s: {"labels": s.labels}),
    "attention_mask": (
        ValueError,
        "attention_mask must not be passed",
        lambda s: {"attention_mask": torch.ones_like(s.labels)},
    ),
    "position_ids": (ValueError, "position_ids are missing", lambda s: {"position_ids": None}),
    "shard": (ValueError, "called without a shard; call model", lambda s: {"sparring_shard": None}),
    "use_cache": (NotImplementedError, "use_cache", lambda s: {"use_cache": True}),
    "past_key_values": (
        NotImplementedError,
        "past_key_values",
        lambda s: {"past_key_values": transformers.DynamicCache()},
    ),
    "output_attentions": (
        NotImplementedError,
        "output_attentions",
        lambda s: {"output_attentions": True},
    ),
    "is_causal": (NotImplementedError, "bidirectional LlamaAttention 0", lambda s: {"is_causal": False}),
    "cu_seq_lens_q": (
        NotImplementedError,
        "cu_seq_lens_q in LlamaAttention 0",
        lambda s: {"cu_seq_lens_q": torch.tensor([0, 4])},
    ),
    "unknown": (NotImplementedError, "unknown = 3 in LlamaAttention 0", lambda s: {"unknown": 3}),
    "longer": (
        ValueError,
        "q has 128 tokens, this rank holds 112",
        lambda s: {
            "input_ids": torch.zeros(2, 128, dtype=torch.int64),
            "position_ids": torch.arange(128)[None],
        },
    ),
}


@pytest.mark.parametrize("what", CALLS)
def test_wrong_calls_are_refused(what):
    error, message, change = CALLS[what]
    model, cp = single(llama())
    shard = cp.shard(make_batch("whole")[0])
    with pytest.raises(error, match=message):
        model(**shard.inputs | change(shard))


def test_calls_past_the_checks_of_the_model_are_refused():
    """The inner model, and the attention function itself."""
    model, cp = single(llama())
    shard = cp.shard(make_batch("whole")[0])
    with pytest.raises(ValueError, match="no shard reached LlamaAttention"):
        model.model(shard.inputs["input_ids"])
    with pytest.raises(ValueError, match="attention_mask must not be passed"):
        model.model(**shard.inputs, attention_mask=torch.ones_like(shard.labels))
    with pytest.raises(ValueError, match="called without a shard.*to generate"):
        model.generate(shard.inputs["input_ids"][:, :4], max_new_tokens=1)
    other, its_cp = single(llama())
    with pytest.raises(ValueError, match="another ContextParallel"):
        model(**its_cp.shard(make_batch("whole")[0]).inputs)
    module = model.model.layers[0].self_attn
    with pytest.raises(ValueError, match="another ContextParallel"):
        call(other.model.layers[0].self_attn, shard)
    with pytest.raises(NotImplementedError, match="two attention modules of one layer, 0"):
        call(module, shard)
        twin = model.model.layers[1].self_attn
        twin.layer_idx = 0
        call(twin, shard)


def call(module, shard, **options):
    attention = transformers.AttentionInterface()["sparring"]
    keys = options.pop("keys", 112)
    q, k = torch.zeros(2, 4, 112, 8), torch.zeros(2, 2, keys, 8)
    return attention(module, q, k, k, None, scaling=0.3, sparring_shard=shard, **options)


@pytest.mark.parametrize(
    "option",
    [{"dropout": 0.1}, {"sliding_window": 8}, {"softcap": 2.0}, {"s_aux": torch.ones(4)}, {"keys": 224}],
    ids=lambda option: next(iter(option)),
)
def test_attention_arguments_are_refused_by_name(option):
    model, cp = single(llama())
    shard = cp.shard(make_batch("whole")[0])
    name = "112 queries and 224 keys" if "keys" in option else next(iter(option))
    with pytest.raises(NotImplementedError, match=f"{name}.* in LlamaAttention 0"):
        call(model.model.layers[0].self_attn, shard, **option)


def test_mask_functions_of_a_model_are_refused():
    single(llama())
    mask = transformers.AttentionMaskInterface()["sparring"]
    assert mask(batch_size=1, kv_length=8) is None
    with pytest.raises(NotImplementedError, match="mask function of its own"):
        mask(batch_size=1, kv_length=8, use_vmap=True)


def test_another_attention_after_attach_is_noticed():
    model, cp = single(llama())
    shard = cp.shard(make_batch("whole")[0])
    model.set_attn_implementation("sdpa")
    with pytest.raises(RuntimeError, match="became 'sdpa' after attach"):
        model(**shard.inputs)
