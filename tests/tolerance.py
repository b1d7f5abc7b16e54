"""Comparisons of the tests: by the largest error, within bounds that are derived, not guessed.

The largest error of every tier is noted; conftest.py hands it to the reports, benchmarks/proof.py shows it.
"""

from __future__ import annotations

import torch
from torch import Tensor

TIERS = ("fp64", "fp32", "bf16", "triton-interpreter", "gpu-fp32", "gpu-bf16")
_noted: dict[str, float] = {}


def check(tier: str, name: str, actual: Tensor, expected: Tensor, bound: float | Tensor) -> None:
    """Asserts |actual - expected| <= bound everywhere: no NaN, infinities in the same places.

    bound: absolute; a number, or a tensor that broadcasts to `expected`, as from `rounding`.
    """
    if tier not in TIERS:
        raise ValueError(f"tier {tier!r} is unknown; use one of {', '.join(TIERS)}")
    assert actual.shape == expected.shape, f"{name}: {tuple(actual.shape)}, not {tuple(expected.shape)}"
    actual, expected = actual.detach().double(), expected.detach().double()
    assert not actual.isnan().any(), f"{name}: {int(actual.isnan().sum())} of {actual.numel()} are NaN"
    assert not expected.isnan().any(), f"{name}: the expected values have NaN"
    if not expected.numel():
        return
    error = torch.where(actual == expected, 0.0, (actual - expected).abs())  # equal infinities: 0
    bound = torch.as_tensor(bound, dtype=torch.float64, device=error.device).broadcast_to(error.shape)
    finite = expected[expected.isfinite()].abs()
    size = max(1.0, float(finite.max())) if finite.numel() else 1.0
    _noted[tier] = max(_noted.get(tier, 0.0), float(error.max()) / size)
    beyond = error > bound
    if beyond.any():
        worst = (error / bound.clamp(min=1e-300)).argmax()
        at = tuple(int(i) for i in torch.unravel_index(worst, error.shape))
        raise AssertionError(
            f"{name}: {int(beyond.sum())} of {error.numel()} values are wrong; the worst at {at} is "
            f"{float(actual[at])}, not {float(expected[at])}: error {float(error[at]):.3g} > "
            f"{float(bound[at]):.3g}"
        )


def rounding(low: Tensor, exact: Tensor, dtype: torch.dtype) -> Tensor:
    """The bound of each row [..., 1] of a result in `dtype`, from an independent computation in it.

    Twice the error of that computation `low`, the largest of the rows of a head [..., S, D], because the
    error of one row is a matter of luck; and one rounding band of the largest value of the row.
    """
    low, exact = low.detach().double(), exact.detach().double()
    error = (low - exact).abs().amax((-2, -1), keepdim=True)
    return 2 * error + torch.finfo(dtype).eps * exact.abs().amax(-1, keepdim=True)


def drain() -> dict[str, float]:
    """The largest error of each tier since the last call, in units of the largest value (at least 1)."""
    noted = dict(_noted)
    _noted.clear()
    return noted
