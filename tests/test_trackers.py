"""launch/trackers.py, environment.py, profiling.py: what a run tells others, and what it was."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.profiler import record_function

from sparring.launch import train as job
from sparring.launch.config import TrainConfig
from sparring.launch.environment import describe_environment, read_commit
from sparring.launch.metrics import MetricsWriter
from sparring.launch.profiling import profiled
from sparring.launch.trackers import check_tracker, open_tracker


class Kept:
    """A tracker that keeps what it is told."""

    def __init__(self):
        self.told, self.closed = [], False

    def log(self, step, numbers):
        self.told.append((step, numbers))

    def close(self):
        self.closed = True


def write_rows(path, tracker, **options):
    writer = MetricsWriter(path, tracker=tracker, **options)
    writer.write("train", 3, loss=2.5, recall=None, layout="zigzag", headers=2, done=True)
    writer.write("layers", 3, density=[0.5, 0.25])
    writer.write("work", 3, work=[[1.0]], chosen=True)
    writer.close()


def test_a_tracker_is_told_the_numbers_of_each_row_and_is_closed(tmp_path):
    tracker = Kept()
    write_rows(tmp_path / "metrics.jsonl", tracker)
    layers = {"layers/density/0": 0.5, "layers/density/1": 0.25}
    assert tracker.told == [(3, {"train/loss": 2.5, "train/headers": 2}), (3, layers), (3, {})]
    assert tracker.closed


class Writer:
    """Stands for the writer of TensorBoard."""

    def __init__(self, folder, purge_step):
        self.folder, self.purge_step, self.scalars, self.closed = folder, purge_step, [], False
        Writer.last = self

    def add_scalar(self, name, value, step):
        self.scalars.append((name, value, step))

    def flush(self):
        pass

    def close(self):
        self.closed = True


def test_tensorboard_gets_a_scalar_for_each_number(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    write_rows(tmp_path / "metrics.jsonl", open_tracker("tensorboard", tmp_path, {}, 7))
    writer = Writer.last
    assert (writer.folder, writer.purge_step, writer.closed) == (str(tmp_path / "tensorboard"), 7, True)
    assert ("train/loss", 2.5, 3) in writer.scalars and ("layers/density/1", 0.25, 3) in writer.scalars


def test_wandb_gets_settings_and_rows_with_their_step(tmp_path, monkeypatch):
    rows, given = [], {}
    run = SimpleNamespace(
        log=rows.append,
        finish=lambda: rows.append("finished"),
        define_metric=lambda *names, **options: given.update(options),
    )
    wandb = SimpleNamespace(init=lambda **options: given.update(options) or run)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    write_rows(tmp_path / "metrics.jsonl", open_tracker("wandb", tmp_path, {"lr": 1.0}, 0))
    assert given["config"] == {"lr": 1.0} and given["step_metric"] == "step"
    assert given["group"] == tmp_path.name and given["dir"] == str(tmp_path)
    assert rows[0] == {"step": 3, "train/loss": 2.5, "train/headers": 2} and rows[-1] == "finished"


def test_nothing_is_tracked_unless_asked():
    assert TrainConfig().tracker == "none"
    check_tracker("none")
    assert open_tracker("none", None, {}, 0) is None


def test_a_tracker_that_is_not_installed_or_unknown_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("sparring.launch.trackers.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="--tracker wandb needs the package wandb; pip install wandb"):
        job.run(TrainConfig(tracker="wandb", out=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="tracker='mlflow' must be one of .*tensorboard"):
        TrainConfig(tracker="mlflow")


# -- what the run was made with -----------------------------------------------------------------------


def test_the_environment_names_versions_and_processes():
    found = describe_environment(4)
    assert found["processes"] == 4 and found["torch"] == torch.__version__
    assert json.loads(json.dumps(found)) == found


def test_the_commit_is_read_from_files(tmp_path):
    git = tmp_path / ".git"
    assert read_commit(tmp_path) is None
    (git / "refs/heads").mkdir(parents=True)
    (git / "HEAD").write_text("ref: refs/heads/main\n")
    (git / "packed-refs").write_text("# pack-refs\naaa refs/heads/other\nbbb refs/heads/main\n")
    assert read_commit(tmp_path) == "bbb"
    (git / "refs/heads/main").write_text("ccc\n")
    assert read_commit(tmp_path) == "ccc"
    (git / "HEAD").write_text("ddd\n")
    assert read_commit(tmp_path) == "ddd"


def test_a_profiled_part_leaves_a_trace_with_the_names_of_its_spans(tmp_path):
    path = tmp_path / "profile" / "rank-0.json"
    with profiled(path), record_function("sparring.forward"):
        torch.ones(8).sum()
    events = json.loads(path.read_text())["traceEvents"]
    assert "sparring.forward" in {event["name"] for event in events}
    with profiled(None):
        pass


@pytest.mark.parametrize("step", [-1, 40])
def test_a_step_that_is_never_taken_cannot_be_profiled(step):
    with pytest.raises(ValueError, match=f"profile_step={step} and steps=40"):
        TrainConfig(profile_step=step)
