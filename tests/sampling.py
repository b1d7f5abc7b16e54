"""Which cases of a product run in `make test`: a sample that covers every pair of values, and a drawn one."""

from __future__ import annotations

import itertools
import random

import pytest

seed = 0  # of the drawn sample; conftest.py sets it before tests are collected


def pairwise(*factors: list) -> list:
    """The whole product as pytest params; all but two samples of it are marked `full`.

    In the first, every pair of values of two factors occurs together; it is the same in every run. The
    second is a tenth as large, at least one case, and drawn with the seed of the run.
    """
    sizes = [len(factor) for factor in factors]
    fixed, product = covering(sizes), list(itertools.product(*map(range, sizes)))
    rest = [case for case in product if case not in fixed]
    drawn = set(random.Random(seed).sample(rest, min(len(rest), max(1, len(fixed) // 10))))
    return [
        pytest.param(
            *(factor[i] for factor, i in zip(factors, case, strict=True)),
            marks=() if case in fixed or case in drawn else pytest.mark.full,
        )
        for case in product
    ]


def covering(sizes: list[int]) -> set[tuple[int, ...]]:
    """Tuples of indices below `sizes` in which all pairs of indices at two places occur, chosen greedily."""
    places, random_order = range(len(sizes)), random.Random(0)
    missing = {
        (i, a, j, b)
        for i, j in itertools.combinations(places, 2)
        for a, b in itertools.product(range(sizes[i]), range(sizes[j]))
    }
    cases = set()
    while missing:
        i, a, j, b = min(missing)
        case = {i: a, j: b}
        for place in places:
            if place not in case:
                values = random_order.sample(range(sizes[place]), sizes[place])
                case[place] = max(values, key=lambda value: len(missing & _with(case, place, value)))
        cases.add(tuple(case[place] for place in places))
        missing.difference_update(*(_with(case, place, case[place]) for place in places))
    return cases


def _with(case: dict[int, int], place: int, value: int) -> set[tuple[int, int, int, int]]:
    """The pairs of a value at a place with the other values of a case."""
    return {
        (place, value, i, a) if place < i else (i, a, place, value) for i, a in case.items() if i != place
    }
