"""launch/train.py: the whole job, small: alone, under torchrun, interrupted and resumed."""

import json
import os
import subprocess
import sys

import pytest
import torch

from sparring.launch import train as job
from sparring.launch.config import TrainConfig
from sparring.launch.metrics import read_metrics
from sparring.launch.trainee import build_pattern

SIZE = {"seq_len": 256, "block_size": 32, "steps": 6, "warmup": 1, "save_every": 2}
MODEL = {"width": 32, "heads": 2, "kv_heads": 1, "head_dim": 16, "mlp": 32, "device": "cpu"}
PROMISED = (
    "loss_first loss_last dense_loss_last local_loss_last steps seq_len mean_visible_context world_size "
    "pattern density recall worker_imbalance step_imbalance tokens_per_second"
).split()


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text"
    path.write_text("".join(f"line {i} of {i * i}\n" for i in range(1000)))
    return str(path)


def config_of(out, text, **changes):
    return TrainConfig(**{"out": str(out), "data": text, "compare": False, **SIZE, **MODEL, **changes})


def trace(out):
    """What must be the same in two runs of the same settings."""
    rows = read_metrics(out / "metrics.jsonl", "train")
    return [[row[n] for n in ("step", "loss", "grad_norm", "lr", "density", "layout")] for row in rows]


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory):
    """A run that nothing interrupts, alone in this process: its folder and its summary."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    return out, job.run(config_of(out, text, compare=True))


def test_a_run_writes_what_it_promises(whole):
    out, summary = whole
    assert not torch.distributed.is_initialized()
    assert json.loads((out / "summary.json").read_text()) == summary
    for name in PROMISED:
        assert summary[name] is not None, name
    assert summary["loss_last"] < summary["loss_first"]
    assert (out / "report.png").stat().st_size > 10_000
    assert (out / "report.html").stat().st_size > 10_000
    assert json.loads((out / "environment.json").read_text())["processes"] == 1
    assert (out / "checkpoints" / "latest").read_text().strip() == "step-000006"
    work = list(read_metrics(out / "metrics.jsonl", "work"))
    assert [row["layout"] for row in work if row["chosen"]] == [trace(out)[-1][-1]]
    totals = {round(sum(map(sum, row["work"])), 6) for row in work}
    assert len(totals) == 1  # a layout moves work, it makes none


@pytest.mark.parametrize("crash_at", [1, 5])
def test_a_resumed_run_has_the_trace_of_the_uninterrupted_one(whole, text, tmp_path, monkeypatch, crash_at):
    step = job.train_step

    def crash(config, world, trainee, at):
        if at == crash_at:
            raise KeyboardInterrupt
        return step(config, world, trainee, at)

    config = config_of(tmp_path, text, resume=True)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(job, "train_step", crash)
        job.run(config)
    assert not torch.distributed.is_initialized()
    assert len(trace(tmp_path)) == crash_at
    job.run(config)
    assert trace(tmp_path) == trace(whole[0])


@pytest.mark.full  # as test_launch.py does with torchrun
def test_two_ranks_have_the_trace_of_one(whole, text, tmp_path):
    """Dense, so that rounding cannot change what is computed; plans of values are compared elsewhere."""
    config = config_of(tmp_path / "one", text, pattern="dense", save_every=0)
    job.run(config)
    names = ("data", "seq_len", "block_size", "steps", "warmup", "width", "heads", "kv_heads")
    names += ("head_dim", "mlp", "device", "pattern", "save_every")
    options = [w for n in names for w in (f"--{n.replace('_', '-')}", str(getattr(config, n)))]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "sparring.launch.train", *options, "--no-compare", "--out", str(tmp_path / "two")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "two" / "summary.json").read_text())["world_size"] == 2
    one, two = trace(tmp_path / "one"), trace(tmp_path / "two")
    assert len(one) == len(two) == config.steps
    for left, right in zip(one, two, strict=True):
        assert right[:5] == pytest.approx(left[:5], rel=1e-4)


def test_resuming_with_other_settings_is_refused(whole, text):
    out, _ = whole
    with pytest.raises(ValueError, match="lr: checkpoint 0.004, now 0.1"):
        job.run(config_of(out, text, resume=True, lr=0.1))
    assert not torch.distributed.is_initialized()


def test_an_earlier_run_is_set_aside_not_overwritten(tmp_path):
    for content in ("first", "second"):
        (tmp_path / "metrics.jsonl").write_text(content)
        (tmp_path / "own.txt").write_text("not of a run")
        job.set_aside(tmp_path)
    assert (tmp_path / "previous-1" / "metrics.jsonl").read_text() == "first"
    assert (tmp_path / "previous-2" / "metrics.jsonl").read_text() == "second"
    assert {p.name for p in tmp_path.iterdir()} == {"previous-1", "previous-2", "own.txt"}


def test_groups_that_do_not_divide_are_refused(text, tmp_path):
    with pytest.raises(ValueError, match="1 processes do not divide into dp=2"):
        job.run(config_of(tmp_path, text, dp=2))


def test_a_diverged_loss_ends_the_run(text, tmp_path):
    with pytest.raises(FloatingPointError, match="the loss of step 1 is nan"):
        job.run(config_of(tmp_path, text, lr=float("inf"), warmup=0, pattern="dense"))


def test_patterns_are_built_by_name():
    assert build_pattern(TrainConfig(pattern="dense")).__class__.__name__ == "Dense"
    sparse = build_pattern(TrainConfig(max_density=0.5, top_p=0.9))
    assert sparse.top_p == 0.9 and sparse.columns == (32, 256) and sparse.slashes == (2, 16)
    with pytest.raises(ValueError, match="'fog' must be one of .*vertical-slash"):
        build_pattern(TrainConfig(pattern="fog"))
