"""Attention plans of many kinds, drawn at random: what benchmarks/balance.py weighs layouts with.

A plan is drawn for 32 query heads on 8 key heads, in blocks. What belongs to a head (its slashes, how wide
its window is, how much it chooses) comes from `KIND_SEED` and stays from step to step; what belongs to the
text (columns, topics, documents, choices) is drawn anew for each seed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from sparring.balance import Layout, first_blocks

HEADS, KEY_HEADS = 32, 8
KIND_SEED = 7
ROWS = 512  # query blocks drawn at a time


@dataclass(frozen=True, eq=False)
class Drawn:
    """One plan, in blocks.

    counts: uint8 [n, n], how many heads chose each tile. needs: uint64 [KEY_HEADS, n, n / 64], bits of the
    key blocks that any query head of a key head chose. columns: float64 [n], column work of each query
    block in tiles, mean over heads. documents: the ranges of the only batch row, in tokens.
    """

    name: str
    block_size: int
    counts: np.ndarray
    needs: np.ndarray
    columns: np.ndarray
    documents: tuple[tuple[tuple[int, int], ...], ...]

    @property
    def num_blocks(self) -> int:
        return len(self.counts)

    def sums(self) -> np.ndarray:
        """float64 [n]: tiles of each query block, mean over heads."""
        return self.counts.sum(1, dtype=np.int64) / HEADS

    def by_source(self, layout: Layout) -> np.ndarray:
        """float64 [W, W]: tiles of each rank with the keys of each, mean over heads."""
        held = [list(blocks) for blocks in layout.assignment]
        by_key = np.stack([self.counts[blocks].sum(0, dtype=np.uint32) for blocks in held])
        return np.stack([by_key[:, blocks].sum(1) for blocks in held], axis=1) / HEADS

    def needed(self, layout: Layout) -> np.ndarray:
        """float64 [W, W]: key blocks of each rank that each rank needs, mean over key heads."""
        held = [list(blocks) for blocks in layout.assignment]
        result = np.zeros((layout.world, layout.world))
        for bits in self.needs:
            for rank, blocks in enumerate(held):
                keys = np.unpackbits(np.bitwise_or.reduce(bits[blocks]).view(np.uint8), bitorder="little")
                result[rank] += np.bincount(layout.source_of_block, keys[: self.num_blocks], layout.world)
        return result / KEY_HEADS

    def needed_by_nodes(self, layout: Layout, nodes: int) -> np.ndarray:
        """float64 [nodes]: key blocks of other nodes that a node needs, mean over key heads."""
        node_of = layout.source_of_block // (layout.world // nodes)
        result = np.zeros(nodes)
        for bits in self.needs:
            for node in range(nodes):
                keys = np.bitwise_or.reduce(bits[node_of == node]).view(np.uint8)
                keys = np.unpackbits(keys, bitorder="little")[: self.num_blocks]
                result[node] += keys[node_of != node].sum()
        return result / KEY_HEADS


Head = Callable[[np.ndarray], np.ndarray]  # query blocks [k] -> chosen key blocks, bool [k, n]


def _toeplitz(by_distance: np.ndarray) -> Head:
    """The tiles at chosen distances."""
    n = len(by_distance)
    padded = np.concatenate([by_distance[::-1], np.zeros(n - 1, dtype=bool)])
    rows = np.lib.stride_tricks.sliding_window_view(padded, n)
    return lambda blocks: rows[n - 1 - blocks]


def _distances(n: int, *parts: np.ndarray) -> np.ndarray:
    chosen = np.zeros(n, dtype=bool)
    chosen[0] = True
    for part in parts:
        chosen[part[part < n]] = True
    return chosen


def _slashes(rng, n: int, tiles: float, window: int, draw: Callable[[int], np.ndarray]) -> np.ndarray:
    """Distances chosen by a head: a window, then drawn slashes two blocks wide until `tiles` are chosen."""
    chosen = _distances(n, np.arange(window))
    per_distance = n - np.arange(n)
    while True:
        starts = draw(256).astype(int).clip(0, n - 1)
        for start in starts:
            if per_distance[chosen].sum() >= tiles:
                return chosen
            chosen[start : start + 2] = True


def _budget(n: int, density: float) -> float:
    return density * n * (n + 1) / 2


def _window(n: int, density: float) -> int:
    return max(1, round(n * (1 - np.sqrt(1 - density))))


def sinks_window(n, density, block_size, kind, text):
    """A window and 64 sinks as columns: static, the same for all heads."""
    window = _toeplitz(_distances(n, np.arange(_window(n, density))))
    return [window] * HEADS, np.where(np.arange(n) > _window(n, density), 64 / block_size, 0.0)


def vertical_slash(n, density, block_size, kind, text):
    """A window of 1024 tokens, slashes anywhere, 1000 columns anywhere."""
    wide = max(1, 1024 // block_size)
    columns = 1000 / block_size * (np.arange(n) + 0.5) / n
    budget = _budget(n, density) - columns.sum()
    heads = [
        _slashes(kind, n, budget * scale, wide, lambda count: kind.random(count) * n)
        for scale in kind.uniform(0.5, 1.5, HEADS)
    ]
    return list(map(_toeplitz, heads)), columns


def clustered_columns(n, density, block_size, kind, text):
    """A narrow window and few slashes; the other half of the tiles' work is in clusters of columns."""
    starts = np.sort(text.random(6)) * 0.5
    share = np.clip(((np.arange(n) + 0.5) / n)[:, None] - starts, 0, density / 6)
    columns = share.sum(1) * n * 0.5
    budget = _budget(n, density) - columns.sum()
    heads = [_slashes(kind, n, budget, 2, lambda count: kind.random(count) * n) for _ in range(HEADS)]
    return list(map(_toeplitz, heads)), columns


def log_slashes(n, density, block_size, kind, text):
    """Window-heavy: half of the tiles are a window, the others slashes at log-uniform distances."""
    budget, wide = _budget(n, density), max(1, _window(n, density / 2))
    heads = [
        _slashes(kind, n, budget * scale, wide, lambda count: np.exp(kind.random(count) * np.log(n)))
        for scale in kind.uniform(0.7, 1.3, HEADS)
    ]
    return list(map(_toeplitz, heads)), 100 / block_size * (np.arange(n) + 0.5) / n


def xattention(n, density, block_size, kind, text):
    """Blocks by content: runs of blocks share a topic, a query block chooses most blocks of a few topics.

    How much a query block chooses varies along the text, as under a top-p rule. Query heads of a key head
    choose alike.
    """
    topics = 64
    topic = np.repeat(text.integers(0, topics, n // 4 + 1), 4)[:n]
    hot = np.exp(np.interp(np.arange(n), np.linspace(0, n, 17), text.normal(0, 0.4, 17)))
    hot /= np.average(hot, weights=np.arange(n) + 1)

    def head(seed: int, scale: float) -> Head:
        likes = np.random.default_rng(seed).random((topics, topics)) ** 4
        likes *= density * scale / likes[topic].mean()

        def rows(blocks: np.ndarray) -> np.ndarray:
            rng = np.random.default_rng((seed, int(blocks[0])))
            wanted = (likes[topic[blocks]] * hot[blocks, None]).astype(np.float32).take(topic, axis=1)
            chosen = rng.random(wanted.shape, dtype=np.float32) < wanted
            chosen[:, :1] = True
            return chosen | (blocks[:, None] - np.arange(n) < 2)

        return rows

    scales = kind.uniform(0.6, 1.4, KEY_HEADS)
    heads = [head(int(s), scale) for s, scale in zip(text.integers(0, 2**31, KEY_HEADS), scales, strict=True)]
    return _alike(heads), np.zeros(n)


def moba(n, density, block_size, kind, text):
    """Chunks of 4096 tokens: the own one and the best k before it, equally many for every query.

    Query heads of a key head choose alike.
    """
    size = max(1, 4096 // block_size)
    chunks = n // size
    k = max(1, round(chunks * (1 - np.sqrt(1 - density))) - 1)

    def head(seed: int) -> Head:
        def rows(blocks: np.ndarray) -> np.ndarray:
            rng = np.random.default_rng((seed, int(blocks[0])))
            own = blocks // size
            distance = (own[:, None] - np.arange(chunks)).clip(0)
            score = rng.gumbel(size=(len(blocks), chunks)) - 0.5 * np.log1p(distance)
            score = np.where(np.arange(chunks) < own[:, None], score, -np.inf)
            best = np.argpartition(-score, min(k, chunks - 1), axis=1)[:, :k]
            chosen = np.zeros((len(blocks), chunks), dtype=bool)
            np.put_along_axis(chosen, best, True, axis=1)
            chosen[np.arange(len(blocks)), own] = True
            return np.repeat(chosen, size, axis=1)

        return rows

    return _alike([head(int(seed)) for seed in text.integers(0, 2**31, KEY_HEADS)]), np.zeros(n)


def _alike(heads: list[Head]) -> list[Head]:
    return [head for head in heads for _ in range(HEADS // KEY_HEADS)]


def mixed_heads(n, density, block_size, kind, text):
    """Heads that differ: windows, few far slashes, content; some choose twenty times as much as others."""
    content, _ = xattention(n, density * 2, block_size, kind, text)
    heads = []
    for number, scale in enumerate(np.geomspace(0.1, 2.0, HEADS)[kind.permutation(HEADS)]):
        share = min(density * scale * 1.5, 0.9)
        if number % 3 == 0:
            heads.append(_toeplitz(_distances(n, np.arange(_window(n, share)))))
        elif number % 3 == 1:
            heads.append(
                _toeplitz(_slashes(kind, n, _budget(n, share), 4, lambda count: kind.random(count) * n))
            )
        else:
            heads.append(content[number])
    return heads, np.zeros(n)


KINDS = {
    "sinks + window": sinks_window,
    "vertical-slash": vertical_slash,
    "clustered columns": clustered_columns,
    "log-uniform slashes": log_slashes,
    "XAttention-like": xattention,
    "MoBA-like": moba,
    "packed documents": log_slashes,
    "mixed heads": mixed_heads,
}


def packed(n: int, block_size: int, text) -> tuple[tuple[int, int], ...]:
    """Documents of log-normal lengths (median an eightieth of the batch) until the batch is full."""
    ends, total = [], n * block_size
    while not ends or ends[-1] < total:
        length = int(np.exp(text.normal(np.log(total / 80), 1.2))) + 1
        ends.append(min((ends[-1] if ends else 0) + length, total))
    return tuple(zip([0, *ends[:-1]], ends, strict=True))


def draw(name: str, num_blocks: int, density: float, block_size: int, seed: int) -> Drawn:
    """One plan of a kind; density: about, of the tiles that the mask allows."""
    kind, text = np.random.default_rng((KIND_SEED, len(name))), np.random.default_rng((seed, len(name)))
    heads, columns = KINDS[name](num_blocks, density, block_size, kind, text)
    documents = ((0, num_blocks * block_size),)
    if name == "packed documents":
        documents = packed(num_blocks, block_size, text)
    first = first_blocks((documents,), num_blocks, block_size)[0]
    depth = np.arange(num_blocks) - first
    columns = columns[depth]
    counts = np.zeros((num_blocks, num_blocks), dtype=np.uint8)
    needs = np.zeros((KEY_HEADS, num_blocks, -(-num_blocks // 64)), dtype=np.uint64)
    for blocks in _batches(num_blocks):
        keys = np.arange(blocks[-1] + 1)
        visible = (keys <= blocks[:, None]) & (keys >= first[blocks][:, None])
        for number, head in enumerate(heads):
            if not number or head is not heads[number - 1]:
                chosen = head(blocks)[:, : len(keys)] & visible
            counts[blocks[0] : blocks[-1] + 1, : len(keys)] += chosen
            bits = np.packbits(chosen, axis=1, bitorder="little")
            key_head = needs[number // (HEADS // KEY_HEADS)].view(np.uint8)
            key_head[blocks[0] : blocks[-1] + 1, : bits.shape[1]] |= bits
    return Drawn(name, block_size, counts, needs, columns, (documents,))


def _batches(num_blocks: int) -> Iterator[np.ndarray]:
    for start in range(0, num_blocks, ROWS):
        yield np.arange(start, min(start + ROWS, num_blocks))
