"""Measures the cost constants of a machine (`sparring.balance.Constants`) and keeps them in a file.

    torchrun --nproc-per-node 2 benchmarks/calibrate.py --out constants.json

Two processes, one for each GPU (NCCL), or on the CPU (gloo, `--device cpu`, small sizes). Four measurements:
tiles and rows, forward and backward, by kernels on random plans in 1 and 8 launches; columns; launches, by
many tiny steps; links and memory. The kernels are checked against the reference first. Links between nodes
cannot be seen by two GPUs of one node: give them with `--between`, or nine tenths of a 400 Gbit/s adapter
with the latency inside are assumed.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from sparring.balance import Constants, KernelCost, LinkCost, write_constants
from sparring.cp.mesh import connect
from sparring.cp.transport import Transport
from sparring.kernels import Geometry, Plan, bind, reference
from sparring.kernels.attention import output_delta, steps
from sparring.kernels.columns import gather_columns

BLOCK = 128


@dataclass(frozen=True)
class Sizes:
    """What is measured on a device. lengths, densities: of the plans. messages: bytes."""

    dtype: torch.dtype
    heads: int
    kv_heads: int
    dim: int
    length: int
    densities: tuple[float, ...]
    columns: int
    messages: tuple[int, ...]
    repeats: int


GPU = Sizes(
    torch.bfloat16, 16, 4, 128, 65536, (0.25, 0.05, 0.02), 1024, tuple(2**n for n in (20, 22, 24, 26, 28)), 7
)
CPU = Sizes(torch.float32, 4, 2, 64, 2048, (0.5, 0.1), 256, tuple(2**n for n in (12, 18, 20, 22, 24)), 9)


def random_plan(geometry: Geometry, heads: int, density: float, columns: int = 0, seed: int = 0) -> Plan:
    """Tiles at random, a mask for every head, the same for the same seed on every rank; causal."""
    g = torch.Generator(geometry.device).manual_seed(seed)
    options = dict(generator=g, device=geometry.device)
    shape = (1, heads, geometry.num_blocks, geometry.num_blocks)
    chosen = None
    if columns:
        chosen = torch.randint(0, geometry.num_tokens, (1, heads, 1, columns), **options)
    return Plan.build(geometry, torch.rand(shape, **options) < density, chosen)


def inputs(sizes: Sizes, length: int, device: str) -> list[torch.Tensor]:
    """q, k, v, dout [1, heads, length, dim], the same on every rank."""
    g = torch.Generator(device).manual_seed(1)

    def normal(heads: int, shift: float) -> torch.Tensor:
        x = torch.randn(1, heads, length, sizes.dim, generator=g, device=device) + shift
        return x.to(sizes.dtype)

    return [
        normal(heads, shift)
        for heads, shift in ((sizes.heads, 0), (sizes.kv_heads, 0), (sizes.kv_heads, 1), (sizes.heads, 0.5))
    ]


class Kernels:
    """One attention on one device, its keys in `sources` equal parts, computed one after the other."""

    def __init__(self, plan: Plan, tensors: list[torch.Tensor], sources: int, module=None):
        self.q, k, v, self.dout = tensors
        self.steps = module or steps("auto", self.q, BLOCK)
        per = plan.geometry.num_blocks // sources
        self.bound = bind(plan, tuple(tuple(range(i * per, (i + 1) * per)) for i in range(sources)))
        self.parts = [
            [x.contiguous() for x in pair]
            for pair in zip(k.chunk(sources, 2), v.chunk(sources, 2), strict=True)
        ]
        self.columns = None if plan.columns is None else [gather_columns(x, plan) for x in (k, v)]
        self.scale, shape = self.q.shape[3] ** -0.5, self.q.shape
        self.out, self.lse = (
            torch.zeros(shape, device=self.q.device),
            torch.zeros(shape[:3], device=self.q.device),
        )
        self.forward()
        if self.columns:
            self.forward_columns()
        self.delta = output_delta(self.out, self.dout, torch.zeros_like(self.lse))
        self.dq = torch.zeros_like(self.out)
        self.sums = [[torch.zeros_like(x, dtype=torch.float32) for x in part] for part in self.parts]
        self.column_sums = [torch.zeros_like(x, dtype=torch.float32) for x in self.columns or ()]

    def forward(self) -> None:
        for i, part in enumerate(self.parts):
            self.steps.forward_step(
                self.q, *part, self.bound, i, self.out, self.lse, self.scale, fresh=i == 0
            )

    def backward(self) -> None:
        for i, part in enumerate(self.parts):
            self.steps.backward_step(self.q, *part, *self._given(), i, self.dq, *self.sums[i], self.scale)

    def forward_columns(self) -> None:
        self.steps.forward_columns(self.q, *self.columns, self.bound, self.out, self.lse, self.scale)

    def backward_columns(self) -> None:
        self.steps.backward_columns(
            self.q, *self.columns, *self._given(), self.dq, *self.column_sums, self.scale
        )

    def results(self) -> list[torch.Tensor]:
        self.backward()
        return [self.out, self.dq, *(torch.cat(x, 2) for x in zip(*self.sums, strict=True))]

    def counts(self) -> tuple[int, int]:
        """Tiles, and (row, source) pairs that have any."""
        counts = self.bound.row_ptr.diff()
        return int(counts.sum()), int((counts > 0).sum())

    def _given(self):
        return self.dout, self.lse, self.delta, self.bound


def seconds(function: Callable[[], object], device: str, repeats: int, calls: int = 3) -> float:
    """Of one of several calls in a row, on the slower of the ranks, which do it at the same time.

    The least of the repeats, because other work only adds.
    """
    function()
    taken = []
    for _ in range(repeats):
        dist.barrier()
        synchronize(device)
        began = time.perf_counter()
        for _ in range(calls):
            function()
        synchronize(device)
        taken.append((time.perf_counter() - began) / calls)
    held = torch.tensor(taken, device=device, dtype=torch.float64)
    dist.all_reduce(held, dist.ReduceOp.MAX)
    return float(held.min())


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def check(sizes: Sizes, device: str) -> None:
    """The kernels against the reference; raises if they disagree."""
    geometry = Geometry.causal(1, 1024, BLOCK, device=device)
    plan, tensors = random_plan(geometry, sizes.heads, 0.4), inputs(sizes, 1024, device)
    found = Kernels(plan, tensors, 2).results()
    expected = Kernels(plan, [x.float() for x in tensors], 2, reference).results()
    for name, x, y in zip(("out", "dq", "dk", "dv"), found, expected, strict=True):
        error = float((x.float() - y).abs().max() / y.abs().max())
        if not error < 2e-2:
            raise SystemExit(f"{name} is wrong by {error:.1e}; nothing is measured")


def launches(sizes: Sizes, device: str) -> tuple[float, float]:
    """Seconds of a step with one tile, forward and backward."""
    number = 16
    geometry = Geometry.causal(1, number * BLOCK, BLOCK, device=device)
    tensors = [x[:, :1] for x in inputs(sizes, number * BLOCK, device)]
    tiny = Kernels(random_plan(geometry, 1, 0.0), tensors, number)
    return tuple(seconds(f, device, sizes.repeats) / number for f in (tiny.forward, tiny.backward))


def fitted(points: list[tuple[int, int, float]]) -> tuple[float, float]:
    """tile and row of seconds = tile * tiles + row * rows, by relative least squares."""
    table = np.array(points)
    rows = table[:, :2] / table[:, 2:]
    tile, row = np.linalg.lstsq(rows, np.ones(len(rows)), rcond=None)[0]
    for (tiles, with_any, measured), share in zip(points, rows @ (tile, row), strict=True):
        say(f"  {tiles:9} tiles, {with_any:7} rows, {measured * 1e3:9.3f} ms, predicted {share - 1:+.1%}")
    return float(tile), max(float(row), 0.0)


def kernels(sizes: Sizes, device: str) -> dict[str, KernelCost]:
    launch = dict(zip(("forward", "backward"), launches(sizes, device), strict=True))
    geometry = Geometry.causal(1, sizes.length, BLOCK, device=device)
    tensors = inputs(sizes, sizes.length, device)
    points = {"forward": [], "backward": []}
    for density in sizes.densities:
        for sources in (1, 8):
            case = Kernels(random_plan(geometry, sizes.heads, density), tensors, sources)
            for way, found in points.items():
                taken = seconds(getattr(case, way), device, sizes.repeats)
                found.append((*case.counts(), taken))
            del case
    plan = random_plan(geometry, sizes.heads, 0.0, sizes.columns)
    pairs = float(plan.column_elements().sum(dtype=torch.float64)) / BLOCK
    case, costs = Kernels(plan, tensors, 1), {}
    for way, found in points.items():
        say(f"{way}:")
        tile, row = fitted(found)
        taken = seconds(getattr(case, f"{way}_columns"), device, sizes.repeats)
        costs[way] = KernelCost(tile, row, taken / pairs, launch[way])
        flops = (4 if way == "forward" else 10) * sizes.dim * BLOCK**2
        say(f"  {flops / tile / 1e12:.2f} TFLOP/s, c = {row / tile:.2f}; {costs[way]}")
    return costs


def link(sizes: Sizes, transport: Transport, device: str) -> LinkCost:
    """Messages in both directions at once over the channel of keys, one after the other."""
    other, points = 1 - transport.rank, []
    for size in sizes.messages:
        sent, received = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))

        def move(sent=sent, received=received):
            transport.exchange([sent], other, [received], other, "keys").wait()

        points.append((size, seconds(move, device, sizes.repeats, calls=10)))
    table = np.array(points)
    rows = np.stack([1 / table[:, 1], table[:, 0] / table[:, 1]], axis=1)
    latency, pace = np.linalg.lstsq(rows, np.ones(len(rows)), rcond=None)[0]
    for (size, taken), share in zip(points, rows @ (latency, pace) - 1, strict=True):
        speed = f"{taken * 1e6:9.1f} us, {size / taken / 1e9:6.2f} GB/s"
        say(f"  {size:10} bytes, {speed}, predicted {share:+.1%}")
    return LinkCost(max(float(latency), 0.0), 1 / float(pace))


def memory(device: str) -> float:
    """Bytes per second of an addition in place: two reads and one write."""
    x, y = (torch.zeros(2**26 if device == "cuda" else 2**22, device=device) for _ in range(2))
    return 3 * x.numel() * x.itemsize / seconds(lambda: x.add_(y), device, 7)


def say(text: str) -> None:
    if dist.get_rank() == 0:
        print(text, flush=True)


def start(device: str) -> Transport:
    """Joins the job and gives the group of all its ranks."""
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.set_num_threads(1)
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    mesh = init_device_mesh(device, (dist.get_world_size(),), mesh_dim_names=("cp",))
    return connect(mesh, "cp", ()).ring


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument(
        "--between", type=float, nargs=2, metavar=("LATENCY", "BANDWIDTH"), help="seconds, bytes/s"
    )
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    device, sizes = options.device, GPU if options.device == "cuda" else CPU
    transport = start(device)
    if transport.size != 2:
        raise SystemExit(f"{transport.size} processes; run it with torchrun --nproc-per-node 2")
    check(sizes, device)
    costs = kernels(sizes, device)
    say("link:")
    inside = link(sizes, transport, device)
    between = inside if device == "cpu" else LinkCost(inside.latency, 45e9)
    if options.between:
        between = LinkCost(*options.between)
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU, gloo"
    constants = Constants(
        source=f"two processes, {name}, torch {torch.__version__}, {sizes.dtype}",
        block_size=BLOCK,
        dim=sizes.dim,
        **costs,
        inside=inside,
        between=between,
        memory=memory(device),
    )
    say(str(constants))
    if transport.rank == 0:
        write_constants(constants, options.out)
    transport.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
