"""Predicted against measured: attention of two processes, forward and backward; see simulate.py --check."""

from __future__ import annotations

import csv
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path

import calibrate
import numpy as np
import torch
import torch.distributed as dist
from calibrate import BLOCK, CPU, GPU, Sizes, random_plan

from sparring.balance import EXCHANGES, Constants, Layout, contiguous, programs, simulate, striped, zigzag
from sparring.cp.attention import ring_attention
from sparring.cp.ring import Ring, step_blocks
from sparring.cp.transport import Transport
from sparring.kernels import Geometry, Plan, attend, bind
from sparring.kernels.attention import steps

LAYOUTS = {"contiguous": contiguous, "zigzag": zigzag, "striped": striped}
CALLS = {"cuda": 3, "cpu": 1}  # between two waits for the device


@dataclass(frozen=True)
class Case:
    exchange: str
    layout: str
    length: int
    density: float


def cases(device: str) -> list[Case]:
    plans = (
        ((131072, 0.25), (131072, 0.05), (262144, 0.05)) if device == "cuda" else ((2048, 0.5), (4096, 0.1))
    )
    return [Case(*names, *plan) for names in product(("ring", "gather"), LAYOUTS) for plan in plans]


class Attention:
    """The part of one rank in one attention of a case."""

    def __init__(self, case: Case, sizes: Sizes, transport: Transport, device: str, seed: int = 0):
        self.case, self.sizes, self.transport, self.device = case, sizes, transport, device
        self.layout: Layout = LAYOUTS[case.layout](case.length // BLOCK, transport.size, BLOCK)
        self.whole = random_plan(
            Geometry.causal(1, case.length, BLOCK, device=device), sizes.heads, case.density
        )
        own = self.whole.geometry.select(self.layout.assignment[transport.rank])
        self.tensors = [x[:, :, own.positions].clone() for x in calibrate.inputs(sizes, case.length, device)]
        for x in self.tensors[:3]:
            x.requires_grad_()
        schedule = EXCHANGES[case.exchange](transport.rank, transport.size, 1)
        self.bound = bind(self.whole.rows(own), step_blocks(schedule, self.layout.assignment))
        tokens = max(self.layout.blocks_per_rank) * BLOCK
        self.ring = Ring(transport, schedule, steps("auto", self.tensors[0], BLOCK), tokens)

    def run(self) -> list[torch.Tensor]:
        """out, dq, dk, dv."""
        *leaves, dout = self.tensors
        out, _ = ring_attention(*leaves, self.bound, self.ring, self.sizes.dim**-0.5)
        return [out.detach(), *torch.autograd.grad(out, leaves, dout)]

    def measured(self) -> float:
        """Seconds, see `calibrate.seconds`."""
        return calibrate.seconds(self.run, self.device, self.sizes.repeats, CALLS[self.device])

    def predicted(self, constants: Constants) -> tuple[float, float]:
        """Seconds; and how much of it is computation on the mean rank."""
        counts = self.bound.row_ptr.diff().view(-1, self.bound.num_sources)
        mine = torch.stack((counts.sum(0), (counts > 0).sum(0))).double()
        tiles, rows = self.transport.all_gather(mine).cpu().numpy().swapaxes(0, 1)
        heads, world = self.sizes.heads, self.transport.size
        work = np.column_stack([tiles / heads, np.zeros(world)])
        schedules = [EXCHANGES[self.case.exchange](rank, world, 1) for rank in range(world)]
        shard = self.ring.tokens * self.sizes.dim
        keys = 2 * self.sizes.kv_heads * shard
        lines = []
        for way, program in zip(("forward", "backward"), programs(schedules), strict=True):
            compute = getattr(constants, way).seconds(work, rows / heads, heads, BLOCK)
            compute[:, -1] += self._around(way, shard) / constants.memory
            size = self.tensors[0].itemsize
            line = simulate(
                program, constants.topology(world), compute, keys * size, keys * 4 * (way == "backward")
            )
            lines.append(line)
        return sum(float(x.seconds) for x in lines), sum(float(x.busy.mean()) for x in lines)

    def _around(self, way: str, shard: int) -> float:
        """Bytes that a call reads and writes besides: keys put together, results cast, delta made."""
        size, q, kv = self.tensors[0].itemsize, self.sizes.heads * shard, 2 * self.sizes.kv_heads * shard
        if way == "forward":
            return 2 * size * kv + (4 + size) * q
        return 2 * size * kv + (4 + size) * kv + (4 + size + 4 + 4 + size) * q


def correct(sizes: Sizes, transport: Transport, device: str) -> None:
    """Every exchange and layout on a short sequence against one process; raises if they differ."""
    for exchange, layout in product(("ring", "gather"), LAYOUTS):
        part = Attention(Case(exchange, layout, 8 * BLOCK, 0.4), sizes, transport, device)
        leaves = calibrate.inputs(sizes, 8 * BLOCK, device)
        dout = leaves.pop()
        for x in leaves:
            x.requires_grad_()
        whole: Plan = part.whole
        out, _ = attend(*leaves, whole)
        expected = [out.detach(), *torch.autograd.grad(out, leaves, dout)]
        at = whole.geometry.select(part.layout.assignment[transport.rank]).positions
        for name, x, y in zip(("out", "dq", "dk", "dv"), part.run(), expected, strict=True):
            error = float((x.float() - y[:, :, at].float()).abs().max() / y.abs().max())
            if not error < 2e-2:
                raise SystemExit(f"{exchange}, {layout}: {name} is wrong by {error:.1e}; nothing is timed")


def run(constants: Constants, device: str | None, results: Path) -> None:
    """Prints the table and keeps it in simulate_check_<device>.csv."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    sizes = replace(GPU, heads=32, kv_heads=8) if device == "cuda" else CPU
    transport = calibrate.start(device)
    correct(sizes, transport, device)
    machine = f"two {torch.cuda.get_device_name()}" if device == "cuda" else "two processes on CPU, gloo"
    calibrate.say(f"{machine}; constants: {constants.source}")
    calibrate.say(
        f"{'exchange':10}{'layout':12}{'tokens':>8}{'density':>9}{'measured':>11}{'predicted':>11}{'error':>8}"
    )
    rows = []
    for case in cases(device):
        part = Attention(case, sizes, transport, device)
        (predicted, busy), measured = part.predicted(constants), part.measured()
        error = predicted / measured - 1
        calibrate.say(
            f"{case.exchange:10}{case.layout:12}{case.length:8}{case.density:9.2f}{measured * 1e3:8.2f} ms"
            f"{predicted * 1e3:8.2f} ms{error:+8.1%}"
        )
        rows.append(
            dict(machine=machine, torch=torch.__version__, constants=constants.source)
            | dict(heads=sizes.heads, kv_heads=sizes.kv_heads, dim=sizes.dim)
            | asdict(case)
            | dict(measured=measured, predicted=predicted, computing=busy, error=error)
        )
        del part
    off = [abs(row["error"]) for row in rows]
    bar = 0.10 if device == "cuda" else 0.15
    calibrate.say(
        f"mean error {np.mean(off):.1%}, largest {max(off):.1%} of {len(off)} cases; asked {bar:.0%}"
    )
    if transport.rank == 0:
        with (results / f"simulate_check_{device}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    transport.close()
    dist.destroy_process_group()
