"""Nothing that goes wrong on one rank is silent, or a hang: raised, killed, stopped, late, out of step."""

from __future__ import annotations

import gc
import itertools
import os
import pickle
import re
import signal
import subprocess
import time
from dataclasses import dataclass, fields, replace

import fault_worker
import machine
import oracle
import pool
import pytest
import torch
import torch.distributed as dist
from fault_worker import BLOCK, Fault, Faulty, fail, inputs, logits, messages
from launched import launch
from sampling import pairwise
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint

from sparring.cp import ContextParallel, RingDesyncError, RingTimeoutError, run_threads
from sparring.cp.attention import ring_attention
from sparring.cp.errors import Place
from sparring.cp.link import Link
from sparring.cp.mesh import connect
from sparring.cp.report import find_straggler
from sparring.kernels.attention import steps
from sparring.launch.config import TrainConfig
from sparring.launch.world import join_world

PATIENCE = 2.0  # seconds that a rank of these tests waits for another
SLACK = 2.0  # seconds more until its error is there


def error_of(body):
    """The exception that body() raises, and the seconds until it does."""
    start = time.monotonic()
    try:
        body()
    except Exception as error:
        error.__traceback__ = error.__cause__ = error.__context__ = None
        return error, time.monotonic() - start
    return None, time.monotonic() - start


def in_process(name: str, patience: float, *args):
    """A body of this module on a rank of the pool."""
    mesh = init_device_mesh(fault_worker.device(), (dist.get_world_size(),), mesh_dim_names=("cp",))
    return globals()[name](connect(mesh, ("cp",), (), patience).ring, *args)


def on_ranks(where: str, world: int, body, *args, patience: float = PATIENCE) -> list:
    """body(transport, *args) on ranks that are threads, processes over gloo, or GPUs over NCCL."""
    if where == "threads":
        return run_threads(world, lambda transport: body(transport, *args), timeout=10 * PATIENCE)
    backend = {"gpus": "nccl"}.get(where, "gloo")
    return pool.run(world, in_process, body.__name__, patience, *args, backend=backend)


def mostly_full(few: list, *factors) -> list:
    """The product as pytest params, all but a few marked `full`: for tests that take seconds a case."""
    marks = pytest.mark.full
    return [pytest.param(*x, marks=() if x in few else marks) for x in itertools.product(*factors)]


# -- errors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [RingTimeoutError, RingDesyncError])
def test_errors_say_where_and_travel_between_processes(kind):
    error = kind("no keys from rank 1 within 10 s", rank=2, peer=1)
    assert str(error) == "rank 2: no keys from rank 1 within 10 s"
    error.place = Place(7, 3, "forward", 1, 3)
    for each in (error, pickle.loads(pickle.dumps(error))):
        assert type(each) is kind and isinstance(each, RuntimeError)
        assert str(each) == "rank 2: step 7, layer 3, forward hop 1 of 3: no keys from rank 1 within 10 s"
        place = (each.rank, each.step, each.layer, each.phase, each.hop, each.peer)
        assert place == (2, 7, 3, "forward", 1, 1)


# -- a rank that raises -------------------------------------------------------------------------------


def cp_of(transport, **options) -> ContextParallel:
    options = {"pattern": "dense", "layout": "zigzag", "block_size": BLOCK, "count_keys": 0} | options
    return ContextParallel(transport, **options)


def survivors(world: int, rank: int, number: int, error: type[Exception]) -> list:
    """What the ranks raise if one raises `error` before a message."""
    errors: list = [None] * world

    def body(transport):
        ring = Faulty(transport, number, lambda: fail(error)) if transport.rank == rank else transport
        cp = cp_of(ring)

        def train():
            fault_worker.step(cp)
            cp.report()

        errors[transport.rank] = error_of(train)[0]
        if errors[transport.rank] is not None:
            raise errors[transport.rank]

    with pytest.raises(error, match="injected"):  # the first failure, not what follows from it
        run_threads(world, body, timeout=60)
    return errors


def assert_survivors_name(errors: list, rank: int, number: int) -> None:
    world = len(errors)
    channel, hop = messages(world)[number]
    phase = "forward" if number < world else "backward"
    for survivor, error in enumerate(errors):
        if survivor != rank:
            assert isinstance(error, RingTimeoutError) and error.rank == survivor
            assert f"as rank {rank} failed: " in str(error)
    waiting = errors[(rank + 1) % world]
    assert (waiting.step, waiting.layer, waiting.phase, waiting.hop) == (0, 0, phase, hop)
    assert waiting.peer == rank and f"no {channel} from rank {rank}" in str(waiting)


@pytest.mark.parametrize("number", messages(4))
@pytest.mark.parametrize("rank", range(4))
def test_a_rank_that_raises_ends_all_others(rank, number):
    """Before any message of an attention: the next rank names the hop, the peer and the cause."""
    assert_survivors_name(survivors(4, rank, number, Fault), rank, number)


@pytest.mark.parametrize("number", messages(3))
def test_out_of_memory_on_one_rank_ends_all_others(number):
    assert_survivors_name(survivors(3, 1, number, torch.OutOfMemoryError), 1, number)


# -- a rank that is late ------------------------------------------------------------------------------


def train_late(transport, rank: int | None, seconds: float):
    """Output, gradients and report of the second step, in which one rank is late at every message."""
    late = Faulty(transport, -1, lambda: time.sleep(seconds))
    cp = cp_of(late)
    fault_worker.step(cp)  # compiles kernels and makes communicators
    late.before = 0 if transport.rank == rank else -1
    shard, out, grads = fault_worker.step(cp)
    return [cp.unshard(x, shard, dim=2) for x in (out, *grads)], cp.report()


@pytest.mark.parametrize(
    "where,world,rank,seconds",
    [
        pytest.param("gpus", 2, 1, 0.3, marks=machine.needs("two gpus")),
        ("threads", 2, 1, 0.3),
        ("processes", 3, 0, 0.3),
        pytest.param("processes", 3, 2, 3.0, marks=pytest.mark.full),
    ],
)
def test_a_straggler_changes_nothing_and_is_named(where, world, rank, seconds):
    (expected, _), *_ = on_ranks("threads", world, train_late, None, 0.0)
    for tensors, report in on_ranks(where, world, train_late, rank, seconds, patience=30.0):
        for actual, x in zip(tensors, expected, strict=True):
            assert oracle.max_error(actual.cpu(), x) <= (2e-5 if where == "gpus" else 1e-6)
        assert report.straggler == rank and f"the others waited for rank {rank}" in str(report)
        assert report.waited[(rank + 1) % world] >= 0.9 * seconds * len(messages(world))
        assert report.waited[rank] < seconds


@pytest.mark.parametrize(
    "waited,straggler",
    [([3.0, 0.1, 2.0], 6), ([0.5, 0.1, 0.5], None), ([1.0, 1.0, 1.0], None), ([0.0], None)],
)
def test_a_straggler_is_named_only_if_others_waited_long(waited, straggler):
    """Of a step of 10 seconds, on ranks 5, 6, 7."""
    assert find_straggler(waited, 10.0, (5, 6, 7)[: len(waited)]) == straggler


# -- ranks that are out of step -----------------------------------------------------------------------


@dataclass(frozen=True)
class Odd(Link):
    """The link of a rank that sends something else in one phase."""

    what: str = ""
    where: str = ""

    def exchange(self, send, send_to, receive, recv_from, channel, like=None):
        if self.place.phase != self.where:
            return super().exchange(send, send_to, receive, recv_from, channel, like)
        if self.what == "step":
            return replace(self.same(), place=replace(self.place, step=self.place.step + 1)).exchange(
                send, send_to, receive, recv_from, channel, like
            )
        if self.what in ("plan", "layout"):
            return replace(self.same(), header={**self.header, self.what: "other"}).exchange(
                send, send_to, receive, recv_from, channel, like
            )
        changed = {
            "short": lambda x: x.flatten()[:-BLOCK].clone(),
            "dtype": lambda x: x.half(),
            "channel": lambda x: x,
        }[self.what]
        if self.what == "channel":
            channel = {"keys": "grads", "grads": "keys"}[channel]
        sends = [changed(x) for x in send]
        return super().exchange(sends, send_to, receive, recv_from, channel, changed(like))

    def same(self) -> Link:
        return Link(**{field.name: getattr(self, field.name) for field in fields(Link)})


ODD = {  # what differs -> the name of the field that says so
    "short": "tensors", "dtype": "tensors", "channel": "message", "step": "step", "plan": "plan",
    "layout": "layout",
}  # fmt: skip


def exchange_odd(transport, what: str, phase: str):
    """debug: the last rank sends something else in the forward, or in the backward."""
    cp = cp_of(transport, debug=True)
    shard = cp.shard(fault_worker.batch(transport.size))
    q, k, v = inputs(shard)
    bound, ring = shard.plan(0, q, k, v, 1.0), shard.ring(0, steps("reference", q, 16))
    ring_attention(q, k, v, bound, ring, 1.0)[0].sum().backward()  # nobody objects
    if transport.rank == transport.size - 1:
        known = {field.name: getattr(ring.transport, field.name) for field in fields(Link)}
        ring = replace(ring, transport=Odd(**known, what=what, where=phase))
    return error_of(lambda: ring_attention(q, k, v, bound, ring, 1.0)[0].sum().backward())


@pytest.mark.parametrize(
    "what,phase,world,where",
    pairwise(list(ODD), ["forward", "backward"], [2, 3, 4], ["threads", "processes"]),
)
def test_debug_proves_every_message_before_it_moves(what, phase, world, where):
    """All ranks raise, at once, and show both headers. (Keys and values travel in one tensor.)"""
    for rank, (error, seconds) in enumerate(on_ranks(where, world, exchange_odd, what, phase)):
        assert isinstance(error, RingDesyncError) and seconds < PATIENCE
        assert (error.rank, error.layer, error.phase, error.hop) == (rank, 0, phase, 1)
        first, *headers = str(error).splitlines()
        assert first.endswith(f"ranks disagree on {ODD[what]}")
        others = list(range(world - 1))
        assert [line.split(":")[0].strip() for line in headers] == [f"ranks {others}", f"ranks {[world - 1]}"]
        assert all(f"{name}=" in line for line in headers for name in ("step", "phase", "message", "tensors"))


def leave_out(transport, what: str, debug: bool, before: int):
    """After `before` steps, the last rank leaves out a layer, or alone computes one again in the backward."""
    cp = cp_of(transport, debug=debug)

    def train(odd: bool):
        shard = cp.shard(fault_worker.batch(transport.size))
        q, k, v = inputs(shard)
        for layer in range(2):
            if odd and what == f"skips layer {layer}":
                continue
            if odd and what == f"checkpoints layer {layer}":
                q = checkpoint(cp.attention, q, k, v, shard, layer, use_reentrant=False)
            else:
                q = cp.attention(q, k, v, shard, layer=layer)
        cp.loss(logits(q), shard).backward()
        cp.report()

    for _ in range(before):
        train(odd=False)
    return error_of(lambda: train(odd=transport.rank == transport.size - 1))


@pytest.mark.parametrize("where", ["threads", "processes"])
@pytest.mark.parametrize("debug,before", [(False, 0), (True, 1)])
@pytest.mark.parametrize(
    "what", ["skips layer 0", "skips layer 1", "checkpoints layer 0", "checkpoints layer 1"]
)
def test_a_layer_left_out_or_computed_again_by_one_rank(what, debug, before, where):
    """In the first step always, later in debug: all ranks see what the others are doing."""
    for error, seconds in on_ranks(where, 3, leave_out, what, debug, before):
        assert isinstance(error, RingDesyncError) and "phase=" in str(error)
        assert seconds < (PATIENCE if where == "processes" else 10 * PATIENCE)


@machine.needs("two gpus")
@pytest.mark.parametrize("what,phase", list(zip(ODD, ["forward", "backward"] * 3, strict=True)))
def test_debug_proves_every_message_over_nccl(what, phase):
    for error, _ in on_ranks("gpus", 2, exchange_odd, what, phase):
        assert isinstance(error, RingDesyncError) and f"ranks disagree on {ODD[what]}\n" in str(error)


@pytest.mark.parametrize("what", ["skips layer 1", "checkpoints layer 0"])
def test_a_later_step_without_debug_ends_in_time(what):
    """Nobody compares headers then: ranks wait for messages that nobody sends."""
    results = on_ranks("processes", 3, leave_out, what, False, 1)
    assert all(seconds < 2 * PATIENCE + SLACK for _, seconds in results)
    for error, _ in results:
        assert isinstance(error, RingTimeoutError) or "mismatch" in str(error)


def reduce_other_shapes(transport):
    return error_of(lambda: transport.all_reduce(torch.zeros(3 + transport.rank)).wait())[0]


def test_what_torch_says_of_collectives_that_differ_is_left_alone():
    for error in on_ranks("processes", 2, reduce_other_shapes):
        assert type(error) is RuntimeError and "Detected mismatch between collectives on ranks" in str(error)


# -- a rank that stands still -------------------------------------------------------------------------


def stand_still(transport, rank: int, number: int, seconds: float):
    """One rank stops before a message; a child of it lets it go on after some seconds."""

    def stop():
        script = f"sleep {seconds}; kill -CONT {os.getpid()}"
        with subprocess.Popen(["sh", "-c", script]):
            os.kill(os.getpid(), signal.SIGSTOP)

    cp = cp_of(Faulty(transport, number, stop) if transport.rank == rank else transport)
    return error_of(lambda: (fault_worker.step(cp), cp.report()))


@pytest.mark.parametrize("rank,number", mostly_full([(1, 1), (2, 4)], range(3), list(messages(3))[:4]))
def test_survivors_of_a_stopped_rank_name_the_hop_in_time(rank, number):
    results = on_ranks("processes", 3, stand_still, rank, number, PATIENCE + SLACK + 0.5)
    for survivor, (error, seconds) in enumerate(results):
        if survivor != rank:
            assert isinstance(error, RingTimeoutError) and error.rank == survivor
            assert seconds < PATIENCE + SLACK
            assert (error.step, error.layer) == (0, 0) and error.phase in ("forward", "backward")
    waiting = results[(rank + 1) % 3][0]
    assert (waiting.peer, waiting.hop) == (rank, messages(3)[number][1])
    assert f"within {PATIENCE:g} s" in str(waiting)


# -- under torchrun -----------------------------------------------------------------------------------

BOUND = 5.0  # seconds from the fault to the end of the job, or as long as its start took on a busy machine


def assert_gone(job, bound: float = BOUND) -> None:
    assert job.returncode not in (0, None) and not job.orphans and not job.leaked
    assert job.seconds_since_fault <= max(bound, job.seconds_to_start), job.stderr


def assert_root_cause(job, rank: int) -> None:
    """torchrun's own report says which rank was the first to fail."""
    cause = job.stderr.split("Root Cause (first observed failure)")[1]
    assert f"rank      : {rank} (local_rank: {rank})" in cause


@pytest.mark.parametrize("world,rank,number", mostly_full([(3, 1, 3)], [2, 3, 4], [0, 1], [1, 2, 3]))
def test_torchrun_names_the_rank_that_raised(world, rank, number, tmp_path):
    job = launch(tmp_path, world, "--fault", "raise", "--rank", rank, "--before", number)
    assert_gone(job)
    assert_root_cause(job, rank)
    assert job.cause["message"].startswith("Fault: injected")
    errors = {x["rank"]: x for x in job.said if x.get("error") == "RingTimeoutError"}
    assert errors[(rank + 1) % world]["peer"] == rank and rank not in errors


@pytest.mark.parametrize("fault", ["kill", pytest.param("segfault", marks=pytest.mark.full)])
def test_torchrun_names_the_rank_that_was_killed(fault, tmp_path):
    job = launch(tmp_path, 2, "--fault", fault, "--rank", 1, "--before", 3)
    assert_gone(job)
    assert_root_cause(job, 1)
    assert {"kill": "SIGKILL", "segfault": "SIGSEGV"}[fault] in job.stderr


@pytest.mark.full
def test_a_rank_that_exits_early_is_named_by_its_peers(tmp_path):
    """torchrun does not count exit code 0 as a failure; the error that it reports says who left."""
    job = launch(tmp_path, 2, "--fault", "exit", "--rank", 1, "--before", 2)
    assert_gone(job)
    assert job.cause["message"].startswith("RingTimeoutError: rank 0: step 1, layer 0, backward hop 1 of")
    assert "rank 1 before the connection was lost" in job.cause["message"]


@pytest.mark.full
def test_a_job_with_a_stopped_rank_is_gone_in_time(tmp_path):
    """torchrun gives a rank that does not answer 30 seconds before it kills it."""
    job = launch(tmp_path, 3, "--fault", "stop", "--rank", 1, "--before", 1, "--timeout", 10)
    assert_gone(job, 10 + 35)
    errors = {x["rank"]: x for x in job.said if x.get("error") == "RingTimeoutError"}
    assert set(errors) == {0, 2}
    for x in errors.values():
        assert x["time"] - job.fault["time"] <= 10 + SLACK
        assert (x["step"], x["layer"], x["hop"], x["peer"]) == (1, 0, 1, 1)  # one sends to it, one receives


def test_a_rank_without_memory_says_how_much_it_held(capsys):
    with pytest.raises(torch.OutOfMemoryError), join_world(TrainConfig(device="cpu")):
        fault_worker.exhaust()
    assert re.search(r"rank 0: out of memory; peak \d+\.\d\d GiB resident", capsys.readouterr().err)


@pytest.mark.full
def test_torchrun_names_the_rank_without_memory(tmp_path):
    job = launch(tmp_path, 2, "--fault", "memory", "--rank", 0, "--before", 2)
    assert_gone(job)
    assert_root_cause(job, 0)
    assert job.cause["message"].startswith("OutOfMemoryError: ")
    assert "rank 0: out of memory; peak " in job.stderr


@pytest.mark.full  # one that saves first is in test_interrupt.py
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("world", [1, 2])
def test_a_signal_ends_the_job_in_order(number, world, tmp_path):
    """Every rank leaves its groups and exits with 128 + the signal's number; nothing stays behind."""
    options = ["--steps", 10**6, "--warmup", 1, "--seq-len", 256, "--block-size", 32, "--no-compare"]
    options += ["--width", 32, "--heads", 2, "--kv-heads", 1, "--head-dim", 16, "--mlp", 32]
    options += ["--save-every", 0, "--device", "cpu", "--out", tmp_path / "out"]
    job = launch(tmp_path, world, *options, target="sparring.launch.train", interrupt=number)
    assert_gone(job)
    if world == 1:
        assert job.returncode == 128 + number and "Traceback" not in job.stderr
    else:
        assert "RingTimeoutError" not in job.stderr


# -- on GPUs ------------------------------------------------------------------------------------------

# NCCL does not raise in the program: the host has gone ahead, and waits in a native call until torchrun
# ends it, or until a communicator times out and its watchdog, having waited a minute for the records of
# other ranks, aborts the process and names the transfer.
GPU_BOUND, WATCHDOG = 10.0, 60.0


@machine.needs("two gpus")
@pytest.mark.parametrize("fault", ["raise", "kill", "memory", "exit"])
def test_nccl_job_is_gone_in_time(fault, tmp_path):
    job = launch(tmp_path, 2, "--fault", fault, "--device", "cuda", "--before", 2, "--timeout", 10)
    assert_gone(job, GPU_BOUND if fault != "exit" else 10 + WATCHDOG + GPU_BOUND)
    if fault != "exit":
        assert_root_cause(job, 1)
    if fault == "memory":
        assert "rank 1: out of memory; peak " in job.stderr


@machine.needs("two gpus")
def test_nccl_job_with_a_stopped_rank_is_gone_in_time(tmp_path):
    job = launch(tmp_path, 2, "--fault", "stop", "--device", "cuda", "--before", 1, "--timeout", 10)
    assert_gone(job, 10 + WATCHDOG + 30 + GPU_BOUND)
    assert "Watchdog caught collective operation timeout" in job.stderr


# -- a long run ---------------------------------------------------------------------------------------


def soak(transport, count: int):
    """Resident KiB and open files after a third of the steps, and at the end."""
    cp, seen = cp_of(transport, pattern="vertical-slash", layout="auto", recall_every=10), []
    for number in range(1, count + 1):
        fault_worker.step(cp, layers=2)
        cp.report()
        if number in (count // 3, count):
            gc.collect()
            with open("/proc/self/status") as status:
                resident = next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))
            seen.append((resident, len(os.listdir("/proc/self/fd"))))
    return seen


@pytest.mark.full
@pytest.mark.timeout(900)
def test_a_thousand_steps_take_no_more_memory_or_files():
    results = pool.run(2, in_process, "soak", PATIENCE, 1000, timeout=800)
    for (resident, files), (resident_later, files_later) in results:
        assert resident_later <= 1.01 * resident and files_later <= files
