"""Exchanges between two emulated hosts with a slow link: time of one attention on the same plan.

A sink and a window, with blocks dealt in stripes, where every rank needs keys of all others, and in runs,
where it needs those of its neighbour.

    sudo python benchmarks/two_hosts.py                  # 2 hosts x 4 ranks, shared link and link per rank

Needs root and iproute2: each host is a network namespace, a link a veth pair that `tc tbf` limits in both
directions. Ranks are gloo processes, fp32, on however many cores there are: the link has to be slow enough
to be what counts. Every exchange is compared with one process before it is timed. `bound`: the ratio to the
flat ring if only bytes on the busiest link counted.
"""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from sparring.balance import EXCHANGES
from sparring.balance.layout import named
from sparring.cp import ContextParallel
from sparring.cp.pull import needed_blocks
from sparring.kernels import Geometry, attend
from sparring.kernels.patterns import SinkWindow
from sparring.kernels.patterns.base import make_plan

RESULTS = Path(__file__).parent / "results"
PATTERN = SinkWindow(sink=128, window=256)
TOKENS, HEADS, DIM, BLOCK = 256, 32, 64, 128  # tokens of each rank
HOSTS = ("sparring-host-0", "sparring-host-1")


LAYOUTS = {"striped": tuple(EXCHANGES), "contiguous": ("ring", "hierarchical", "pull")}


def crossings(exchange: str, layout: str, world: int, links: str) -> list[float]:
    """Shards on the busiest link and direction: forward; forward and backward."""
    inner, counts = world // 2, []
    schedules = [EXCHANGES[exchange](rank, world, 2) for rank in range(world)]
    needs = shares(layout, world) if exchange == "pull" else None
    for phases in (("forward",), ("forward", "backward")):
        on = Counter()
        for rank, schedule in enumerate(schedules):
            for step in (step for phase in phases for step in getattr(schedule, phase)):
                for what, each in [("keys", t) for t in step.keys] + [("grads", t) for t in step.gradients]:
                    if each.send_to // inner != rank // inner:
                        there = (each.send_to, rank) if what == "keys" else (rank, each.send_to)
                        link = rank // inner, each.send_to % inner if links == "each" else 0
                        on[link] += 1 if needs is None else needs[there]
        counts.append(max(on.values()))
    return counts


def shares(layout: str, world: int) -> dict[tuple[int, int], float]:
    """(rank, holder): the share of the holder's blocks that the tiles of the rank touch."""
    blocks = world * TOKENS // BLOCK
    held = named(layout, blocks, world, BLOCK)
    found = {}
    for rank in range(world):
        geometry = Geometry.causal(1, world * TOKENS, BLOCK).select(held.assignment[rank])
        needed = needed_blocks(PATTERN.estimate(None, {}, geometry), 1)[0, 0]
        for holder, own in enumerate(held.assignment):
            found[rank, holder] = needed[list(own)].double().mean().item()
    return found


# -- a rank -------------------------------------------------------------------------------------------


def inputs(length: int):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(1, HEADS, length, DIM, generator=g) + shift for shift in (0, 0, 1, 0.5)]


def attention(cp, shard, tensors):
    """out, and a function that makes the gradients of q, k, v."""
    q, k, v, dout = tensors
    out = cp.attention(q, k, v, shard)
    return out, lambda: torch.autograd.grad(out, (q, k, v), dout)


def check(cp, shard, mine, whole) -> None:
    """Two heads of out and gradients against one process; raises if they differ."""
    out, backward = attention(cp, shard, mine)
    found = [cp.unshard(x[:, :2], shard, dim=2) for x in (out.detach(), *backward())]
    if cp.transport.rank:
        return
    leaves = [x[:, :2].clone().requires_grad_() for x in whole[:3]]
    plan = make_plan(PATTERN, *leaves, Geometry.causal(1, whole[0].shape[2], BLOCK))
    expected, _ = attend(*leaves, plan)
    expected = [expected.detach(), *torch.autograd.grad(expected, leaves, whole[3][:, :2])]
    for name, x, y in zip(("out", "dq", "dk", "dv"), found, expected, strict=True):
        error = float((x - y).abs().max() / y.abs().max())
        if not error < 1e-5:
            raise SystemExit(f"{cp.exchange}: {name} is wrong by {error:.1e}; nothing is timed")


def timed(cp, shard, mine, repeats: int) -> tuple[float, float]:
    """Seconds of forward, and of forward and backward: medians of the slowest rank."""
    taken = []
    for _ in range(repeats):
        dist.barrier()
        began = time.perf_counter()
        _, backward = attention(cp, shard, mine)
        forward = time.perf_counter() - began
        dist.barrier()
        began = time.perf_counter()
        backward()
        taken.append([forward, forward + time.perf_counter() - began])
    times = torch.tensor(taken)
    dist.all_reduce(times, dist.ReduceOp.MAX)
    return tuple(times.median(0).values.tolist())


def work(options) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    world = dist.get_world_size()
    axes = ("cp_outer", "cp_inner")
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=axes)
    whole = inputs(world * TOKENS)
    for layout, exchange in [(layout, exchange) for layout, names in LAYOUTS.items() for exchange in names]:
        cp = ContextParallel(
            mesh, axes, pattern=PATTERN, layout=layout, exchange=exchange, block_size=BLOCK, count_keys=0
        )
        shard = cp.shard({"input_ids": torch.zeros(1, world * TOKENS, dtype=torch.int64)})
        at = shard.geometry.positions
        mine = [x[:, :, at].clone().requires_grad_(i < 3) for i, x in enumerate(whole)]
        check(cp, shard, mine, whole)
        times = timed(cp, shard, mine, options.repeats)
        if dist.get_rank() == 0:
            print("RESULT", layout, exchange, *times, flush=True)
        cp.close()
    dist.destroy_process_group()


# -- the hosts ----------------------------------------------------------------------------------------


def ip(*words: str, host: str | None = None) -> None:
    inside = ["netns", "exec", host, "ip"] if host else []
    subprocess.run(["ip", *inside, *words], check=True)


def connect(links: int, mbit: int) -> None:
    """Two hosts with so many links; link i has the addresses 10.77.i.1 and 10.77.i.2."""
    for host in HOSTS:
        ip("netns", "add", host)
        ip("link", "set", "lo", "up", host=host)
    for i in range(links):
        ends = (f"sparring{i}a", f"sparring{i}b")
        ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        for number, (host, end) in enumerate(zip(HOSTS, ends, strict=True), 1):
            ip("link", "set", end, "netns", host)
            ip("addr", "add", f"10.77.{i}.{number}/24", "dev", end, host=host)
            ip("link", "set", end, "up", host=host)
            limit = f"root tbf rate {mbit}mbit burst 256kb limit 8mb".split()
            command = ["ip", "netns", "exec", host, "tc", "qdisc", "add", "dev", end, *limit]
            subprocess.run(command, check=True)


def disconnect() -> None:
    for host in HOSTS:
        subprocess.run(["ip", "netns", "del", host], stderr=subprocess.DEVNULL)


def run(options, links: str) -> list[dict]:
    """One row for every exchange."""
    world, each = 2 * options.ranks, links == "each"
    disconnect()
    connect(options.ranks if each else 1, options.mbit)
    command = [sys.executable, __file__, "--work", "--repeats", str(options.repeats)]
    jobs = []
    try:
        for rank in range(world):
            host, local = divmod(rank, options.ranks)
            name = f"sparring{local if each else 0}{'ab'[host]}"
            given = dict(RANK=rank, WORLD_SIZE=world, MASTER_ADDR="10.77.0.1", MASTER_PORT=29555)
            given |= dict(GLOO_SOCKET_IFNAME=name, OMP_NUM_THREADS=1)
            environment = os.environ | {key: str(value) for key, value in given.items()}
            inside = ["ip", "netns", "exec", HOSTS[host], *command]
            output = subprocess.PIPE if rank == 0 else subprocess.DEVNULL
            jobs.append(subprocess.Popen(inside, env=environment, stdout=output, text=True))
        said, _ = jobs[0].communicate(timeout=options.timeout)
        if any(job.wait(timeout=60) for job in jobs):
            raise SystemExit("a rank failed; see its error above")
    finally:
        for job in jobs:
            job.kill()
        disconnect()
    words = [line.split()[1:] for line in said.splitlines() if "RESULT" in line]
    found = {(layout, exchange): list(map(float, times)) for layout, exchange, *times in words}
    rows = []
    for (layout, exchange), times in found.items():
        for what, column in (("forward", 0), ("forward and backward", 1)):
            shards = [crossings(name, layout, world, links)[column] for name in ("ring", exchange)]
            ratio, bound = found[layout, "ring"][column] / times[column], shards[0] / shards[1]
            rows.append(dict(links=links, layout=layout, exchange=exchange, what=what, seconds=times[column],
                             ratio=ratio, bound=bound))  # fmt: skip
            name = f"{links:7} {layout:11} {exchange:13} {what:21}"
            print(f"{name} {times[column]:8.2f} {ratio:7.2f} {bound:7.2f}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4, help="of each host")
    parser.add_argument("--mbit", type=int, default=100, help="per second and link")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--timeout", type=int, default=600, help="seconds for all exchanges on one kind of link"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "two_hosts.csv")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options)
        return
    if os.geteuid() != 0:
        raise SystemExit("network namespaces need root: sudo python benchmarks/two_hosts.py")
    head = f"{'links':7} {'layout':11} {'exchange':13} {'what':21} {'seconds':>8} {'x ring':>7} {'bound':>7}"
    print(head)
    rows = [row for links in ("shared", "each") for row in run(options, links)]
    command = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(command, cwd=RESULTS.parent, capture_output=True, text=True).stdout.strip()
    common = dict(torch=torch.__version__, commit=commit, cores=os.cpu_count(), ranks=2 * options.ranks,
                  mbit=options.mbit, tokens=TOKENS, heads=HEADS, dim=DIM)  # fmt: skip
    with options.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*common, *rows[0]])
        writer.writeheader()
        writer.writerows(common | row for row in rows)


if __name__ == "__main__":
    main()
