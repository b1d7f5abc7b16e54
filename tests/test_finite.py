"""NaN and infinities in q, k, v: named on every rank with debug=True, and without it seen where they are."""

from __future__ import annotations

import time

import pool
import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

from sparring.cp import ContextParallel, run_threads

SIZE = 16
NAN, INF = float("nan"), float("inf")


def attend_to(transport, debug, rank, name, bad):
    """(error, seconds) of one attention call where `rank` has one bad element in the tensor `name`."""
    cp = ContextParallel(transport, pattern="dense", block_size=SIZE, layout="contiguous", debug=debug)
    shard = cp.shard({"input_ids": torch.zeros(1, 64, dtype=torch.int64)})
    q_k_v = {each: torch.zeros(1, 4 if each == "q" else 2, shard.local_length, 8) for each in "qkv"}
    if transport.rank == rank:
        q_k_v[name][0, 1, 3, 5] = bad
    began = time.monotonic()
    try:
        out = cp.attention(*q_k_v.values(), shard, layer="deep")
        return cp.unshard(out, shard, dim=2)
    except FloatingPointError as error:
        return str(error), time.monotonic() - began


def attend_to_over_gloo(*arguments):
    return attend_to(make_transport(), *arguments)


def make_transport():
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),), mesh_dim_names=("cp",))
    return ContextParallel(mesh, pattern="dense").transport


@pytest.mark.parametrize("name,bad,rank", [("q", NAN, 0), ("k", INF, 3), ("v", -INF, 1), ("k", NAN, 2)])
def test_debug_names_what_is_not_finite_on_every_rank(name, bad, rank):
    text = (
        f"attention layer 'deep' got NaN or infinite elements: 1 in {name} on rank {rank} of 4 ranks; look at"
    )
    for error, seconds in run_threads(4, lambda t: attend_to(t, True, rank, name, bad), timeout=20):
        assert error.startswith(text) and seconds < 10


def test_debug_names_what_is_not_finite_on_every_process():
    for error, seconds in pool.run(2, attend_to_over_gloo, True, 1, "v", NAN):
        assert "1 in v on rank 1 of 2 ranks" in error and seconds < 10


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_without_debug_what_is_not_finite_reaches_those_who_see_it(name):
    """Token 19 of 64, in the second of four blocks: as documented at `debug`."""
    for out in run_threads(4, lambda t: attend_to(t, False, 1, name, NAN), timeout=20):
        wrong = out.isnan().any(-1)[0]  # [heads, tokens]
        assert not wrong[:, :16].any(), "blocks that never see it"
        assert wrong[1 if name == "q" else 2, 19], "who sees it"
        if name == "q":
            assert int(wrong.sum()) == 1, "a query is alone"
        else:
            assert wrong[2:, 19:].all() and not wrong[:2].any(), "all who see it, of this key head"


def test_the_count_of_keys_does_not_depend_on_values():
    """NaN must not look like keys that were lost."""
    cp = ContextParallel(None, pattern="dense", block_size=SIZE)
    shard = cp.shard({"input_ids": torch.zeros(1, 48, dtype=torch.int64)})
    x = torch.zeros(1, 2, 48, 8)
    cp.attention(x, x + INF, x + NAN, shard)
    assert "density" in str(cp.report(shard))
