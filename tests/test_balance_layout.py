"""Layouts: every block held once, restoring undoes sharding, the built-in rules."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparring.balance import Layout, contiguous, from_assignment, striped, zigzag

BUILTINS = {
    "contiguous": contiguous,
    "zigzag": zigzag,
    "striped": striped,
    "striped(4)": lambda n, w, b: striped(n, w, b, stripe=4),
    "striped(3)": lambda n, w, b: striped(n, w, b, stripe=3),
}


@st.composite
def layouts(draw):
    """Built-in layouts of any size, and random assignments with uneven and empty ranks."""
    world = draw(st.integers(1, 9))
    num_blocks = draw(st.integers(1, 60))
    block_size = draw(st.integers(1, 5))
    name = draw(st.sampled_from([*BUILTINS, "random"]))
    if name != "random":
        return BUILTINS[name](num_blocks, world, block_size)
    order = draw(st.permutations(range(num_blocks)))
    cuts = sorted(draw(st.lists(st.integers(0, num_blocks), min_size=world - 1, max_size=world - 1)))
    bounds = [0, *cuts, num_blocks]
    return from_assignment([order[a:b] for a, b in zip(bounds, bounds[1:], strict=False)], block_size)


@settings(deadline=None)
@given(layouts())
def test_every_block_is_held_once_where_the_layout_says(layout):
    held = [block for blocks in layout.assignment for block in blocks]
    assert sorted(held) == list(range(layout.num_blocks))
    assert layout.blocks_per_rank == tuple(map(len, layout.assignment))
    for block in range(layout.num_blocks):
        source, slot = layout.source_of_block[block], layout.slot_of_block[block]
        assert layout.assignment[source][slot] == block
    assert layout.source_of_block.dtype == layout.slot_of_block.dtype == np.int32


@settings(deadline=None)
@given(layouts())
def test_restoring_undoes_sharding(layout):
    full = np.arange(layout.num_blocks * layout.block_size) * 7
    shards = [full[layout.token_index(rank)] for rank in range(layout.world)]
    assert [len(s) for s in shards] == [n * layout.block_size for n in layout.blocks_per_rank]
    np.testing.assert_array_equal(np.concatenate(shards)[layout.inverse], full)
    assert layout.inverse.dtype == layout.token_index(0).dtype == np.int64


@settings(deadline=None)
@given(layouts())
def test_positions_within_a_block_are_consecutive(layout):
    for rank, blocks in enumerate(layout.assignment):
        index = layout.token_index(rank).reshape(-1, layout.block_size)
        expected = np.array(blocks, dtype=int)[:, None] * layout.block_size
        np.testing.assert_array_equal(index, expected + np.arange(layout.block_size))


@pytest.mark.parametrize("name", BUILTINS)
@settings(deadline=None)
@given(world=st.integers(1, 12), share=st.integers(1, 9))
def test_builtins_are_even_when_the_blocks_divide_by_the_ranks(name, world, share):
    layout = BUILTINS[name](world * share, world, 2)
    assert layout.blocks_per_rank == (share,) * world
    assert all(blocks == tuple(sorted(blocks)) for blocks in layout.assignment)


@pytest.mark.parametrize("name", BUILTINS)
@settings(deadline=None)
@given(world=st.integers(1, 12), num_blocks=st.integers(1, 70))
def test_builtins_are_nearly_even_otherwise(name, world, num_blocks):
    counts = BUILTINS[name](num_blocks, world, 2).blocks_per_rank
    assert max(counts) - min(counts) <= (2 if name == "zigzag" else 1)


def test_the_rules():
    assert contiguous(6, 2, 1).assignment == ((0, 1, 2), (3, 4, 5))
    assert zigzag(8, 2, 1).assignment == ((0, 1, 6, 7), (2, 3, 4, 5))
    assert zigzag(6, 2, 1).assignment == ((0, 4, 5), (1, 2, 3))  # odd: chunks of 1, 2, 1, 2 blocks
    assert striped(6, 2, 1).assignment == ((0, 2, 4), (1, 3, 5))
    assert striped(12, 2, 1, stripe=2).assignment == ((0, 1, 4, 5, 8, 9), (2, 3, 6, 7, 10, 11))
    # one full round of 2 x 4 blocks, then what is left in narrower stripes
    assert striped(12, 2, 1, stripe=4).assignment == ((0, 1, 2, 3, 8, 9), (4, 5, 6, 7, 10, 11))


@settings(deadline=None)
@given(share=st.integers(1, 40), world=st.integers(1, 10))
def test_zigzag_balances_dense_causal_work(share, world):
    work = [sum(block + 1 for block in blocks) for blocks in zigzag(share * world, world, 1).assignment]
    assert max(work) - min(work) <= (0 if share % 2 == 0 else share * world)


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ([[0, 1], [1, 2]], ["holds 4 blocks", "3 of them different", "misses 1 of the 4"]),
        ([[0, 1], [3]], ["holds 3 blocks", "misses 1 of the 3", "[2]", "exactly one rank"]),
        ([[-1], [0]], ["misses 1 of the 2", "[1]"]),
        ([], ["0 ranks"]),
    ],
)
def test_an_assignment_that_is_no_permutation_is_refused(assignment, words):
    with pytest.raises(ValueError) as error:
        from_assignment(assignment, 128)
    assert all(word in str(error.value) for word in words)


def test_other_bad_sizes_are_refused():
    with pytest.raises(ValueError, match="holds 2 blocks.*misses 1 of the 3 blocks"):
        Layout(1, 3, ((0,), (1,)), "short")
    with pytest.raises(ValueError, match="holds 3 blocks, 2 of them different, and misses 0 of the 2"):
        Layout(1, 2, ((0, 1), (1,)), "twice")
    with pytest.raises(ValueError, match="block_size is 0"):
        contiguous(4, 2, 0)
    with pytest.raises(ValueError, match="stripe is 0"):
        striped(4, 2, 1, stripe=0)


def test_the_digest_tells_layouts_apart_and_is_stable():
    layout = zigzag(8, 2, 128)
    assert layout.digest() == 6353288063219883717
    assert layout.digest() == from_assignment(layout.assignment, 128, "other name").digest()
    others = [contiguous(8, 2, 128), striped(8, 2, 128), zigzag(8, 2, 64), zigzag(8, 4, 128)]
    assert len({layout.digest(), *(other.digest() for other in others)}) == 5
    assert all(0 <= other.digest() < 2**63 for other in others)
    swapped = from_assignment([layout.assignment[0][::-1], layout.assignment[1]], 128)
    assert swapped.digest() != layout.digest()  # the order on a rank matters


def test_repr_is_short_and_says_what_matters():
    assert repr(striped(8, 2, 128, 4)) == "Layout(striped(4): 8 blocks of 128 tokens on 2 ranks, 4 each)"
    assert "0 to 3 each" in repr(from_assignment([[0, 1, 2], []], 16))
