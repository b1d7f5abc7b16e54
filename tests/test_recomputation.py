"""Activation checkpointing: recomputation repeats the forward, with its shard and its plans."""

from __future__ import annotations

import pytest
import tiny_models
import torch
from tiny_models import TinyGPT, assert_same_step, gradients, llama, make_batch, parallel, sharded

from sparring.cp import run_threads
from sparring.kernels.patterns import SinkWindow, VerticalSlash

SPARSE = VerticalSlash(top_p=0.6, columns=(3, 12), slashes=(1, 4), probe=8, sink=2, window=0)
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")


def each_once(ways):
    """On two ranks; on one in the whole product."""
    return [pytest.param(1, how, marks=pytest.mark.full) for how in ways] + [(2, how) for how in ways]


@pytest.mark.parametrize("world,how", each_once([how for how in tiny_models.CHECKPOINTING if how]))
def test_it_changes_no_gradient(world, how):
    """torchtitan #1522: on all layers, on one, or selective, which must not mix up what it saved."""
    batch, _ = make_batch("packed")
    [expected, *_] = sharded(TinyGPT(kv_heads=2), batch, world, SPARSE)
    results = sharded(TinyGPT(kv_heads=2, checkpointing=how), batch, world, SPARSE)
    assert_same_step(results, expected)
    runs = [len(runs) for runs in results[0]["covered"].values()]
    assert runs == ([1, 2] if how == "one layer" else [2, 2])


HOW = {
    "all layers": {"use_reentrant": False},
    "all layers, reentrant": {"use_reentrant": True},
    "one layer": {"use_reentrant": False},
    "selective": {"use_reentrant": False, "context_fn": tiny_models.selective(tiny_models.PRODUCTS)},
}


@pytest.mark.parametrize("how", HOW)
def test_that_of_transformers_changes_no_gradient(how):
    """The same by the model's own switch."""

    def prepare(model):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=HOW[how])
        model.model.layers[0].gradient_checkpointing = how != "one layer"

    batch, _ = make_batch("packed")
    [expected, _] = sharded(llama(), batch, 2, SPARSE)
    results = sharded(llama(), batch, 2, SPARSE, prepare=prepare)
    assert_same_step(results, expected)
    runs = [len(runs) for runs in results[0]["covered"].values()]
    assert runs == ([1, 2] if how == "one layer" else [2, 2])


class Restless(VerticalSlash):
    """Chooses otherwise each time it is asked: what VerticalSlash chooses and 1, 2, 3, ... blocks back."""

    def estimate(self, q, summary, geometry):
        asked = self.__dict__.setdefault("asked", [])
        asked.append(len(asked))
        window = SinkWindow(sink=0, window=len(asked) * geometry.block_size)
        plan = super().estimate(q, summary, geometry)
        tiles = plan.tiles_bool() | window.estimate(q, summary, geometry).tiles_bool()
        return type(plan).build(geometry, tiles, plan.columns, plan.column_group)


@pytest.mark.parametrize("world,how", each_once(["reentrant", "non-reentrant", "selective, products"]))
def test_it_uses_the_plan_of_the_forward(world, how):
    """A plan estimated anew from recomputed values may differ: it is asked for once and kept, bit for bit."""
    batch, _ = make_batch("packed")

    def run(checkpointing):
        replicas = [TinyGPT(checkpointing=checkpointing) for _ in range(world)]

        def body(transport):
            options = dict(top_p=0.6, columns=(3, 12), slashes=(1, 4), probe=8, sink=2, window=0)
            pattern = Restless(**options)
            cp = parallel(transport, pattern=pattern, layout="zigzag")
            own = cp.attach(replicas[transport.rank])
            shard = cp.shard(batch)
            loss = cp.loss(own(**shard.inputs), shard)
            before = {layer: plan.tiles.clone() for layer, plan in shard.plans.items()}
            loss.backward()
            cp.sum_gradients(own)
            assert pattern.__dict__["asked"] == [0, 1]
            assert all(torch.equal(before[layer], plan.tiles) for layer, plan in shard.plans.items())
            return {"loss": loss.item(), "grads": gradients(own)}

        return run_threads(world, body, timeout=60)

    assert_same_step(run(how), run(None)[0])


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_layer_without_its_shard_is_refused(reentrant):
    """NeMo Automodel #3507, in recomputation: a layer whose shard got lost between forward and backward."""
    batch, _ = make_batch("whole")
    model = llama()
    cp = parallel(None)
    cp.attach(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    shard = cp.shard(batch)
    loss = cp.loss(model(**shard.inputs), shard)
    layer = model.model.layers[0].self_attn
    whole = layer.forward
    layer.forward = lambda *args, sparring_shard, **kwargs: whole(*args, **kwargs)
    with pytest.raises(ValueError, match="no shard reached LlamaAttention"):
        loss.backward()
