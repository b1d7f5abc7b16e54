"""Selection of the heaviest entries: exact integer masses, ties to the lower id, no host sync."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

ID_BITS = 24  # ids up to 16.7 million
FORCED = 1 << 61


def encode(mass: Tensor, ids: Tensor, forced: Tensor) -> Tensor:
    """One int64 that sorts descending by (forced, mass, lower id first). mass < 2^37, 0 <= ids < 2^24."""
    return (mass << ID_BITS) + ((1 << ID_BITS) - 1 - ids) + forced * FORCED


def decode(code: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """mass, ids and forced of encoded entries; an invalid entry is negative."""
    forced = code >= FORCED
    return (code - forced * FORCED) >> ID_BITS, ids_of(code), forced


def ids_of(code: Tensor) -> Tensor:
    """ids of encoded entries that are valid."""
    return (1 << ID_BITS) - 1 - (code & ((1 << ID_BITS) - 1))


def keep_top_p(mass: Tensor, forced: Tensor, target: Tensor, floor: int, cap: int | Tensor) -> Tensor:
    """bool like mass: which of the entries, sorted by encode() in the last dim, are kept.

    The shortest prefix whose mass reaches `target` (int64, mass still to be covered), but at least
    `floor` and at most `cap` entries; forced entries (they come first) within the cap.
    """
    before = mass.cumsum(-1) - mass
    place = torch.arange(mass.shape[-1], device=mass.device)
    wanted = (before < target[..., None]) | (place < floor) | forced
    return wanted & (place < cap)


def threshold(codes: Tensor, target: Tensor, floor: int, cap: int) -> Tensor:
    """int64 [...]: of the codes [..., n], keep_top_p keeps those that are at least this.

    codes: in any order, unique where they are valid (not negative). target: int64 [...].
    """
    codes = codes.sort(-1, descending=True).values
    mass, _, forced = decode(codes.clamp(min=0))
    keep = keep_top_p(mass, forced, target, floor, cap) & (codes >= 0)
    return codes.masked_fill(~keep, 2 * FORCED).amin(-1)


@dataclass(frozen=True)
class Contest:
    """Which parts of a list of codes compete, and how many of each win: all that top_k knows beforehand.

    bounds: (begin, end) of each part in the list. keep: winners of each.
    rounds: int64 [matches, 3] each, (begin, length, where the winners go) of the matches of a tournament
        of short lists: winners of one round are the list of the next; sizes: lengths of these lists.
    """

    bounds: tuple[tuple[int, int], ...]
    keep: int
    rounds: tuple[Tensor, ...]
    sizes: tuple[int, ...]


def make_contest(
    bounds: tuple[tuple[int, int], ...], keep: int, device: torch.device, match: int = 8192
) -> Contest:
    """The contest for `keep` winners of each part; a match has up to `match` codes, or four times `keep`."""
    match = max(match, 4 * keep)
    parts, rounds, sizes, last = bounds, [], [], False
    while not last:
        cuts = [[(x, min(match, end - x)) for x in range(begin, end, match)] for begin, end in parts]
        last = all(len(cut) <= 1 for cut in cuts)
        table, parts, size = [], [], 0
        for cut in cuts:
            wins = [keep if last else min(length, keep) for _, length in cut]
            places = [size + sum(wins[:i]) for i in range(len(cut))]
            table += [(*x, place) for x, place in zip(cut, places, strict=True)]
            parts.append((size, size + sum(wins)))
            size += keep if last else sum(wins)
        rounds.append(torch.tensor(table, dtype=torch.int64).reshape(-1, 3).to(device))
        sizes.append(size)
    return Contest(bounds, keep, tuple(rounds), tuple(sizes))


def top_k(codes: Tensor, contest: Contest) -> Tensor:
    """int64 [H, parts, keep]: the highest codes of each part of [H, n], in any order, -1 where fewer."""
    best = codes.new_full((len(codes), len(contest.bounds), contest.keep), -1)
    for part, (begin, end) in enumerate(contest.bounds):
        count = min(contest.keep, end - begin)
        best[:, part, :count] = codes[:, begin:end].topk(count, sorted=False).values
    return best
