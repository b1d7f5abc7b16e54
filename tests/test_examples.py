"""launch/examples as people start them, with the losses of one process; launch/trainer.py."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import uuid
from pathlib import Path
from types import SimpleNamespace

import machine
import pytest
import tiny_models
import torch
from tiny_models import BLOCK, IGNORE, VOCAB
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset
from training import begin, finish

from sparring.cp import ContextParallel
from sparring.kernels.patterns import Dense
from sparring.launch.config import parse_command
from sparring.launch.start import Start

EXAMPLES = Path(__file__).resolve().parents[1] / "launch" / "examples"
SCRIPTS = sorted(path.name for path in EXAMPLES.glob("*.py"))


def words_of(script: str, world: int, *arguments: str) -> list[str]:
    """The command in the docstring of an example, for so many ranks; for one, without a launcher."""
    text = ast.get_docstring(ast.parse((EXAMPLES / script).read_text()))
    launcher, *options, path = text.splitlines()[-1].partition(" [")[0].split()
    program = [str(EXAMPLES / script), *arguments]
    if script == "ray_job.py":
        assert (launcher, *options, path) == ("cd", "launch/examples;", "python", script)
        return [sys.executable, *program, str(world)]
    assert (launcher, path) == ("torchrun", f"launch/examples/{script}")
    assert options == ["--standalone", "--nproc-per-node", "2"]
    if world == 1:
        return [sys.executable, *program]
    return [sys.executable, "-m", "torch.distributed.run", *options[:-1], str(world), *program]


ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}


def losses_of(folder: Path, script: str, world: int, *arguments: str) -> list[float]:
    """What an example prints."""
    mark = uuid.uuid4().hex
    alone = ALONE if world == 1 and script != "ray_job.py" else {}
    job = begin(words_of(script, world, *arguments), folder, mark, RAY_TMPDIR="/tmp", **alone)
    (said,) = finish([job], mark)
    return [float(loss) for loss in re.findall(r"loss (\d+\.\d+)", said)]


def case(script: str, world: int, *arguments: str, full: bool = True, needs: tuple[str, ...] = ()):
    """An example on `world` ranks."""
    marks = [pytest.mark.full] * full + [machine.needs(name) for name in needs]
    name = "-".join([script.removesuffix(".py"), str(world), *arguments])
    return pytest.param(script, world, arguments, id=name, marks=marks)


@pytest.mark.parametrize(
    "script, world, arguments",
    [
        case("plain_loop.py", 2, full=False),
        case("transformers_model.py", 2),
        case("trainer.py", 2, needs=("accelerate",)),
        case("trainer.py", 4, "2", needs=("accelerate",)),
        case("accelerate_loop.py", 2, needs=("accelerate",)),
        case("ray_job.py", 2, needs=("ray",)),
    ],
)
def test_examples_have_the_losses_of_one_process(script, world, arguments, tmp_path):
    one = losses_of(tmp_path, script, 1)
    assert len(one) >= 5 and one[0] > one[4]
    assert losses_of(tmp_path, script, world, *arguments) == pytest.approx(one, rel=1e-5)


@pytest.mark.full
def test_the_example_of_a_model_in_a_folder_runs(tmp_path):
    tiny_models.llama(vocab_size=256, max_position_embeddings=1024).save_pretrained(tmp_path / "model")
    losses = losses_of(tmp_path, "transformers_model.py", 2, str(tmp_path / "model"))
    assert len(losses) == 5 and losses[0] > losses[4]


def test_examples_are_short():
    assert len(SCRIPTS) == 5
    assert [name for name in SCRIPTS if len((EXAMPLES / name).read_text().splitlines()) >= 80] == []


def test_the_slurm_script_starts_a_job_that_the_command_line_accepts(tmp_path):
    """srun and scontrol are stood in for; the first prints what it is given."""
    for name, body in (("srun", 'printf "%s\\n" "$@"'), ("scontrol", "echo node1; echo node2")):
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    given = {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_ID": "17"}
    given |= {"SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "8", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    words = ["bash", str(EXAMPLES / "slurm.sh"), "--model", "DIR", "--data", "PATH"]
    done = subprocess.run(
        words, env=os.environ | given, capture_output=True, text=True, timeout=20, check=True
    )
    said = done.stdout.splitlines()
    assert said[1:3] == ["sparring", "train"]
    start = parse_command(Start, said[3:])
    launcher = start.launcher
    assert (launcher.nnodes, launcher.nproc_per_node, launcher.max_restarts) == (2, 8, 3)
    assert (launcher.rdzv_endpoint, launcher.rdzv_id) == ("node1:29500", "17")
    assert (start.settings.model, start.settings.data, start.settings.out) == ("DIR", "PATH", "runs/17")


# -- the mixin of Trainer -----------------------------------------------------------------------------


def rows_of(count: int, length: int = 96) -> list[dict[str, torch.Tensor]]:
    """The more labels the later the row; the first has none."""
    ids = torch.randint(VOCAB, (count, length), generator=torch.Generator().manual_seed(2))
    rows = [{"input_ids": row, "labels": row.clone()} for row in ids]
    for i, row in enumerate(rows):
        row["labels"][length * i // count :] = IGNORE
    return rows


def arguments(folder: Path, **options):
    from transformers import TrainingArguments

    given = dict(
        per_device_train_batch_size=1, gradient_accumulation_steps=3, max_steps=4, learning_rate=1e-2
    )
    given |= dict(logging_steps=1, save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True)
    return TrainingArguments(str(folder), **given | options)


def trainer_of(folder: Path, count: int = 12, trainer: dict | None = None, **options):
    """ContextParallelTrainer in one process, with small blocks and every visible tile."""
    from sparring.launch.trainer import ContextParallelTrainer

    cp = ContextParallel(None, pattern=Dense(), block_size=BLOCK)
    model, args = cp.attach(tiny_models.llama()), arguments(folder, **options)
    return ContextParallelTrainer(model, args, train_dataset=rows_of(count), cp=cp, **trainer or {})


def logged(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.full
@machine.needs("accelerate")
def test_the_mixin_has_the_losses_of_trainer_itself(tmp_path):
    """Micro-batches of unequal numbers of labels, one without any."""
    from transformers import Trainer

    original = Trainer(tiny_models.llama(), arguments(tmp_path / "one"), train_dataset=rows_of(12))
    original.train()
    trainer = trainer_of(tmp_path / "two")
    trainer.train()
    assert len(logged(trainer)) == 4
    assert logged(trainer) == pytest.approx(logged(original), rel=1e-5)


@machine.needs("accelerate")
def test_evaluation_is_the_mean_over_all_labels(tmp_path):
    """Though batches have unequal numbers of labels, and the last is short."""
    rows = rows_of(7)
    trainer = trainer_of(tmp_path, trainer={"eval_dataset": rows}, per_device_eval_batch_size=3)
    ids, labels = (torch.stack([row[name] for row in rows]) for name in ("input_ids", "labels"))
    with torch.no_grad():
        logits = tiny_models.llama()(ids).logits[:, :-1]
    expected = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE).item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    with pytest.raises(NotImplementedError, match="predict.*supported is evaluate"):
        trainer.predict(rows)


@pytest.mark.full
@machine.needs("accelerate")
def test_checkpoints_of_trainer_go_on(tmp_path):
    whole = trainer_of(tmp_path, save_strategy="steps", save_steps=2)
    whole.train()
    resumed = trainer_of(tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert logged(resumed) == pytest.approx(logged(whole), rel=1e-5)


def group(size: int, rank: int, shared: int) -> SimpleNamespace:
    """As much of a ContextParallel as says which rank this is."""
    everyone = SimpleNamespace(size=size, rank=rank)
    return SimpleNamespace(everyone=everyone, transport=SimpleNamespace(size=shared))


def dealt(rows: int, size: int, rank: int, shared: int, sampler=None) -> list[list[int]]:
    """The batches of 2 rows that a rank gets."""
    from accelerate.data_loader import prepare_data_loader

    from sparring.launch.trainer import deal_by_replica

    loader = DataLoader(range(rows), batch_size=2, sampler=sampler)
    prepared = prepare_data_loader(loader, num_processes=size, process_index=rank)
    return [batch.tolist() for batch in deal_by_replica(prepared, group(size, rank, shared))]


@machine.needs("accelerate")
def test_ranks_that_share_a_sequence_get_the_same_rows():
    assert [dealt(8, 4, rank, 2) for rank in range(4)] == [[[0, 1], [4, 5]]] * 2 + [[[2, 3], [6, 7]]] * 2
    assert [dealt(5, 2, rank, 2) for rank in range(2)] == [[[0, 1], [2, 3], [4]]] * 2


@machine.needs("accelerate")
def test_samplers_that_deal_rows_themselves_are_refused(tmp_path):
    sampler = DistributedSampler(range(8), num_replicas=4, rank=0)
    with pytest.raises(NotImplementedError, match="DistributedSampler.*leave that to Trainer"):
        dealt(8, 4, 0, 2, sampler)

    class Stream(IterableDataset):
        def __iter__(self):
            return iter(rows_of(8))

    trainer = trainer_of(tmp_path)
    trainer.train_dataset = Stream()
    with pytest.raises(NotImplementedError, match="an IterableDataset; supported"):
        trainer.get_train_dataloader()


@machine.needs("accelerate")
def test_evaluation_that_would_count_rows_twice_is_refused(tmp_path, monkeypatch):
    trainer = trainer_of(tmp_path, trainer={"eval_dataset": rows_of(7)}, per_device_eval_batch_size=2)
    trainer.cp = group(2, 0, 1)
    loader = SimpleNamespace(dataset=rows_of(7))
    monkeypatch.setattr("sparring.launch.trainer.deal_by_replica", lambda *_: loader)
    with pytest.raises(ValueError, match="7 rows to evaluate .* batches of 4 .*leave out 3"):
        trainer.get_eval_dataloader()


NOT_SUPPORTED = {
    "deepspeed": {"zero_stage": 3}, "fsdp": "full_shard", "parallelism_config": "cp", "fp16": True,
    "fp16_full_eval": True, "bf16_full_eval": True, "label_smoothing_factor": 0.1, "neftune_noise_alpha": 5.0,
    "split_batches": True, "dispatch_batches": True, "train_sampling_strategy": "batch_rebalance",
    "compute_loss_func": print, "compute_metrics": print, "preprocess_logits_for_metrics": print,
}  # fmt: skip


@machine.needs("accelerate")
@pytest.mark.parametrize("name", NOT_SUPPORTED)
def test_what_would_be_wrong_under_context_parallelism_is_refused_by_name(name):
    from sparring.launch.trainer import check

    given = {name: NOT_SUPPORTED[name]}
    args = SimpleNamespace(**given, accelerator_config=SimpleNamespace(**given))
    with pytest.raises(NotImplementedError, match=f"{name}=.* under context parallelism; .*leave it out"):
        check(SimpleNamespace(**given, args=args, cp=None))


@machine.needs("accelerate")
@pytest.mark.parametrize(
    "change, message",
    [
        ({"model": None}, "not attached; give Trainer the one that cp.attach"),
        ({"size": 4}, "cp knows 4 ranks and the job has 2"),
        ({"grad_reduce": "sum"}, 'grad_reduce is "sum" and DDP averages; .*"mean"'),
        ({"unused": None}, "ddp_find_unused_parameters must be False"),
        ({"gpus": 2}, "one process has 2 GPUs; start one for each"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    from sparring.launch.trainer import check

    model = torch.nn.Linear(1, 1)
    fits = {"model": model, "size": 2, "grad_reduce": "mean", "unused": False, "gpus": 1}

    def trainer(model, size, grad_reduce, unused, gpus):
        cp = SimpleNamespace(**vars(group(size, 0, 2)), model=model, grad_reduce=grad_reduce)
        args = SimpleNamespace(
            n_gpu=gpus, world_size=2, ddp_find_unused_parameters=unused, accelerator_config=SimpleNamespace()
        )
        return SimpleNamespace(args=args, cp=cp, model=fits["model"])

    check(trainer(**fits))
    with pytest.raises(ValueError, match=message):
        check(trainer(**fits | change))
