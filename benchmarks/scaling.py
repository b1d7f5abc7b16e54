"""One attention layer, forward and backward, on one rank and on all of a job: time, work, traffic.

    torchrun --nproc-per-node 2 benchmarks/scaling.py                          # 256k tokens on two GPUs
    torchrun --nproc-per-node 2 benchmarks/scaling.py --exchanges hierarchical --nodes 2 --timeline
    torchrun --nproc-per-node 4 benchmarks/scaling.py --device cpu --tokens 2048 --heads 4 2 --dim 32

Every row is checked before it is timed: 4096 tokens against one rank in fp32, and all keys that queries see
are counted. `ms`: median over repeats of the slowest rank. `efficiency`: time of one rank for the whole
sequence / (ranks x ms). `kernels`: busy time of the compute kernels, maximum over ranks / mean. `exposed`:
share of the time in which a rank computes nothing. TFLOP/s count computed tiles, 14 multiplications with
head dim a pair of tokens. --torch adds dense causal attention by torch's context_parallel with cuDNN.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.profiler import ProfilerActivity, profile

from sparring.cp import ContextParallel
from sparring.kernels import Geometry, Plan, attend
from sparring.kernels.patterns import Dense, Pattern, SinkWindow
from sparring.kernels.patterns.base import Traits, make_plan

RESULTS = Path(__file__).parent / "results"
ERROR = {torch.bfloat16: 2**-6, torch.float32: 2e-5}  # of the largest value


@dataclass(frozen=True)
class RandomTiles(Pattern):
    """Tiles of every query head drawn by a hash of (head, query block, key block): alike for any layout."""

    heads: int
    density: float
    traits = Traits("strict", "none", "block")

    def estimate(self, q, summary, geometry: Geometry) -> Plan:
        rows, keys = geometry.block_ids[:, None], torch.arange(geometry.num_blocks, device=q.device)
        tiles = torch.stack([self._drawn(head, rows, keys) for head in range(self.heads)])
        return Plan.build(geometry, tiles.expand(geometry.batch, -1, -1, -1))

    def _drawn(self, head: int, rows, keys) -> torch.Tensor:
        x = rows * 0x9E3779B1 + keys * 0x85EBCA6B + head * 0xC2B2AE35
        for shift, factor in ((15, 0x2C1B3C6D), (12, 0x297A2D39), (15, 1)):
            x = (x ^ (x >> shift) & 0xFFFFFFFF) * factor & 0xFFFFFFFF
        return x < self.density * 2**32


def pattern_of(name: str, heads: int, tokens: int) -> Pattern:
    """dense, random:DENSITY, or window:DENSITY, of a causal sequence."""
    kind, _, density = name.partition(":")
    if kind == "dense":
        return Dense()
    if kind == "random":
        return RandomTiles(heads, float(density))
    if kind == "window":
        return SinkWindow(sink=0, window=int(tokens * float(density) / 2))
    raise SystemExit(f"unknown pattern {name}; use dense, random:DENSITY or window:DENSITY")


def inputs(options, tokens: int, dtype):
    """q, k, v, dout of the whole sequence, the same on all ranks: values with structure."""
    g = torch.Generator(options.device).manual_seed(0)
    heads = (options.heads[0], options.heads[1], options.heads[1], options.heads[0])
    for h, shift in zip(heads, (0, 0, 1, 0.5), strict=True):
        x = torch.randn(1, h, tokens, options.dim, generator=g, device=options.device) + shift
        yield x.to(dtype)


def connect(options, pattern, exchange: str, layout: str, alone=False, count_keys=0) -> ContextParallel:
    mesh, axes = None, ("nodes", "ranks")
    if not alone:
        shape = (options.nodes, dist.get_world_size() // options.nodes)
        mesh = init_device_mesh(options.device.type, shape, mesh_dim_names=axes)
    exchange = "ring" if alone else exchange
    return ContextParallel(
        mesh, axes, pattern=pattern, layout=layout, exchange=exchange, recall_every=0, count_keys=count_keys
    )


class Layer:
    """One attention layer on this rank. run(): forward and backward, (out, dq, dk, dv) of this rank."""

    def __init__(self, options, cp: ContextParallel, tokens: int, dtype):
        self.cp = cp
        self.shard = cp.shard({"input_ids": torch.zeros(1, tokens, dtype=torch.int64, device=options.device)})
        at = self.shard.geometry.positions
        *leaves, self.dout = [x[:, :, at] for x in inputs(options, tokens, dtype)]
        self.leaves = [x.requires_grad_() for x in leaves]

    def run(self):
        out = self.cp.attention(*self.leaves, self.shard)
        return out, *torch.autograd.grad(out, self.leaves, self.dout)


def steady(options, cp: ContextParallel) -> Layer:
    """The layer in the second step: in the first, ranks also prove that they agree, and wait for that."""
    Layer(options, cp, options.tokens, options.dtype).run()
    return Layer(options, cp, options.tokens, options.dtype)


def check(options, name: str, exchange: str, layout: str) -> None:
    """A short sequence on all ranks against one in fp32; raises if they differ."""
    tokens = 4096 if options.device.type == "cuda" else options.tokens
    pattern = pattern_of(name, options.heads[0], tokens)
    cp = connect(options, pattern, exchange, layout, count_keys=1)
    layer = Layer(options, cp, tokens, options.dtype)
    found = [cp.unshard(x.detach(), layer.shard, 2).float() for x in layer.run()]
    *leaves, dout = (x.float() for x in inputs(options, tokens, options.dtype))
    leaves = [x.requires_grad_() for x in leaves]
    plan = make_plan(pattern, *leaves, Geometry.causal(1, tokens, device=options.device))
    out, _ = attend(*leaves, plan, impl="reference")
    for what, x, y in zip(
        ("out", "dq", "dk", "dv"), found, (out, *torch.autograd.grad(out, leaves, dout)), strict=True
    ):
        error = float((x - y.detach()).abs().max() / y.detach().abs().max())
        if not error <= ERROR[options.dtype]:
            raise SystemExit(
                f"{what} of {name}, {exchange}, {layout} is wrong by {error:.1e}; nothing is timed"
            )
    cp.report(layer.shard)  # raises unless queries saw the keys that plans promise
    cp.close()


def synchronize(options) -> None:
    if options.device.type == "cuda":
        torch.cuda.synchronize()


def slowest(options, run) -> float:
    """Median milliseconds of the slowest rank; every repeat begins together."""
    times = []
    for repeat in range(options.repeats + 1):
        synchronize(options)
        dist.barrier()
        began = time.perf_counter()
        run()
        synchronize(options)
        took = torch.tensor([time.perf_counter() - began], device=options.device)
        dist.all_reduce(took, dist.ReduceOp.MAX)
        if repeat:  # the first compiles
            times.append(took.item() * 1e3)
    return median(times)


def alone_ms(options, pattern) -> float:
    """Milliseconds for the whole sequence on rank 0 alone, while the others wait."""
    ms = torch.zeros(1, device=options.device)
    if dist.get_rank() == 0:
        layer = steady(options, connect(options, pattern, "ring", "contiguous", True))
        times = []
        for _ in range(options.repeats + 1):
            synchronize(options)
            began = time.perf_counter()
            layer.run()
            synchronize(options)
            times.append((time.perf_counter() - began) * 1e3)
        ms += median(times[1:])
    dist.broadcast(ms, 0)
    return ms.item()


def recorded(options, run) -> list[dict]:
    """Kernels of one run on this rank: name, stream, begin and end in ms; empty on the CPU.

    The profiler starts at its own time on every rank, so they meet once more behind that.
    """
    if options.device.type != "cuda":
        return []
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        dist.barrier()
        torch.cuda.synchronize()
        run()
        torch.cuda.synchronize()
    events = [x for x in seen.profiler.kineto_results.events() if x.device_type().name == "CUDA"]
    events = sorted((x for x in events if x.duration_ns() > 0), key=lambda x: x.start_ns())
    barrier = next(
        (x.start_ns() + x.duration_ns() for x in events if "nccl" in x.name().lower()), 0
    )  # a message as any other
    events = [x for x in events if x.start_ns() >= barrier]
    first = min(x.start_ns() for x in events)
    return [
        dict(name=x.name(), stream=x.device_resource_id(), begin=(x.start_ns() - first) / 1e6,
             end=(x.start_ns() - first + x.duration_ns()) / 1e6)
        for x in events
    ]  # fmt: skip


def busy(kernels: list[dict]) -> float:
    """Milliseconds in which at least one of them runs."""
    total = end = 0.0
    for each in sorted(kernels, key=lambda x: x["begin"]):
        total += max(0.0, each["end"] - max(end, each["begin"]))
        end = max(end, each["end"])
    return total


def measure(options, name: str, exchange: str, layout: str, one: float) -> dict:
    """A row of the table."""
    pattern = pattern_of(name, options.heads[0], options.tokens)
    cp = connect(options, pattern, exchange, layout)
    layer = steady(options, cp)
    layer.run()
    report = cp.report(layer.shard)
    ms = slowest(options, layer.run)
    kernels = recorded(options, layer.run)
    compute = busy([x for x in kernels if "nccl" not in x["name"].lower()])
    span = max((x["end"] for x in kernels), default=0.0)
    table = torch.zeros(dist.get_world_size(), 2, device=options.device)
    table[dist.get_rank()] = torch.tensor([compute, span])
    dist.all_reduce(table)
    if options.timeline and kernels and dist.get_rank() == 0:
        draw(
            kernels,
            options.out.with_name(f"timeline_{exchange}_{name.replace(':', '_')}.png"),
            name,
            exchange,
        )
    pairs = report.density * options.tokens * (options.tokens + 1) / 2
    world = dist.get_world_size()
    row = dict(
        pattern=name, exchange=cp.exchange, layout=report.layout, ranks=world, nodes=options.nodes,
        tokens=options.tokens, density=report.density, ms=ms, ms_alone=one, efficiency=one / (world * ms),
        tflops=14 * pairs * options.heads[0] * options.dim / ms / 1e9 / world,
        kernels=(table[:, 0].max() / table[:, 0].mean()).item() if compute else None,
        exposed=(1 - table[:, 0] / table[:, 1]).max().item() if compute else None,
        worker=report.worker_imbalance, step=report.step_imbalance, bytes=json.dumps(report.bytes_moved),
    )  # fmt: skip
    if options.device.type == "cuda":
        peak = torch.tensor([torch.cuda.max_memory_allocated() / 2**30], device=options.device)
        dist.all_reduce(peak, dist.ReduceOp.MAX)
        row["peak_gib"] = peak.item()
        torch.cuda.reset_peak_memory_stats()
    cp.close()
    return row


def draw(kernels: list[dict], path: Path, name: str, exchange: str) -> None:
    """The streams of rank 0 over time."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    streams = sorted({x["stream"] for x in kernels})
    figure, axes = plt.subplots(figsize=(10, 1 + 0.5 * len(streams)))
    for moving, color in ((False, "tab:blue"), (True, "tab:orange")):
        for place, stream in enumerate(streams):
            of = [x for x in kernels if x["stream"] == stream and ("nccl" in x["name"].lower()) == moving]
            spans = [(x["begin"], x["end"] - x["begin"]) for x in of]
            label = ("messages" if moving else "computation") if place == 0 or moving and of else None
            axes.broken_barh(spans, (place - 0.4, 0.8), color=color, label=label)
    axes.set_yticks(range(len(streams)), [f"stream {x}" for x in streams])
    axes.set_xlabel("ms")
    axes.set_title(f"{name}, {exchange}: forward and backward of one layer on rank 0")
    handles = {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    axes.legend(handles.values(), handles, loc="upper right")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def torch_row(options) -> dict:
    """Dense causal attention by torch's context_parallel, cuDNN inside; as many key heads as query heads."""
    from torch.distributed.tensor.experimental import context_parallel
    from torch.nn.attention import SDPBackend, sdpa_kernel

    world = dist.get_world_size()
    mesh = init_device_mesh(options.device.type, (world,))
    equal = argparse.Namespace(**vars(options) | {"heads": (options.heads[0],) * 2})
    q, k, v, dout = inputs(equal, options.tokens, options.dtype)
    buffers = [x.contiguous() for x in (q, k, v, dout)]
    with (
        sdpa_kernel(SDPBackend.CUDNN_ATTENTION),
        context_parallel(mesh, buffers=buffers, buffer_seq_dims=[2] * 4),
    ):
        leaves = [x.detach().requires_grad_() for x in buffers[:3]]

        def run():
            out = torch.nn.functional.scaled_dot_product_attention(*leaves, is_causal=True)
            return torch.autograd.grad(out, leaves, buffers[3])

        ms = slowest(options, run)
    pairs = options.tokens * (options.tokens + 1) / 2
    return dict(
        pattern="dense", exchange="torch context_parallel, cuDNN", layout="zigzag", ranks=world, nodes=1,
        tokens=options.tokens, density=1.0, ms=ms,
        tflops=14 * pairs * options.heads[0] * options.dim / ms / 1e9 / world,
    )  # fmt: skip


def show(row: dict) -> None:
    if dist.get_rank() == 0:
        cells = [f"{row['pattern']:12} {row['exchange']:13} {row['layout']:11} {row['ms']:9.1f} ms"]
        cells += [
            f"{name} {row[name]:.3f}"
            for name in ("efficiency", "tflops", "kernels", "exposed", "worker", "step")
            if row.get(name) is not None
        ]
        print("  ".join(cells), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--patterns", nargs="+", default=["dense", "random:0.05", "window:0.05"])
    parser.add_argument("--exchanges", nargs="+", default=["ring", "gather", "pull"])
    parser.add_argument("--layouts", nargs="+", default=["auto"])
    parser.add_argument("--tokens", type=int, default=262144)
    parser.add_argument("--heads", type=int, nargs=2, default=(32, 8), help="query heads and key heads")
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--nodes", type=int, default=1, help="that the ranks count as lying on")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--timeline", action="store_true", help="draw the streams of rank 0")
    parser.add_argument("--torch", action="store_true", help="add torch's context_parallel")
    parser.add_argument("--commit", help="written to the results where there is no git")
    parser.add_argument("--out", type=Path, default=RESULTS / "scaling.csv")
    options = parser.parse_args()
    local = int(os.environ["LOCAL_RANK"])
    options.device = torch.device("cuda", local) if options.device == "cuda" else torch.device("cpu")
    options.dtype = torch.bfloat16 if options.device.type == "cuda" else torch.float32
    if options.device.type == "cuda":
        torch.cuda.set_device(options.device)
        dist.init_process_group("nccl", device_id=options.device)
    else:
        torch.set_num_threads(1)
        dist.init_process_group("gloo")
    rows = []
    for name in options.patterns:
        one = alone_ms(options, pattern_of(name, options.heads[0], options.tokens))
        for exchange in options.exchanges:
            for layout in options.layouts:
                check(options, name, exchange, layout)
                rows.append(measure(options, name, exchange, layout, one))
                show(rows[-1])
    if options.torch:
        rows.append(torch_row(options))
        show(rows[-1])
    if dist.get_rank() == 0:
        write(options, rows)
    dist.destroy_process_group()


def write(options, rows: list[dict]) -> None:
    describe = ["git", "describe", "--always", "--dirty"]
    found = subprocess.run(describe, cwd=RESULTS.parent, capture_output=True, text=True).stdout.strip()
    device = torch.cuda.get_device_name() if options.device.type == "cuda" else "CPU"
    common = dict(device=device, torch=torch.__version__, commit=options.commit or found or "unknown",
                  dtype=str(options.dtype).removeprefix("torch."), heads=options.heads[0],
                  kv_heads=options.heads[1], dim=options.dim)  # fmt: skip
    names = dict.fromkeys(name for row in rows for name in row)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*common, *names])
        writer.writeheader()
        writer.writerows(common | row for row in rows)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
