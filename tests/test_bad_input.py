"""The error contract of ContextParallel: bad input raises a typed error with what was given, what is needed
and a remedy, on every rank. One device is in test_bad_plans.py, transformers models in test_bad_models.py.
"""

from __future__ import annotations

import pickle
from contextlib import nullcontext

import oracle
import pool
import pytest
import tolerance
import torch
from refusals import raises
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate

from sparring.balance import zigzag
from sparring.cp import ContextParallel, RingDesyncError, RingTimeoutError, run_threads
from sparring.kernels.patterns import SinkWindow, VerticalSlash
from sparring.launch.checkpoint import CheckpointError
from sparring.launch.config import TrainConfig
from sparring.launch.world import join_world

SIZE, LENGTH = 16, 40  # padded to 48
TOKENS = torch.arange(LENGTH)[None]


def make(**options):
    return ContextParallel(None, **({"pattern": "dense", "block_size": SIZE} | options))


# -- ContextParallel(...) -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options,error,text",
    [
        ({"pattern": "sinkwindow"}, ValueError, "pattern 'sinkwindow' is unknown; use one of..sink-window"),
        ({"pattern": {0: "no"}}, ValueError, "pattern 'no' is unknown; use one of..dense"),
        ({"pattern": 7}, ValueError, "pattern 7 of layer 'default' is neither a Pattern nor a name; use"),
        ({"layout": "zig"}, ValueError, "unknown layout 'zig'; use one of..zigzag..striped(g)..auto"),
        ({"layout": "striped(0)"}, ValueError, "stripe is 0 blocks; it must be at least 1"),
        ({"layout": 3}, ValueError, "unknown layout 3; use one of..zigzag"),
        ({"exchange": "rings"}, ValueError, "exchange 'rings' is unknown; use one of..'auto', 'ring'"),
        ({"exchange": ("ring", "heads")}, NotImplementedError, "exchange ('ring', 'heads'); implemented are"),
        ({"grad_reduce": "avg"}, ValueError, "grad_reduce 'avg' is unknown; use 'mean'..or 'sum'"),
        ({"impl": "cuda"}, ValueError, "impl 'cuda' is unknown; use one of..reference..triton"),
        ({"block_size": 100}, ValueError, "block_size 100 must be a power of two of at least 16; use 128"),
        ({"block_size": 8}, ValueError, "block_size 8 must be a power of two of at least 16; use 128"),
        ({"recall_every": -1}, ValueError, "recall_every is -1; it is a count: use a whole number, 0 or"),
        ({"count_keys": 1.5}, ValueError, "count_keys is 1.5; it is a count: use a whole number, 0 or more"),
        ({"timeout": 0}, ValueError, "timeout is 0 seconds; use a finite number above 0"),
        ({"timeout": float("nan")}, ValueError, "timeout is nan seconds; use a finite number above 0"),
    ],
)
def test_options(options, error, text):
    with raises(error, text):
        make(**options)


def construct(names, sizes, axes, data_axes):
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=names)
    try:
        ContextParallel(mesh, axes, data_axes)
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize(
    "names,sizes,axes,data_axes,text",
    [
        (
            ("dp", "tp"),
            (1, 2),
            ("cp",),
            (),
            "('cp',) are not in the mesh, which has ('dp', 'tp')..mesh_dim_names",
        ),
        (None, (2,), ("cp",), (), "('cp',) are not in the mesh, which has ()..mesh_dim_names"),
        (("cp",), (2,), ("cp",), ("dp",), "('dp',) are not in the mesh, which has ('cp',)"),
        (("cp",), (2,), (), (), "axes () are not in the mesh, which has ('cp',)"),
        (
            ("dp", "cp"),
            (1, 2),
            ("cp",),
            ("dp", "cp"),
            "('cp',) and data_axes ('dp', 'cp') overlap; an axis has one use",
        ),
        (
            ("rack", "node", "gpu"),
            (1, 1, 2),
            ("rack", "node", "gpu"),
            (),
            "axes ('rack', 'node', 'gpu') are 3; give one, or two: of nodes and of ranks inside a node",
        ),
    ],
)
def test_mesh_axes(names, sizes, axes, data_axes, text):
    """The message names the axes that the mesh has."""
    for message in pool.run(2, construct, names, sizes, axes, data_axes):
        assert message is not None
        with raises(ValueError, text):
            raise ValueError(message)


@pytest.mark.parametrize(("exchange", "flat"), [("hierarchical", "ring"), (("heads", "ring"), "heads")])
def test_exchanges_between_nodes_need_to_know_them(exchange, flat):
    text = (
        f"exchange {exchange!r} needs two axes of the mesh..got ('cp',); give both, or use exchange='{flat}'"
    )

    def body(transport):
        with raises(ValueError, text):
            ContextParallel(transport, exchange=exchange)

    run_threads(2, body)


def construct_by_name():
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "cp"))
    cp = ContextParallel(mesh, "cp", "dp")
    return cp.transport.size, cp.everyone.size


def test_one_axis_by_its_name():
    assert pool.run(2, construct_by_name) == [(2, 2)] * 2


def join(dp):
    with pytest.raises(ValueError) as caught, join_world(TrainConfig(dp=dp, device="cpu")):
        pass
    return str(caught.value)


@pytest.mark.parametrize("world,dp", [(4, 3), (2, 4)])
def test_world_that_does_not_divide(world, dp):
    text = f"{world} processes do not divide into dp={dp} groups; start a multiple of dp, or change --dp"
    assert pool.run(world, join, dp) == [text] * world


@pytest.mark.parametrize("mesh", [2, "cp", torch.zeros(2)])
def test_mesh_of_another_type(mesh):
    with raises(ValueError, f"mesh is a {type(mesh).__name__}; give a DeviceMesh..None"):
        ContextParallel(mesh)


# -- cp.shard(batch) ----------------------------------------------------------------------------------

HOLES = torch.ones(1, LENGTH, dtype=torch.int64)
HOLES[0, 10:12] = 0


@pytest.mark.parametrize(
    "batch,error,text",
    [
        ({}, ValueError, "batch has []; it needs input_ids or inputs_embeds"),
        ({"labels": TOKENS}, ValueError, "batch has ['labels']; it needs input_ids or inputs_embeds"),
        ({"input_ids": TOKENS[:, :0]}, ValueError, "sequence length is 0; attention needs at least 1 token"),
        ({"input_ids": TOKENS[:0]}, ValueError, "batch size is 0; it needs at least 1 row"),
        ({"input_ids": TOKENS[0]}, ValueError, "input_ids is (40,); it must be [batch, length, ...]"),
        (
            {"inputs_embeds": TOKENS},
            ValueError,
            "inputs_embeds is (1, 40); it must be [batch, length, width]",
        ),
        ({"input_ids": [[1, 2]]}, ValueError, "input_ids is a list; it must be a tensor"),
        (
            {"input_ids": TOKENS, "token_type_ids": TOKENS, "pixel_values": TOKENS},
            NotImplementedError,
            "batch has ['token_type_ids', 'pixel_values']; supported are ['input_ids'",
        ),
        (
            {"input_ids": TOKENS, "labels": TOKENS[:, :39]},
            ValueError,
            "labels is (1, 39); it must start with [1, 40]",
        ),
        (
            {"input_ids": TOKENS, "document_ids": TOKENS.expand(2, -1)},
            ValueError,
            "document_ids is (2, 40); it must start with [1, 40]",
        ),
        (
            {"input_ids": TOKENS, "position_ids": TOKENS[:, :9]},
            ValueError,
            "position_ids is (1, 9); it must start with [1, 40]",
        ),
        (
            {"input_ids": TOKENS, "document_ids": TOKENS[:, :, None]},
            ValueError,
            "document_ids is (1, 40, 1); it must be [batch, length]",
        ),
        (
            {"input_ids": TOKENS, "position_ids": TOKENS.expand(3, 1, -1)},
            NotImplementedError,
            "position_ids with 3 dims (M-RoPE); only [batch, length]",
        ),
        (
            {"input_ids": TOKENS, "attention_mask": torch.ones(1, 1, LENGTH, LENGTH)},
            NotImplementedError,
            "attention_mask with 4 dims; only padding masks [batch, length]",
        ),
        (
            {"input_ids": TOKENS, "attention_mask": HOLES},
            NotImplementedError,
            "attention_mask with holes inside a document; only padding at the ends of a row",
        ),
        (
            {"input_ids": TOKENS, "attention_mask": (1.0 - HOLES) * -1e9},
            ValueError,
            "attention_mask holds -1000000000.0 to -0.0; use 1 for tokens and 0 for padding",
        ),
        ({"input_ids": TOKENS.float()}, ValueError, "input_ids is of torch.float32; use torch.int64"),
        (
            {"input_ids": TOKENS, "labels": TOKENS.double()},
            ValueError,
            "labels is of torch.float64; use torch.int64",
        ),
        (
            {"input_ids": TOKENS, "labels": TOKENS.to("meta")},
            ValueError,
            "the batch is on {'input_ids': 'cpu', 'labels': 'meta'}; use one device",
        ),
        ({"input_ids": TOKENS.to("meta")}, ValueError, "is on {'input_ids': 'meta'}; use one device, that"),
    ],
)
def test_batches(batch, error, text):
    with raises(error, text):
        make().shard(batch)


BATCH = {"input_ids": TOKENS, "labels": TOKENS, "position_ids": TOKENS, "attention_mask": TOKENS * 0 + 1}


def without(name):
    return {key: x for key, x in BATCH.items() if key != name}


@pytest.mark.parametrize(
    "other,name",
    [
        (BATCH | {"input_ids": TOKENS + 1}, "input_ids"),
        (BATCH | {"input_ids": TOKENS.flip(1)}, "input_ids"),  # the same tokens in another order
        (BATCH | {"labels": TOKENS + 1}, "labels"),
        (without("labels"), "labels"),
        (BATCH | {"position_ids": TOKENS % 20}, "position_ids"),
        (BATCH | {"attention_mask": (TOKENS < 30).long()}, "attention_mask"),
        (without("attention_mask"), "attention_mask"),
        ({key: x[:, :39] for key, x in BATCH.items()}, "length"),
        ({key: x.expand(2, -1) for key, x in BATCH.items()}, "batch size"),
    ],
)
def test_another_batch_on_one_rank(other, name):
    """A data loader with a seed of its own: all ranks name what differs before data moves."""

    def body(transport):
        cp = ContextParallel(transport, pattern="dense", block_size=SIZE)
        with raises(RingDesyncError, f"ranks disagree on..{name}"):
            cp.shard(other if transport.rank == 1 else BATCH)

    run_threads(3, body, timeout=20)


@pytest.mark.parametrize("world", [1, 4])
@pytest.mark.parametrize("pattern", ["dense", SinkWindow(sink=4, window=16), VerticalSlash(probe=8)])
def test_tiny_sequences_are_defined(pattern, world):
    """One token, fewer than ranks; a row of padding only: zeros, never NaN."""
    mask = torch.tensor([[1], [0]])

    def body(transport):
        cp = ContextParallel(transport, pattern=pattern, block_size=SIZE)
        shard = cp.shard({"input_ids": torch.ones(2, 1, dtype=torch.int64), "attention_mask": mask})
        x = torch.ones(2, 2, shard.local_length, 8, requires_grad=True)
        out = cp.attention(x, x, x, shard)
        out.sum().backward()
        assert torch.isfinite(x.grad).all()
        return cp.unshard(out, shard, dim=2)

    for out in run_threads(world, body, timeout=20):
        assert (out[0] == 1).all() and (out[1] == 0).all()


@pytest.mark.parametrize("length", [1001, 127, 3])
def test_any_length_works(length):
    """Lengths are padded to ranks x block_size and unpadded, never refused: equal to the oracle at any W."""
    q, k, v, dout, dlse = oracle.inputs(1, 2, 1, length, 8)
    expected = oracle.attention(q, k, v, torch.ones(1, 2, length, length).tril().bool(), dout, dlse * 0)[0]

    def body(transport):
        cp = ContextParallel(transport, pattern="dense", block_size=64)
        shard = cp.shard({"input_ids": torch.zeros(1, length, dtype=torch.int64)})
        padded = (
            torch.nn.functional.pad(x, (0, 0, 0, shard.geometry.num_tokens - length)) for x in (q, k, v)
        )
        return cp.unshard(cp.attention(*(x[:, :, shard.geometry.positions] for x in padded), shard), shard, 2)

    for world in (1, 2):
        for out in run_threads(world, body, timeout=20):
            tolerance.check("fp64", "out", out, expected, 1e-10)


def test_layout_of_another_size():
    layout = zigzag(4, 1, SIZE)
    with raises(ValueError, "4 blocks of 16 tokens on 1 ranks..3 blocks of 16 tokens on 1 ranks..'auto'"):
        make(layout=layout).shard({"input_ids": TOKENS})
    with raises(ValueError, "3 blocks of 32 tokens on 1 ranks..3 blocks of 16 tokens on 1 ranks"):
        make(layout=zigzag(3, 1, 32)).shard({"input_ids": TOKENS})
    with raises(ValueError, "3 blocks of 16 tokens on 3 ranks..3 blocks of 16 tokens on 1 ranks"):
        make(layout=zigzag(3, 3, SIZE)).shard({"input_ids": TOKENS})


# -- the model's calls --------------------------------------------------------------------------------


def tensors(heads=4, kv_heads=2, length=48, dim=8, batch=1, dtype=torch.float32):
    q = torch.zeros(batch, heads, length, dim, dtype=dtype)
    k = torch.zeros(batch, kv_heads, length, dim, dtype=dtype)
    return [q, k, k.clone()]


def changed(index, x):
    q_k_v = tensors()
    q_k_v[index] = x(q_k_v[index])
    return q_k_v


@pytest.mark.parametrize(
    "q_k_v,error,text",
    [
        (tensors(heads=3), ValueError, "3 query heads are not divisible by 2 key heads; every key head"),
        (tensors(length=40), ValueError, "q has 40 tokens, this rank holds 48..shard.inputs"),
        (tensors(length=96), ValueError, "q has 96 tokens, this rank holds 48..no cache"),
        (tensors(batch=2), ValueError, "batch 2 of q differs from batch 1 of the plan; plan"),
        (
            changed(0, lambda q: q[0]),
            ValueError,
            "q, k, v have 3, 4, 4 dims; all must be [batch, heads, sequence, head_dim]",
        ),
        (
            changed(1, torch.Tensor.double),
            ValueError,
            "torch.float32, torch.float64, torch.float32; all must",
        ),
        (changed(1, lambda k: k.to("meta")), ValueError, "are on cpu, meta, cpu, cpu; use one device"),
        (changed(2, lambda v: None), TypeError, "v is a NoneType; use a tensor"),
    ],
)
def test_attention(q_k_v, error, text):
    cp = make()
    with raises(error, text):
        cp.attention(*q_k_v, cp.shard({"input_ids": TOKENS}))


@pytest.mark.parametrize(
    "arguments,error,text",
    [
        ({"shard": None}, TypeError, "shard is a NoneType; pass what cp.shard(batch) returned"),
        ({"shard": {"input_ids": TOKENS}}, TypeError, "shard is a dict; pass what cp.shard(batch) returned"),
        ({"layer": [0]}, TypeError, "unhashable type: 'list'"),
        ({"scale": float("nan")}, ValueError, "scale is nan; use a finite number, or None for 1 / sqrt(8)"),
    ],
)
def test_arguments_of_attention(arguments, error, text):
    cp = make()
    shard = cp.shard({"input_ids": TOKENS})
    with raises(error, text):
        cp.attention(*tensors(), **{"shard": shard} | arguments)


def test_attention_of_another_batch():
    """A shard of another step has another length; one of another object is no shard of this one."""
    cp = make()
    cp.shard({"input_ids": TOKENS})
    with raises(ValueError, "q has 48 tokens, this rank holds 16"):
        cp.attention(*tensors(), cp.shard({"input_ids": TOKENS[:, :5]}))
    with raises(ValueError, "the shard is of another ContextParallel; pass what cp.shard(batch) returned"):
        cp.attention(*tensors(), make().shard({"input_ids": TOKENS}))


def attend_to_dtensors():
    cp = make()
    shard = cp.shard({"input_ids": TOKENS})
    q, k, v = tensors()
    k = DTensor.from_local(k, init_device_mesh("cpu", (2,)), [Replicate()])
    with raises(NotImplementedError, "q, k or v is a DTensor; pass local tensors, x.to_local()"):
        cp.attention(q, k, v, shard)


def test_dtensors():
    pool.run(2, attend_to_dtensors)


# -- loss, report, replay -----------------------------------------------------------------------------


def test_loss():
    cp = make()
    logits = torch.zeros(1, 48, 50)
    with raises(ValueError, "the batch had no labels; give cp.shard labels or shift_labels"):
        cp.loss(logits, cp.shard({"input_ids": TOKENS}))
    shard = cp.shard({"input_ids": TOKENS, "labels": TOKENS})
    with raises(ValueError, "output has 40 tokens, the shard has 48 labels; pass what the model returned"):
        cp.loss(logits[:, :40], shard)
    with raises(ValueError, "output is a tuple; pass the logits"):
        cp.loss((logits,), shard)
    with raises(ValueError, "tokens is 0; give the sum of shard.tokens over the micro-batches"):
        cp.loss(logits, shard, tokens=0)


def test_unshard():
    cp = make()
    shard = cp.shard({"input_ids": TOKENS})
    with raises(ValueError, "dim 1 has 40 entries, this rank holds 48 tokens; say which dim is"):
        cp.unshard(torch.zeros(1, 40, 3), shard)


def test_report():
    cp = make()
    with raises(ValueError, "nothing to report yet; call shard and run the model first"):
        cp.report()
    shard = cp.shard({"input_ids": TOKENS})
    for argument in (None, shard):
        with raises(ValueError, "no attention ran with this shard; call the model with **shard.inputs first"):
            cp.report(argument)


def test_replay():
    cp = make()
    shard = cp.shard({"input_ids": TOKENS})
    cp.attention(*tensors(), shard, layer="a")
    plans = cp.plans(shard)
    packed = TOKENS // 30
    for batch, layer, text in (
        ({"input_ids": TOKENS}, "b", "replay has no plan for layer 'b', only for ['a']; use plans of"),
        (
            {"input_ids": TOKENS, "document_ids": packed},
            "a",
            "documents (((0, 40),),)..(0, 30), (30, 40)..plans of this",
        ),
    ):
        with cp.replay(plans):
            other = cp.shard(batch)
        with raises(ValueError, text):
            cp.attention(*tensors(), other, layer=layer)


def test_gradients_and_models():
    model = torch.nn.Linear(2, 2)
    with raises(ValueError, 'sum_gradients needs ContextParallel(grad_reduce="sum")'):
        make().sum_gradients(model)
    with raises(ValueError, "this model is not attached to this object; detach the one that attach returned"):
        make().detach(model)
    cp = make()
    cp.attach(model)
    with raises(ValueError, "attach was called before; detach the first model or use another object"):
        cp.attach(torch.nn.Linear(2, 2))


# -- the errors themselves ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [RingDesyncError, RingTimeoutError, CheckpointError])
def test_typed_errors_travel(kind):
    """Between processes: pickled and back, with their text."""
    error = pickle.loads(pickle.dumps(kind("ranks 0 and 1 differ")))
    assert type(error) is kind and isinstance(error, Exception) and str(error) == "ranks 0 and 1 differ"


def test_failures_of_other_ranks_are_typed():
    """A rank that fails wakes the others, and its own error is the one that is raised."""

    def body(transport):
        cp = make() if transport.rank == 1 else ContextParallel(transport, pattern="dense", block_size=SIZE)
        with (
            nullcontext()
            if transport.rank == 1
            else pytest.raises(RingTimeoutError, match="as rank 1 failed")
        ):
            cp.shard({"input_ids": TOKENS[:, :0]} if transport.rank == 1 else {"input_ids": TOKENS})

    with raises(ValueError, "sequence length is 0"):
        run_threads(3, body, timeout=20)
