"""launch/metrics.py, summary.py and report.py: what a run writes down, and what is made of it."""

import json

import matplotlib.image
import numpy as np
import pytest

from sparring.launch.config import TrainConfig
from sparring.launch.metrics import MetricsWriter, ProgressReport, progress_text, read_metrics
from sparring.launch.report import main, write_report
from sparring.launch.summary import summarize

STEPS = 12


def fill(path, world=2, layers=3, kinds=("train", "dense", "local")):
    writer = MetricsWriter(path)
    for kind in kinds:
        for step in range(STEPS):
            row = {"loss": 5.0 - 0.2 * step, "density": 0.25, "recall": None if step % 2 else 0.9}
            row |= {"worker_imbalance": 1.1, "step_imbalance": 1.2, "layout": "zigzag"}
            writer.write(kind, step, **row, tokens_per_second=100.0 + step)
    for step in range(STEPS):
        writer.write("layers", step, density=[0.3] * layers, recall=[0.9] * layers)
    for name in ("contiguous", "zigzag"):
        work = np.tril(np.ones((world, world + 1))).tolist()
        writer.write("work", STEPS - 1, layout=name, chosen=name == "zigzag", work=work)
    writer.close()


def test_rows_are_appended_and_flushed_at_once(tmp_path):
    path = tmp_path / "deep" / "metrics.jsonl"
    writer = MetricsWriter(path)
    writer.write("train", 0, loss=2.5)
    assert list(read_metrics(path)) == [{"kind": "train", "step": 0, "loss": 2.5}]
    writer.close()


def test_other_ranks_write_nothing(tmp_path):
    writer = MetricsWriter(tmp_path / "metrics.jsonl", active=False)
    writer.write("train", 0, loss=2.5)
    writer.close()
    assert list(tmp_path.iterdir()) == []


def test_a_resumed_run_keeps_the_main_rows_before_its_first_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    fill(path)
    with open(path, "a") as file:
        file.write('{"kind": "train", "st')  # a crash in the middle of a line
    MetricsWriter(path, start=5).close()
    assert [row["step"] for row in read_metrics(path, "train")] == list(range(5))
    assert [row["step"] for row in read_metrics(path, "layers")] == list(range(5))
    assert not list(read_metrics(path, "dense")) and not list(read_metrics(path, "work"))


def test_progress_is_plain_lines_without_a_terminal(capsys):
    progress = ProgressReport("train", 10, every=4)
    for step in range(10):
        progress.update(step, {"loss": 1.0 + step, "density": 0.25, "layout": "zigzag"})
    progress.close()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["1/10", "5/10", "9/10", "10/10"]
    assert lines[0].endswith("loss 1.0000  density 0.250  zigzag")
    ProgressReport("train", 10, active=False).update(0, {"loss": 1.0})
    assert capsys.readouterr().out == ""


def test_what_was_not_measured_is_not_shown():
    assert progress_text({"loss": 2.0, "density": None}) == "loss 2.0000"


def test_summary_holds_the_promised_values(tmp_path):
    fill(tmp_path / "metrics.jsonl")
    config = TrainConfig(steps=STEPS, warmup=0)
    summary = summarize(config, tmp_path / "metrics.jsonl", world_size=2, parameters=10, context=4000.0)
    assert summary["loss_first"] == 5.0
    assert summary["loss_last"] == pytest.approx(2.8)  # the last tenth: one step of twelve
    assert summary["dense_loss_last"] == summary["local_loss_last"] == summary["loss_last"]
    assert summary["recall"] == pytest.approx(0.9)  # of the steps that measured it
    assert summary["tokens_per_second"] == 105.5
    expected = {"steps": STEPS, "seq_len": 8192, "mean_visible_context": 4000.0, "world_size": 2}
    expected |= {"pattern": "vertical-slash", "density": 0.25, "worker_imbalance": 1.1}
    assert summary.items() >= expected.items()
    assert json.loads(json.dumps(summary)) == summary


@pytest.mark.parametrize(("world", "layers"), [(1, 1), (8, 16)])
def test_report_is_drawn(tmp_path, world, layers):
    fill(tmp_path / "metrics.jsonl", world, layers)
    (tmp_path / "summary.json").write_text(json.dumps({"pattern": "dense", "density": 1.0}))
    path = write_report(tmp_path)
    picture = matplotlib.image.imread(path)
    assert path.name == "report.png" and min(picture.shape[:2]) > 500
    lower = picture[picture.shape[0] * 2 // 3 :, :, :3]
    assert len(np.unique(lower.reshape(-1, 3), axis=0)) > 20  # the heat maps are there


def test_report_needs_nothing_but_training_rows(tmp_path):
    writer = MetricsWriter(tmp_path / "metrics.jsonl")
    writer.write("train", 0, loss=5.0)
    writer.close()
    assert write_report(tmp_path).stat().st_size > 10_000


def test_report_of_no_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no training steps"):
        write_report(tmp_path)
    with pytest.raises(SystemExit, match="holds no training steps"):
        main([str(tmp_path)])
