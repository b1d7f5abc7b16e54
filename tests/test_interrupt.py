"""A job that is told to end finishes its step, saves, and goes on later, on any number of ranks."""

import os
import signal

import pool
import pytest
from launched import launch
from training import SMALL, config_of, losses, trace, words_of

from sparring.launch import signals
from sparring.launch import train as job
from sparring.launch.signals import Stop, orderly_signals


def until(config, end):
    """Train on this rank; the last rank is told to end in step `end`. The exit code, 0 after all steps."""
    stop, step = Stop(), job.train_step

    def told(config, world, trainee, at):
        if at == end and world.rank == world.size - 1:
            stop.number = signal.SIGTERM
        return step(config, world, trainee, at)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "train_step", told)
        try:
            job.run(config, stop=stop)
        except SystemExit as error:
            return error.code
        return 0


def train(world, config, end=-1):
    """On ranks of the pool; what each exited with, once."""
    (code,) = set(pool.run(world, until, config, end, detail=False))
    return code


def latest(config):
    return (job.checkpoints(config) / "latest").read_text().strip()


@pytest.mark.full  # test_checkpoint_sharded.py loads on other numbers of ranks
def test_a_job_goes_on_on_other_numbers_of_ranks(tmp_path):
    """2 ranks, then 4 of which two groups share the rows of a step, then 1: the losses of one rank."""
    settings = {"pattern": "dense", "steps": 6, "save_every": 100, "resume": True}
    together, apart = settings | {"batch": 2}, settings | {"dp": 2}
    whole = config_of(tmp_path, "whole", **together)
    assert train(1, whole) == 0
    assert train(2, config_of(tmp_path, "parts", **together), end=1) == 128 + signal.SIGTERM
    assert latest(config_of(tmp_path, "parts")) == "step-000002"
    assert train(4, config_of(tmp_path, "parts", **apart), end=3) == 128 + signal.SIGTERM
    assert latest(config_of(tmp_path, "parts")) == "step-000004"
    assert train(1, config_of(tmp_path, "parts", **together)) == 0
    found, expected = losses(tmp_path / "parts"), losses(tmp_path / "whole")
    assert len(found) == 6 and found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("number", "world"),
    [
        (signal.SIGTERM, 2),
        pytest.param(signal.SIGINT, 2, marks=pytest.mark.full),
        pytest.param(signal.SIGINT, 1, marks=pytest.mark.full),
        pytest.param(signal.SIGTERM, 1, marks=pytest.mark.full),
    ],
)
def test_a_signal_lets_the_job_save_and_loses_no_step(number, world, tmp_path):
    """Sparse: on as many ranks the trace is that of a job that nobody interrupted, bit for bit."""
    config = config_of(tmp_path, "told", steps=10**5, save_every=10**5)
    words = words_of({n: getattr(config, n) for n in (*SMALL, "data", "out")})
    told = launch(tmp_path, world, *words, target="sparring.launch.train", interrupt=number)
    assert told.orphans == [] and told.leaked == set() and "CheckpointError" not in told.stderr
    if world == 1:
        assert told.returncode == 128 + number
    steps = len(trace(config.out))
    assert steps > 2 and latest(config) == f"step-{steps:06d}"

    resumed = config_of(tmp_path, "told", steps=10**5, save_every=10**5, resume=True)
    assert train(world, resumed, end=steps + 1) == 128 + signal.SIGTERM
    whole = config_of(tmp_path, "whole", steps=10**5, save_every=10**5)
    assert train(world, whole, end=steps + 1) == 128 + signal.SIGTERM
    assert len(trace(whole.out)) == steps + 2
    assert trace(config.out) == trace(whole.out)


@pytest.fixture
def without_limit(monkeypatch):
    """Signals of this process do not end it in time."""
    monkeypatch.setattr(signals, "_end_in_time", lambda *_: None)


def test_a_signal_that_is_postponed_is_noted_and_counts_in_the_end(without_limit):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as caught, orderly_signals() as stop:
        with stop.postpone():
            os.kill(os.getpid(), signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)  # and again, as torchrun does
            assert stop.number == signal.SIGTERM
        raise AssertionError("it did not count")
    assert caught.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_signal_that_is_not_postponed_raises_at_once(without_limit):
    with pytest.raises(SystemExit) as caught, orderly_signals():
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("it did not raise")
    assert caught.value.code == 130
