"""pytest --proof FILE: a log of every finished test, one line each; those that passed are not run again."""

from __future__ import annotations

import csv
import functools
import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import torch

FIELDS = ("test", "outcome", "seconds", "reason", "world", "errors", "machine")


def read(path: Path) -> dict[str, dict[str, str]]:
    """The last line of each test in a log, by its id; nothing if there is no log."""
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        return {row["test"]: row for row in csv.DictReader(file, FIELDS)}


@functools.cache
def machine() -> str:
    """What computes here, e.g. 'Python 3.11.7, torch 2.13.0+cpu, triton 3.6.0, no GPU'."""
    try:
        triton = f"triton {version('triton')}"
    except PackageNotFoundError:
        triton = "no triton"
    count = torch.cuda.device_count()
    gpus = f"{count} x {torch.cuda.get_device_name(0)}" if count else "no GPU"
    return f"Python {platform.python_version()}, torch {torch.__version__}, {triton}, {gpus}"


class ProofLog:
    """The plugin. path: the log, or None in a worker of pytest-xdist. passed: ids of tests to leave out."""

    def __init__(self, path: Path | None, passed: list[str]):
        self.path, self.passed = path, set(passed)
        self.reports: dict[str, list] = {}

    def pytest_collection_modifyitems(self, config, items):
        done = [item for item in items if item.nodeid in self.passed]
        if done:
            config.hook.pytest_deselected(items=done)
            items[:] = [item for item in items if item.nodeid not in self.passed]

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node):
        """pytest-xdist: a worker leaves out the same tests, however late it starts."""
        node.workerinput["passed"] = sorted(self.passed)

    def pytest_runtest_logreport(self, report):
        if self.path is None:
            return
        self.reports.setdefault(report.nodeid, []).append(report)
        if report.when == "teardown":
            line = _line(self.reports.pop(report.nodeid))
            with self.path.open("a", newline="") as file:
                csv.DictWriter(file, FIELDS).writerow(line)


def _line(reports: list) -> dict:
    """What the reports of set-up, call and tear-down of one test say together."""
    outcomes = [report.outcome for report in reports]
    outcome = next((x for x in ("failed", "skipped") if x in outcomes), "passed")
    noted = dict(pair for report in reports for pair in report.user_properties)
    return {
        "test": reports[0].nodeid,
        "outcome": outcome,
        "seconds": f"{sum(report.duration for report in reports):.2f}",
        "reason": "" if outcome == "passed" else _reason(reports[outcomes.index(outcome)]),
        "world": noted.get("world") or "",
        "errors": json.dumps(noted.get("errors", {})),
        "machine": machine(),
    }


def _reason(report) -> str:
    if report.skipped:
        return report.longrepr[2].removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    return (crash.message if crash else str(report.longrepr)).splitlines()[0][:200]
