"""Bit for bit the same from run to run, whatever the order in which messages arrive."""

from __future__ import annotations

import random
import time
from dataclasses import fields, replace

import machine
import oracle
import pool
import pytest
import tiny_models
import torch
import torch.distributed as dist
from rings import LAYOUTS, Shares, Wrapped, attend_batch, on_ring
from test_ring import BATCHES, PATTERNS, make_batch
from torch.distributed.device_mesh import init_device_mesh
from zoo import SIZE, ZOO

from sparring.balance import EXCHANGES
from sparring.cp import run_threads
from sparring.cp.transport import Pending

FULL = pytest.mark.full
HEADS, DIM, RUNS = (4, 2), 8, 5  # runs that are compared with the first


class Late(Wrapped):
    """Every message waits up to 5 ms, those of one rank always longest."""

    def __init__(self, inner, seed):
        super().__init__(inner)
        self.random, self.always = random.Random(seed * 1000 + inner.rank), seed % inner.size == inner.rank

    def pause(self):
        time.sleep(0.005 if self.always else self.random.uniform(0, 0.005))

    def late(self, pending) -> Pending:
        return Pending(lambda: (self.pause(), pending.wait()))

    def exchange(self, *message):
        self.pause()
        return self.late(super().exchange(*message))

    def all_to_all(self, *message):
        self.pause()
        return self.late(super().all_to_all(*message))

    def publish(self, *rows):
        self.pause()
        return super().publish(*rows)

    def all_reduce(self, *options):
        self.pause()
        return self.late(super().all_reduce(*options))

    def all_gather(self, *options):
        self.pause()
        return super().all_gather(*options)


def assert_equal(one, other):
    """Of two results: tensors to the last bit, everything that is in them."""
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for x, y in zip(one, other, strict=True):
            assert_equal(x, y)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for name in one:
            assert_equal(one[name], other[name])
    elif hasattr(one, "tolist"):
        assert one.tolist() == other.tolist()
    elif hasattr(one, "__dataclass_fields__"):
        for field in (field for field in fields(one) if field.compare):  # times are not compared
            assert_equal(getattr(one, field.name), getattr(other, field.name))
    else:
        assert one == other


def test_results_are_compared_wholly():
    with pytest.raises(AssertionError):
        assert_equal([{"a": (torch.zeros(2), 1)}], [{"a": (torch.tensor([0.0, 1e-38]), 1)}])


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=FULL)], ids=str)
@pytest.mark.parametrize(
    "mask,exchange",
    [
        ("vertical_slash", "ring"),
        ("column_groups", "hierarchical"),
        ("vertical_slash", "gather"),
        ("vertical_slash", "pull"),
        *(pytest.param("anything", exchange, marks=FULL) for exchange in EXCHANGES),
    ],
)
def test_given_plans(mask, exchange, dtype):
    """out, lse and gradients of 4 ranks on 2 nodes."""
    options = {"exchange": exchange, "nodes": 2}
    plan = ZOO[mask](203, *HEADS)
    layout = LAYOUTS["zigzag"](plan.geometry.num_blocks, 4, SIZE)
    *tensors, dlse = oracle.inputs(1, *HEADS, 203, DIM, dtype=dtype)
    expected = on_ring(plan, layout, *tensors, dlse.float(), **options)
    for seed in range(RUNS):
        late = {"wrap": lambda x, seed=seed: Late(x, seed)}
        actual = on_ring(plan, layout, *tensors, dlse.float(), **options, **late)
        assert_equal(actual, expected)


def timeless(shares: Shares) -> Shares:
    """Without what a report says of seconds."""
    report = replace(shares.report, waited=(), elapsed=0.0, straggler=None, header_wait=0.0)
    return replace(shares, report=report)


def inputs(name, dtype=torch.float32):
    size, length, _ = BATCHES[name]
    return oracle.inputs(size, *HEADS, length, DIM, dtype=dtype)[:4]


def options(pattern):
    return dict(pattern=PATTERNS[pattern], layout="striped", block_size=SIZE, deterministic=True)


@pytest.mark.parametrize(
    "name,pattern", [("ragged", "vertical-slash"), pytest.param("batch 2", "segments", marks=FULL)]
)
def test_batches(name, pattern):
    """Results, plans and reports of 3 ranks."""

    def run(seed=None):
        def body(transport):
            transport = transport if seed is None else Late(transport, seed)
            return timeless(attend_batch(transport, make_batch(name), *inputs(name), **options(pattern)))

        return run_threads(3, body)

    expected = run()
    for seed in range(RUNS):
        assert_equal(run(seed), expected)


def on_gloo(name, pattern, seed):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("cp",))
    time.sleep(random.Random(seed + dist.get_rank()).uniform(0, 0.02))
    return timeless(attend_batch(mesh, make_batch(name), *inputs(name), **options(pattern)))


@pytest.mark.parametrize("pattern", [pytest.param("sink-window", marks=FULL), "vertical-slash"])
def test_gloo(pattern):
    expected = pool.run(3, on_gloo, "ragged", pattern, 0)
    for seed in (1, 2):
        assert_equal(pool.run(3, on_gloo, "ragged", pattern, seed), expected)


@pytest.mark.parametrize("pattern", [pytest.param("sink-window", marks=FULL), "vertical-slash"])
def test_whole_models(monkeypatch, pattern):
    """Loss, outputs, plans and every gradient of a Llama on 3 ranks."""
    batch, _ = tiny_models.make_batch("packed")

    def run():
        return tiny_models.sharded(tiny_models.llama(), batch, 3, PATTERNS[pattern], deterministic=True)

    expected = run()
    for seed in range(2):

        def late(world, body, seed=seed, **limits):
            return run_threads(world, lambda transport: body(Late(transport, seed)), **limits)

        monkeypatch.setattr(tiny_models, "run_threads", late)
        assert_equal(run(), expected)


@machine.needs("gpu", "triton compiled")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("world", [1, 2, 4])
def test_kernels(world, dtype):
    """Ranks as threads of one GPU: results, plans and reports."""
    import gpu_ring

    tensors = gpu_ring.tensors(dtype)
    chosen = dict(pattern=gpu_ring.PATTERNS["segments"], layout="zigzag", impl="triton", deterministic=True)

    def run(seed):
        def body(transport):
            with torch.autograd.set_multithreading_enabled(False):
                late = Late(transport, seed)
                return timeless(attend_batch(late, gpu_ring.make_batch(), *tensors, **chosen))

        return run_threads(world, body)

    expected = run(0)
    for seed in range(1, RUNS):
        assert_equal(run(seed), expected)
