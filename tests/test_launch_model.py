"""Models of the main job: loaded from folders, adapted, sharded; each step equals the plain model's."""

from __future__ import annotations

import copy
import json
from contextlib import contextmanager
from pathlib import Path

import machine
import numpy as np
import pool
import pytest
import tiny_models
import tolerance
import torch
import transformers
from tiny_models import BLOCK, assert_same_step, make_batch, reference
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from sparring.cp import ContextParallel
from sparring.kernels.patterns import Dense
from sparring.launch.config import TrainConfig
from sparring.launch.corpus import Corpus
from sparring.launch.data import PackedText
from sparring.launch.memory import save_memory
from sparring.launch.model import add_adapters, build_model, load_model
from sparring.launch.optimizer import build_optimizer, update
from sparring.launch.packing import pack
from sparring.launch.tokens import VOCAB_SIZE
from sparring.launch.trainee import Trainee, prepare_model
from sparring.launch.world import join_world

LENGTH = 256
FULL = pytest.mark.full
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
SIZES = {
    "vocab_size": VOCAB_SIZE + 3, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512,
    "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip


def rope(kind, **options):
    """Rotary frequencies that are scaled from half of the sequences' length."""
    return tiny_models.rope(kind, LENGTH // 2, **options)


LONG = {"short_factor": [1.0 + i / 8 for i in range(8)], "long_factor": [1.0 + i for i in range(8)]}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": LENGTH // 2}
# The class of a model and what distinguishes it.
FAMILIES = {
    "llama": ("Llama", {}),
    "llama, tied": ("Llama", {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "phi3": ("Phi3", {}),
    "gemma": ("Gemma", {}),
    "gemma3": ("Gemma3", {"layer_types": ["full_attention"] * 2}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "sliding_window": None}),
    "qwen2 moe": ("Qwen2Moe", MOE | {"shared_expert_intermediate_size": 48}),
    "qwen3 moe": ("Qwen3Moe", MOE),
    "llama, linear": ("Llama", rope("linear")),
    "llama, yarn": ("Llama", rope("yarn", original_max_position_embeddings=LENGTH // 2)),
    "llama, dynamic": ("Llama", rope("dynamic")),
    "llama, llama3": ("Llama", rope("llama3", **LLAMA3)),
    "phi3, longrope": ("Phi3", rope("longrope") | {"original_max_position_embeddings": LENGTH // 2}),
    "qwen3 moe, yarn": ("Qwen3Moe", MOE | rope("yarn", original_max_position_embeddings=LENGTH // 2)),
}


def save_tiny(folder, family, **options):
    """A random model of a family, as anyone would save it."""
    name, own = FAMILIES[family]
    own = copy.deepcopy(own) | options
    if "longrope" in family:
        own["rope_parameters"] |= LONG
    of = "TextConfig" if name == "Gemma3" else "Config"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = getattr(transformers, name + of)(**SIZES | own)
        getattr(transformers, name + "ForCausalLM")(config).save_pretrained(folder)
    return str(folder)


@contextmanager
def joined(options):
    """The configuration and the world of this rank of the pool."""
    config = TrainConfig(**{"device": "cpu", "timeout": 30.0} | options)
    with pytest.MonkeyPatch.context() as patch:
        if config.device == "cuda":
            patch.setenv("LOCAL_RANK", str(torch.cuda.current_device()))
        with join_world(config) as world:
            yield config, world


def prepared(config, world):
    """The context parallelism of a job and its model."""
    options = {} if config.device == "cuda" else {"block_size": BLOCK, "layout": "zigzag"}
    cp = ContextParallel(world.mesh, ("cp_outer", "cp_inner"), ("dp",), pattern=Dense(), **options)
    torch.manual_seed(0)
    model = prepare_model(config, world, cp, VOCAB_SIZE)
    adapt(dict(model.named_parameters()))
    return cp, model


def step(options, name):
    """Loss and gradients of one step on this rank of a job, and what it holds."""
    with joined(options) as (config, world):
        cp, model = prepared(config, world)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        rows = slice(world.dp_rank, world.dp_rank + 1) if config.dp > 1 else slice(None)
        batch = make_batch(name, LENGTH)[0]
        shard = cp.shard({key: x[rows].to(world.device) for key, x in batch.items()})
        loss = cp.loss(model(**shard.inputs), shard)
        loss.backward()
        return {
            "loss": loss.item(),
            "grads": {n: p.grad.full_tensor().cpu() for n, p in trained.items()},
            "dtypes": {(p.dtype, p.grad.dtype) for p in trained.values()},
            "frozen": {p.dtype for p in model.parameters() if not p.requires_grad},
            "held": sum(p.to_local().numel() for p in model.parameters()),
            "attention runs": [len(runs) for runs in shard.record.covered.values()],
        }


def adapt(parameters):
    """Second factors of adapters are 0 at first, and so the gradients of the others."""
    with torch.no_grad():
        for name, parameter in parameters.items():
            if "lora_B" in name:
                parameter.fill_(0.01)


def step_on_ranks(world, options, name="packed"):
    return pool.run(world, step, options, name, detail=False)


def plain(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **options).train()


def expected_step(model, name="packed"):
    return reference(model, *make_batch(name, LENGTH))


def often(cases, *names):
    """All cases; those that are not named run in the whole product alone."""
    return [pytest.param(x, marks=() if x in names else FULL) for x in cases]


@pytest.mark.parametrize("family", often(FAMILIES, "qwen2", "mixtral", "phi3, longrope"))
def test_a_saved_model_takes_the_step_of_transformers_on_two_ranks(family, tmp_path):
    folder = save_tiny(tmp_path, family)
    assert_same_step(step_on_ranks(2, {"model": folder}), expected_step(plain(folder)))


SWITCHES = {
    "full": {"checkpointing": "full"},
    "offload": {"checkpointing": "full", "offload": True},
    "selective": {"checkpointing": "selective"},
    "tiles": {"mlp_tiles": 5},
    "full, tiles": {"checkpointing": "full", "mlp_tiles": 3},
    "selective, tiles": {"checkpointing": "selective", "mlp_tiles": 3},
}
SHARDS = [
    (1, {}),
    pytest.param(2, {"shard": "none"}, marks=FULL),
    pytest.param(4, {"dp": 2}, marks=FULL),
    (4, {"dp": 2, "shard": "hybrid"}),
]


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """A model with tied embeddings in a folder, and its step."""
    folder = save_tiny(tmp_path_factory.mktemp("models") / "qwen2", "qwen2")
    return folder, {name: expected_step(plain(folder), name) for name in ("packed", "unequal")}


@pytest.mark.parametrize("switch", often(SWITCHES, "offload", "selective, tiles"))
def test_less_memory_changes_no_gradient(switch, qwen):
    """Attention runs once more in the backward under full checkpointing, and there alone."""
    folder, expected = qwen
    results = step_on_ranks(2, {"model": folder} | SWITCHES[switch])
    assert_same_step(results, expected["packed"])
    again = 2 if SWITCHES[switch].get("checkpointing") == "full" else 1
    assert [result["attention runs"] for result in results] == [[again, again]] * 2


@pytest.mark.parametrize("world,options", SHARDS, ids=str)
def test_weights_are_sharded_as_asked(world, options, qwen):
    """Unequal numbers of labels on the replicas; every rank holds its share of the weights alone."""
    folder, expected = qwen
    results = step_on_ranks(world, {"model": folder} | options, "unequal")
    assert_same_step(results, expected["unequal"])
    whole = sum(p.numel() for p in plain(folder).parameters())
    shares = {"none": 1, "hybrid": world // options.get("dp", 1)}.get(options.get("shard"), world)
    for result in results:
        assert result["held"] == pytest.approx(whole / shares, rel=0.01)
        assert result["dtypes"] == {(torch.float32, torch.float32)}


@machine.needs("peft")
@pytest.mark.parametrize("family", often(["llama", "qwen2"]))
def test_adapters_alone_are_trained(family, tmp_path):
    folder = save_tiny(tmp_path, family)
    config = TrainConfig(model=folder, lora_rank=3, lora_alpha=5.0)
    torch.manual_seed(0)
    model = plain(folder)
    add_adapters(model, config)
    adapt(dict(model.named_parameters()))
    expected = expected_step(model)
    assert len(expected["grads"]) == 2 * 7 * 2  # factors, linear maps, layers
    options = {"model": folder, "lora_rank": 3, "lora_alpha": 5.0, "checkpointing": "full"}
    for result in (results := step_on_ranks(2, options)):
        assert result["frozen"] == {torch.float32} and set(result["dtypes"]) == {(torch.float32,) * 2}
    assert_same_step(results, expected)


@pytest.mark.parametrize("rank", [pytest.param(0, marks=FULL), pytest.param(4, marks=machine.needs("peft"))])
def test_trained_weights_and_their_gradients_are_fp32_where_the_computation_is_bfloat16(rank, qwen):
    """As far from fp32 as the plain model in bfloat16, at most twice: different orders of sums."""
    folder, _ = qwen
    steps = []
    for dtype in (torch.bfloat16, torch.float32):
        torch.manual_seed(0)
        model = plain(folder)
        if rank:
            add_adapters(model, TrainConfig(lora_rank=rank))
            adapt(dict(model.named_parameters()))
        steps.append(expected_step(model.to(dtype)))
    low, exact = steps
    for result in step_on_ranks(2, {"model": folder, "dtype": "bfloat16", "lora_rank": rank}):
        assert result["dtypes"] == {(torch.float32, torch.float32)}
        assert result["frozen"] == ({torch.bfloat16} if rank else set())
        assert result["loss"] == pytest.approx(exact["loss"], rel=torch.finfo(torch.bfloat16).eps)
        for name, gradient in exact["grads"].items():
            bound = 2 * (low["grads"][name] - gradient).abs().max()
            bound += torch.finfo(torch.bfloat16).eps * gradient.abs().max()
            tolerance.check("bf16", name, result["grads"][name], gradient, bound)


def restore(options):
    """Trains a step, and another model takes its state: the names in it, and whether all is the same."""
    with joined(options) as (config, world):
        states = []
        for steps in (1, 0):
            cp, model = prepared(config, world)
            data = PackedText(pack(Corpus.of([np.arange(200)]), 64))
            trainee = Trainee(model, cp, build_optimizer(model, config), data)
            for number in range(steps):
                shard = cp.shard(make_batch("packed", LENGTH)[0])
                cp.loss(model(**shard.inputs), shard).backward()
                update(trainee.optimizer, config, number)
            if states:
                before = {name: p.full_tensor() for name, p in model.named_parameters()}
                trainee.load_state_dict(states[0])
                changed = [n for n, p in model.named_parameters() if not p.full_tensor().equal(before[n])]
            states.append(copy.deepcopy(trainee.state_dict()))
            cp.detach(model)
        (first, second), parts = states, ("model", "optimizer")
        same = all(
            torch.equal(x.full_tensor(), y.full_tensor())
            for part in parts
            for x, y in zip(leaves(first[part]), leaves(second[part]), strict=True)
        )
        return [sorted(first[part]) for part in parts], changed, same


def leaves(state):
    """The sharded tensors of a state."""
    values = state.values() if isinstance(state, dict) else ()
    return [state] if isinstance(state, DTensor) else [x for value in values for x in leaves(value)]


@pytest.mark.parametrize("rank", [pytest.param(0, marks=FULL), pytest.param(2, marks=machine.needs("peft"))])
def test_a_sharded_state_is_restored_by_name(rank, qwen):
    """With adapters it holds nothing else."""
    for (weights, states), changed, same in pool.run(
        2, restore, {"model": qwen[0], "lora_rank": rank}, detail=False
    ):
        assert same and changed and set(changed) <= set(weights) and states == weights
        assert "lm_head.weight" not in weights  # tied to the embedding
        assert all("lora" in name for name in weights) == bool(rank)


@machine.needs("gpu")
@pytest.mark.parametrize("switch", SWITCHES)
def test_on_a_gpu(switch, qwen):
    check_on_gpus(1, {"model": qwen[0]} | SWITCHES[switch], qwen[1]["packed"])


@machine.needs("two gpus")
@pytest.mark.parametrize("options", [{}, {"shard": "none"}, SWITCHES["offload"]], ids=str)
def test_on_two_gpus(options, qwen):
    check_on_gpus(2, {"model": qwen[0]} | options, qwen[1]["packed"])


def check_on_gpus(world, options, expected):
    options |= {"device": "cuda", "timeout": 120.0}
    for result in pool.run(world, step, options, "packed", backend="nccl", timeout=180):
        assert result["loss"] == pytest.approx(expected["loss"], rel=1e-4)
        for name, gradient in expected["grads"].items():
            tolerance.check("gpu-fp32", name, result["grads"][name], gradient, 1e-3 * gradient.abs().max())


# -- what is kept ----------------------------------------------------------------------------------


def kept(folder, **options):
    """Bytes that the forward of the attached model keeps for the backward, weights aside."""
    model = load_model(Path(folder)).train()
    cp = ContextParallel(None, pattern=Dense(), block_size=BLOCK)
    cp.attach(model)
    save_memory(model, TrainConfig(**options))
    shard = cp.shard(make_batch("whole", LENGTH)[0])
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found = {}

    def note(tensor):
        found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        output = model(**shard.inputs)
    assert output.logits.requires_grad
    return sum(size for storage, size in found.items() if storage not in weights)


def test_every_switch_keeps_less(qwen):
    """The inputs of layers are the least, then what attention needs; tiles keep no inside of the MLP."""
    folder, _ = qwen
    whole, tiles = kept(folder), kept(folder, mlp_tiles=4)
    selective, full = kept(folder, checkpointing="selective"), kept(folder, checkpointing="full")
    assert full < selective < tiles < whole
    rows, width = 2 * LENGTH * 4, SIZES["hidden_size"]
    inputs = 2 * rows * width  # of two layers
    assert inputs <= full <= inputs + 8 * rows * width  # and what comes before and after the layers


def test_layers_of_other_parts_are_refused(qwen):
    model = load_model(Path(qwen[0]))
    model.model.layers[1].feed_forward = model.model.layers[1]._modules.pop("mlp")
    with pytest.raises(NotImplementedError, match="Qwen2DecoderLayer has no part mlp"):
        save_memory(model, TrainConfig(mlp_tiles=2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"offload": True}, "offload=True and checkpointing='none'.*set checkpointing to full"),
        ({"lora_alpha": 8.0}, "lora_alpha=8.0 and lora_rank=0"),
        ({"model": "folder", "width": 512}, "width=512 and model='folder'.*leave width out"),
        ({"mlp_tiles": 0}, "mlp_tiles=0 must be greater than 0"),
        ({"shard": "half"}, "shard='half' must be one of"),
        ({"checkpointing": "some"}, "checkpointing='some' must be one of"),
    ],
)
def test_contradictory_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**changes)


# -- folders ---------------------------------------------------------------------------------------


def test_default_model_has_about_a_million_parameters_and_depends_on_the_seed_alone():
    state = torch.get_rng_state()
    models = [build_model(TrainConfig(seed=seed)) for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), state)
    assert 0.5e6 < sum(p.numel() for p in models[0].parameters()) < 2e6
    first, same, other = (dict(model.named_parameters()) for model in models)
    assert all(torch.equal(first[name], same[name]) for name in first)
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(first[name], other[name])
    assert first["model.embed_tokens.weight"].shape[0] == VOCAB_SIZE
    assert "lm_head.weight" not in first  # tied


def change_config(folder, **changes):
    path = Path(folder, "config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("key", ["_attn_implementation", "attn_implementation"])
@pytest.mark.parametrize("name", ["evil/kernel", "flash_attention_2", "sparring"])
def test_the_attention_that_a_folder_asks_for_is_not_used(key, name, tmp_path):
    folder = save_tiny(tmp_path, "llama")
    change_config(folder, **{key: name})
    assert load_model(tmp_path).config._attn_implementation == "sdpa"


def test_code_in_a_folder_does_not_run(tmp_path):
    folder = save_tiny(tmp_path, "llama")
    canary = tmp_path / "canary"
    (tmp_path / "own.py").write_text(f"open({str(canary)!r}, 'w')")
    change_config(folder, model_type="own", auto_map={"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"})
    with pytest.raises(ValueError):
        load_model(tmp_path)
    assert not canary.exists()


def test_pickled_weights_are_refused(tmp_path):
    folder = save_tiny(tmp_path, "llama")
    state = plain(folder).state_dict()
    (tmp_path / "model.safetensors").unlink()
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        load_model(tmp_path)


def test_unfit_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no config.json there; give a folder made by save_pretrained"):
        load_model(tmp_path)
    save_tiny(tmp_path, "llama")
    with pytest.raises(ValueError, match="a vocabulary of 260 tokens, the data has 300"):
        load_model(tmp_path, 300)


@pytest.mark.parametrize(
    ("family", "changes", "what"),
    [
        ("mistral", {"sliding_window": 64}, "a sliding window of 64"),
        ("mixtral", {"output_router_logits": True}, "output_router_logits = True"),
        (
            "gemma3",
            {"layer_types": ["full_attention", "sliding_attention"]},
            "type sliding_attention",
        ),
    ],
)
def test_layers_and_losses_of_a_folder_that_are_not_supported_are_refused_by_name(
    family, changes, what, tmp_path
):
    """Load-balancing losses of experts too: they would be of this rank's tokens alone."""
    folder = save_tiny(tmp_path, family, **changes)
    cp = ContextParallel(None, block_size=BLOCK)
    with pytest.raises(NotImplementedError, match=what):
        cp.attach(build_model(TrainConfig(model=folder)))
