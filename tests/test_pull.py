"""Pull moves what plans need and nothing else. That its results are right is shown in test_zoo.py.

Ranks of one node read each other's memory; as many nodes as ranks: they send messages.
"""

from __future__ import annotations

from collections import Counter

import oracle
import pytest
import torch
from needs import remote_blocks
from rings import LAYOUTS, NAMES, Counting, attend_batch, on_ring
from zoo import SIZE, ZOO

from sparring.balance import contiguous, from_assignment
from sparring.cp import run_threads
from sparring.cp.pull import needed_blocks
from sparring.cp.rows import first_set
from sparring.kernels import Geometry, Plan
from sparring.kernels.patterns import SinkWindow

HEADS, DIM, LENGTH = (4, 2), 8, 240
UNEVEN = from_assignment(((5, 0, 11), (), (1, 2, 3, 4, 6, 7, 8), (12, 9, 10, 13, 14)), SIZE)


def moved(plan, layout, nodes):
    """Bytes and messages, or windows, of all ranks by channel, from a forward and a backward in fp32."""
    watched = []

    def wrap(transport):
        watched.append(Counting(transport))
        return watched[-1]

    tensors = oracle.inputs(1, *HEADS, LENGTH, DIM, dtype=torch.float32)
    on_ring(plan, layout, *tensors, exchange="pull", wrap=wrap, nodes=nodes)
    return sum((each.bytes for each in watched), Counter()), sum((x.messages for x in watched), Counter())


@pytest.mark.parametrize(
    ("layout", "nodes"), [("contiguous", 1), ("striped", 1), ("uneven", 1), ("uneven", 4)], ids=str
)
@pytest.mark.parametrize("mask", ["causal_window", "top_k", "key_head_top_k", "top_p", "empty_rows"])
def test_bytes_are_the_lower_bound_of_the_plan(mask, layout, nodes):
    """Keys forward and backward, and their gradients, once for every block of a key head that is needed."""
    plan = ZOO[mask](LENGTH, *HEADS)
    blocks = plan.geometry.num_blocks
    held = UNEVEN if layout == "uneven" else LAYOUTS[layout](blocks, 4, SIZE)
    block = 2 * SIZE * DIM * 4  # of keys and values
    least = remote_blocks(plan, held, *HEADS) * block
    assert least > 0
    assert moved(plan, held, nodes)[0] == {"keys": 2 * least, "grads": least}


@pytest.mark.parametrize("world", [2, 5])
@pytest.mark.parametrize("layout", ["zigzag", "first rank empty"])
@pytest.mark.parametrize("mask", ["vertical_slash", "key_head_top_k"])
def test_rows_that_are_read_are_the_rows_that_are_sent(mask, layout, world):
    """Outputs and gradients, to the last bit."""
    plan, tensors = ZOO[mask](LENGTH, *HEADS), oracle.inputs(1, *HEADS, LENGTH, DIM, dtype=torch.float32)
    held = LAYOUTS[layout](plan.geometry.num_blocks, world, SIZE)
    read, sent = (on_ring(plan, held, *tensors, exchange="pull", nodes=nodes) for nodes in (1, world))
    for name, x, y in zip(NAMES, read, sent, strict=True):
        assert torch.equal(x, y), name


@pytest.mark.parametrize("nodes", [1, 2])
def test_headers_agree_before_rows_are_read_or_sent(nodes):
    tensors = oracle.inputs(1, *HEADS, LENGTH, DIM, dtype=torch.float32)[:4]
    batch, options = {"input_ids": torch.zeros(1, LENGTH, dtype=torch.int64)}, {"block_size": SIZE}

    def body(transport):
        return attend_batch(transport, batch, *tensors, exchange="pull", debug=True, **options).tensors

    debugged = run_threads(2, body, nodes=nodes)
    plain = run_threads(2, lambda x: attend_batch(x, batch, *tensors, exchange="pull", **options).tensors)
    for one, other in zip(debugged, plain, strict=True):
        assert all(map(torch.equal, one, other))


@pytest.mark.parametrize("nodes", [1, 5])
def test_a_message_that_nobody_needs_is_dropped(nodes):
    """Documents of one rank each: nothing moves. One tile more, and one group of messages does."""
    plan = ZOO["diagonal_only"](LENGTH, *HEADS)
    layout = contiguous(plan.geometry.num_blocks, 5, SIZE)
    assert not any(sum(moved(plan, layout, nodes), Counter()).values())
    tiles = plan.tiles_bool()
    tiles[0, 0, 6, 4] = True  # of rank 2, which is next to rank 1
    total, messages = moved(Plan.build(plan.geometry, tiles), layout, nodes)
    heads = HEADS[1] if plan.mask_heads == 1 else 1
    assert total["grads"] == heads * 2 * SIZE * DIM * 4
    assert messages == {"keys": 2 * 5, "grads": 5}


def test_a_window_of_4096_tokens_moves_little_at_32_ranks():
    """At most 3 % of a ring, which brings all others' keys to every rank."""
    world, blocks = 32, 4096  # 512k tokens
    layout = contiguous(blocks, world, 128)
    pulled = 0
    for rank in (1, 15, 31):
        geometry = Geometry.causal(1, blocks * 128, 128).select(layout.assignment[rank])
        plan = SinkWindow(sink=64, window=4096).estimate(None, {}, geometry)
        needed = needed_blocks(plan, 2).clone()
        needed[:, :, list(layout.assignment[rank])] = False
        pulled = max(pulled, int(needed.sum(2).max()))
    assert 0 < pulled <= 0.03 * blocks * (world - 1) / world


@pytest.mark.parametrize("mask_heads", [1, 2, 4])
def test_a_block_is_needed_by_the_key_heads_of_the_heads_that_chose_it(mask_heads):
    geometry = Geometry.causal(1, 7 * SIZE, SIZE).select((1, 4, 6))
    tiles = torch.rand(1, mask_heads, 3, 7, generator=torch.Generator().manual_seed(0)) < 0.3
    plan = Plan.build(geometry, tiles)
    shared = plan.tiles_bool().repeat_interleave(4 // mask_heads, 1).any(2)  # [B, H, blocks]
    assert torch.equal(needed_blocks(plan, 2), shared.unflatten(1, (2, 2)).any(2))


def test_the_first_set_entries_come_in_order():
    mask = torch.tensor([False, True, True, False, True])
    assert first_set(mask, 3).tolist() == [1, 2, 4] and first_set(mask, 0).tolist() == []
