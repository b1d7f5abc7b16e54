"""Whether the attention kernels compute right on this machine, and which of them "auto" takes."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels import Geometry, Plan, attend
from ..kernels.attention import MODULES, steps
from .doctor_finding import Finding, check

BLOCK = 128
LENGTH = 4 * BLOCK
HEADS, KEY_HEADS, HEAD_DIM = 4, 2, 128
HEAD_DIMS = (64, 128, 256)  # that are asked about
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
NAMES = ("out", "dq", "dk", "dv")
# What sums over a few hundred keys and exponentials lose in fp32, of the largest value.
FP32 = 2e-5


def check_auto(device: torch.device) -> list[Finding]:
    """Which implementation "auto" takes for usual dtypes and head dims."""
    found = []
    for dtype in DTYPES:
        chosen = {dim: automatic(dtype, dim, device) for dim in HEAD_DIMS}
        impls = dict.fromkeys(chosen.values())
        dims = {impl: ", ".join(str(dim) for dim in HEAD_DIMS if chosen[dim] == impl) for impl in impls}
        detail = "; ".join(f"{impl} for head dim {dims[impl]}" for impl in impls)
        found.append(Finding(f"auto.impl.{_name(dtype)}", "ok", detail))
    return found


def automatic(dtype: torch.dtype, head_dim: int, device: torch.device) -> str:
    """The implementation that impl="auto" stands for."""
    module = steps("auto", torch.empty(1, 1, BLOCK, head_dim, dtype=dtype, device=device), BLOCK)
    return next(impl for impl, name in MODULES.items() if module.__name__.endswith(name))


def implementations(dtype: torch.dtype, device: torch.device) -> list[str]:
    """Those that compute in this dtype here: the best, and those that "auto" takes where it cannot."""
    best = automatic(dtype, HEAD_DIM, device)
    known = list(MODULES)  # from the specification to the fastest
    return known[: known.index(best) + 1]


def check_kernel(impl: str, dtype: torch.dtype, device: torch.device) -> list[Finding]:
    """Its largest errors against what rounding explains."""
    errors = kernel_errors(impl, dtype, device)
    backward = max(NAMES[1:], key=lambda each: errors[each][0] / errors[each][1])
    parts = {"forward": errors["out"], f"backward ({backward})": errors[backward]}
    detail = ", ".join(f"{what} {error:.1e} of {bound:.1e} allowed" for what, (error, bound) in parts.items())
    remedy = "do not train here: results are wrong; report this, with the output of sparring doctor --json"
    good = all(error <= bound for error, bound in errors.values())
    return [check(kernel_name(impl, dtype, device), good, detail, remedy)]


def kernel_name(impl: str, dtype: torch.dtype, device: torch.device) -> str:
    """Of its finding."""
    return f"kernel.{device}.{impl}.{_name(dtype)}"


def kernel_errors(impl: str, dtype: torch.dtype, device: torch.device) -> dict[str, tuple[float, float]]:
    """(largest error, its bound) of the output and of each gradient, both in units of its largest value.

    Bound in fp16 and bf16: twice the error of plain operations that round where kernels do, and one rounding
    of the result.
    """
    plan, (q, k, v, dout) = _plan(device), _inputs(dtype, device)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out, _ = attend(*leaves, plan, impl=impl)
    results = (out.detach(), *torch.autograd.grad(out, leaves, dout))
    mask = plan.element_mask()
    exact = _dense(q, k, v, dout, mask, torch.float64, torch.float64)
    rough = _dense(q, k, v, dout, mask, torch.float32, dtype)
    found = {}
    for name, x, y, low in zip(NAMES, results, exact, rough, strict=True):
        rounding = 2 * _error(low, y) + torch.finfo(dtype).eps
        found[name] = _error(x, y), FP32 if dtype == torch.float32 else rounding
    return found


def _error(x: Tensor, exact: Tensor) -> float:
    """The largest, of the largest exact value; infinite where x is not finite."""
    error = (x.double() - exact).abs().max() / exact.abs().max()
    return float(error.nan_to_num(torch.inf, torch.inf))


def _plan(device: torch.device) -> Plan:
    """Causal: the diagonal, some tiles before it, other ones for each key head, and two columns."""
    geometry, blocks = Geometry.causal(1, LENGTH, BLOCK, device=device), LENGTH // BLOCK
    tiles = torch.zeros(1, KEY_HEADS, blocks, blocks, dtype=torch.bool, device=device)
    tiles[:, 0, :, 0] = tiles[:, 1, 2:, 1] = True
    columns = torch.tensor([3, BLOCK + 5], device=device).expand(1, KEY_HEADS, 1, -1)
    return Plan.build(geometry, tiles, columns)


def _inputs(dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """q, k, v and the gradient of the output. Values with a mean, so that a lost tile shows."""
    generator = torch.Generator().manual_seed(0)
    heads = (HEADS, KEY_HEADS, KEY_HEADS, HEADS)
    drawn = [torch.randn(1, n, LENGTH, HEAD_DIM, generator=generator) for n in heads]
    drawn[2] += torch.arange(LENGTH)[:, None] / LENGTH
    return [x.to(device, dtype) for x in drawn]


def _dense(q, k, v, dout, mask: Tensor, compute: torch.dtype, rounds: torch.dtype) -> list[Tensor]:
    """fp64 out, dq, dk, dv of masked attention by plain operations in `compute`.

    Weights, their gradients and the results round to `rounds`, as kernels do. mask: [1, KEY_HEADS, S, S].
    """
    group, scale = HEADS // KEY_HEADS, HEAD_DIM**-0.5
    q, k, v, dout = (x.to(compute) for x in (q, k, v, dout))
    wide_k, wide_v, mask = (x.repeat_interleave(group, 1) for x in (k, v, mask))
    weights = (q @ wide_k.mT * scale).masked_fill(~mask, -torch.inf).softmax(-1)
    rounded = weights.to(rounds).to(compute)
    out = rounded @ wide_v
    delta = (out * dout).sum(-1, keepdim=True)
    scores = (weights * (dout @ wide_v.mT - delta)).to(rounds).to(compute)
    dq, dk, dv = scores @ wide_k * scale, scores.mT @ q * scale, rounded.mT @ dout
    dk, dv = (x.unflatten(1, (-1, group)).sum(2) for x in (dk, dv))
    return [x.to(rounds).double() for x in (out, dq, dk, dv)]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
