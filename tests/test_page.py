"""launch/page.py, compare.py: report.html is whole and escaped; runs side by side."""

import json
import re
from base64 import b64encode
from html.parser import HTMLParser
from io import StringIO

import matplotlib.image
import pytest
from matplotlib.figure import Figure
from rich.console import Console
from test_report import fill

from sparring.launch.compare import comparison, draw_comparison, labels
from sparring.launch.metrics import MetricsWriter, read_metrics
from sparring.launch.page import write_page
from sparring.launch.report import main

EVIL = "<script>alert(1)</script>\"'&"


def write_run(folder, **settings):
    fill(folder / "metrics.jsonl")
    (folder / "summary.json").write_text(json.dumps({"loss_last": 2.5, "steps": 12, "density": 0.25}))
    (folder / "config.json").write_text(json.dumps({"lr": 4e-5, "out": str(folder)} | settings))
    return folder


class Reader(HTMLParser):
    """Tags, what they load or link to, and text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.text = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href")]

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_needs_no_other_file_and_shows_everything(tmp_path):
    write_run(tmp_path, pattern="dense")
    writer = MetricsWriter(tmp_path / "metrics.jsonl", start=100)
    writer.write("decision", 11, text="exchange ring: given by the user")
    imbalance = {"worker_imbalance": [1.5, 1.25, 1.0], "step_imbalance": [2.0, 1.75, 1.0]}
    writer.write("layers", 12, density=[0.125, 0.5, 0.75], **imbalance)
    writer.close()
    (tmp_path / "environment.json").write_text(json.dumps({"torch": "2.13.0", "commit": None}))
    for name in ("checkpoints/step-000012", "checkpoints/step-000006"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "report.png").write_bytes(b"a picture")
    read = Reader(write_page(tmp_path).read_text())
    assert "script" not in read.tags and "link" not in read.tags
    picture, *links = read.links
    assert picture == "data:image/png;base64," + b64encode(b"a picture").decode()
    assert links == ["checkpoints/step-000006", "checkpoints/step-000012"]
    text = " ".join(" ".join(read.text).split())
    for words in ("loss last 2.5000", "lr 4e-05", "pattern dense", "torch 2.13.0", "given by the user"):
        assert words in text, words
    assert "0 0.1250 0.9000 1.5000 2.0000 1 0.5000 0.9000" in text  # recall of the step that measured it


def test_all_text_is_escaped(tmp_path):
    folder = write_run(tmp_path, data=EVIL)
    writer = MetricsWriter(folder / "metrics.jsonl", start=100)
    writer.write("decision", 11, text=EVIL)
    writer.close()
    (folder / "environment.json").write_text(json.dumps({EVIL: EVIL}))
    (folder / "checkpoints" / "step-<b>").mkdir(parents=True)
    text = write_page(folder).read_text()
    read = Reader(text)
    assert "script" not in read.tags and "b" not in read.tags
    assert " ".join(read.text).count(EVIL) == 4


def test_a_page_of_metrics_alone_is_written(tmp_path):
    fill(tmp_path / "metrics.jsonl")
    text = write_page(tmp_path).read_text()
    assert "<h2>layers" in text and "<h2>summary" not in text and "<img" not in text


def shown(runs):
    console = Console(width=150, record=True, file=StringIO())
    console.print(comparison(runs))
    lines = [re.split(r"\s*[\u2502\u2503]\s*", line) for line in console.export_text().splitlines()]
    return {cells[1]: cells[2:-1] for cells in lines if len(cells) > 3}


def test_runs_are_compared_by_what_they_reached_and_where_settings_differ(tmp_path):
    runs = []
    for name, lr in (("fast", 0.5), ("slow", 0.25)):
        (tmp_path / name).mkdir()
        runs.append(write_run(tmp_path / name, lr=lr, pattern="dense"))
    table = shown(runs)
    assert table["loss last"] == ["2.5000", "2.5000"] and table["recall"] == ["-", "-"]
    assert table["lr"] == ["0.5000", "0.2500"]
    assert "pattern" not in table and "out" not in table  # equal; not of the run itself
    main([*map(str, runs), "--out", str(tmp_path / "both.png")])
    assert min(matplotlib.image.imread(tmp_path / "both.png").shape[:2]) > 400


def test_curves_are_those_of_the_runs(tmp_path):
    fill(tmp_path / "metrics.jsonl")
    rows = list(read_metrics(tmp_path / "metrics.jsonl", "train"))
    old = [{"step": 0, "loss": 3.0}]  # of an older version: without times
    grid = Figure().subplots(1, 3)
    draw_comparison(grid, ["new", "old"], [rows, old])
    assert [len(axes.get_lines()) for axes in grid] == [2, 1, 1]
    assert list(grid[1].get_lines()[0].get_xdata()[:3]) == [0.5, 1.0, 1.5]
    assert [text.get_text() for text in grid[0].get_legend().get_texts()] == ["new  2.800", "old  3.000"]


def test_runs_of_equal_names_are_told_by_their_paths(tmp_path):
    assert labels([tmp_path / "a", tmp_path / "b"]) == ["a", "b"]
    assert labels([tmp_path / "a/x", tmp_path / "b/x"]) == [str(tmp_path / "a/x"), str(tmp_path / "b/x")]


def test_a_run_without_steps_is_not_compared(tmp_path):
    fill(tmp_path / "metrics.jsonl")
    with pytest.raises(SystemExit, match="empty.*holds no training steps"):
        main([str(tmp_path), str(tmp_path / "empty"), "--out", str(tmp_path / "both.png")])
