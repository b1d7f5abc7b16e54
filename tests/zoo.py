"""The mask zoo: the masks of LongCA-bench, choices of sparse methods, adversarial plans.

Each entry makes the plan of a sequence of `n` tokens in blocks of SIZE for `heads` query heads that read
`kv_heads` key heads. Sizes of documents, windows and chunks do not divide by anything, on purpose.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from sparring.kernels import Geometry, Plan

SIZE = 16
DOCUMENTS = ((0, 37), (37, 38), (38, 120), (120, 10**6))  # the last one ends with the sequence


def _positions(n: int) -> torch.Tensor:
    return torch.arange(n)[None]


def _document(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """First and last token of each token's document."""
    first, last = torch.zeros(1, n, dtype=torch.int64), torch.zeros(1, n, dtype=torch.int64)
    for start, end in DOCUMENTS:
        first[:, start:end], last[:, start:end] = start, min(end, n) - 1
    return first, last


def _intervals(lo, hi, prefix=None) -> Plan:
    """All visible tiles of a mask."""
    lo, hi = torch.broadcast_tensors(lo, hi)
    if prefix is not None:
        prefix = tuple(torch.broadcast_to(torch.as_tensor(x), lo.shape) for x in prefix)
    geometry = Geometry.from_intervals(lo, hi, SIZE, prefix)
    blocks = geometry.num_blocks
    return Plan.build(geometry, torch.ones(1, 1, blocks, blocks, dtype=torch.bool))


def _tiles(n: int, tiles: Callable, columns=None, full=False) -> Plan:
    """Chosen tiles of a causal (or full) mask; tiles(block rows, key blocks) -> bool [heads, M, M]."""
    i = _positions(n)
    geometry = Geometry.from_intervals(i * 0, i * 0 + n - 1 if full else i, SIZE)
    at = torch.arange(geometry.num_blocks)
    return Plan.build(geometry, tiles(at[:, None], at[None])[None], columns)


def _random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def full(n, heads, kv_heads):
    return _intervals(_positions(n) * 0, _positions(n) * 0 + n - 1)


def causal(n, heads, kv_heads):
    return _intervals(_positions(n) * 0, _positions(n))


def full_document(n, heads, kv_heads):
    return _intervals(*_document(n))


def causal_document(n, heads, kv_heads):
    return _intervals(_document(n)[0], _positions(n))


def full_window(n, heads, kv_heads):
    return _intervals(_positions(n) - 21, (_positions(n) + 21).clamp(max=n - 1))


def causal_window(n, heads, kv_heads):
    return _intervals(_positions(n) - 33, _positions(n))


def shared_question(n, heads, kv_heads):
    """A question that is a fifth of the sequence, and four answers that see it and themselves."""
    i, part = _positions(n), max(1, n // 5)
    answer = (i // part).clamp(max=4) * part
    return _intervals(answer, i, (0, part - 1))


def global_window(n, heads, kv_heads):
    """The first 10 tokens see all and are seen by all; the others see a window."""
    i = _positions(n)
    return _intervals(torch.where(i < 10, 0, i - 25), torch.where(i < 10, n - 1, i), (0, 9))


def causal_blockwise(n, heads, kv_heads):
    """Chunks of 32 tokens: own and previous chunk, and the first one."""
    i = _positions(n)
    return _intervals((i // 32 - 1) * 32, i, (0, 31))


def prefix_causal(n, heads, kv_heads):
    i = _positions(n)
    return _intervals(i * 0, torch.where(i < 41, 40, i))


def prefix_document(n, heads, kv_heads):
    """The first 9 tokens of each document see each other."""
    i, (first, last) = _positions(n), _document(n)
    return _intervals(first, torch.where(i < first + 9, torch.minimum(first + 8, last), i))


def block_causal_document(n, heads, kv_heads):
    """Within a document, whole chunks of 24 tokens up to one's own."""
    i, (first, last) = _positions(n), _document(n)
    return _intervals(first, torch.minimum(first + ((i - first) // 24 + 1) * 24 - 1, last))


def uniform_sparse(n, heads, kv_heads):
    return _tiles(n, lambda q, k: torch.rand(heads, len(q), len(q), generator=_random(1)) < 0.3, full=True)


def variable_sparse(n, heads, kv_heads):
    """Blocks of 1 to 3 tiles, of queries and of keys, and a density of its own for every row of them."""
    g = _random(2)

    def tiles(q, k):
        rows, keys = (torch.randint(1, 4, (len(q),), generator=g).cumsum(0) for _ in range(2))
        rows, keys = (torch.searchsorted(x, q[:, 0], right=True) for x in (rows, keys))
        density = torch.rand(heads, len(q), 1, generator=g) ** 2
        chosen = torch.rand(heads, len(q), len(q), generator=g) < density
        return chosen[:, rows][:, :, keys]

    return _tiles(n, tiles)


def vertical_slash(n, heads, kv_heads):
    columns = torch.randint(0, n, (1, heads, 1, 12), generator=_random(4))
    return _tiles(n, lambda q, k: sum((q - k) == d for d in (1, 4, 5)).bool().repeat(heads, 1, 1), columns)


def _best(scores, count):
    """The `count` best entries of each row, or all of them."""
    chosen = scores.topk(min(count, scores.shape[-1]), -1).indices
    return torch.zeros(scores.shape, dtype=torch.bool).scatter_(-1, chosen, True)


def _scores(heads, q, k, seed):
    """Random scores of tiles, -1 where a causal mask hides them."""
    return torch.rand(heads, len(q), k.shape[1], generator=_random(seed)).masked_fill(k > q, -1)


def top_k(n, heads, kv_heads):
    """The 3 best visible blocks of each row."""
    return _tiles(n, lambda q, k: _best(_scores(heads, q, k, 5), 3))


def key_head_top_k(n, heads, kv_heads):
    """MiniMax M3: one's own block and the 2 best ones, chosen by each key head for all its queries."""
    return _tiles(n, lambda q, k: _best(_scores(kv_heads, q, k, 6) + (q == k) * 2, 3))


def chunk_top_k(n, heads, kv_heads):
    """MoBA: one's own chunk of two blocks and the 2 best earlier ones."""

    def tiles(q, k):
        chunk = torch.arange(-(-len(q) // 2))
        scores = _scores(heads, q // 2, chunk[None], 7)
        return _best(scores + (q // 2 == chunk) * 2, 3).repeat_interleave(2, 2)[..., : len(q)]

    return _tiles(n, tiles)


def top_p(n, heads, kv_heads):
    """XAttention: the fewest blocks of each row that hold 0.9 of its scores."""

    def tiles(q, k):
        scores = (_scores(heads, q, k, 8) * 6).softmax(-1)
        value, order = scores.sort(-1, descending=True)
        kept = value.cumsum(-1) - value < 0.9
        return torch.zeros_like(kept).scatter_(-1, order, kept)

    return _tiles(n, tiles)


def column_groups(n, heads, kv_heads):
    """Tiles shared by all heads; columns chosen by each key head, anew for every third of the rows."""
    i, g = _positions(n), _random(9)
    geometry = Geometry.from_intervals(i * 0, i, SIZE)
    rows = geometry.num_blocks
    tiles = torch.rand(1, 1, rows, rows, generator=g) < 0.2
    columns = torch.randint(0, n, (1, kv_heads, 3, 9), generator=g)
    return Plan.build(geometry, tiles, columns, torch.arange(rows) * 3 // rows)


def anything(n, heads, kv_heads):
    """Random intervals with a random prefix for every query, random tiles and columns for every head."""
    i, g = _positions(n), _random(10)
    lo, width, end = (torch.randint(0, n, i.shape, generator=g) for _ in range(3))
    geometry = Geometry.from_intervals(lo, lo + width - n // 4, SIZE, (end // 2, end))
    shape = (1, heads, geometry.num_blocks, geometry.num_blocks)
    columns = torch.randint(0, n, (1, heads, 1, 12), generator=g)
    return Plan.build(geometry, torch.rand(shape, generator=g) < 0.3, columns)


def lambda_shape(n, heads, kv_heads):
    """Sinks and a window, both exact to the token."""
    return _intervals(_positions(n) - 40, _positions(n), (0, 4))


def hot_row(n, heads, kv_heads):
    return _tiles(n, lambda q, k: (q == len(q) - 2).expand(len(q), len(q))[None])


def hot_column(n, heads, kv_heads):
    return _tiles(n, lambda q, k: (k == 1).expand(len(q), len(q))[None])


def one_column(n, heads, kv_heads):
    """A single token that everybody sees."""
    return _tiles(n, lambda q, k: (q == k)[None], torch.full((1, 1, 1, 1), n // 3))


def diagonal_only(n, heads, kv_heads):
    return _tiles(n, lambda q, k: (q == k)[None])


def empty_rows(n, heads, kv_heads):
    """Runs of queries that see nothing, whole blocks among them."""
    i = _positions(n)
    blind = ((i >= 20) & (i < 75)) | (i % 7 == 3)
    return _intervals(torch.where(blind, n, i * 0), torch.where(blind, -1, i))


def empty_ranks(n, heads, kv_heads):
    """Only the middle of the sequence attends, to itself: ranks without work and keys that nobody sees."""
    i, first, last = _positions(n), n * 2 // 5, n * 3 // 5
    inside = (i >= first) & (i <= last)
    return _intervals(torch.where(inside, first, n), torch.where(inside, last, -1))


LONGCA = (
    full, causal, full_document, causal_document, full_window, causal_window, shared_question, global_window,
    causal_blockwise, prefix_causal, prefix_document, block_causal_document, uniform_sparse, variable_sparse,
)  # fmt: skip
METHODS = (vertical_slash, top_k, key_head_top_k, chunk_top_k, top_p, column_groups, lambda_shape)
ADVERSARIAL = (anything, hot_row, hot_column, one_column, diagonal_only, empty_rows, empty_ranks)
ZOO = {mask.__name__: mask for mask in LONGCA + METHODS + ADVERSARIAL}
