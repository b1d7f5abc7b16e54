"""The lists of a bound plan, and the order of work, as Triton kernels make them: bit for bit those of torch.

Interpreted on the CPU in a process of its own, because the interpreter has to be chosen before triton is
imported, and compiled where there is a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import interpreted
import machine
import pytest
import torch
from interpreted import INTERPRETED, MARKS, kernels_run

from sparring.kernels import Geometry, Plan, bind
from sparring.kernels.bound import AHEAD, plain_lists, prepare
from sparring.kernels.geometry import EMPTY
from sparring.kernels.plan import pack_bits, unpack_bits

DEVICE = "cpu" if INTERPRETED else "cuda"
if INTERPRETED:
    from sparring.kernels import triton_lists  # noqa: F401  (bound to the interpreter by this import)
gpu = machine.needs("gpu", "triton compiled")
pytestmark = MARKS

if not INTERPRETED:

    @machine.needs("triton", "numpy < 2.4")
    def test_in_a_process_of_its_own():
        interpreted.check(__file__)


@dataclass(frozen=True)
class Case:
    """Blocks of 16 tokens; held: physical order of the query blocks, sources: of the key blocks, or None."""

    name: str
    blocks: int
    batch: int = 1
    mask_heads: int = 1
    density: float = 0.4
    held: tuple[int, ...] | None = None
    sources: tuple[tuple[int, ...], ...] | None = None
    documents: tuple[tuple[int, int], ...] | None = None
    causal: bool = True


def backwards(first, last):
    return tuple(range(last - 1, first - 1, -1))


EVEN, ODD = tuple(range(0, 64, 2)), tuple(range(1, 64, 2))
CASES = (
    Case("one block", 1),
    Case("whole words", 64, mask_heads=2),
    Case("a ragged word", 33, batch=2, mask_heads=3),
    Case("several chunks of a line", 300, density=0.1),
    Case("all chosen", 70, mask_heads=2, density=1.0),
    Case("all of everything", 40, density=1.0, causal=False),
    Case("diagonal only", 45, density=0.0),
    Case("documents", 50, 2, 2, documents=((0, 90), (90, 91), (100, 640), (655, 700))),
    Case("one source, permuted", 37, mask_heads=2, sources=(backwards(0, 37),)),
    Case("two sources of whole words", 64, mask_heads=2, sources=(EVEN, ODD)),
    Case("uneven sources", 75, 2, 3, sources=((5, 3), backwards(6, 40), (0, 1, 2, 4), tuple(range(40, 75)))),
    Case("a source that holds nothing", 20, mask_heads=2, sources=((), tuple(range(20)), ())),
    Case("a shard", 66, 2, 2, held=(65, 3, 40, 0, 33), sources=(tuple(range(1, 66)), (0,))),
    Case("a holder of nothing", 20, held=(), sources=((), tuple(range(20)))),
)


def make(case: Case, seed: int = 0) -> tuple[Plan, tuple[tuple[int, ...], ...]]:
    """A random plan with a row and a column in which only the diagonal is chosen, and its sources."""
    g = torch.Generator().manual_seed(seed)
    length = case.blocks * 16
    if case.causal:
        documents = None if case.documents is None else (case.documents,) * case.batch
        geometry = Geometry.causal(case.batch, length - 3, 16, documents)
    else:
        everything = torch.zeros(case.batch, length, dtype=torch.int32)
        geometry = Geometry.from_intervals(everything, everything + length - 1, 16)
    geometry = geometry.to(DEVICE)
    if case.held is not None:
        geometry = geometry.select(case.held)
    shape = (case.batch, case.mask_heads, len(geometry.blocks), case.blocks)
    tiles = torch.rand(shape, generator=g) < case.density
    if case.density < 1:
        tiles[:, :, 2:3], tiles[:, 0, :, 1:3] = False, False
    return Plan.build(geometry, tiles.to(DEVICE)), case.sources or (tuple(range(case.blocks)),)


def slots_of(sources):
    """int64 [R, n]: the logical block in each slot, -1 for none."""
    width = max(1, *map(len, sources))
    slots = [(*held, *[-1] * (width - len(held))) for held in sources]
    return torch.tensor(slots, device=DEVICE)


def check_equal(actual, expected):
    """Pointers and counts, all entries, and a slot behind the last that a kernel may read ahead."""
    for (pointer, full, entries), wanted in zip(actual, expected, strict=True):
        assert torch.equal(pointer, wanted[0]) and torch.equal(full, wanted[1])
        end = int(pointer[-1])
        assert entries.dtype == torch.int32 and entries.shape == wanted[2].shape
        assert torch.equal(entries[:end], wanted[2][:end])
        assert (entries[end : end + AHEAD] == 0).all()


@kernels_run
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_lists_are_those_of_plain_operations(case):
    from sparring.kernels import triton_lists

    plan, sources = make(case)
    slots, capacity = slots_of(sources), case.mask_heads * plan.geometry.num_visible_tiles
    actual = triton_lists.lists(plan, triton_lists.tables(plan.geometry, slots), capacity)
    expected = plain_lists(plan, slots, capacity)
    check_equal(actual, expected)
    bound = bind(plan, sources)
    of_bound = (
        (bound.row_ptr, bound.row_full, bound.row_tiles),
        (bound.key_ptr, bound.key_full, bound.key_tiles),
    )
    for lists, wanted in zip(of_bound, expected, strict=True):
        end = int(wanted[0][-1])
        assert all(torch.equal(x[: len(y)], y) for x, y in zip(lists[:2], wanted[:2], strict=True))
        assert torch.equal(lists[2][:end], wanted[2][:end])


@kernels_run
def test_bits_behind_the_last_block_are_ignored():
    """The last word of a row of 33 blocks has 31 bits of no block."""
    from sparring.kernels import triton_lists

    plan, sources = make(CASES[2])
    noisy = Plan(plan.geometry, plan.tiles.clone())
    noisy.tiles[..., 1] |= -2  # bits 1 to 31; Plan looks at bits of blocks alone
    slots = slots_of(sources)
    known = triton_lists.tables(plan.geometry, slots, in_order=True)
    capacity = plan.mask_heads * plan.geometry.num_visible_tiles
    check_equal(triton_lists.lists(noisy, known, capacity), plain_lists(plan, slots, capacity))


@kernels_run
@pytest.mark.parametrize("shape", [(1, 3, 300), (2, 4, 128), (3, 1, 1), (1, 2, 0)], ids=str)
@pytest.mark.parametrize("longest", [1, 200])
def test_longest_first_is_a_stable_sort(shape, longest):
    from sparring.kernels.triton_order import longest_first

    g = torch.Generator().manual_seed(longest)
    lengths = torch.randint(0, longest + 1, shape, generator=g, dtype=torch.int32).to(DEVICE)
    lengths[:, 1:2] = 0  # a group without work
    group = torch.arange(shape[1], device=DEVICE)[:, None]
    key = torch.where(lengths > 0, group * (longest + 1) - lengths, 2**30).flatten(1)
    assert torch.equal(longest_first(lengths, longest), key.argsort(stable=True))


@kernels_run
@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("case", [case for case in CASES if case.mask_heads == 2], ids=lambda case: case.name)
def test_work_tables_name_the_rows_longest_first(case, together, monkeypatch):
    """Two mask heads, four query heads of two key heads: every row with its list, in order of key heads.

    Or of all together, where their keys fit into the L2.
    """
    from sparring.kernels import hopper_schedule

    plan, sources = make(case)
    bound, rows = bind(plan, sources), len(plan.geometry.blocks)
    keys = torch.empty(case.batch, 2, bound.blocks_per_source * bound.block_size, 64)
    if not together:
        monkeypatch.setattr(hopper_schedule, "NEAR", 0)
    for source in range(len(sources)):
        expected = []
        for tile in range(case.batch * 4 * rows):
            batch, head, row = tile // rows // 4, tile // rows % 4, tile % rows
            x = ((batch * 2 + head // 2) * rows + row) * len(sources) + source
            begin, end = bound.row_ptr[x : x + 2].tolist()
            expected.append((tile, begin, int(bound.row_full[x]), end - begin))
        groups = 1 if together else case.batch * 2
        per = case.batch * 4 * rows // groups
        expected.sort(key=lambda item: (item[3] == 0, item[0] // per if item[3] else 0, -item[3]))
        table, live = hopper_schedule.work_table(bound, source, 4, keys)
        assert table.tolist() == [list(item) for item in expected]
        assert live.tolist() == [sum(item[3] > 0 for item in expected)]


@kernels_run
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("case", [case for case in CASES if case.mask_heads == 2], ids=lambda case: case.name)
def test_column_tables_name_every_part_of_every_list(case, kv_heads):
    """Two mask heads: of one key head, of one each, or shared by two. One key head after the other."""
    from sparring.kernels.triton_order import columns_in_order, longest_first

    plan, sources = make(case)
    bound = bind(plan, sources)
    slots, count = bound.blocks_per_source, len(sources)
    tiles = bound.key_ptr.diff().view(case.batch, 2, count, slots).permute(2, 0, 1, 3)
    tiles = tiles.sum(2, keepdim=True) if kv_heads == 1 else tiles.repeat_interleave(kv_heads // 2, 2)
    tiles = tiles.int().flatten(1, 2)
    order = longest_first(tiles, 2 * bound.rows)
    for shares in (0, 5):
        tables, live = columns_in_order(tiles.flatten(1).contiguous(), order, slots, shares, 2)
        for lengths, table, used in zip(tiles.tolist(), tables.tolist(), live[:, 0].tolist(), strict=True):
            longest = max(2, sum(map(sum, lengths)) // shares) if shares else 10**9
            expected = []
            for head, of_head in enumerate(lengths):
                for slot in sorted(range(slots), key=lambda slot: -of_head[slot]):
                    parts = max(1, (of_head[slot] + longest // 2) // longest) if of_head[slot] else 0
                    expected += [[head, slot, part, parts] for part in range(parts)]
            assert table[:used] == expected


def large(blocks: int, heads: int) -> Plan:
    """A quarter of the tiles of a causal mask, made without a bool of each."""
    geometry = Geometry.causal(1, blocks * 128, device="cuda")
    g = torch.Generator("cuda").manual_seed(0)
    visible = pack_bits(geometry.tile_class != EMPTY)[:, None]
    shape = (2, 1, heads, *visible.shape[2:])
    words = torch.randint(-(2**31), 2**31, shape, generator=g, dtype=torch.int32, device="cuda")
    return Plan(geometry, words[0] & words[1] & visible)


@gpu
def test_lists_are_made_without_waiting_for_the_device():
    plan = large(256, 8)
    sources = (tuple(range(0, 256, 2)), tuple(range(1, 256, 2)))
    for key_blocks in ((plan.geometry.blocks,), sources):
        prepare(plan.geometry, key_blocks)
        bind(plan, key_blocks)  # compiles
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            bind(plan, key_blocks)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@gpu
def test_half_a_million_tokens_with_32_masks_fit():
    """4096 blocks: room for the visible tiles in both lists, and bitmasks; nothing else of that size."""
    plan = large(4096, 32)
    geometry, key_blocks = plan.geometry, (plan.geometry.blocks,)
    prepare(geometry, key_blocks)
    room = 2 * 4 * 32 * geometry.num_visible_tiles
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    bound = bind(plan, key_blocks)
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < room + 2**27
    for head in (0, 31):
        words = plan.tiles[:, head : head + 1]
        chosen = unpack_bits(words, 4096)[0, 0]
        slots = torch.arange(4096, device="cuda")[None]
        expected = plain_lists(Plan(geometry, words), slots, geometry.num_visible_tiles)
        for pointer, full, entries, wanted in (
            (bound.row_ptr, bound.row_full, bound.row_tiles, expected[0]),
            (bound.key_ptr, bound.key_full, bound.key_tiles, expected[1]),
        ):
            lines = pointer[head * 4096 : (head + 1) * 4096 + 1]
            assert torch.equal(lines - lines[0], wanted[0])
            assert torch.equal(full[head * 4096 : (head + 1) * 4096], wanted[1])
            count = int(chosen.sum())
            assert torch.equal(entries[lines[0] : lines[0] + count], wanted[2][:count])


@kernels_run
def test_groups_of_key_heads_are_equal_and_as_few_as_fit():
    from sparring.kernels.hopper_schedule import NEAR, groups_of

    for heads in range(1, 17):
        for size in (NEAR // 20, NEAR // 5, NEAR // 2, NEAR, 3 * NEAR):
            found = groups_of(heads, size)
            fitting = [n for n in range(1, heads + 1) if heads % n == 0 and heads // n * size <= NEAR]
            assert found == min(fitting, default=heads)
