"""The seed of this run's sample, skips, poisoned memory, and what a test leaves for reports and the proof."""

from __future__ import annotations

import random
from pathlib import Path

import machine
import poison
import proof_log
import pytest
import sampling
import tolerance


def pytest_addoption(parser):
    parser.addoption("--draw", type=int, metavar="SEED", help="repeat the sample of cases that a run drew")
    parser.addoption(
        "--proof", type=Path, metavar="FILE", help="log tests there; leave out those that passed"
    )


def pytest_configure(config):
    draw, path = config.getoption("--draw"), config.getoption("--proof")
    from_controller = getattr(config, "workerinput", None)  # in a worker of pytest-xdist
    if from_controller is not None:
        sampling.seed = from_controller["draw"]
        config.pluginmanager.register(proof_log.ProofLog(None, from_controller.get("passed", [])))
    else:
        sampling.seed = random.SystemRandom().randrange(10**6) if draw is None else draw
        if path is not None:
            passed = [test for test, row in proof_log.read(path).items() if row["outcome"] == "passed"]
            config.pluginmanager.register(proof_log.ProofLog(path, passed))


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node):
    """pytest-xdist: all workers collect the same cases."""
    node.workerinput["draw"] = sampling.seed


def pytest_report_header():
    return f"sample of cases: fixed, and drawn with seed {sampling.seed} (again: --draw {sampling.seed})"


@pytest.hookimpl(tryfirst=True)  # before -m looks at marks
def pytest_collection_modifyitems(items):
    for item in items:
        if any("gpu" in name for mark in item.iter_markers("needs") for name in mark.args):
            item.add_marker("gpu")


def pytest_runtest_setup(item):
    for mark in item.iter_markers("needs"):
        for name in mark.args:
            if reason := machine.lacks(name):
                pytest.skip(reason)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Notes, for the report of the test, its world size and its largest errors."""
    tolerance.drain()
    try:
        return (yield)
    finally:
        case = item.callspec.params if hasattr(item, "callspec") else {}
        item.user_properties.append(("world", case.get("world")))
        item.user_properties.append(("errors", tolerance.drain()))


@pytest.fixture
def poisoned():
    """Memory that was not initialised holds NaN. For tests of operations: usefixtures("poisoned")."""
    with poison.poisoned():
        yield
