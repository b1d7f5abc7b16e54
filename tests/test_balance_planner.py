"""Work, imbalance, the statistics' prediction, and the choice of the layout."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparring.balance import (
    PlannerState,
    Statistics,
    choose,
    contiguous,
    expected_columns,
    expected_tiles,
    first_blocks,
    from_assignment,
    measure,
    resolve,
    step_imbalance,
    striped,
    work_matrices,
    worker_imbalance,
)

BLOCK = 16


def documents_of(*lengths):
    """One batch row of packed documents with these lengths in blocks."""
    ends = np.cumsum(lengths) * BLOCK
    return (tuple((int(end) - n * BLOCK, int(end)) for n, end in zip(lengths, ends, strict=True)),)


def plan_of(documents, num_blocks, rule):
    """(chosen, visible, first) of batch row 0 for a rule(distance, offset) -> bool, in blocks."""
    first = first_blocks(documents, num_blocks, BLOCK)[0]
    blocks = np.arange(num_blocks)
    distance, offset = blocks[:, None] - blocks, blocks - first[:, None]
    visible = (distance >= 0) & (offset >= 0)
    return rule(distance.clip(0), offset.clip(0)) & visible, visible, first


def statistics_of(documents, num_blocks, rule, columns=None):
    chosen, _, first = plan_of(documents, num_blocks, rule)
    columns = np.zeros(num_blocks) if columns is None else columns
    return measure(chosen.astype(float), columns, np.arange(num_blocks), first)


SLASHES = np.random.default_rng(1).random(256) < 0.1
COLUMNS = np.random.default_rng(2).random(256) < 0.1
RULES = {
    "dense": lambda d, o: d >= 0,
    "slashes": lambda d, o: SLASHES[d],
    "window": lambda d, o: d < 4,
    "columns": lambda d, o: COLUMNS[o],
    "sink": lambda d, o: o < 1,
    "union": lambda d, o: SLASHES[d] | COLUMNS[o],
}


# Work and imbalance


def test_imbalances_of_hand_computed_examples():
    work = np.array([[4.0, 0.0], [2.0, 2.0]])
    assert worker_imbalance(work) == 1.0  # 4 and 4
    assert step_imbalance(work) == 6 / 4  # slowest 4 + 2, mean 3 + 1
    work = np.array([[3.0, 3.0], [1.0, 1.0]])
    assert worker_imbalance(work) == step_imbalance(work) == 1.5
    assert worker_imbalance(np.zeros((2, 3))) == step_imbalance(np.zeros((2, 3))) == 1.0


def test_work_matrix_of_a_hand_computed_example():
    tiles = np.array([[1, 0, 0, 0], [2, 3, 0, 0], [4, 5, 6, 0], [7, 8, 9, 10]], dtype=float)
    columns = np.array([0.5, 0.25, 0, 1])
    plain, stripes = work_matrices([contiguous(4, 2, 1), striped(4, 2, 1)], tiles, columns)
    # rank 0 holds blocks 0 and 1; rank 1 meets its own keys first, then those of rank 0
    np.testing.assert_array_equal(plain, [[6, 0, 0.75], [25, 24, 1]])
    np.testing.assert_array_equal(stripes, [[1 + 4 + 6, 5, 0.5], [3 + 8 + 10, 2 + 7 + 9, 1.25]])


@settings(deadline=None)
@given(st.integers(1, 30), st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_a_work_matrix_holds_all_work_once(num_blocks, world, seed):
    rng = np.random.default_rng(seed)
    tiles = rng.integers(0, 9, (num_blocks, num_blocks)).astype(float)
    columns = rng.integers(0, 9, num_blocks).astype(float)
    owner = rng.integers(0, world, num_blocks)  # uneven, some ranks may hold nothing
    layout = from_assignment([np.flatnonzero(owner == rank) for rank in range(world)], 1)
    (work,) = work_matrices([layout], tiles, columns)
    assert work.shape == (world, world + 1)
    for rank in range(world):
        for step in range(world):
            source = (rank - step) % world
            assert work[rank, step] == tiles[np.ix_(owner == rank, owner == source)].sum()
        assert work[rank, -1] == columns[owner == rank].sum()


# Prediction


def test_first_blocks_see_back_to_the_earliest_document_of_the_block():
    first = first_blocks((((0, 40), (40, 64)), ((16, 33),)), 5, 16)
    # token 40 stands in block 2, which still holds tokens of the first document
    np.testing.assert_array_equal(first, [[0, 0, 0, 2, 5], [1, 1, 1, 4, 5]])
    with pytest.raises(ValueError, match=r"document \(0, 96\).*80 tokens"):
        first_blocks((((0, 96),),), 5, 16)


def test_without_statistics_every_visible_tile_counts():
    documents = (((0, 40), (40, 64)), ((16, 33),))
    first = first_blocks(documents, 5, 16)
    expected = sum(np.tri(5) * (np.arange(5) >= row[:, None]) for row in first)
    for statistics in (None, Statistics.zeros(5)):
        tiles = expected_tiles(documents, 5, 16, statistics)
        np.testing.assert_array_equal(tiles.work(np.arange(tiles.num_blocks)), expected)
        np.testing.assert_allclose(tiles.sums(), expected.sum(1))
        assert not expected_columns(documents, 5, 16, statistics).any()


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("lengths", [(128,), (50, 6, 60, 12)])
def test_slashes_columns_and_their_union_are_predicted_tile_by_tile(name, lengths):
    documents = documents_of(*lengths)
    chosen, visible, _ = plan_of(documents, 128, RULES[name])
    tiles = expected_tiles(documents, 128, BLOCK, statistics_of(documents, 128, RULES[name]))
    predicted = tiles.work(np.arange(tiles.num_blocks))
    assert np.abs(predicted - chosen).sum() <= 0.025 * chosen.sum()
    assert not predicted[~visible].any() and predicted.min() >= 0 and predicted.max() <= 1
    np.testing.assert_allclose(tiles.sums().sum(), predicted.sum(), rtol=1e-3)


def test_statistics_carry_over_to_another_batch_and_length():
    rule = RULES["union"]
    seen = statistics_of(documents_of(100, 28), 128, rule)
    documents = documents_of(40, 50, 6)
    chosen, _, _ = plan_of(documents, 96, rule)
    predicted = expected_tiles(documents, 96, BLOCK, seen).work(np.arange(96))
    assert np.abs(predicted - chosen).sum() <= 0.03 * chosen.sum()
    # a longer document than any seen: a window stays a window
    short = statistics_of(documents_of(*[16] * 8), 128, RULES["window"])
    work = expected_tiles(documents_of(128), 128, BLOCK, short).sums()
    assert abs(work[100] - 4) < 0.4


def test_column_work_is_predicted_from_depth():
    columns = np.minimum(np.arange(64) * 0.1, 3.0)
    seen = statistics_of(documents_of(64), 64, RULES["window"], columns)
    documents = (documents_of(32, 20)[0], documents_of(64)[0])
    expected = columns + np.concatenate([columns[:32], columns[:20], np.zeros(12)])
    np.testing.assert_allclose(expected_columns(documents, 64, BLOCK, seen), expected)


def test_statistics_sum_over_ranks_and_layers():
    documents = documents_of(20, 12)
    chosen, _, first = plan_of(documents, 32, RULES["union"])
    blocks, columns = np.arange(32), np.arange(32) * 0.5
    whole = measure(chosen.astype(float), columns, blocks, first)
    parts = [
        measure(chosen[held].astype(float), columns[held], held, first[held])
        for held in (blocks[::2], blocks[1::2])
    ]
    total = Statistics.from_vector(sum(part.to_vector() for part in parts))
    np.testing.assert_array_equal(total.to_vector(), whole.to_vector())
    twice = expected_tiles(documents, 32, BLOCK, whole + whole).work(blocks)
    np.testing.assert_allclose(twice, expected_tiles(documents, 32, BLOCK, whole).work(blocks), rtol=1e-6)
    pads = measure(np.zeros((1, 4)), np.ones(1), np.array([3]), np.array([4]))
    assert not pads.to_vector().any()


# The choice


def auto(documents, num_blocks, world, statistics=None):
    return resolve("auto", documents, num_blocks, world, BLOCK, statistics)


def test_packed_documents_switch_the_layout():
    one = auto(documents_of(64), 64, 4)
    packed = auto(documents_of(5, 23, 3, 17, 9, 7), 64, 4)
    uneven = auto(documents_of(1, 2, 40, 21), 64, 4)
    short = auto(documents_of(*[16] * 4), 64, 4)
    assert one.layout.name == "zigzag"
    assert packed.layout.name == "striped"
    assert uneven.layout.name == "work-sorted"
    assert short.layout.name == "contiguous"  # one document a rank: nothing has to move
    times = {c.layout.name: c.time for c in packed.table}
    assert times["zigzag"] > 1.5 * times["striped"]


def test_clustered_columns_switch_the_layout():
    documents = documents_of(64)
    window = auto(documents, 64, 4, statistics_of(documents, 64, lambda d, o: d < 2))
    cluster = auto(
        documents, 64, 4, statistics_of(documents, 64, lambda d, o: (d < 2) | ((o >= 8) & (o < 16)))
    )
    every_fourth = auto(documents, 64, 4, statistics_of(documents, 64, lambda d, o: (d < 2) | (o % 4 == 1)))
    assert window.layout.name == "contiguous"
    assert cluster.layout.name == "striped"  # the hot keys are dealt to all ranks
    assert every_fourth.layout.name == "zigzag"  # dealt singly, they would all meet on one rank
    times = {c.layout.name: c.time for c in every_fourth.table}
    assert times["striped"] > 3 * times["zigzag"]


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 6), st.integers(0, 2**32 - 1), st.floats(0, 1))
def test_never_worse_than_contiguous_and_deterministic(num_blocks, world, seed, density):
    rng = np.random.default_rng(seed)
    tiles = np.tril(rng.random((num_blocks, num_blocks)) < density).astype(float)
    columns = rng.random(num_blocks)
    decision, again = (choose(tiles, columns, world, BLOCK) for _ in range(2))
    chosen = next(c for c in decision.table if c.layout is decision.layout)
    assert chosen.time == min(c.time for c in decision.table) <= decision.table[0].time
    assert decision.table[0].layout.name == "contiguous"
    assert decision.layout == again.layout and decision.explain() == again.explain()
    if num_blocks % world == 0:
        assert all(len(set(c.layout.blocks_per_rank)) == 1 for c in decision.table)


def test_work_sorted_deals_equal_work_in_snake_order():
    layout = choose(np.ones((8, 8)), np.zeros(8), 2, BLOCK).table[-1].layout
    assert layout.assignment == ((0, 3, 4, 7), (1, 2, 5, 6))
    layout = choose(np.eye(5), np.array([0.0, 9, 5, 7, 1]), 2, BLOCK).table[-1].layout
    assert layout.assignment == ((0, 1, 4), (2, 3))  # sorted 1, 3, 2, 4, 0


def test_hysteresis_keeps_the_layout_in_use_until_another_is_clearly_better():
    tiles = np.tril(np.ones((128, 128)))
    fresh = choose(tiles, np.zeros(128), 4, BLOCK)
    times = {c.layout.name: c.time for c in fresh.table}
    best = times[fresh.layout.name]
    close = [name for name, time in times.items() if time <= 1.03 * best]
    far = [name for name, time in times.items() if time > 1.03 * best]
    assert "striped" in close and "contiguous" in far
    for name in times:
        kept = choose(tiles, np.zeros(128), 4, BLOCK, PlannerState(name))
        assert kept.layout.name == (name if name in close else fresh.layout.name)
        assert kept.state == PlannerState(kept.layout.name)


def test_the_state_survives_a_checkpoint():
    state = auto(documents_of(64), 64, 4).state
    assert state.layout == "zigzag"
    assert PlannerState.from_dict(json.loads(json.dumps(state.to_dict()))) == state
    assert PlannerState.from_dict(PlannerState().to_dict()) == PlannerState()


def test_explain_shows_all_candidates_and_marks_the_chosen():
    lines = auto(documents_of(64), 64, 4).explain().splitlines()
    assert [line[2:].split()[0] for line in lines[1:6]] == [
        "contiguous",
        "zigzag",
        "striped",
        "striped(4)",
        "work-sorted",
    ]
    assert [line[0] for line in lines[1:6]] == [" ", "*", " ", " ", " "]
    assert lines[1].split()[1:4] == ["2080.0", "1.738", "1.738"]


# Names


def test_names_and_layouts_are_taken_as_given():
    documents, state = documents_of(8), PlannerState("zigzag")
    for name in ("contiguous", "zigzag", "striped", "striped(4)"):
        decision = resolve(name, documents, 8, 2, BLOCK, state=state)
        assert (decision.layout.name, decision.table, decision.state) == (name, (), state)
    assert resolve("striped(2)", documents, 8, 2, BLOCK).layout == striped(8, 2, BLOCK, 2)
    own = from_assignment([[7, 0, 3], [1, 2, 4, 5, 6]], BLOCK)
    decision = resolve(own, documents, 8, 2, BLOCK)
    assert decision.layout is own and "given by the user" in decision.explain()


def test_unknown_names_and_misfitting_layouts_are_refused():
    with pytest.raises(ValueError, match=r"'zig'; use one of contiguous, zigzag, striped.*auto"):
        resolve("zig", documents_of(8), 8, 2, BLOCK)
    with pytest.raises(ValueError, match="8 blocks of 16 tokens on 2 ranks, 4 each.*12 blocks of 16"):
        resolve(contiguous(8, 2, BLOCK), documents_of(12), 12, 2, BLOCK)
