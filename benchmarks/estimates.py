"""What choosing tiles costs: estimate, selection, plan and its lists against the attention they are for.

    python benchmarks/estimates.py               # VerticalSlash at 32k and 128k tokens, 32 heads

`ms` is the time between two events on the device, launches included; `device_ms` adds up its kernels, and
`launches` counts them. `share` compares with forward and backward of the same plan, without its lists. The
scores of whole tiles, pooled and antidiagonal with stride 16, are timed on the same tensors.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
from functools import partial
from pathlib import Path

import torch
import triton
from torch.profiler import ProfilerActivity, profile

from sparring.kernels import Geometry, Plan, attend, bind, block_scores, estimates
from sparring.kernels.bound import prepare
from sparring.kernels.patterns import VerticalSlash, vertical_slash
from sparring.kernels.patterns.base import combine_alone, make_plan

RESULTS = Path(__file__).parent / "results"


def make(options, length: int):
    """q, k, v, dout [1, heads, length, dim] and the geometry."""
    g = torch.Generator("cuda").manual_seed(0)
    heads = (options.heads, options.kv_heads, options.kv_heads, options.heads)
    shapes = [(1, h, length, options.dim) for h in heads]
    tensors = [torch.randn(x, generator=g, device="cuda").to(torch.bfloat16) for x in shapes]
    return *tensors, Geometry.causal(1, length, device="cuda")


def check(options) -> None:
    """The plan of the kernels against that of the specification in PyTorch; raises if they disagree."""
    q, k, v, _, geometry = make(options, 8192)
    plan, chosen = make_plan(VerticalSlash(), q, k, v, geometry), vertical_slash.operations
    vertical_slash.operations = lambda _: estimates
    expected = make_plan(VerticalSlash(), q, k, v, geometry)
    vertical_slash.operations = chosen
    tiles, wanted = plan.tiles_bool(), expected.tiles_bool()
    columns = torch.cat([plan.columns, expected.columns], -1).sort(-1).values
    alone = 1 - 2 * (columns[..., 1:] == columns[..., :-1]).sum() / columns.shape[-1] / options.heads
    other = (tiles != wanted).sum() / wanted.sum()
    print(f"against the specification: {float(other):.1e} of the tiles differ, {float(alone):.1e} of columns")
    if not (other < 1e-2 and alone < 1e-2):  # scores round in another order: only ties may differ
        raise SystemExit("the plan is wrong; nothing is timed")


def density(plan: Plan) -> float:
    """Visible pairs of chosen tiles and columns, of all that are visible."""
    visible = plan.geometry.visible_elements[:, None]
    pairs = (plan.tiles_bool() * visible).sum(dtype=torch.float64) / plan.mask_heads
    if plan.columns is not None:
        pairs += plan.column_elements().sum(dtype=torch.float64) / plan.columns.shape[1]
    return float(pairs / visible.sum(dtype=torch.float64))


def cost(function) -> dict:
    """Milliseconds, those of the device alone, and launches of one call."""
    ms = triton.testing.do_bench(function, warmup=50, rep=200, return_mode="median")
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        function()
        torch.cuda.synchronize()
    kernels = [x for x in recorded.events() if x.device_type == torch.autograd.DeviceType.CUDA]
    device_ms = sum(x.time_range.elapsed_us() for x in kernels) / 1000
    return dict(ms=ms, device_ms=device_ms, launches=len(kernels))


def pooled(q, k, geometry: Geometry) -> torch.Tensor:
    """Scores of the mean queries and keys of blocks."""
    run = block_scores.operations(q, "pooled")
    return run.pooled_scores(run.block_means(q, geometry), run.block_means(k, geometry), geometry)


def antidiagonal(q, k, geometry: Geometry) -> torch.Tensor:
    """Probabilities of tiles by their antidiagonals, all three stages."""
    run, keys = block_scores.operations(q, "antidiagonal"), (q, k, geometry.block_ids)
    peak = run.peaks(*keys, geometry, 16)
    return run.masses(*keys, peak, run.totals(*keys, peak, geometry, 16), geometry, 16)


def rows_of(options, length: int) -> list[dict]:
    """One row for every stage, for all of them, for the lists and for attention."""
    q, k, v, dout, geometry = make(options, length)
    pattern, summary, parts = VerticalSlash(), {}, {}
    pattern.prepare(geometry)
    prepare(geometry, (geometry.blocks,))
    with torch.no_grad():
        for stage, name in enumerate(("rows", "peaks", "totals", "masses")):
            run = partial(pattern.summarize, q, k, v, geometry, stage, dict(summary))
            parts[name] = run
            summary |= combine_alone(run())
        parts["select"] = lambda: pattern.estimate(q, summary, geometry)
        parts["plan"] = lambda: make_plan(pattern, q, k, v, geometry)
        parts["pooled"] = lambda: pooled(q, k, geometry)
        parts["antidiagonal"] = lambda: antidiagonal(q, k, geometry)
        plan = parts["plan"]()
        parts["lists"] = lambda: bind(plan, (geometry.blocks,))
        costs = {name: cost(part) for name, part in parts.items()}
    leaves = [x.requires_grad_() for x in (q, k, v)]
    costs["attend"] = cost(lambda: torch.autograd.grad(attend(*leaves, plan)[0], leaves, dout))
    kept = density(plan)
    rows = []
    for name, row in costs.items():
        share = row["ms"] / (costs["attend"]["ms"] - costs["lists"]["ms"])
        rows.append(dict(length=length, density=kept, what=name, **row, share=share))
        print(
            f"{length} density {kept:.3f} {name:12} {row['ms']:8.3f} ms, "
            f"{row['device_ms']:8.3f} ms of kernels in {row['launches']:4} launches, share {share:.2%}",
            flush=True,
        )
    both = sum(costs[name]["device_ms"] for name in ("plan", "lists"))
    of = costs["attend"]["device_ms"] - costs["lists"]["device_ms"]
    print(f"{length}: plan and lists take {both / of:.2%} of the time of forward and backward kernels")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[32768, 131072])
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--commit", help="written to the results where there is no git")
    parser.add_argument("--out", type=Path, default=RESULTS / "estimates.csv")
    options = parser.parse_args()
    check(options)
    rows = [row for length in options.lengths for row in rows_of(options, length)]
    describe = ["git", "describe", "--always", "--dirty"]
    found = subprocess.run(describe, cwd=RESULTS.parent, capture_output=True, text=True).stdout.strip()
    versions = dict(gpu=torch.cuda.get_device_name(), torch=torch.__version__, triton=triton.__version__)
    common = versions | dict(commit=options.commit or found or "unknown", dtype="bfloat16")
    common |= dict(heads=options.heads, kv_heads=options.kv_heads, dim=options.dim)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*common, *rows[0]])
        writer.writeheader()
        writer.writerows(common | row for row in rows)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
