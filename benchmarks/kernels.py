"""Speed of the attention kernels on one GPU, in one run: ours, cuDNN dense, FlexAttention on the same tiles.

    python benchmarks/kernels.py                   # the cases that the targets below speak of
    python benchmarks/kernels.py --cases all       # lengths 8k to 512k, head dims, densities, masks
    python benchmarks/kernels.py --draw            # only draws the picture of a CSV

Checked against the reference first. TFLOP/s count 4 * D for every pair of a chosen tile, whole tiles, 2.5
times that backward. Lists are built before; `hopper` and `triton` are kernels on them, with fp32 results.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch._functorch.config as functorch_config
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from sparring.kernels import (
    Geometry,
    Plan,
    bind,
    hopper_deterministic_steps,
    hopper_steps,
    reference,
    triton_steps,
)
from sparring.kernels.attention import output_delta
from sparring.kernels.columns import gather_columns
from sparring.kernels.geometry import FULL, PARTIAL

RESULTS = Path(__file__).parent / "results"
OURS = {"hopper": hopper_steps, "hopper deterministic": hopper_deterministic_steps, "triton": triton_steps}
OTHERS = ("cudnn", "flex")


@dataclass(frozen=True)
class Case:
    """tiles: random; random with one sink column; a window and a sink; slashes, half of them block columns,
    half block diagonals; or all, in 8 packed documents. Not causal: random full tiles, or the same as partial
    tiles, because the first query of every block sees nothing. columns: random ones for each head as well.
    sources: ring steps, one after the other.
    """

    density: float
    length: int = 32768
    heads: int = 32
    kv_heads: int = 8
    dim: int = 128
    tiles: str = "random"
    columns: int = 0
    sources: int = 1


OTHER_MASKS = ("documents", "full", "partial")  # than the causal one
QUICK = (Case(1.0, 8192), Case(0.1, 8192))
TARGETS = (
    *(Case(density) for density in (1.0, 0.25, 0.1, 0.05)),
    Case(0.05, tiles="sink"),
    *(Case(density, dim=64) for density in (1.0, 0.1)),
    *(Case(0.1, tiles=tiles) for tiles in ("full", "partial")),
    Case(1.0, 131072, 16, 4),
    Case(0.05, 131072, 16, 4),
    Case(0.05, 131072, 16, 4, sources=8),
)
ALL = (
    *TARGETS,
    *(Case(density, length) for length in (8192, 131072) for density in (1.0, 0.5, 0.25, 0.1, 0.05, 0.02)),
    *(Case(density, heads=16, kv_heads=2) for density in (1.0, 0.1)),
    *(Case(0.1, tiles=tiles) for tiles in ("window", "slashes")),
    Case(1.0, tiles="documents"),
    *(Case(density, dim=64) for density in (0.5, 0.25, 0.05, 0.02)),
    Case(0.1, 131072, 16, 4, columns=1024),
    Case(0.02, 524288, 8, 2),
)
DENSE, SPARSE = Case(1.0), {density: Case(density) for density in (0.25, 0.1, 0.05)}
LONG, RING = Case(0.05, 131072, 16, 4), Case(0.05, 131072, 16, 4, sources=8)
LONG_DENSE = Case(1.0, 131072, 16, 4)
PART, WHOLE = Case(0.1, tiles="partial"), Case(0.1, tiles="full")
NARROW, SINK = Case(1.0, dim=64), Case(0.05, tiles="sink")


def asked() -> list[tuple[str, tuple, tuple, float]]:
    """The targets: name, (implementation, direction, case) of two rates, their least ratio."""

    def of(case, way, name="hopper"):
        return name, way, case

    rows = []
    for way, cudnn, flex, sparse, long, sink, ring in (
        ("forward", 1.05, 1.4, (0.95, 0.92, 0.87), 0.95, 1.05, 1.15),
        ("backward", 1.0, 1.35, (0.0, 0.92, 0.87), 0.83, 1.10, 1.08),
    ):
        dense, tenth = of(DENSE, way), SPARSE[0.1]
        rows.append((f"{way}, dense / cuDNN", dense, of(DENSE, way, "cudnn"), cudnn))
        for (density, case), floor in zip(SPARSE.items(), sparse, strict=True):
            rows.append((f"{way}, density {density} / own dense", of(case, way), dense, floor))
        rows.append((f"{way}, 128k, density 0.05 / own dense", of(LONG, way), dense, long))
        rows.append((f"{way}, density 0.1 / FlexAttention", of(tenth, way), of(tenth, way, "flex"), flex))
        rows.append((f"{way}, one sink column / uniform", of(SINK, way), of(SPARSE[0.05], way), 1 / sink))
        rows.append((f"{way}, partial tile / full tile", of(PART, way), of(WHOLE, way), 1 / 1.15))
        rows.append((f"{way}, 8 ring steps / one pass", of(RING, way), of(LONG, way), 1 / ring))
    deterministic, cudnn = of(DENSE, "backward", "hopper deterministic"), of(DENSE, "backward", "cudnn")
    rows.append(("backward, deterministic, dense / cuDNN", deterministic, cudnn, 0.87))
    rows.append(("forward, D=64, dense / cuDNN", of(NARROW, "forward"), of(NARROW, "forward", "cudnn"), 1.0))
    return rows


def make(case: Case, seed: int = 0) -> tuple:
    """q, k, v, dout and a plan with a mask of its own for every query head, causal."""
    g = torch.Generator("cuda").manual_seed(seed)

    def normal(heads):
        shape = (1, heads, case.length, case.dim)
        return torch.randn(shape, generator=g, device="cuda", dtype=torch.float32).to(torch.bfloat16)

    eighth = case.length // 8
    documents = [(i * eighth, (i + 1) * eighth) for i in range(8)] if case.tiles == "documents" else None
    geometry = Geometry.causal(1, case.length, device="cuda", documents=documents and (tuple(documents),))
    if case.tiles in ("full", "partial"):
        i = torch.arange(case.length, device="cuda")[None]
        blind = (i % 128 == 0) & (case.tiles == "partial")
        geometry = Geometry.from_intervals(i * 0, torch.where(blind, -1, i * 0 + case.length - 1), 128)
    shape = (1, case.heads, geometry.num_blocks, geometry.num_blocks)
    tiles = choose(case, shape, g)
    columns = None
    if case.columns:
        shape = (1, case.heads, 1, case.columns)
        columns = torch.randint(0, case.length, shape, generator=g, device="cuda")
    plan = Plan.build(geometry, tiles, columns)
    return normal(case.heads), normal(case.kv_heads), normal(case.kv_heads), normal(case.heads), plan


def choose(case: Case, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """bool tiles, about `density` of the causal ones."""
    rows = torch.arange(shape[2], device="cuda")
    if case.tiles == "documents":
        return torch.ones(shape, dtype=torch.bool, device="cuda")
    distance = (rows[:, None] - rows).clamp(min=0)
    if case.tiles == "window":
        return ((distance <= case.density * shape[2] / 2) | (rows == 0)).expand(shape)
    if case.tiles == "slashes":
        columns, diagonals = torch.rand(2, *shape[:3], generator=generator, device="cuda") < case.density / 2
        return columns[:, :, None] | diagonals[..., distance]
    tiles = torch.rand(shape, generator=generator, device="cuda") < case.density
    if case.tiles == "sink":
        tiles[..., 0] = True
    return tiles


def pairs(plan: Plan) -> float:
    """Pairs of queries and keys that are computed: 128 x 128 a tile, and the visible ones of columns."""
    visible = (plan.geometry.visible_elements > 0)[:, None]
    total = 128.0**2 * float((plan.tiles_bool() & visible).sum())
    return total + (0 if plan.columns is None else float(plan.column_elements().sum(dtype=torch.float64)))


class Ours:
    """The kernels on a plan that is bound to `sources` parts of the keys."""

    def __init__(self, name: str, case: Case, q, k, v, dout, plan):
        self.steps = OURS[name]
        blocks, per = plan.geometry.blocks, -(-plan.geometry.num_blocks // case.sources)
        self.bound = bind(plan, tuple(blocks[i * per : (i + 1) * per] for i in range(case.sources)))
        self.parts = [
            (k[:, :, i * per * 128 :][:, :, : per * 128].contiguous(),
             v[:, :, i * per * 128 :][:, :, : per * 128].contiguous())
            for i in range(case.sources)
        ]  # fmt: skip
        self.q, self.dout, self.scale = q, dout, q.shape[3] ** -0.5
        self.columns = None if plan.columns is None else [gather_columns(x, plan) for x in (k, v)]
        self.out, self.lse = torch.empty_like(q, dtype=torch.float32), q.new_empty(q.shape[:3]).float()
        self.forward()
        self.delta = output_delta(self.out, dout, torch.zeros_like(self.lse))
        self.dq = torch.zeros_like(self.out)
        self.sums = [[torch.zeros_like(x, dtype=torch.float32) for x in part] for part in self.parts]
        self.column_sums = [torch.zeros_like(x, dtype=torch.float32) for x in self.columns or ()]

    def forward(self):
        state = self.out, self.lse, self.scale
        for i, part in enumerate(self.parts):
            self.steps.forward_step(self.q, *part, self.bound, i, *state, fresh=i == 0)
        if self.columns:
            self.steps.forward_columns(self.q, *self.columns, self.bound, *state)

    def backward(self):
        given = (self.dout, self.lse, self.delta, self.bound)
        for i, part in enumerate(self.parts):
            self.steps.backward_step(self.q, *part, *given, i, self.dq, *self.sums[i], self.scale)
        if self.columns:
            self.steps.backward_columns(self.q, *self.columns, *given, self.dq, *self.column_sums, self.scale)

    def results(self) -> list:
        """out, dq, dk, dv."""
        self.backward()
        return [self.out, self.dq, *(torch.cat(x, 2) for x in zip(*self.sums, strict=True))]


class Others:
    """A differentiable function of q, k, v."""

    def __init__(self, name: str, case: Case, q, k, v, dout, plan):
        self.leaves, self.dout = [x.detach().requires_grad_() for x in (q, k, v)], dout
        if name == "cudnn":
            group = case.heads // case.kv_heads
            k, v = (x.repeat_interleave(group, 1) for x in (k, v))
            self.leaves = [x.detach().requires_grad_() for x in (q, k, v)]
            self.function = partial(scaled_dot_product_attention, is_causal=True)
        else:
            mask = block_mask(plan)
            self.function = partial(FLEX, block_mask=mask, enable_gqa=True)
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            self.out = self.function(*self.leaves)

    def forward(self):
        with torch.no_grad(), sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return self.function(*self.leaves)

    def backward(self):
        return torch.autograd.grad(self.out, self.leaves, self.dout, retain_graph=True)

    def results(self) -> list:
        return [self.out, *self.backward()]


functorch_config.donated_buffer = False  # its backward is timed many times on one forward
torch._dynamo.config.recompile_limit = 64  # shapes of all cases, each with a kernel of its own
FLEX = torch.compile(flex_attention, dynamic=False)


def block_mask(plan: Plan) -> BlockMask:
    """The same tiles for FlexAttention."""
    chosen, kind = plan.tiles_bool(), plan.geometry.tile_class[:, None]

    def ordered(tiles):
        order = tiles.byte().argsort(dim=-1, descending=True, stable=True)
        return tiles.sum(-1, dtype=torch.int32), order.int()

    def causal(batch, head, q, k):
        return q >= k

    some, full = ordered(chosen & (kind == PARTIAL)), ordered(chosen & (kind == FULL))
    return BlockMask.from_kv_blocks(*some, *full, BLOCK_SIZE=128, mask_mod=causal)


def build(name: str, case: Case, tensors) -> Ours | Others:
    return (Others if name in OTHERS else Ours)(name, case, *tensors)


def check(names, dims) -> None:
    """Every implementation against the reference on a short sequence; raises if they disagree."""
    for dim in dims:
        for name in names:
            case = Case(1.0 if name == "cudnn" else 0.4, 1024, 8, 2, dim)
            q, k, v, dout, plan = make(case)
            v += 1
            bound = bind(plan, (plan.geometry.blocks,))
            wide, scale = [x.float() for x in (q, k, v, dout)], dim**-0.5
            out, lse = torch.empty_like(wide[0]), torch.empty(q.shape[:3], device="cuda")
            reference.forward_step(*wide[:3], bound, 0, out, lse, scale, fresh=True)
            grads = [torch.zeros_like(x) for x in wide[:3]]
            delta = output_delta(out, wide[3], torch.zeros_like(lse))
            reference.backward_step(*wide, lse, delta, bound, 0, *grads, scale)
            found = build(name, case, (q, k, v, dout, plan)).results()
            for what, x, y in zip(("out", "dq", "dk", "dv"), found, (out, *grads), strict=True):
                if name == "cudnn" and what in ("dk", "dv"):
                    x = x.unflatten(1, (2, 4)).float().sum(2)
                error = float((x.detach().float() - y).abs().max() / y.abs().max())
                if not error < 2e-2:
                    raise SystemExit(f"{name}, D={dim}: {what} is wrong by {error:.1e}; nothing is timed")
        print(f"D={dim}: {', '.join(names)} agree with the reference", flush=True)


def milliseconds(function: Callable) -> float:
    return triton.testing.do_bench(function, warmup=25, rep=60, return_mode="median")


def measure(case: Case, names) -> list[dict]:
    """One row per implementation and direction."""
    tensors = make(case)
    count, blocks = pairs(tensors[-1]), case.length // 128
    rows = []
    for name in names:
        if name == "cudnn" and (case.density < 1 or case.tiles != "random"):
            continue
        if name == "flex" and (case.sources > 1 or case.columns or case.tiles in OTHER_MASKS):
            continue
        if name == "flex" and case.length > 131072:
            continue  # its lists alone would need tens of GB
        run = build(name, case, tensors)
        for way, factor in (("forward", 4), ("backward", 10)):
            if name == "hopper deterministic" and way == "forward":
                continue
            ms = milliseconds(getattr(run, way))
            rate = factor * case.dim * count / ms / 1e9
            tiles = count / case.heads / blocks / 128**2
            row = dict(impl=name, direction=way, **asdict(case), tiles_per_row=tiles, ms=ms, tflops=rate)
            rows.append(row)
        of_run = "  ".join(f"{row['tflops']:8.1f}" for row in rows if row["impl"] == name)
        print(f"{describe(case)} {name:20} {of_run:>18}", flush=True)
        del run
    return rows


def describe(case: Case) -> str:
    ring = f" in {case.sources} steps" if case.sources > 1 else ""
    shape = f"{case.length // 1024}k {case.heads}/{case.kv_heads} D={case.dim}"
    columns = f", {case.columns} columns" if case.columns else ""
    return f"{shape:17} {case.density:4.2f} {case.tiles + columns + ring:22}"


def report(rows: list[dict]) -> None:
    """The targets: asked and measured; and c of efficiency = n / (n + c), by least squares."""
    case_of = {id(r): Case(**{f: r[f] for f in asdict(DENSE)}) for r in rows}
    rate = {(r["impl"], r["direction"], case_of[id(r)]): r["tflops"] for r in rows}
    print(f"\n{'ratio':48} {'asked':>6} {'measured':>9}")
    for name, above, below, floor in asked():
        if above in rate and below in rate:
            ratio = rate[above] / rate[below]
            print(f"{name:48} {floor:6.2f} {ratio:9.2f} {'' if ratio >= floor else 'missed'}")
    dense = sum(r["ms"] for r in rows if r["impl"] == "cudnn" and case_of[id(r)] == LONG_DENSE)
    sparse = sum(r["ms"] for r in rows if r["impl"] == "hopper" and case_of[id(r)] == LONG)
    if dense and sparse:
        print(f"128k, density 0.05: forward and backward {dense / sparse:.1f} times as fast as dense cuDNN")
    for way in ("forward", "backward"):
        some = [r for r in rows if r["impl"] == "hopper" and r["direction"] == way]
        some = [r for r in some if case_of[id(r)] in (DENSE, *SPARSE.values())]
        if len(some) > 1:
            top = max(r["tflops"] for r in some)
            x = torch.tensor([[1 / r["tiles_per_row"]] for r in some])
            y = torch.tensor([[top / r["tflops"] - 1] for r in some])
            print(f"{way}: c = {float(torch.linalg.lstsq(x, y).solution):.2f} tiles a row")


def draw(path: Path) -> None:
    """TFLOP/s by density at 32k, head dim 128."""
    import matplotlib.pyplot as plt

    with path.open(newline="") as file:
        rows = [r for r in csv.DictReader(file) if r["length"] == "32768" and r["dim"] == "128"]
    rows = [r for r in rows if (r["tiles"], r["columns"], r["heads"]) == ("random", "0", "32")]
    if not rows:
        return
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    for axis, way in zip(axes, ("forward", "backward"), strict=True):
        for number, name in enumerate((*OURS, *OTHERS)):
            points = sorted((float(r["density"]), float(r["tflops"])) for r in rows
                            if r["impl"] == name and r["direction"] == way)  # fmt: skip
            if points and name == "cudnn":
                axis.axhline(points[0][1], color="gray", linestyle="--", label="cuDNN, dense")
            elif points:
                axis.plot(*zip(*points, strict=True), marker="o", color=f"C{number}", label=name)
        axis.set(xscale="log", xlabel="density of chosen tiles", title=way)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("TFLOP/s of active tiles")
    axes[1].legend(fontsize=8)
    figure.suptitle(f"S = 32768, 32/8 heads of 128, bf16, causal, {rows[0]['gpu']}", fontsize=10)
    figure.tight_layout()
    figure.savefig(path.with_suffix(".png"), dpi=130)


def write(path: Path, rows: list[dict], commit: str | None) -> None:
    command = ["git", "describe", "--always", "--dirty"]
    found = subprocess.run(command, cwd=RESULTS.parent, capture_output=True, text=True).stdout.strip()
    common = dict(
        gpu=torch.cuda.get_device_name(),
        torch=torch.__version__,
        triton=triton.__version__,
        commit=commit or found or "unknown",
        dtype="bfloat16",
    )
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*common, *rows[0]])
        writer.writeheader()
        writer.writerows(common | row for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--cases", choices=("quick", "targets", "all"), default="targets")
    parser.add_argument("--impls", nargs="+", default=[*OURS, *OTHERS], choices=[*OURS, *OTHERS])
    parser.add_argument("--commit", help="written to the results where there is no git")
    parser.add_argument("--out", type=Path, default=RESULTS / "kernels.csv")
    parser.add_argument("--draw", action="store_true", help="only draw the picture of --out")
    options = parser.parse_args()
    if not options.draw:
        cases = {"quick": QUICK, "targets": TARGETS, "all": ALL}[options.cases]
        check(options.impls, sorted({case.dim for case in cases}))
        print(f"{'TFLOP/s':66} {'forward':>8}  backward")
        rows = []
        for case in cases:
            rows += measure(case, options.impls)
            write(options.out, rows, options.commit)  # what is measured stays if a later case fails
        report(rows)
    draw(options.out)


if __name__ == "__main__":
    main()
