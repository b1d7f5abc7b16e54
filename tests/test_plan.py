"""`sparring plan`: its formulas against tensors that exist, its order, what it refuses, what it prints."""

from __future__ import annotations

import importlib
import itertools
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import machine
import pytest
import torch
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity
from transformers import LlamaConfig, MixtralConfig

from sparring.cp import ContextParallel
from sparring.kernels import Geometry
from sparring.kernels.bound import LISTS, bind
from sparring.kernels.patterns.base import make_plan
from sparring.launch.config import TrainConfig
from sparring.launch.memory import save_memory
from sparring.launch.model import build_model
from sparring.launch.optimizer import build_optimizer, update
from sparring.launch.plan import Plan, main, predict_training
from sparring.launch.plan_memory import (
    OVERHEAD,
    kept_by_layer,
    moments,
    peak,
    plan_bytes,
    saved_by_norm,
    share_of,
)
from sparring.launch.plan_model import build_meta, sizes_of
from sparring.launch.plan_switches import SETS, largest, longest, options
from sparring.launch.plan_time import step_seconds
from sparring.launch.tokens import VOCAB_SIZE
from sparring.launch.trainee import build_pattern, prepare_model
from sparring.launch.world import join_world

TINY = TrainConfig(
    device="cpu", seq_len=256, block_size=32, layers=2, width=64, heads=4, kv_heads=2, head_dim=16, mlp=96,
    warmup=0, pattern="dense",
)  # fmt: skip
LARGE = TrainConfig(
    seq_len=131072, layers=32, width=4096, heads=32, kv_heads=8, head_dim=128, mlp=14336, dtype="bfloat16"
)
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def sizes(config):
    return sizes_of(build_meta(config))


def test_sizes_are_counted_without_memory_and_equal_those_of_the_model():
    meta, real = build_meta(TINY), build_model(TINY)
    assert all(parameter.is_meta for parameter in meta.parameters())
    found = sizes_of(meta)
    assert found.whole.count == found.whole.trained == sum(p.numel() for p in real.parameters())
    assert found.root.count == found.head.count + TINY.width  # tied, and the last norm
    assert found == sizes_of(real)


def test_a_folder_needs_its_config_alone(tmp_path):
    settings = {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 96}
    settings |= {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 300}
    MixtralConfig(**settings, num_key_value_heads=2, sliding_window=None).save_pretrained(tmp_path)
    found = sizes(TrainConfig(model=str(tmp_path)))
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert found.mlp == 2 * 96  # of the two experts that a token meets
    assert found.mlp_flops == 2 * 2 * (2 * 3 * 64 * 96 + 4 * 64)  # layers, operations, experts and router
    assert found.root.count == 2 * 300 * 64 + 64  # not tied


@machine.needs("peft")
def test_adapters_alone_are_trained():
    found = sizes(replace(TINY, lora_rank=2))
    assert 0 < found.whole.trained < found.whole.count / 10 and found.head.trained == 0
    assert found.whole.frozen == sizes(TINY).whole.count


def test_weights_gradients_and_optimizer_state_are_as_allocated():
    with join_world(TINY) as world:
        cp = ContextParallel(None, pattern="dense", block_size=TINY.block_size)
        model = prepare_model(TINY, world, cp, VOCAB_SIZE)
        optimizer = build_optimizer(model, TINY)
        ids = torch.arange(256)[None] % VOCAB_SIZE
        shard = cp.shard({"input_ids": ids, "labels": ids})
        cp.loss(model(**shard.inputs), shard).backward()

        def held(tensors):
            local = [x.to_local() if isinstance(x, DTensor) else x for x in tensors]
            return sum(x.numel() * x.itemsize for x in local if x.ndim)

        found = moments(sizes(TINY), TINY, 1)["end"]
        assert held(model.parameters()) == found["weights"]
        assert held(p.grad for p in model.parameters()) == found["gradients"]
        update(optimizer, TINY, 0)
        assert held(x for state in optimizer.state.values() for x in state.values()) == found["AdamW"]


def saved_bytes(config, layers):
    """Of all storages that one forward keeps for its backward, but weights."""
    config = replace(config, layers=layers)
    cp = ContextParallel(None, pattern="dense", block_size=config.block_size)
    model = cp.attach(build_model(config).to(getattr(torch, config.dtype)))
    save_memory(model, config)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x

    ids = torch.arange(config.seq_len)[None] % VOCAB_SIZE
    shard = cp.shard({"input_ids": ids})
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        output = model(**shard.inputs)
    del output
    return sum(storage.nbytes() for place, storage in kept.items() if place not in weights)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind,tiles", [("none", 1), ("none", 4), ("selective", 1), ("full", 1), ("full", 4)])
def test_a_layer_keeps_the_activations_that_its_formula_counts(kind, tiles, dtype):
    """To 1 %: pointers of columns and masks are left out."""
    config = replace(TINY, checkpointing=kind, mlp_tiles=tiles, dtype=dtype)
    measured = (saved_bytes(config, 4) - saved_bytes(config, 2)) / 2
    model, share = sizes(config), share_of(config, 1)
    lists = 0 if kind == "full" else plan_bytes(model, config, share)[1]
    assert measured == pytest.approx(share.tokens * kept_by_layer(model, config) + lists, rel=0.01)


def allocated(config, folder):
    """Most bytes that two steps allocate, with kernels that do nothing, as those of GPUs keep little."""
    nothing = {
        name: lambda *_, **__: None for name in ("backward_step", "forward_columns", "backward_columns")
    }

    def forward_step(q, k, v, bound, step, out, lse, scale, fresh):
        out.zero_(), lse.zero_()

    kernels = SimpleNamespace(forward_step=forward_step, **nothing)
    with pytest.MonkeyPatch.context() as patch, join_world(config) as world:
        patch.setattr("sparring.cp.call.steps", lambda *_: kernels)
        with torch.profiler.profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            cp = ContextParallel(None, pattern="dense", block_size=config.block_size, grad_reduce="mean")
            model = prepare_model(config, world, cp, VOCAB_SIZE)
            optimizer = build_optimizer(model, config)
            ids = torch.arange(config.seq_len)[None] % VOCAB_SIZE
            for step in range(2):
                shard = cp.shard({"input_ids": ids, "labels": ids})
                cp.loss(model(**shard.inputs), shard).backward()
                update(optimizer, config, step)
    profiler.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    totals = [event["args"]["Total Allocated"] for event in events if event.get("name") == "[memory]"]
    return max(totals) - totals[0]  # the profiler goes on counting from where it was


@pytest.mark.full
@pytest.mark.parametrize("kind", ["none", "selective", "full"])
def test_the_peak_of_two_steps_is_predicted_within_a_tenth(kind, tmp_path):
    config = replace(TINY, seq_len=2048, block_size=128, layers=4, width=128, head_dim=32, mlp=384)
    config = replace(config, checkpointing=kind)
    assert allocated(config, tmp_path) == pytest.approx(peak(sizes(config), config, 1), rel=0.1)


@pytest.mark.parametrize("pattern", ["dense", "vertical-slash"])
@pytest.mark.parametrize("world", [1, 2])
def test_bits_and_lists_of_a_plan_have_the_size_that_is_counted(pattern, world):
    """But for the few entries that kernels may read ahead, and ranks that hold more visible tiles."""
    config = replace(TINY, pattern=pattern, seq_len=1024)
    geometry = Geometry.causal(1, 1024, 32)
    held = tuple(tuple(range(rank, 32, world)) for rank in range(world))
    q, k = torch.randn(1, 4, 1024, 16), torch.randn(1, 2, 1024, 16)
    whole = make_plan(build_pattern(config), q, k, k, geometry)
    plan = whole.rows(geometry.select(held[0]))
    bits, lists, _ = plan_bytes(sizes(config), config, share_of(config, world))
    columns = 0 if plan.columns is None else plan.columns.nbytes
    assert plan.tiles.nbytes + columns == pytest.approx(bits, rel=0.02)
    bound = bind(plan, held)
    assert sum(getattr(bound, name).nbytes for name in LISTS) == pytest.approx(lists, rel=0.04)


@pytest.mark.parametrize("pattern", ["dense", "vertical-slash", "sink-window"])
@pytest.mark.parametrize("gpus", [1, 2, 16])
def test_longer_sequences_need_more_and_each_set_of_switches_not_more_than_the_one_before(pattern, gpus):
    model, config = sizes(LARGE), replace(LARGE, pattern=pattern)
    for _, switches in SETS:
        changed = replace(config, **switches)
        needed = [peak(model, replace(changed, seq_len=2**n), gpus) for n in range(12, 23)]
        assert needed == sorted(needed) and needed[0] < needed[-1]
    for length in (4096, 131072, 2**21):
        needed = [peak(model, replace(config, seq_len=length, **switches), gpus) for _, switches in SETS]
        slack = (
            share_of(replace(config, seq_len=length), gpus).tokens * 2 * saved_by_norm(model, 2)
        )  # see SETS
        assert all(after <= before + slack for before, after in itertools.pairwise(needed))
    found = options(model, config, gpus, 139 * 2**30)
    reached = [option.longest for option in found]
    assert reached == sorted(reached)


def test_weights_are_shared_as_asked():
    model = sizes(LARGE)
    config = replace(LARGE, dp=2)
    kinds = {kind: moments(model, replace(config, shard=kind), 8)["end"]["weights"] for kind in
             ("full", "hybrid", "none")}  # fmt: skip
    assert kinds["none"] == 4 * kinds["hybrid"] == 8 * kinds["full"] == 4 * model.whole.count


def test_the_longest_sequence_fits_and_one_step_longer_does_not():
    model, config, memory = sizes(LARGE), replace(LARGE, checkpointing="full"), 139 * 2**30
    found = longest(model, config, 8, memory)
    assert found and found % (8 * 128) == 0
    assert peak(model, replace(config, seq_len=found), 8) + OVERHEAD <= memory
    assert peak(model, replace(config, seq_len=found + 8 * 128), 8) + OVERHEAD > memory


@pytest.mark.parametrize("answer", [0, 1, 2, 3, 7, 8, 1000])
def test_the_largest_count_is_found(answer):
    assert largest(lambda count: count <= answer) == answer


def test_time_counts_what_is_computed_again_and_the_density():
    from sparring.balance import H200

    model = sizes(LARGE)

    def seconds(**changes):
        return step_seconds(model, replace(LARGE, pattern="dense", **changes), 8, 1, H200)[0]

    plain, again, tiled = seconds(), seconds(checkpointing="full"), seconds(mlp_tiles=8)
    tokens = 131072 / 8
    more = (again["weights"] - plain["weights"]) / (tokens * model.layer_flops)
    assert (tiled["weights"] - plain["weights"]) / (tokens * model.mlp_flops) == pytest.approx(more)
    assert 1.2 < again["attention"] / plain["attention"] < 1.5  # a forward more
    sparse = step_seconds(model, replace(LARGE, pattern="vertical-slash", max_density=0.1), 8, 1, H200)[0]
    assert sparse["attention"] < 0.2 * plain["attention"]
    assert "to the CPU and back" in seconds(checkpointing="full", offload=True)


@pytest.mark.parametrize(
    ("plan", "shown"),
    [
        (lambda: predict_training(Plan(replace(TINY, dp=2), gpus=3)), ["3 GPUs", "dp=2"]),
        (lambda: Plan(TINY, gpus=12, gpus_per_node=8), ["12 GPUs", "gpus_per_node=8"]),
        (lambda: Plan(TINY, gpus=0), ["gpus=0", "greater than 0"]),
        (lambda: Plan(TINY, memory=-1.0), ["memory=-1.0"]),
        (lambda: predict_training(Plan(TrainConfig(model="nowhere"))), ["nowhere", "config.json"]),
        (lambda: predict_training(Plan(replace(TINY, dp=2), gpus=24, gpus_per_node=8)), ["12", "8"]),
    ],
)
def test_what_no_job_can_have_is_refused_with_both_numbers(plan, shown):
    with pytest.raises(ValueError) as error:
        plan()
    assert all(part in str(error.value) for part in shown), error.value


def test_an_exchange_without_a_formula_is_refused_by_name():
    with pytest.raises(NotImplementedError, match="exchange 'heads'"):
        predict_training(Plan(replace(TINY, exchange="heads"), gpus=2))


def test_the_command_prints_json_or_tables_with_the_same_numbers(tmp_path, capsys):
    sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "vocab_size": 32000}
    LlamaConfig(**sizes, num_attention_heads=16, num_key_value_heads=4).save_pretrained(tmp_path)
    words = ["--model", str(tmp_path), "--seq-len", "1048576", "--gpus", "8", "--pattern", "dense"]
    main([*words, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["needed"] == sum(found["memory"].values()) + found["overhead"]
    assert found["fits"] == (found["needed"] <= found["available"]) and found["cp_size"] == 8
    assert found["step_seconds"] == sum(found["seconds"].values())
    fitting = [each["switches"] for each in found["options"] if each["fits"]]
    assert found["chosen"] == fitting[0] and len(found["options"]) == len(SETS)
    main(words)
    text = capsys.readouterr().out
    for each in found["options"]:
        assert f"{each['longest']:,}" in text
    assert f"cheapest switches that fit: {fitting[0]}" in text and "assumed" in text
    main([*words, "--memory", "1"])
    assert "no switches fit" in capsys.readouterr().out


@pytest.fixture(scope="module")
def benchmark():
    patch = pytest.MonkeyPatch()
    patch.syspath_prepend(BENCHMARKS)
    yield importlib.import_module("longest")
    patch.undo()


@pytest.mark.parametrize("answer", [0, 100, 256, 1000, 1024, 5000])
def test_the_search_for_the_longest_length_doubles_then_bisects(benchmark, answer):
    jobs = []

    def run(lengths):
        jobs.append(lengths)
        return sum(length <= answer for length in lengths)

    found = benchmark.search(run, start=256, most=4096, unit=32, steps=10)
    assert found <= answer and min(answer, 4096) - found < 32
    assert jobs[0] == [256, 512, 1024, 2048, 4096] and all(len(lengths) == 1 for lengths in jobs[1:])


@pytest.mark.full
def test_the_benchmark_of_longest_sequences_runs_without_gpus(tmp_path):
    words = "--device cpu --tiny --gpus 2 --most 512 --steps 1 --out".split()
    command = [sys.executable, str(BENCHMARKS / "longest.py"), *words, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "longest: 512 tokens" in done.stdout
    assert len((tmp_path / "longest.csv").read_text().splitlines()) == 3
