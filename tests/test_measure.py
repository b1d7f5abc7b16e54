"""launch/flops.py, measure.py: operations counted by hand, memory, and the rank that others wait for."""

import time
from types import SimpleNamespace

import numpy as np
import pool
import pytest
import tiny_models
import torch
from test_launch_model import MOE, SIZES
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from sparring.cp import ContextParallel
from sparring.launch import train as job
from sparring.launch.config import TrainConfig
from sparring.launch.flops import flops_per_pair, flops_per_token
from sparring.launch.measure import job_statistics, own_counts, peak_bytes, slow_rank, waited_for
from sparring.launch.progress import ProgressReport

# tiny_models.llama: width 32, 4 query heads and 2 key heads of 8, feed-forward 48, 2 layers, vocabulary 48.
LAYER = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 48 + 2 * 32  # q, k and v, o, feed-forward, norms
BODY, TABLE = 2 * LAYER + 32, 48 * 32


def test_a_trained_weight_takes_six_operations_and_an_embedding_none():
    assert flops_per_token(tiny_models.llama()) == 6 * (BODY + TABLE)  # the head, not the embedding
    assert flops_per_token(tiny_models.llama(tie_word_embeddings=True)) == 6 * (BODY + TABLE)


def test_a_frozen_weight_takes_four():
    model = tiny_models.llama()
    model.requires_grad_(False)
    model.lm_head.weight.requires_grad_(True)
    assert flops_per_token(model) == 4 * BODY + 6 * TABLE


def test_a_token_meets_the_experts_that_are_chosen_for_it():
    counts = []
    for chosen in (2, 4):
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES | MOE | {"num_experts_per_tok": chosen}))
        counts.append(flops_per_token(model))
    expert = 3 * SIZES["hidden_size"] * MOE["moe_intermediate_size"]
    assert counts[1] - counts[0] == 6 * 2 * 2 * expert  # two layers, two experts more


def test_a_pair_takes_twelve_operations_for_each_element_of_a_head():
    assert flops_per_pair(tiny_models.llama()) == 12 * 8


def test_pairs_are_those_of_all_heads_and_layers():
    cp = ContextParallel(None, pattern="dense", block_size=16)
    model = cp.attach(tiny_models.llama())
    shard = cp.shard({"input_ids": torch.zeros(1, 64, dtype=torch.int64)})
    model(**shard.inputs)
    pairs, peak, late, waited = own_counts(cp.report(shard), shard, torch.device("cpu"))
    assert pairs == 2 * 4 * 64 * 65 // 2
    assert peak == peak_bytes(torch.device("cpu")) > 2**20
    assert (late, waited) == (-1, 0)


def test_rates_are_those_of_a_rank():
    counts = [[100, 2**30, -1, 0], [300, 3 * 2**30, 1, 250_000]]
    values = job_statistics(counts, 0.5, 2e12, 1e10)
    assert values["attention_tflops"] == pytest.approx(400 * 1e10 / 0.5 / 2 / 1e12)
    assert values["model_tflops"] == pytest.approx((2e12 + 400 * 1e10) / 0.5 / 2 / 1e12)
    assert (values["peak_memory"], values["straggler"], values["straggler_wait"]) == (3.0, 1, 0.25)
    alone = job_statistics([[100, 2**30, -1, 0]], 0.5, 2e12, 1e10)
    assert alone["straggler"] is alone["straggler_wait"] is None


def test_waiting_counts_beyond_that_of_the_straggler():
    report = SimpleNamespace(straggler=2, waited=(1.0, 2.0, 0.5))
    assert waited_for(report) == pytest.approx(1.0)
    assert waited_for(SimpleNamespace(straggler=None, waited=(1.0, 2.0))) == 0.0


def late(*ranks):
    return [
        {"straggler": r, "straggler_wait": None if r is None else 0.1 * (1 + i)} for i, r in enumerate(ranks)
    ]


def test_a_rank_is_slow_if_others_wait_for_it_in_most_steps():
    assert slow_rank(late(3, None, 3, 3)) == (3, pytest.approx(np.mean([0.1, 0.3, 0.4])))
    assert slow_rank(late(3, None, 3, 1)) is None  # half is not most
    assert slow_rank(late(3)) is None and slow_rank(late(None, None)) is None and slow_rank([]) is None
    assert slow_rank([{"loss": 1.0}] * 3) is None  # rows of an older run


def test_progress_names_the_slow_rank(capsys):
    progress = ProgressReport("train", 4)
    for step, row in enumerate(late(3, 3, 3, None)):
        progress.update(step, {"loss": 1.0} | row)
    lines = capsys.readouterr().out.splitlines()
    assert "late" not in lines[0]
    assert all("rank 3 is late by 0." in line for line in lines[1:])


SMALL = {"seq_len": 128, "block_size": 16, "steps": 3, "warmup": 0, "compare": False, "pattern": "dense"}
SMALL |= {"width": 32, "heads": 2, "kv_heads": 1, "head_dim": 16, "mlp": 32, "save_every": 0}


def train_beside_a_slow_rank(settings):
    """The summary of a job of which rank 1 takes its time before every attention."""

    def slow(*arguments):
        trainee = assemble(*arguments)
        if arguments[1].rank == 1:
            for layer in trainee.model.model.layers:
                layer.self_attn.q_proj.register_forward_hook(lambda *_: time.sleep(0.2))
        return trainee

    assemble = job.assemble
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "assemble", slow)
        patch.setattr(job, "finish", lambda *_: None)  # draws the report
        return job.run(TrainConfig(device="cpu", **settings))


def test_a_run_names_the_rank_that_is_late_and_says_how_fast_it_was(tmp_path):
    (tmp_path / "text").write_text("so it goes " * 200)
    settings = SMALL | {"data": str(tmp_path / "text"), "out": str(tmp_path / "run"), "profile_step": 1}
    summary, nothing = pool.run(2, train_beside_a_slow_rank, settings)
    assert nothing is None
    assert summary["straggler"] == 1 and 0.3 < summary["straggler_wait"] < 2.0
    assert 0 < summary["attention_tflops"] < summary["model_tflops"]
    assert summary["peak_memory"] > 0
    trace = (tmp_path / "run" / "profile" / "rank-1.json").read_text()
    for name in ("shard", "estimate", "forward", "backward", "optimizer"):
        assert f"sparring.{name}" in trace, name
