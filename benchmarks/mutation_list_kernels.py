"""Listed mutations of kernels/: geometry, plans, the reference and the Triton implementation."""

from __future__ import annotations

from mutation_case import Mutation

ATTEND = "test_attend.py::test_matches_oracle -k 'packed or sink or window or full'"
ROWS = "test_attend.py -k 'matches_oracle and 1-1 or one_token or groupings'"
COUNTS = "test_attend.py -k 'counts or intervals or element_mask or classes'"
PATTERNS = "test_patterns.py"
RING = "test_ring.py -k 'ring_matches_oracle or uneven' -m 'not full'"
TRITON = "test_triton.py -k 'matches_specification and (m2 or h4:2-m4-d16) and not (batch or float or d80)'"
TRITON_COLUMNS = "test_triton.py -k 'long_sequence or matches_specification and block16 and not float'"

GEOMETRY = [
    Mutation(
        "document boundary one token early: the last key of the one before is seen",
        "kernels/geometry.py",
        "lo[row, start:end] = start\n",
        "lo[row, start:end] = max(start - 1, 0)\n",
        PATTERNS,
    ),
    Mutation(
        "document boundary one token late: the last query sees nothing",
        "kernels/geometry.py",
        "lo[row, start:end] = start\n",
        "lo[row, start : end - 1] = start\n",
        PATTERNS,
    ),
    Mutation(
        "a query sees the next token",
        "kernels/geometry.py",
        "hi[row, start:end] = torch.arange(start, end, dtype=torch.int32)",
        "hi[row, start:end] = torch.arange(start + 1, end + 1, dtype=torch.int32)",
        PATTERNS,
    ),
    Mutation(
        "a full tile whose first key is invisible to one query",
        "kernels/geometry.py",
        "covered = (first >= lo.amax(2)[..., None])",
        "covered = (first + 1 >= lo.amax(2)[..., None])",
        COUNTS,
    ),
    Mutation(
        "a tile of which one query sees the last key alone counts as invisible",
        "kernels/geometry.py",
        "(last >= lo.amin(2)[..., None])",
        "(last > lo.amin(2)[..., None])",
        COUNTS,
    ),
    Mutation(
        "a tile of which one query sees the first key alone counts as invisible",
        "kernels/geometry.py",
        "seen = (first <= hi.amax(2)[..., None])",
        "seen = (first < hi.amax(2)[..., None])",
        COUNTS,
    ),
    Mutation(
        "the first token of the padding is visible",
        "kernels/geometry.py",
        "hi.int().clamp(max=lo.shape[1] - 1)",
        "hi.int().clamp(max=lo.shape[1])",
        COUNTS,
    ),
    Mutation(
        "elements seen through both intervals are counted twice",
        "kernels/geometry.py",
        "overlap = torch.where(lo <= hi, lo - 1, num_tokens)",
        "overlap = torch.where(lo <= hi, lo, num_tokens)",
        COUNTS,
    ),
]

PLAN = [
    Mutation(
        "first key block dropped from every list",
        "kernels/bound.py",
        "chosen = plan.tiles_bool()[..., ids] & held",
        "chosen = plan.tiles_bool()[..., ids] & held & (ids > 0)",
        ROWS,
    ),
    Mutation(
        "last key block dropped from every list",
        "kernels/bound.py",
        "chosen = plan.tiles_bool()[..., ids] & held",
        "chosen = plan.tiles_bool()[..., ids] & held & (ids < geometry.num_blocks - 1)",
        ROWS,
    ),
    Mutation(
        "the diagonal tile is not forced",
        "kernels/plan.py",
        "tiles = (tiles | diagonal) & ",
        "tiles = tiles & ",
        "test_attend.py -k diagonal",
    ),
    Mutation(
        "partial tiles are treated as full",
        "kernels/bound.py",
        "full = (geometry.tile_class == FULL)",
        "full = (geometry.tile_class >= FULL)",
        ROWS,
    ),
    Mutation(
        "the transposed lists lack the first query block",
        "kernels/bound.py",
        "transposed = (x.permute(0, 1, 3, 4, 2) for x in (chosen, full))",
        "transposed = (x.permute(0, 1, 3, 4, 2).index_fill(4, ids[:1], False) for x in (chosen, full))",
        TRITON,
    ),
    Mutation(
        "the second visible interval is not bound",
        "kernels/bound.py",
        "(intervals + [None, None])[:4]",
        "(intervals[:2] + [None, None])[:4]",
        ATTEND,
    ),
    Mutation(
        "positions of keys are one too high",
        "kernels/bound.py",
        "(slots.clamp(min=0) * geometry.block_size).int()",
        "(slots.clamp(min=0) * geometry.block_size + 1).int()",
        ROWS,
    ),
    Mutation(
        "the first visible column of a row is lost",
        "kernels/bound.py",
        "columns_before(*columns, low)",
        "columns_before(*columns, low, right=True)",
        ATTEND,
    ),
    Mutation(
        "the last visible column of a row is lost",
        "kernels/bound.py",
        "columns_before(*columns, high, right=True)",
        "columns_before(*columns, high)",
        "test_attend.py -k columns_are_seen",
    ),
    Mutation(
        "a column beyond the 32nd block looks up its tile in the first word",
        "kernels/plan.py",
        "word = (block // WORD).clamp(max=tiles.shape[3] - 1)",
        "word = (block // WORD).clamp(max=0)",
        "test_attend.py -k word",
    ),
    Mutation(
        "columns that are not held here are not zero",
        "kernels/columns.py",
        "return picked.view(*index.shape, -1) * held[..., None]",
        "return picked.view(*index.shape, -1)",
        RING,
    ),
    Mutation(
        "gradients of columns go to ranks that do not hold them",
        "kernels/columns.py",
        "dcolumns = dcolumns * held[..., None]\n",
        "dcolumns = dcolumns * 1\n",
        RING,
    ),
    Mutation(
        "gradients of all but the first column group are lost",
        "kernels/columns.py",
        "for group in range(index.shape[2]):",
        "for group in range(1):",
        ATTEND,
    ),
]

REFERENCE = [
    Mutation(
        "forward alone leaves out the tiles of the first query block",
        "kernels/reference.py",
        "k_row, v_row = (x[row.batch, row.kv_heads][:, row.keys] for x in (k, v))\n        _forward_row(",
        "k_row, v_row = (x[row.batch, row.kv_heads][:, row.keys] for x in (k, v))\n"
        "        row.tokens.start and _forward_row(",
        ROWS,
    ),
    Mutation(
        "dQ alone leaves out the first query block",
        "kernels/reference.py",
        "    _target(dq, row).add_(",
        "    row.tokens.start and _target(dq, row).add_(",
        ROWS,
    ),
    Mutation(
        "dK alone leaves out the first key of each row",
        "kernels/reference.py",
        "dk[row.batch, row.kv_heads].index_add_(1, row.keys, dk_row)",
        "dk[row.batch, row.kv_heads].index_add_(1, row.keys[1:], dk_row[:, 1:])",
        ROWS,
    ),
    Mutation(
        "dV alone leaves out the last key of each row",
        "kernels/reference.py",
        "dv[row.batch, row.kv_heads].index_add_(1, row.keys, dv_row)",
        "dv[row.batch, row.kv_heads].index_add_(1, row.keys[:-1], dv_row[:, :-1])",
        ROWS,
    ),
    Mutation(
        "dV of one column is lost",
        "kernels/reference.py",
        "dcv[row.batch, row.kv_heads, row.group].index_add_(1, row.keys, dv_row)",
        "dcv[row.batch, row.kv_heads, row.group].index_add_(1, row.keys[:-1], dv_row[:, :-1])",
        ATTEND,
    ),
    Mutation(
        "a column inside a chosen tile counts twice",
        "kernels/reference.py",
        "covered = tile_of_columns(bits, positions[None, None, None], size)[0, 0, 0]",
        "covered = tile_of_columns(bits, positions[None, None, None], size)[0, 0, 0] & False",
        ATTEND,
    ),
    Mutation(
        "the prefix interval is ignored in partial tiles",
        "kernels/reference.py",
        "pairs[: 2 if bound.prefix_lo is not None else 1]",
        "pairs[:1]",
        ATTEND,
    ),
    Mutation(
        "the last key of a window is invisible",
        "kernels/reference.py",
        "(lo <= positions) & (positions <= hi)",
        "(lo < positions) & (positions <= hi)",
        ATTEND,
    ),
    Mutation(
        "the mask falls on the full tiles instead of the partial ones",
        "kernels/reference.py",
        "[..., scores.shape[2] - masked :]",
        "[..., :masked]",
        ROWS,
    ),
    Mutation(
        "merge without guard: a row that has seen nothing yet",
        "kernels/reference.py",
        "    peak = peak.masked_fill(peak == -torch.inf, 0.0)  # a row that has seen nothing yet\n",
        "",
        ATTEND,
    ),
    Mutation(
        "merge without guard: division by an empty sum",
        "kernels/reference.py",
        "value / total.masked_fill(total == 0, 1.0)[..., None]",
        "value / total[..., None]",
        ATTEND,
    ),
    Mutation(
        "backward without guard: the lse of a row that sees nothing",
        "kernels/reference.py",
        "    final = final.masked_fill(final == -torch.inf, 0.0)\n",
        "",
        ATTEND,
    ),
    Mutation(
        "what earlier steps saw is left out of the normaliser",
        "kernels/reference.py",
        "total = weights.sum(-1) + carried",
        "total = weights.sum(-1)",
        RING,
    ),
    Mutation(
        "the gradient of lse is ignored",
        "kernels/attention.py",
        "return (out * dout).sum(-1) - dlse",
        "return (out * dout).sum(-1)",
        ROWS,
    ),
    Mutation(
        "accumulators are carried in the dtype of the inputs",
        "kernels/attention.py",
        "return torch.float64 if x.dtype == torch.float64 else torch.float32",
        "return x.dtype",
        "test_triton.py -k 'bfloat16'",
    ),
    Mutation(
        "keys and values of columns are swapped in the backward",
        "kernels/operators.py",
        "run.backward_columns(q, ck, cv,",
        "run.backward_columns(q, cv, ck,",
        ATTEND,
    ),
]

TRITON_KERNELS = [
    Mutation(
        "Triton lists: partial tiles count as full ones",
        "kernels/triton_lists.py",
        "tl.store(num_full + x, full_count, mask=known)",
        "tl.store(num_full + x, chosen_count, mask=known)",
        "test_lists.py -k lists",
    ),
    Mutation(
        "Triton lists: bits behind the last block become entries",
        "kernels/triton_lists.py",
        "chosen &= 0xFF >> tl.minimum(tl.maximum((byte + 1) * 8 - bits, 0), 8)",
        "chosen &= 0xFF",
        "test_lists.py -k behind",
    ),
    Mutation(
        "the order of work: the first part of a list is computed twice, its last one never",
        "kernels/triton_order.py",
        "tl.store(place + 2, item - before, mask=item < items)",
        "tl.store(place + 2, tl.maximum(item - before - 1, 0), mask=item < items)",
        "test_lists.py -k column",
    ),
    Mutation(
        "Triton selection: one code too many wins",
        "kernels/triton_select.py",
        "if kept >= keep:",
        "if kept > keep:",
        "test_estimates.py -k top_k",
    ),
    Mutation(
        "Triton forward: the last partial tile of a row is dropped",
        "kernels/triton_forward.py",
        "for i in range(full * SPLIT, (end - begin) * SPLIT):",
        "for i in range(full * SPLIT, (end - begin) * SPLIT - 1):",
        TRITON,
    ),
    Mutation(
        "Triton dQ: the last full tile of a row is dropped",
        "kernels/triton_backward.py",
        "for i in range(0, full * SPLIT):",
        "for i in range(0, full * SPLIT - 1):",
        TRITON,
    ),
    Mutation(
        "Triton dK, dV: the last full tile of a key block is dropped",
        "kernels/triton_backward.py",
        "for i in range(0, full * STEP):",
        "for i in range(0, full * STEP - 1):",
        TRITON,
    ),
    Mutation(
        "Triton dK, dV: query heads with lists of their own all read the first head",
        "kernels/triton_backward.py",
        "first_head = offset + member * SHARE * tokens",
        "first_head = offset",
        TRITON,
    ),
    Mutation(
        "Triton: a query does not see itself",
        "kernels/triton_forward.py",
        "(position <= tl.expand_dims(high, AXIS))",
        "(position < tl.expand_dims(high, AXIS))",
        TRITON,
    ),
    Mutation(
        "Triton: the prefix interval is ignored",
        "kernels/triton_forward.py",
        "    if PREFIX:\n        prefix = position",
        "    if False:\n        prefix = position",
        TRITON,
    ),
    Mutation(
        "Triton: the sum of earlier tiles is not rescaled",
        "kernels/triton_forward.py",
        "acc * decay[:, None], input_precision",
        "acc, input_precision",
        TRITON,
    ),
    Mutation(
        "Triton: merge without guard",
        "kernels/triton_forward.py",
        'shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)',
        "shift = new_peak",
        TRITON,
    ),
    Mutation(
        "Triton backward: the lse of a row that sees nothing",
        "kernels/triton_backward.py",
        'value = tl.where(value == float("-inf"), 0.0, value * LOG2E)',
        "value = value * LOG2E",
        TRITON,
    ),
    Mutation(
        "Triton: a column inside a chosen tile counts twice",
        "kernels/triton_columns.py",
        "return kept & (((word >> (block % 32)) & 1) == 0)",
        "return kept & (word == word)",
        TRITON_COLUMNS,
    ),
    Mutation(
        "Triton: a column beyond the 32nd block looks up its tile in the first word",
        "kernels/triton_columns.py",
        "word = tl.load(tiles + block // 32, mask=kept, other=-1)",
        "word = tl.load(tiles + block * 0, mask=kept, other=-1)",
        TRITON_COLUMNS,
    ),
    Mutation(
        "Triton dK, dV of columns: rows beyond the first scan are not found",
        "kernels/triton_columns.py",
        "for start in range(0, rows, _SCAN):",
        "for start in range(0, 1, _SCAN):",
        TRITON_COLUMNS,
    ),
    Mutation(
        "Triton dK, dV of columns: parts of a sum over rows overlap",
        "kernels/triton_columns.py",
        "    top += split * share\n    bottom = tl.minimum(bottom, top + share)\n",
        "    bottom = tl.minimum(bottom, top + (split + 1) * share)\n",
        TRITON_COLUMNS,
    ),
]

KERNELS = [*GEOMETRY, *PLAN, *REFERENCE, *TRITON_KERNELS]
