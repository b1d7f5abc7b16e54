"""Rings over torch.distributed (gloo): equal to rings of threads, on any subgroup, loud when ranks differ."""

from __future__ import annotations

import os
import sys
import time

import oracle
import pool
import pytest
import torch
import torch.distributed as dist
from sampling import pairwise
from test_ring import BATCHES, LAYOUTS, PATTERNS, SIZE, make_batch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from sparring.balance import from_assignment, striped
from sparring.cp import ContextParallel, RingDesyncError, RingTimeoutError, run_threads
from sparring.cp.mesh import connect
from sparring.launch.config import TrainConfig
from sparring.launch.world import join_world

HEADS, DIM = (4, 2), 8
ROUNDING = 2e-6  # fp32, relative to the largest entry


def attend_once(transport, pattern, layout, name, dtype=torch.float32, **options):
    """One attention with gradients on one rank: out, dq, dk, dv in full order, the plan and the report."""
    batch = make_batch(name)
    size, length = batch["input_ids"].shape
    cp = ContextParallel(transport, pattern=pattern, layout=layout, block_size=SIZE, **options)
    shard = cp.shard(batch)
    *local, _ = local_inputs(shard, oracle.inputs(size, *HEADS, length, DIM, dtype=dtype))
    q, k, v = (x.requires_grad_() for x in local[:3])
    out = cp.attention(q, k, v, shard)
    grads = torch.autograd.grad(out, (q, k, v), local[3])
    full = [cp.unshard(x, shard, dim=2) for x in (out, *grads)]
    return full, cp.plans(shard)[0], cp.report(shard)


def local_inputs(shard, tensors):
    """This rank's part of tensors [B, H, S, ...]."""
    tail = shard.geometry.num_tokens - shard.length
    padded = (torch.nn.functional.pad(x, (0, 0) * (x.dim() - 3) + (0, tail)) for x in tensors)
    return [x[:, :, shard.geometry.positions].contiguous() for x in padded]


def whole_ring():
    """The ring of all ranks."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("cp",))
    return connect(mesh, ("cp",), ()).ring


def attend_on_rank(*args, **options):
    return attend_once(whole_ring(), *args, **options)


def assert_same_attention(actual, wanted):
    """Of two results of attend_once on the same rank: plans, tensors and reports."""
    (tensors, plan, report), (other_tensors, expected, other_report) = actual, wanted
    for what, x, y in zip(("out", "dq", "dk", "dv"), tensors, other_tensors, strict=True):
        assert oracle.relative_error(x, y) <= ROUNDING, what
    assert report_values(report) == pytest.approx(report_values(other_report), rel=1e-6)
    assert torch.equal(plan.tiles, expected.tiles)
    assert (plan.columns is None) == (expected.columns is None)
    assert plan.columns is None or torch.equal(plan.columns, expected.columns)
    assert plan.column_group is None or torch.equal(plan.column_group, expected.column_group)


def assert_equals_oracle(full, plan, name, heads=HEADS):
    batch = make_batch(name)
    size, length = batch["input_ids"].shape
    q, k, v, dout, dlse = oracle.inputs(size, *heads, length, DIM)
    mask = oracle.expand(plan, heads[0])[:, :, :length, :length]
    out, _, *grads = oracle.attention(q, k, v, mask, dout, dlse * 0)
    for what, actual, expected in zip(("out", "dq", "dk", "dv"), full, (out, *grads), strict=True):
        assert oracle.max_error(actual, expected) <= 1e-10, what


@pytest.mark.parametrize(
    "world,pattern,layout,name", pairwise([2, 3, 4], list(PATTERNS), LAYOUTS, list(BATCHES))
)
def test_equals_threads(world, pattern, layout, name):
    """The same plans bit for bit, the same results to rounding, the same report on every rank."""
    args = (PATTERNS[pattern], layout, name)
    expected = run_threads(world, lambda transport: attend_once(transport, *args))
    for mine, threads in zip(pool.run(world, attend_on_rank, *args), expected, strict=True):
        assert_same_attention(mine, threads)


def report_values(report):
    """All numbers of a report."""
    return [
        report.density, report.density_tiles, report.recall, report.worker_imbalance, report.step_imbalance,
        *report.work.ravel().tolist(), *report.bytes_moved.values(),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "world,pattern,layout,name",
    [
        (2, "vertical-slash", "zigzag", "packed"),
        (3, "segments", "striped", "batch 2"),
        (4, "sink-window", "contiguous", "ragged"),
        (4, "dense", "auto", "packed"),
    ],
)
def test_equals_oracle_in_fp64(world, pattern, layout, name):
    for full, plan, _ in pool.run(world, attend_on_rank, PATTERNS[pattern], layout, name, torch.float64):
        assert_equals_oracle(full, plan, name)


def attend_in_nodes(options, *args):
    """On two nodes of two ranks, as the axes of the mesh say."""
    axes = ("nodes", "ranks")
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=axes)
    return attend_once(connect(mesh, axes, ()).ring, *args, **options)


@pytest.mark.parametrize(
    "exchange,pattern,layout,debug",
    [
        ("hierarchical", "vertical-slash", "zigzag", True),
        ("auto", "sink-window", "auto", False),
        ("gather", "segments", "striped", False),
        ("pull", "vertical-slash", "contiguous", True),
        ("pull", "segments", "striped", False),
    ],
)
def test_exchanges_between_nodes(exchange, pattern, layout, debug):
    args, options = (PATTERNS[pattern], layout, "packed"), {"exchange": exchange, "debug": debug}
    expected = run_threads(4, lambda transport: attend_once(transport, *args, **options), nodes=2)
    for mine, threads in zip(pool.run(4, attend_in_nodes, options, *args), expected, strict=True):
        assert_same_attention(mine, threads)
    moved = expected[0][2].bytes_moved
    if exchange in ("gather", "pull"):
        assert expected[0][2].exchange == exchange and "outer keys" not in moved
    else:  # of 3 hops of keys one goes to the other node, and of 6 of gradients two
        assert expected[0][2].exchange == "hierarchical"
        assert 2 * moved["outer keys"] == moved["keys"] and 2 * moved["outer grads"] == moved["grads"]


def nodes_of_a_job(of_node, dp):
    """The axes of the mesh in a launcher that says how many processes a node has."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_WORLD_SIZE", str(of_node))
        with join_world(TrainConfig(dp=dp, device="cpu")) as world:
            return world.mesh.shape


@pytest.mark.parametrize(
    "of_node,dp,shape", [(2, 1, (1, 2, 2)), (4, 1, (1, 1, 4)), (1, 2, (2, 2, 1)), (2, 2, (2, 1, 2))]
)
def test_a_sequence_over_several_nodes_has_an_outer_axis(of_node, dp, shape):
    assert pool.run(4, nodes_of_a_job, of_node, dp) == [shape] * 4


@pytest.mark.parametrize("pattern", PATTERNS)
def test_uneven_shards(pattern):
    """A layout of one's own: other numbers of blocks on every rank, none on one."""
    layout = from_assignment(((5, 0, 11), (), (1, 2, 3, 4, 6, 7, 8), (12, 9, 10)), SIZE)
    for full, plan, _ in pool.run(4, attend_on_rank, PATTERNS[pattern], layout, "ragged", torch.float64):
        assert_equals_oracle(full, plan, "ragged")


def one_token():
    cp = ContextParallel(whole_ring(), pattern="vertical-slash", block_size=SIZE)
    shard = cp.shard({"input_ids": torch.zeros(1, 1, dtype=torch.int64)})
    v = torch.full((1, 2, shard.local_length, DIM), 7.0)
    return cp.unshard(cp.attention(v, v, v, shard), shard, dim=2)


def test_fewer_tokens_than_ranks():
    """Nothing to probe, nothing to gather, ranks of padding alone."""
    for out in pool.run(3, one_token):
        assert torch.equal(out, torch.full((1, 2, 1, DIM), 7.0))


def test_report_counts_bytes():
    """Keys travel W - 1 hops forward and backward, gradients too, in fp32; columns are all-reduced."""
    world, blocks = 3, 6  # 16 blocks on 3 ranks, padded to 18
    wire = 2 * HEADS[1] * blocks * SIZE * DIM * 4
    columns = 2 * HEADS[1] * 5 * DIM * 4  # 5 sinks
    expected = {
        "keys": world * 2 * (world - 1) * wire,
        "grads": world * (world - 1) * wire,
        "columns": world * 3 * (2 * (world - 1) * columns // world),
    }
    results = pool.run(world, attend_on_rank, PATTERNS["sink-window"], "striped", "even")
    for _, _, report in results:
        assert report.bytes_moved == expected


def recall_of_shards():
    cp = ContextParallel(whole_ring(), pattern="dense", layout="zigzag", block_size=SIZE, recall_every=2)
    batch, sampled = make_batch("packed"), []
    for _ in range(4):
        shard = cp.shard(batch)
        q, k, v, *_ = local_inputs(shard, oracle.inputs(1, *HEADS, 250, DIM, dtype=torch.float32))
        cp.attention(q, k, v, shard)
        sampled.append(cp.report().recall)
    return sampled


def test_recall_is_sampled_every_so_often():
    for sampled in pool.run(2, recall_of_shards):
        assert sampled == [pytest.approx(1.0, abs=1e-5), None, pytest.approx(1.0, abs=1e-5), None]


# -- groups of a larger job ---------------------------------------------------------------------------


def data_parallel_step(names):
    """On a 2 x 2 mesh with axes in the given order: attention, a loss and summed gradients."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=names)
    cp = ContextParallel(
        mesh, data_axes=("dp",), pattern=PATTERNS["sink-window"], layout="zigzag", block_size=SIZE,
        grad_reduce="sum",
    )  # fmt: skip
    replica = mesh["dp"].get_local_rank()
    batch, embedding, weight = data_parallel_inputs(replica)
    shard = cp.shard(batch)
    (x,) = local_inputs(shard, [embedding[batch["input_ids"]][:, None]])
    x = x.expand(-1, 2, -1, -1)
    model = torch.nn.Linear(DIM, 11, bias=False, dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(weight)
    out = cp.attention(x, x, x, shard)
    loss = cp.loss(model(out.mean(1)), shard)
    loss.backward()
    cp.sum_gradients(model)
    peers = (cp.transport.ranks, tuple(sorted(cp.everyone.ranks)))
    return replica, peers, cp.unshard(out, shard, dim=2), loss.item(), model.weight.grad, shard.tokens


def data_parallel_inputs(replica):
    """Another batch for every replica, the first with few labels; everything else is the same."""
    g = torch.Generator().manual_seed(3)
    embedding = torch.randn(11, DIM, generator=g, dtype=torch.float64)
    weight = torch.randn(11, DIM, generator=g, dtype=torch.float64)
    tokens = torch.randint(11, (2, 1, 150), generator=g)[replica]
    labels = tokens.clone()
    if replica == 0:
        labels[:, 20:] = -100
    return {"input_ids": tokens, "labels": labels}, embedding, weight


def data_parallel_reference():
    """The same step of both batches in one process: outputs, loss, gradient, valid labels."""
    outs, logits, targets = [], [], []
    weight = data_parallel_inputs(0)[2].requires_grad_()
    for replica in range(2):
        batch, embedding, _ = data_parallel_inputs(replica)
        cp = ContextParallel(None, pattern=PATTERNS["sink-window"], block_size=SIZE)
        shard = cp.shard(batch)
        (x,) = local_inputs(shard, [embedding[batch["input_ids"]][:, None]])
        x = x.expand(-1, 2, -1, -1)
        outs.append(cp.unshard(cp.attention(x, x, x, shard), shard, dim=2))
        logits.append(outs[-1].mean(1)[0, :-1] @ weight.T)
        targets.append(batch["labels"][0, 1:])
    loss = torch.nn.functional.cross_entropy(torch.cat(logits), torch.cat(targets))
    loss.backward()
    return outs, loss.item(), weight.grad, int((torch.cat(targets) >= 0).sum())


@pytest.mark.parametrize("names,groups", [(("dp", "cp"), [(0, 1), (2, 3)]), (("cp", "dp"), [(0, 2), (1, 3)])])
def test_data_parallel_groups(names, groups):
    """Context parallelism times data parallelism, whichever ranks form the groups."""
    outs, loss, gradient, tokens = data_parallel_reference()
    for rank, result in enumerate(pool.run(4, data_parallel_step, names)):
        replica, (ring, everyone), out, *rest = result
        assert ring == groups[replica] and rank in ring and everyone == (0, 1, 2, 3)
        assert oracle.max_error(out, outs[replica]) <= 1e-12
        assert rest[0] == pytest.approx(loss, abs=1e-12)
        assert oracle.max_error(rest[1], gradient) <= 1e-12
        assert rest[2] == tokens


IN_SUBGROUP = (PATTERNS["segments"], "striped", "ragged")


def attend_in_subgroup(ranks):
    """Only `ranks` take part, in this order; the others build the mesh and do nothing else."""
    mesh = DeviceMesh("cpu", ranks, mesh_dim_names=("cp",))
    if dist.get_rank() not in ranks:
        with pytest.raises(ValueError, match="is not in the mesh"):
            ContextParallel(mesh)
        return None
    return attend_once(connect(mesh, "cp", ()).ring, *IN_SUBGROUP)


@pytest.mark.parametrize("ranks", [[1, 2, 3], [3, 1, 2]])
def test_subgroup_of_a_job(ranks):
    """A ring that does not start at rank 0, or does not ascend, is as good as any other."""
    expected = run_threads(3, lambda transport: attend_once(transport, *IN_SUBGROUP))
    results = pool.run(4, attend_in_subgroup, ranks)
    assert results[0] is None
    for place, rank in enumerate(ranks):
        assert_same_attention(results[rank], expected[place])


def attend_in_slice():
    """Two rings in one job, by a slice of its mesh, with different patterns."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))
    name = ["dense", "sink-window"][mesh["dp"].get_local_rank()]
    return attend_once(connect(mesh["cp"], "cp", ()).ring, PATTERNS[name], "zigzag", "even")


def test_slice_of_a_mesh():
    results = pool.run(4, attend_in_slice)
    for replica, name in enumerate(["dense", "sink-window"]):
        args = (PATTERNS[name], "zigzag", "even")
        expected = run_threads(2, lambda transport, args=args: attend_once(transport, *args))
        for place in range(2):
            assert_same_attention(results[2 * replica + place], expected[place])


# -- ranks that differ --------------------------------------------------------------------------------


def error_of(body):
    """The exception that body() raises, and the seconds until it does."""
    start = time.monotonic()
    try:
        body()
    except Exception as error:
        error.__traceback__ = None
        return error, time.monotonic() - start
    return None, time.monotonic() - start


def shard_other_batch(what):
    """The last rank holds another batch, layout or step than the others."""
    odd = dist.get_rank() == dist.get_world_size() - 1
    cp = ContextParallel(
        whole_ring(), layout="striped" if odd and what == "layout" else "zigzag", block_size=SIZE
    )
    tokens = torch.arange(200)[None]
    batch = {"input_ids": tokens, "labels": tokens, "document_ids": tokens // 100}
    if odd:
        changes = {
            "input_ids": {"input_ids": tokens.flip(1)},
            "length": {name: x[:, :190] for name, x in batch.items()},
            "batch size": {name: x.expand(2, -1) for name, x in batch.items()},
            "document_ids": {"document_ids": tokens // 90},
            "labels": {"labels": tokens.flip(1)},
        }
        batch |= changes.get(what, {})
        if what == "no labels":
            del batch["labels"]
        if what == "step":
            cp.load_state_dict(cp.state_dict() | {"step": 5})
    return error_of(lambda: cp.shard(batch))[0]


@pytest.mark.parametrize(
    "what", ["input_ids", "length", "batch size", "document_ids", "labels", "no labels", "layout", "step"]
)
def test_shard_proves_agreement(what):
    """Without debug: cp.shard finds what differs before anything moves, on every rank."""
    for error in pool.run(3, shard_other_batch, what):
        assert_both_headers(error, "labels" if what == "no labels" else what)


def assert_both_headers(error, name):
    """The error names what differs and shows what the last of three ranks holds, and what the others do."""
    assert isinstance(error, RingDesyncError)
    first, *headers = str(error).splitlines()
    assert name in first.split("ranks disagree on ")[1].split(", ")
    assert [line.split(":")[0].strip() for line in headers] == ["ranks [0, 1]", "ranks [2]"]
    assert all(f"{name}=" in line for line in headers)


def attend_otherwise(what):
    """In its first attention the last rank has other tensors, or is elsewhere."""
    odd = dist.get_rank() == dist.get_world_size() - 1
    cp = ContextParallel(whole_ring(), pattern="dense", layout="zigzag", block_size=SIZE)
    shard = cp.shard(make_batch("even"))
    heads, dtype, dim, layer = HEADS, torch.float32, DIM, 0
    if odd:
        heads = {"query heads": (2, 2), "key heads": (4, 4)}.get(what, heads)
        dtype = torch.float64 if what == "dtype" else dtype
        dim = 16 if what == "head dim" else dim
        layer = 1 if what == "layer" else layer
        if what == "layout":
            shard.layout = striped(shard.layout.num_blocks, shard.layout.world, SIZE)
    q, k, v, *_ = local_inputs(shard, oracle.inputs(1, *heads, 256, dim, dtype=dtype))
    return error_of(lambda: cp.attention(q, k, v, shard, layer=layer))[0]


@pytest.mark.parametrize("what", ["query heads", "key heads", "head dim", "dtype", "layer", "layout"])
def test_attention_proves_agreement(what):
    for rank, error in enumerate(pool.run(3, attend_otherwise, what)):
        assert_both_headers(error, what)
        assert (error.rank, error.step, error.phase) == (rank, 0, "forward")


def one_rank_leaves(how, patience):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("cp",))
    cp = ContextParallel(mesh, layout="zigzag", block_size=SIZE, timeout=patience)
    shard = cp.shard(make_batch("even"))
    q, k, v, *_ = local_inputs(shard, oracle.inputs(1, *HEADS, 256, DIM, dtype=torch.float32))
    cp.attention(q, k, v, shard)
    if dist.get_rank() == 1:
        if how == "exits":
            dist.destroy_process_group()
            return None
        return error_of(lambda: cp.attention(q[:, :, 1:], k, v, shard))
    return error_of(lambda: cp.attention(q, k, v, shard, layer=1))


@pytest.mark.parametrize("how", ["raises", "exits"])
def test_a_rank_that_leaves(how):
    """The others raise a typed error within the timeout and say for what they waited."""
    results = pool.run(3, one_rank_leaves, how, 2.0, timeout=30)
    if how == "raises":
        assert isinstance(results[1][0], ValueError)
    for rank in (0, 2):
        error, seconds = results[rank]
        assert isinstance(error, RingTimeoutError) and seconds < 4
        assert f"rank {rank}: step 0, layer 1, forward: no all-gather over ranks (0, 1, 2)" in str(error)


# -- the pool itself ----------------------------------------------------------------------------------


def fail_on(rank, how):
    print("a last word", file=sys.stderr, flush=True)
    if dist.get_rank() == rank and how == "raises":
        raise KeyError("lost key")
    if dist.get_rank() == rank and how == "dies":
        os._exit(7)
    time.sleep(30)


def process_id():
    return os.getpid()


def reduce_other_shapes():
    return error_of(lambda: dist.all_reduce(torch.zeros(3 + dist.get_rank())))[0]


def test_pool_notices_collectives_that_do_not_match():
    for error in pool.run(2, reduce_other_shapes):
        assert "mismatch" in str(error)


@pytest.mark.parametrize(
    "how,text",
    [
        ("raises", "rank 1 of 2: .*lost key"),
        ("dies", "rank 1 of 2: died, exit code 7"),
        ("hangs", "rank 0 of 2: did not finish"),
    ],
)
def test_pool_reports_and_recovers(how, text):
    """Failures carry the rank's traceback and output, end its processes, and leave the next call well."""
    before = pool.run(2, process_id)
    with pytest.raises(pool.PoolError, match=f"(?s){text}.*a last word"):
        pool.run(2, fail_on, 1, how, timeout=1.0)
    for process in before:
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)
    assert set(pool.run(2, process_id)).isdisjoint(before)
