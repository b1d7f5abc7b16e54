"""The mask zoo: masks of LongCA-bench and others, as plans over visible intervals; adversarial plans.

Each entry makes a plan for a sequence of `n` tokens and `heads` query heads; blocks of SIZE tokens. The
lengths do not divide by anything on purpose.
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


def full(n, heads):
    return _intervals(_positions(n) * 0, _positions(n) * 0 + n - 1)


def causal(n, heads):
    return _intervals(_positions(n) * 0, _positions(n))


def full_document(n, heads):
    return _intervals(*_document(n))


def causal_document(n, heads):
    return _intervals(_document(n)[0], _positions(n))


def full_window(n, heads):
    return _intervals(_positions(n) - 21, (_positions(n) + 21).clamp(max=n - 1))


def causal_window(n, heads):
    return _intervals(_positions(n) - 33, _positions(n))


def shared_question(n, heads):
    """A question of 30 tokens, then answers that see it and themselves."""
    i = _positions(n)
    answer = torch.where(i < 30, 0, 30 + (i - 30) // 45 * 45)
    return _intervals(answer, i, (0, 29))


def global_window(n, heads):
    """The first 10 tokens see all and are seen by all; the others see a window."""
    i = _positions(n)
    return _intervals(torch.where(i < 10, 0, i - 25), torch.where(i < 10, n - 1, i), (0, 9))


def causal_blockwise(n, heads):
    """Chunks of 32 tokens: own and previous chunk, and the first one."""
    i = _positions(n)
    return _intervals((i // 32 - 1) * 32, i, (0, 31))


def prefix_causal(n, heads):
    i = _positions(n)
    return _intervals(i * 0, torch.where(i < 41, 40, i))


def prefix_document(n, heads):
    """The first 9 tokens of each document see each other."""
    i, (first, last) = _positions(n), _document(n)
    return _intervals(first, torch.where(i < first + 9, torch.minimum(first + 8, last), i))


def block_causal_document(n, heads):
    """Within a document, whole chunks of 24 tokens up to one's own."""
    i, (first, last) = _positions(n), _document(n)
    return _intervals(first, torch.minimum(first + ((i - first) // 24 + 1) * 24 - 1, last))


def uniform_sparse(n, heads):
    return _tiles(n, lambda q, k: torch.rand(heads, len(q), len(q), generator=_random(1)) < 0.3, full=True)


def variable_sparse(n, heads):
    """Every row has a density of its own."""

    def tiles(q, k):
        density = torch.rand(heads, len(q), 1, generator=_random(2))
        return torch.rand(heads, len(q), len(q), generator=_random(3)) < density**2

    return _tiles(n, tiles)


def vertical_slash(n, heads):
    columns = torch.randint(0, n, (1, heads, 1, 12), generator=_random(4))
    return _tiles(n, lambda q, k: sum((q - k) == d for d in (1, 4, 5)).bool().repeat(heads, 1, 1), columns)


def top_k(n, heads):
    """The 3 best visible blocks of each row."""

    def tiles(q, k):
        scores = torch.rand(heads, len(q), len(q), generator=_random(5)).masked_fill(k > q, -1)
        chosen = scores.topk(min(3, len(q)), -1).indices
        return torch.zeros(scores.shape, dtype=torch.bool).scatter_(2, chosen, True)

    return _tiles(n, tiles)


def lambda_shape(n, heads):
    """Sinks and a window, both exact to the token."""
    return _intervals(_positions(n) - 40, _positions(n), (0, 4))


def hot_row(n, heads):
    return _tiles(n, lambda q, k: (q == len(q) - 2).expand(len(q), len(q))[None])


def hot_column(n, heads):
    return _tiles(n, lambda q, k: (k == 1).expand(len(q), len(q))[None])


def diagonal_only(n, heads):
    return _tiles(n, lambda q, k: (q == k)[None])


def empty_rows(n, heads):
    """Runs of queries that see nothing, whole blocks among them."""
    i = _positions(n)
    blind = ((i >= 20) & (i < 75)) | (i % 7 == 3)
    return _intervals(torch.where(blind, n, i * 0), torch.where(blind, -1, i))


ZOO = {f.__name__: f for f in (
    full, causal, full_document, causal_document, full_window, causal_window, shared_question, global_window,
    causal_blockwise, prefix_causal, prefix_document, block_causal_document, uniform_sparse, variable_sparse,
    vertical_slash, top_k, lambda_shape, hot_row, hot_column, diagonal_only, empty_rows,
)}  # fmt: skip
