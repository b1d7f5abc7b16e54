"""launch/ray_train.py: the same job on Ray Train's workers."""

from __future__ import annotations

import importlib
import os
import pickle
import pkgutil
import random
import threading
import time
import uuid
from dataclasses import replace
from pathlib import Path

import machine
import pytest
import replayed
import sampling
from launched import MARK
from training import Killer, config_of, losses, marked, trace

import sparring.balance
import sparring.cp
import sparring.kernels
import sparring.launch
from sparring.launch import train as job

pytestmark = machine.needs("ray")
SAVED = {"save_every": 2, "steps": 16, "keep": 1}


@pytest.fixture(scope="module")
def fit(tmp_path_factory):
    """fit of launch/ray_train.py on one cluster for all tests, which leaves no process behind."""
    import ray

    from sparring.launch import ray_train

    mark, before = uuid.uuid4().hex, dict(os.environ)
    os.environ |= {MARK: mark, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "RAY_TMPDIR": "/tmp"}
    try:
        ray_train.connect(4, config_of(tmp_path_factory.mktemp("ray"), "none"), None, False)
        ray.cloudpickle.register_pickle_by_value(replayed)
        ray_train.fit.mark = mark
        yield ray_train.fit
    finally:
        ray.shutdown()
        os.environ.clear()
        os.environ |= before
    limit = time.monotonic() + 20
    while marked(mark) and time.monotonic() < limit:
        time.sleep(0.1)
    assert [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in marked(mark) if pid != os.getpid()] == []


def test_two_workers_have_the_losses_of_one_process(fit, tmp_path):
    one = config_of(tmp_path, "one", pattern="dense", steps=6)
    job.run(one)
    two = replace(one, out=str(tmp_path / "two"))
    fit(two, 2)
    assert losses(two.out) == pytest.approx(losses(one.out), rel=1e-5)
    assert (tmp_path / "two" / "summary.json").exists() and (tmp_path / "two" / "config.json").exists()


@pytest.mark.full
@pytest.mark.parametrize("pattern", ["dense", "vertical-slash"])
@pytest.mark.parametrize("world", [2, 4])
def test_workers_have_the_losses_of_one_process(pattern, world, fit, tmp_path):
    """Plans of values are those of the one process."""
    one = config_of(tmp_path, "one", pattern=pattern)
    replayed.train(one)
    many = replace(one, out=str(tmp_path / "many"))
    fit(many, world, train=replayed.train)
    assert len(losses(many.out)) == one.steps
    assert losses(many.out) == pytest.approx(losses(one.out), rel=1e-5)


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kills", [1, 5])
def test_killed_workers_do_not_change_the_trace(kills, fit, tmp_path):
    """All workers start again from the last complete checkpoint, though nobody asked to resume."""
    whole = config_of(tmp_path, "whole", **SAVED)
    fit(whole, 2)
    config = replace(whole, out=str(tmp_path / "killed"))
    chance = random.Random(f"{sampling.seed} ray {kills}")
    steps = sorted(chance.sample(range(1, config.steps - 3), kills))
    picks = [chance.randrange(2) for _ in steps]
    killer = Killer(config.out, steps, lambda: marked(fit.mark, _is_worker), picks)
    ended = threading.Event()

    def watch():
        while not ended.wait(0.005):
            killer()

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        fit(config, 2, max_failures=kills)
    finally:
        ended.set()
        watcher.join()
    assert killer.killed == kills
    assert trace(config.out) == trace(whole.out)


def _is_worker(environment: bytes, line: bytes) -> bool:
    return line.startswith(b"ray::RayTrainWorker")


@pytest.mark.full
def test_an_error_of_a_worker_arrives_with_its_type_and_rank(fit, tmp_path):
    import ray.train

    config = config_of(tmp_path, "diverged", lr=float("inf"), warmup=0, pattern="dense")
    with pytest.raises(ray.train.WorkerGroupError) as error:
        fit(config, 2)
    failures = error.value.worker_failures
    assert set(failures) == {0, 1}
    for failure in failures.values():
        assert isinstance(failure, FloatingPointError) and "the loss of step 1 is nan" in str(failure)


# -- what is refused ----------------------------------------------------------------------------------


def test_elastic_workers_are_refused(tmp_path):
    from sparring.launch.ray_train import fit

    with pytest.raises(ValueError, match=r"num_workers=\(2, 4\) is elastic.*one number, such as 4"):
        fit(config_of(tmp_path, "out"), (2, 4))
    with pytest.raises(ValueError, match="3 workers do not divide into dp=2 groups"):
        fit(config_of(tmp_path, "out", dp=2), 3)


@pytest.mark.parametrize("mode", ["disabled", None])
def test_clusters_without_authentication_are_refused(mode, tmp_path, monkeypatch):
    import ray

    from sparring.launch.ray_train import fit

    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    if mode:
        monkeypatch.setenv("RAY_AUTH_MODE", mode)
    monkeypatch.setattr(ray, "init", lambda *_, **__: pytest.fail("joined"))
    message = f"RAY_AUTH_MODE={mode or 'unset'}: the cluster at 10.0.0.1:6379 .*--allow-unauthenticated-ray"
    with pytest.raises(ValueError, match=message):
        fit(config_of(tmp_path, "out"), 2, address="10.0.0.1:6379")


def test_a_cluster_is_joined_with_a_token_or_where_that_is_allowed(tmp_path, monkeypatch, capsys):
    import ray

    from sparring.launch.ray_train import connect

    joined, config = [], config_of(tmp_path, "out")
    monkeypatch.setattr(ray, "init", joined.append)
    for mode, allowed in (("token", False), ("disabled", True)):
        monkeypatch.setenv("RAY_AUTH_MODE", mode)
        connect(2, config, "10.0.0.1:6379", allowed)
        assert f"Ray at 10.0.0.1:6379, authentication: {mode}" in capsys.readouterr().out
    assert joined == ["10.0.0.1:6379"] * 2


# -- errors -------------------------------------------------------------------------------------------


def exceptions() -> set[type]:
    """Every exception class of the library whose module can be imported here."""
    found = set()
    for package in (sparring.balance, sparring.cp, sparring.kernels, sparring.launch):
        for each in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if "triton" not in each.name and "hopper" not in each.name:
                module = importlib.import_module(each.name)
                found |= {
                    x for x in vars(module).values() if isinstance(x, type) and issubclass(x, Exception)
                }
    return {x for x in found if x.__module__.startswith("sparring.")}


def test_every_exception_of_the_library_travels_between_processes():
    kinds = exceptions()
    assert {"RingTimeoutError", "RingDesyncError", "CheckpointError"} <= {x.__name__ for x in kinds}
    for kind in kinds:
        error = kind("what happened")
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is kind and str(again) == str(error) and vars(again) == vars(error)
