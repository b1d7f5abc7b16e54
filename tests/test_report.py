"""launch/metrics.py, progress.py, summary.py, report.py, pictures.py: what a run writes down, and shows."""

import json

import matplotlib.image
import numpy as np
import pytest
from matplotlib.figure import Figure

from sparring.launch.config import TrainConfig
from sparring.launch.metrics import MetricsWriter, read_metrics
from sparring.launch.pictures import draw_blocks, draw_layouts, draw_work
from sparring.launch.progress import ProgressReport, number, progress_text
from sparring.launch.report import main, write_report
from sparring.launch.summary import summarize

STEPS = 12


def fill(path, world=2, layers=3, kinds=("train", "dense", "local")):
    writer = MetricsWriter(path)
    for kind in kinds:
        for step in range(STEPS):
            row = {"loss": 5.0 - 0.2 * step, "density": 0.25, "recall": None if step % 2 else 0.9}
            row |= {"worker_imbalance": 1.1, "step_imbalance": 1.2, "layout": "zigzag"}
            row |= {"predicted_worker_imbalance": 1.05 if step > 1 else None, "exposed": 0.03}
            row |= {"predicted_step_imbalance": None, "bytes": 3 << 20, "least_bytes": 1 << 20}
            row |= {"seconds": 0.5, "tokens_per_second": 100.0 + step, "peak_memory": 1.0 + step}
            row |= {"model_tflops": 3.0, "attention_tflops": 1.0, "straggler": 1, "straggler_wait": 0.25}
            writer.write(kind, step, **row)
    for step in range(STEPS):
        imbalance = {"worker_imbalance": [1.2] * layers, "step_imbalance": [1.3] * layers}
        writer.write("layers", step, density=[0.3] * layers, recall=[0.9] * layers, **imbalance)
    for row in weighed(world):
        writer.write("work", STEPS - 1, **row)
    writer.close()


def weighed(world=2):
    """Rows of three layouts, the second the one in use, the third the slowest."""
    work = np.tril(np.ones((world, world + 1)))
    held = {"rank_of_block": [*range(world)] * 3, "work_of_block": [float(n) for n in range(3 * world)]}
    return [
        {"layout": "contiguous", "chosen": False, "work": work.tolist()},
        {"layout": "zigzag", "chosen": True, "work": (0.5 * np.ones_like(work)).tolist()} | held,
        {"layout": "striped", "chosen": False, "work": (np.eye(*work.shape) + work).tolist()},
    ]


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
    assert all("zigzag  left 0:0" in line for line in lines[1:-1]) and lines[-1].endswith("zigzag")
    ProgressReport("train", 10, active=False).update(0, {"loss": 1.0})
    assert capsys.readouterr().out == ""


def test_progress_is_a_bar_above_all_numbers_on_a_terminal(monkeypatch, capsys):
    """Numbers that one line does not hold stand on the next."""
    for name, value in {"FORCE_COLOR": "1", "TERM": "xterm", "COLUMNS": "50"}.items():
        monkeypatch.setenv(name, value)
    progress = ProgressReport("train", 10)
    shown = {"loss": 1.25, "tokens_per_second": 1e5, "model_tflops": 312.5, "attention_tflops": 0.0125}
    progress.update(0, shown | {"density": 0.25, "recall": 0.5, "peak_memory": 77.125, "layout": "zigzag"})
    progress.close()
    output = " ".join(capsys.readouterr().out.split())
    words = ["1/10", "loss 1.2500", "tok/s 100,000", "312.5 TFLOP/s", "0.0125 TFLOP/s", "0.250", "0.500"]
    assert [word for word in [*words, "77.12 GiB", "zigzag"] if word not in output] == []


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "None"), (True, "True"), (1234567, "1,234,567"), (0.5, "0.5000"), (4e-5, "4e-05"), (0.0, "0")]
    + [(12345.6, "12,346"), (-0.25, "-0.2500"), ("zigzag", "zigzag")],
)
def test_numbers_are_shown_with_the_digits_that_matter(value, text):
    assert number(value) == text


def test_what_was_not_measured_is_not_shown():
    assert progress_text({"loss": 2.0, "density": None}) == "loss 2.0000"


def test_summary_holds_the_promised_values(tmp_path):
    fill(tmp_path / "metrics.jsonl")
    config = TrainConfig(steps=STEPS, warmup=0)
    metrics = tmp_path / "metrics.jsonl"
    summary = summarize(config, metrics, world_size=2, parameters=10, context=4000.0, padding=0.25)
    assert summary["loss_first"] == 5.0
    assert summary["loss_last"] == pytest.approx(2.8)  # the last tenth: one step of twelve
    assert summary["dense_loss_last"] == summary["local_loss_last"] == summary["loss_last"]
    assert summary["recall"] == pytest.approx(0.9)  # of the steps that measured it
    assert summary["tokens_per_second"] == 105.5
    expected = {"steps": STEPS, "seq_len": 8192, "mean_visible_context": 4000.0, "world_size": 2}
    expected |= {"pattern": "vertical-slash", "density": 0.25, "worker_imbalance": 1.1}
    expected |= {"predicted_worker_imbalance": pytest.approx(1.05), "predicted_step_imbalance": None}
    expected |= {"straggler": 1, "straggler_wait": 0.25, "peak_memory": float(STEPS)}
    expected |= {"model_tflops": 3.0, "attention_tflops": 1.0}
    expected |= {"bytes": 3 << 20, "least_bytes": 1 << 20, "exposed": pytest.approx(0.03)}
    assert summary.items() >= expected.items()
    assert json.loads(json.dumps(summary)) == summary


@pytest.mark.parametrize(("world", "layers"), [(1, 1), (8, 16)])
def test_report_is_drawn(tmp_path, world, layers):
    fill(tmp_path / "metrics.jsonl", world, layers)
    (tmp_path / "summary.json").write_text(json.dumps({"pattern": "dense", "density": 1.0}))
    main([str(tmp_path)])
    path = tmp_path / "report.png"
    picture = matplotlib.image.imread(path)
    assert min(picture.shape[:2]) > 500
    assert len((tmp_path / "report.html").read_bytes()) > path.stat().st_size  # it is in there
    lower = picture[picture.shape[0] * 2 // 3 :, :, :3]
    assert len(np.unique(lower.reshape(-1, 3), axis=0)) > 20  # the heat maps are there


def test_heat_maps_share_one_scale_and_show_totals():
    rows = weighed(4)[:2]
    grid = Figure().subplots(1, 2)
    draw_work(grid, rows)
    images = [axes.get_images()[0] for axes in grid]
    assert [image.get_clim() for image in images] == [(0, 1)] * 2
    for axes, image, row in zip(grid, images, rows, strict=True):
        assert np.array_equal(image.get_array(), row["work"])
        shown = {text.get_text().strip() for text in axes.texts}
        assert {f"{sum(line):,.0f}" for line in row["work"]} | {"total"} <= shown
        assert row["layout"] in axes.get_title()


def test_the_worst_layout_stands_beside_the_chosen_one():
    figure = Figure()
    draw_layouts(figure, weighed(4))
    titles = [axes.get_title() for axes in figure.axes]
    before, after = (title.split("\n")[0] for title in titles if title.startswith("work, "))
    assert before == "work, striped (the worst weighed)" and after == "work, zigzag (chosen)"
    figure = Figure()
    draw_layouts(figure, weighed(4)[1:2])  # nothing else was weighed
    assert sum(axes.get_title().startswith("work, ") for axes in figure.axes) == 1


def test_blocks_are_drawn_in_the_lane_of_their_rank_as_high_as_their_work():
    axes = Figure().subplots()
    draw_blocks(axes, [1, 0, 2, 1], [4.0, 2.0, 0.0, 1.0], 3)
    blocks = [np.array(line) for line in axes.collections[0].get_segments()]
    assert [line[0, 0] for line in blocks] == [0, 1, 2, 3]
    assert [line[1, 1] for line in blocks] == [1.5, 0.5, 2.5, 1.5]  # the bottom of the lane
    heights = [line[1, 1] - line[0, 1] for line in blocks]
    assert heights == pytest.approx([0.9, 0.45, 0.05, 0.225])


def test_a_run_of_an_older_version_is_drawn(tmp_path):
    """Its rows say nothing of blocks, predictions and bytes."""
    writer = MetricsWriter(tmp_path / "metrics.jsonl")
    writer.write("train", 0, loss=5.0, worker_imbalance=1.1, step_imbalance=1.2)
    for row in weighed():
        writer.write("work", 0, **{name: row[name] for name in ("layout", "chosen", "work")})
    writer.close()
    assert write_report(tmp_path).stat().st_size > 10_000


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
