"""launch/prefetch.py: the batches, errors and position of the data, though a thread is ahead."""

import threading
import time

import machine
import numpy as np
import pytest
import torch

from sparring.launch.corpus import Corpus
from sparring.launch.data import PackedText
from sparring.launch.packing import pack
from sparring.launch.prefetch import DEPTH, Prefetch

CPU = torch.device("cpu")


def make(count=10, **settings):
    rows = pack(Corpus.of([np.arange(count * 8)], vocab_size=2**16), 8)
    return PackedText(rows, batch=3, **settings)


def ahead(data, timeout=20.0):
    return Prefetch(data, CPU, timeout=timeout)


def take(data, count):
    return [next(data)["input_ids"].tolist() for _ in range(count)]


def threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def until(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    assert threads() == []


class Watched(PackedText):
    """Counts what is made, and does as told before it makes batch `at`."""

    def __init__(self, at=-1, before=None):
        inner = make()
        super().__init__(inner.rows, batch=3)
        self.made, self.at, self.before = 0, at, before

    def __next__(self):
        self.made += 1
        if self.made == self.at:
            self.before()
        return super().__next__()


def fail():
    raise OSError("the disk is gone")


def test_batches_and_positions_are_those_of_the_data_itself():
    plain, data = make(), ahead(make())
    assert data.state_dict() == plain.state_dict()
    for _ in range(9):
        assert take(data, 1) == take(plain, 1)
        assert data.state_dict() == plain.state_dict()  # not that of the batches made ahead
    data.close()


def test_the_thread_is_a_bounded_number_of_batches_ahead():
    watched = Watched()
    data = ahead(watched)
    time.sleep(0.05)
    assert watched.made == 0  # nothing before the first is asked for
    for taken in range(1, 4):
        take(data, 1)
        until(lambda: watched.made == taken + DEPTH)  # noqa: B023
        time.sleep(0.02)
        assert watched.made == taken + DEPTH
    data.close()


def test_going_on_elsewhere_forgets_what_was_made_ahead():
    plain = make()
    take(plain, 5)
    state, rest = plain.state_dict(), take(plain, 6)
    for taken in (0, 1, 7):
        data = ahead(make())
        take(data, taken)
        data.load_state_dict(state)
        assert data.state_dict() == state
        assert take(data, 6) == rest
        data.close()


@pytest.mark.parametrize("at", [1, 2, 5])
def test_an_error_of_the_thread_is_raised_where_its_batch_is_due(at):
    data, plain = ahead(Watched(at, fail)), make()
    assert take(data, at - 1) == take(plain, at - 1)
    state = data.state_dict()
    with pytest.raises(OSError, match="the disk is gone"):
        next(data)
    assert data.state_dict() == state == plain.state_dict()
    with pytest.raises(OSError, match="the disk is gone"):
        next(data)  # never a batch after the one that is missing


def test_closing_waits_for_the_batch_that_is_made_and_may_be_repeated():
    going = threading.Event()
    data = ahead(Watched(2, lambda: (going.set(), time.sleep(0.1))))
    take(data, 1)
    assert going.wait(20)
    data.close()
    assert threads() == []
    data.close()
    with pytest.raises(RuntimeError, match="shutdown"):
        next(data)
    ahead(make()).close()  # one that never began


def test_a_batch_that_takes_too_long_is_an_error_and_no_hang():
    release = threading.Event()
    data = ahead(Watched(1, lambda: release.wait(20)), timeout=0.1)
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        next(data)
    data.close()
    assert time.monotonic() - began < 5
    release.set()
    until(lambda: threads() == [])


@machine.needs("gpu")
def test_batches_for_a_gpu_are_pinned_and_arrive():
    device = torch.device("cuda", torch.cuda.current_device())
    data, plain = Prefetch(make(), device), make()
    for _ in range(5):
        batch, expected = next(data), next(plain)
        for name, tensor in batch.items():
            assert tensor.is_pinned()
            assert torch.equal(tensor.to(device, non_blocking=True).cpu(), expected[name])
    data.close()
