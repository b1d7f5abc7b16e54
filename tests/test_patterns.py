"""Patterns choose what their definitions say: against brute force, and planted structure."""

from __future__ import annotations

import oracle
import pytest
import torch

from sparring.kernels import Geometry, Plan
from sparring.kernels.patterns import PATTERNS, Dense, SinkWindow, VerticalSlash, make_plan
from sparring.kernels.select import decode, encode, keep_top_p

SIZE = 16


def chosen(plan: Plan) -> torch.Tensor:
    return plan.tiles_bool()


def top(mass, ids, share, floor, cap, forced, covered=0.0, total=1.0):
    """The definition: heaviest first, ties to the lower id, until `share` of `total` is covered."""
    picked, reached = [], covered
    for i in sorted(ids, key=lambda i: (i not in forced, -float(mass[i]), i)):
        if len(picked) >= cap:
            break
        if i in forced or len(picked) < floor or reached < share * total:
            picked.append(i)
            reached += float(mass[i])
        elif reached >= share * total:
            break
    return set(picked)


def brute_force(pattern, q, k, document, end, blocks):
    """Columns and diagonals of one head for one document, by loops over the probe's probabilities."""
    local = 1 + -(-pattern.window // SIZE)
    rows = range(max(document, end - pattern.probe), end)
    vertical, slash = [0.0] * end, [0.0] * (blocks + 1)
    near = 0.0
    for row in rows:
        scores = (q[row].double() @ k[document : row + 1].double().T) * q.shape[1] ** -0.5
        for key, p in enumerate((scores.softmax(0) / len(rows)).tolist(), start=document):
            far = (end - 1) // SIZE - key // SIZE >= local or key < document + pattern.sink
            if far:
                vertical[key] += p
            else:
                near += p
            distance, part = divmod(row - key, SIZE)
            slash[distance] += p * (SIZE - part) / SIZE
            slash[distance + 1] += p * part / SIZE
    sinks = set(range(document, min(end, document + pattern.sink)))
    ids = [i for i in range(document, end) if (end - 1) // SIZE - i // SIZE >= local or i in sinks]
    columns = top(vertical, ids, pattern.top_p, *pattern.columns, sinks, covered=near)
    diagonals = top(slash[:blocks], range(blocks), pattern.top_p, *pattern.slashes, set(range(local)))
    return columns, diagonals


@pytest.mark.parametrize("top_p", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("budgets", [((0, 500), (0, 500)), ((7, 7), (3, 3)), ((2, 9), (2, 5))])
@pytest.mark.parametrize("probe,window", [(12, 0), (40, 20)])
def test_vertical_slash_is_its_definition(top_p, budgets, probe, window):
    pattern = VerticalSlash(top_p, *budgets, probe=probe, sink=2, window=window)
    documents = (((0, 170), (170, 250)),)
    geometry = Geometry.causal(1, 250, SIZE, documents)
    q, k, v, *_ = oracle.inputs(1, 4, 2, geometry.num_tokens, 8, seed=3)
    plan = make_plan(pattern, q, k, v, geometry)
    tiles = chosen(plan)
    for head in range(4):
        expected = torch.zeros(geometry.num_blocks, geometry.num_blocks, dtype=torch.bool)
        columns = set()
        for document, end in documents[0]:
            found = brute_force(pattern, q[0, head], k[0, head // 2], document, end, geometry.num_blocks)
            columns |= found[0]
            for row in range(document // SIZE, (end - 1) // SIZE + 1):
                for distance in found[1]:
                    if row - distance >= 0:
                        expected[row, row - distance] = True
        visible = geometry.visible_elements[0] > 0
        diagonal = torch.eye(geometry.num_blocks, dtype=torch.bool)
        assert torch.equal(tiles[0, head], (expected | diagonal) & visible)
        assert {c for c in plan.columns[0, head, 0].tolist() if c < geometry.num_tokens} == columns


def test_planted_structure_is_found():
    """A loud key becomes a column; a repeated distance becomes a diagonal."""
    geometry = Geometry.causal(1, 512, SIZE)
    torch.manual_seed(0)
    q, k = torch.randn(1, 2, 512, 32) * 0.1, torch.randn(1, 2, 512, 32) * 0.1
    k[:, :, 77] += 3.0 * torch.ones(32)
    q[:, 0] += 1.0  # head 0 looks at key 77
    k[:, 1] = torch.randn(512, 32)
    q[:, 1] = torch.roll(k[:, 1], 160, dims=1) * 3  # head 1 looks 160 tokens back
    pattern = VerticalSlash(0.5, columns=(1, 8), slashes=(1, 4), sink=0, window=0)
    plan = make_plan(pattern, q, k, k, geometry)
    assert 77 in plan.columns[0, 0, 0].tolist()
    tiles = chosen(plan)[0, 1]
    assert tiles.diagonal(-10).all()
    assert not tiles.diagonal(-14).any()


def test_fixed_budgets_are_exact():
    geometry = Geometry.causal(1, 512, SIZE)
    q, k, v, *_ = oracle.inputs(1, 4, 2, 512, 8)
    plan = make_plan(VerticalSlash(columns=(20, 20), slashes=(6, 6), window=SIZE), q, k, v, geometry)
    assert ((plan.columns < 512).sum(-1) == 20).all()
    assert (chosen(plan)[:, :, -1].sum(-1) == 6).all()


def test_short_documents_need_no_probe():
    """Documents inside the forced local tiles are dense already; a batch of them has no window."""
    documents = (tuple((start, start + 10) for start in range(0, 160, 10)),)
    geometry = Geometry.causal(1, 160, SIZE, documents)
    q, k, v, *_ = oracle.inputs(1, 2, 1, 160, 8)
    plan = make_plan(VerticalSlash(window=SIZE), q, k, v, geometry)
    assert plan.columns is None
    assert torch.equal(plan.element_mask(), make_plan(Dense(), q, k, v, geometry).element_mask())


def test_sink_window_is_its_definition():
    documents = (((0, 100), (100, 160)),)
    geometry = Geometry.causal(1, 160, SIZE, documents)
    q, k, v, *_ = oracle.inputs(1, 2, 1, 160, 8)
    mask = oracle.expand(make_plan(SinkWindow(sink=3, window=17), q, k, v, geometry), 1)[0, 0]
    for query in range(160):
        start = 0 if query < 100 else 100
        first = (query // SIZE - 2) * SIZE  # 17 tokens reach into two earlier blocks
        expected = {key for key in range(start, query + 1) if key >= first or key < start + 3}
        assert set(mask[query].nonzero()[:, 0].tolist()) == expected


def test_scale_reaches_the_estimate():
    """Scores of a model with its own scale are those that attention will use."""
    geometry = Geometry.causal(1, 256, SIZE)
    q, k, v, *_ = oracle.inputs(1, 2, 1, 256, 8)
    pattern = VerticalSlash(0.7, columns=(0, 64), slashes=(0, 16))
    scaled = make_plan(pattern, q, k, v, geometry, scale=0.8)
    expected = make_plan(pattern, q * 0.8 * 8**0.5, k, v, geometry)
    assert torch.equal(scaled.tiles, expected.tiles)
    assert torch.equal(scaled.columns, expected.columns)
    assert not torch.equal(scaled.tiles, make_plan(pattern, q, k, v, geometry).tiles)


def test_selection_order():
    """Forced first, then mass, then the lower id; and the prefix rule of top-p."""
    mass, ids = torch.tensor([5, 9, 5, 0, 7]), torch.arange(5)
    code = encode(mass, ids, torch.tensor([False, False, False, True, False]))
    mass, ids, forced = decode(code.sort(descending=True).values)
    assert ids.tolist() == [3, 1, 4, 0, 2] and forced.tolist() == [True, False, False, False, False]
    assert mass.tolist() == [0, 9, 7, 5, 5]
    for target, floor, cap, kept in [(10, 0, 9, 3), (0, 0, 9, 1), (0, 4, 9, 4), (99, 0, 2, 2), (16, 0, 9, 3)]:
        assert keep_top_p(mass, forced, torch.tensor(target), floor, cap).sum() == kept


def test_every_pattern_has_traits_and_a_readable_repr():
    for name, pattern in PATTERNS.items():
        assert pattern().traits.causality in ("strict", "block", "noncausal"), name
        assert type(pattern()).__name__ in repr(pattern())
