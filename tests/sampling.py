"""Which cases of a product run in `make test`: a declared sample that covers every pair of values."""

from __future__ import annotations

import itertools
import random

import pytest


def pairwise(*factors: list, seed: int = 0) -> list:
    """The whole product as pytest params; all but a pairwise-covering sample are marked `full`.

    Every pair of values of two factors occurs together in some unmarked case. The sample is chosen
    greedily with a fixed seed, so it is the same in every run.
    """
    product = list(itertools.product(*factors))
    random.Random(seed).shuffle(product)
    missing = {pair for case in product for pair in _pairs(case)}
    sample = set()
    while missing:
        best = max(product, key=lambda case: len(missing & set(_pairs(case))))
        sample.add(best)
        missing -= set(_pairs(best))
    marks = {case: () if case in sample else (pytest.mark.full,) for case in product}
    return [pytest.param(*case, marks=marks[case]) for case in itertools.product(*factors)]


def _pairs(case: tuple) -> list:
    return [(i, j, case[i], case[j]) for i, j in itertools.combinations(range(len(case)), 2)]
