"""The error contract: bad input raises a typed error with what was given, what is needed and a remedy."""

from __future__ import annotations

import pickle
import re
from contextlib import nullcontext

import pool
import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

from sparring.balance import from_assignment, zigzag
from sparring.cp import ContextParallel, RingDesyncError, RingTimeoutError, run_threads
from sparring.kernels import Geometry, Plan, attend
from sparring.kernels.patterns import Dense, SinkWindow, VerticalSlash
from sparring.launch.checkpoint import CheckpointError

SIZE, LENGTH = 16, 40  # padded to 48
TOKENS = torch.arange(LENGTH)[None]


def make(**options):
    return ContextParallel(None, **({"pattern": "dense", "block_size": SIZE} | options))


def raises(error, text):
    """text: what the message must hold, with .. for whatever lies between its parts."""
    return pytest.raises(error, match="(?s)" + ".*".join(map(re.escape, text.split(".."))))


# -- ContextParallel(...) -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options,error,text",
    [
        ({"pattern": "sinkwindow"}, ValueError, "pattern 'sinkwindow' is unknown; use one of..sink-window"),
        ({"pattern": {0: "no"}}, ValueError, "pattern 'no' is unknown; use one of..dense"),
        ({"pattern": 7}, ValueError, "pattern 7 of layer 'default' is neither a Pattern nor a name"),
        ({"layout": "zig"}, ValueError, "unknown layout 'zig'; use one of..zigzag..striped(g)..auto"),
        ({"layout": "striped(0)"}, ValueError, "stripe is 0 blocks; it must be at least 1"),
        ({"layout": 3}, ValueError, "unknown layout 3; use one of..zigzag"),
        ({"exchange": "rings"}, ValueError, "exchange 'rings' is unknown; use one of..'auto', 'ring'"),
        ({"exchange": "pull"}, NotImplementedError, "exchange 'pull'; implemented are..'ring'"),
        ({"exchange": "hierarchical"}, NotImplementedError, "exchange 'hierarchical'; implemented are"),
        ({"exchange": "gather"}, NotImplementedError, "exchange 'gather'; implemented are"),
        ({"exchange": "heads"}, NotImplementedError, "exchange 'heads'; implemented are"),
        ({"exchange": ("ring", "heads")}, NotImplementedError, "exchange ('ring', 'heads'); implemented are"),
        ({"grad_reduce": "avg"}, ValueError, "grad_reduce 'avg' is unknown; use 'mean'..or 'sum'"),
        ({"impl": "cuda"}, ValueError, "impl 'cuda' is unknown; use one of..reference..triton"),
        ({"block_size": 100}, ValueError, "block_size 100 must be a power of two of at least 16; use 128"),
        ({"block_size": 8}, ValueError, "block_size 8 must be a power of two of at least 16; use 128"),
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
    ],
)
def test_mesh_axes(names, sizes, axes, data_axes, text):
    """The message names the axes that the mesh has."""
    for message in pool.run(2, construct, names, sizes, axes, data_axes):
        assert message is not None
        with raises(ValueError, text):
            raise ValueError(message)


def construct_by_name():
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "cp"))
    cp = ContextParallel(mesh, "cp", "dp")
    return cp.transport.size, cp.everyone.size


def test_one_axis_by_its_name():
    assert pool.run(2, construct_by_name) == [(2, 2)] * 2


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
            "attention_mask with holes; only padding at the ends of a row",
        ),
    ],
)
def test_batches(batch, error, text):
    with raises(error, text):
        make().shard(batch)


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


def test_layout_of_another_size():
    layout = zigzag(4, 1, SIZE)
    with raises(ValueError, "4 blocks of 16 tokens on 1 ranks..3 blocks of 16 tokens on 1 ranks..'auto'"):
        make(layout=layout).shard({"input_ids": TOKENS})
    with raises(ValueError, "3 blocks of 32 tokens on 1 ranks..3 blocks of 16 tokens on 1 ranks"):
        make(layout=zigzag(3, 1, 32)).shard({"input_ids": TOKENS})
    with raises(ValueError, "3 blocks of 16 tokens on 3 ranks..3 blocks of 16 tokens on 1 ranks"):
        make(layout=zigzag(3, 3, SIZE)).shard({"input_ids": TOKENS})
    with raises(
        ValueError, "holds 3 blocks, 2 of them different..misses 1 of the 3 blocks..exactly one rank"
    ):
        from_assignment(((0, 2), (2,)), SIZE)


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
        (tensors(heads=3), ValueError, "3 query heads are not divisible by 2 key heads"),
        (tensors(heads=10, kv_heads=4), ValueError, "10 query heads are not divisible by 4 key heads"),
        (tensors(length=40), ValueError, "q has 40 tokens, this rank holds 48..shard.inputs"),
        (tensors(length=96), ValueError, "q has 96 tokens, this rank holds 48..no cache"),
        (tensors(batch=2), ValueError, "batch 2 of q differs from batch 1 of the plan"),
        (
            changed(0, lambda q: q[0]),
            ValueError,
            "q, k, v have 3, 4, 4 dims; all must be [batch, heads, sequence, head_dim]",
        ),
        (
            changed(1, lambda k: k[:, :, :32]),
            ValueError,
            "q (1, 4, 48, 8), k (1, 2, 32, 8), v (1, 2, 48, 8) do not fit",
        ),
        (
            changed(1, lambda k: k[..., :4]),
            ValueError,
            "k (1, 2, 48, 4), v (1, 2, 48, 8) do not fit..head dim must agree",
        ),
        (
            changed(2, lambda v: v[..., :4]),
            NotImplementedError,
            "value head dim 4 differs from key head dim 8 (MLA)",
        ),
        (changed(2, lambda v: v[0]), ValueError, "q, k, v have 4, 4, 3 dims"),
        (changed(2, lambda v: v[:, :1]), ValueError, "v (1, 1, 48, 8) do not fit"),
        (
            changed(1, torch.Tensor.double),
            ValueError,
            "torch.float32, torch.float64, torch.float32; all must be one of",
        ),
        (tensors(dtype=torch.int32), ValueError, "q, k, v are torch.int32..fp16, bf16, fp32, fp64"),
        (
            tensors(dtype=torch.float8_e4m3fn),
            ValueError,
            "q, k, v are torch.float8_e4m3fn..fp16, bf16, fp32, fp64",
        ),
        (changed(1, lambda k: k.to("meta")), ValueError, "are on cpu, meta, cpu, cpu; use one device"),
    ],
)
def test_attention(q_k_v, error, text):
    cp = make()
    with raises(error, text):
        cp.attention(*q_k_v, cp.shard({"input_ids": TOKENS}))


def test_attention_of_another_batch():
    """A shard of another step has another length."""
    cp = make()
    cp.shard({"input_ids": TOKENS})
    with raises(ValueError, "q has 48 tokens, this rank holds 16"):
        cp.attention(*tensors(), cp.shard({"input_ids": TOKENS[:, :5]}))


def test_loss():
    cp = make()
    logits = torch.zeros(1, 48, 50)
    with raises(ValueError, "the batch had no labels; give cp.shard labels or shift_labels"):
        cp.loss(logits, cp.shard({"input_ids": TOKENS}))
    shard = cp.shard({"input_ids": TOKENS, "labels": TOKENS})
    with raises(ValueError, "output has 40 tokens, the shard has 48 labels"):
        cp.loss(logits[:, :40], shard)
    with raises(ValueError, "output is a tuple; pass the logits"):
        cp.loss((logits,), shard)
    with raises(ValueError, "tokens is 0; give the sum of shard.tokens over the micro-batches"):
        cp.loss(logits, shard, tokens=0)


def test_unshard():
    cp = make()
    shard = cp.shard({"input_ids": TOKENS})
    with raises(ValueError, "dim 1 has 40 entries, this rank holds 48 tokens"):
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
        ({"input_ids": TOKENS}, "b", "replay has no plan for layer 'b', only for ['a']"),
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
    with raises(ValueError, "this model is not attached to this object"):
        make().detach(model)
    cp = make()
    cp.attach(model)
    with raises(ValueError, "attach was called before; detach the first model or use another object"):
        cp.attach(torch.nn.Linear(2, 2))


# -- patterns and plans -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family,options,text",
    [
        (SinkWindow, {"sink": -1}, "sink -1 and window 1024 must not be negative"),
        (SinkWindow, {"window": -5}, "sink 64 and window -5 must not be negative"),
        (VerticalSlash, {"top_p": 0.0}, "top_p is 0.0; it is a share of attention in (0, 1]"),
        (VerticalSlash, {"top_p": 1.5}, "top_p is 1.5; it is a share of attention in (0, 1]"),
        (VerticalSlash, {"top_p": float("nan")}, "top_p is nan; it is a share of attention in (0, 1]"),
        (
            VerticalSlash,
            {"columns": (20, 10)},
            "columns=(20, 10) must be (fewest, most) with 0 <= fewest <= most",
        ),
        (VerticalSlash, {"columns": (-1, 30)}, "columns=(-1, 30) must be (fewest, most)"),
        (
            VerticalSlash,
            {"slashes": (3, 2)},
            "slashes=(3, 2) must be (fewest, most) with 0 <= fewest <= most",
        ),
        (VerticalSlash, {"columns": (0, 8)}, "sink 16 exceeds the 8 columns a document may have"),
        (VerticalSlash, {"probe": 65}, "probe is 65; use 1 to 64 queries"),
        (VerticalSlash, {"probe": 0}, "probe is 0; use 1 to 64 queries"),
        (VerticalSlash, {"sink": -2}, "sink -2 and window 128 must not be negative"),
        (VerticalSlash, {"window": -1}, "sink 16 and window -1 must not be negative"),
        (VerticalSlash, {"segment": 0}, "segment is 0; use a multiple of the block size, or None"),
    ],
)
def test_pattern_budgets(family, options, text):
    with raises(ValueError, text):
        family(**options)


def test_segment_of_another_block_size():
    with raises(ValueError, "segment 40 is not a multiple of the block size 16; use 48"):
        make(pattern=VerticalSlash(segment=40)).shard({"input_ids": TOKENS})


@pytest.mark.parametrize(
    "documents,text",
    [
        (
            (((0, 20), (10, 40)),),
            "document (10, 40) of row 0 is empty, overlaps or leaves the 40 tokens..ascending",
        ),
        ((((0, 0),),), "document (0, 0) of row 0 is empty"),
        ((((0, 41),),), "document (0, 41) of row 0..leaves the 40 tokens"),
        (((), ()), "documents of 2 rows for a batch of 1; give one tuple a row"),
    ],
)
def test_geometry(documents, text):
    with raises(ValueError, text):
        Geometry.causal(1, LENGTH, SIZE, documents)


def test_plans():
    geometry = Geometry.causal(1, LENGTH, SIZE)
    with raises(ValueError, "tiles have shape (1, 1, 3, 4)..held blocks=3, key blocks=3"):
        Plan.build(geometry, torch.ones(1, 1, 3, 4, dtype=torch.bool))
    tiles = torch.ones(1, 3, 3, 3, dtype=torch.bool)
    with raises(ValueError, "columns have 2 groups; say which of them each of the 3 query blocks uses"):
        Plan.build(geometry, tiles, torch.zeros(1, 1, 2, 5, dtype=torch.int32))
    plan = Plan.build(geometry, tiles)
    with raises(ValueError, "the plan has 3 mask heads; use 1, 2 (key heads) or 4 (query)"):
        attend(*tensors(length=LENGTH), plan)
    with raises(
        ValueError, "q has 50 tokens, the plan covers 48 in blocks of 16; build the geometry for length 50"
    ):
        attend(*tensors(length=50), Plan.build(geometry, tiles[:, :1]))
    with raises(ValueError, "impl 'fast' is unknown; use one of auto, reference, triton"):
        attend(*tensors(length=LENGTH), Plan.build(geometry, tiles[:, :1]), impl="fast")
    shard = make(pattern=Dense()).shard({"input_ids": TOKENS})
    with raises(ValueError, "the plan holds 2 of 3 blocks or another order; attend needs all of them"):
        half = geometry.select((0, 2))
        attend(*tensors(length=LENGTH), Plan.build(half, tiles[:, :1, :2]))
    assert shard.geometry.blocks == (0, 1, 2)


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
            else pytest.raises(RingTimeoutError, match="another rank failed")
        ):
            cp.shard({"input_ids": TOKENS[:, :0]} if transport.rank == 1 else {"input_ids": TOKENS})

    with raises(ValueError, "sequence length is 0"):
        run_threads(3, body, timeout=20)
