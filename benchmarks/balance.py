"""How well layouts and exchanges that the planner chooses balance work and move keys, on a zoo of plans.

    python benchmarks/balance.py --json          # the whole zoo, writes results/balance.csv, .json and .png
    python benchmarks/balance.py --quick         # a few small cases

Plans are drawn (balance_zoo.py); the work of every rank and step and the keys it needs are counted from them,
and the schedules of the engine are simulated (sparring.balance.simulate) with one file of cost constants: one
attention layer, forward and backward. `true`: the planner knew the plan; `lagged`: it knew the statistics
of another step of the same model, whose text, columns, documents and choices were drawn anew. Baselines are
the layouts contiguous, zigzag, striped (MTraining) and PTRR (torch's balancer), each with its fastest
exchange.
"""

from __future__ import annotations

import argparse
import csv
import json
import time
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from balance_plots import draw_frontier
from balance_zoo import HEADS, KEY_HEADS, KINDS, Drawn, draw

from sparring.balance import (
    H200,
    Call,
    ExpectedTiles,
    Layout,
    Statistics,
    Tiles,
    choose,
    expected_tiles,
    first_blocks,
    measure,
    programs_of,
    read_constants,
    resolve,
    simulate,
    step_imbalance,
    step_of_source,
    worker_imbalance,
)
from sparring.balance.candidates import fixed, layouts, local_layouts, work_sorted
from sparring.balance.cost import work_by_rank, work_by_step
from sparring.balance.predict import step_seconds
from sparring.balance.statistics import layer_groups

RESULTS = Path(__file__).parent / "results"
DIM, PER_NODE = 128, 8
SIZES = {"512k": (4096, 128), "1M": (8192, 128), "4M": (8192, 512)}  # blocks, tokens in each
EXCHANGES = ("ring", "hierarchical", "gather", "pull")
STATIC = ("vertical-slash", "clustered columns", "sinks + window")  # balanced in every step of a ring
LOCAL = "log-uniform slashes"  # the window-heavy one


@dataclass(frozen=True, eq=False)
class Known(Tiles):
    """A drawn plan as the planner sees it that knows it; only the search looks at expectations."""

    plan: Drawn
    expected: ExpectedTiles

    batch = 1

    @property
    def num_blocks(self) -> int:
        return self.plan.num_blocks

    @cached_property
    def _sums(self) -> np.ndarray:
        return self.plan.sums()

    def sums(self) -> np.ndarray:
        return self._sums

    def work(self, blocks: np.ndarray) -> np.ndarray:
        return self.plan.counts[blocks] / np.float32(HEADS)

    def log_missed(self, blocks: np.ndarray, bounds: np.ndarray, keys: np.ndarray) -> np.ndarray:
        return self.expected.log_missed(blocks, bounds, keys)

    def by_source(self, layout: Layout) -> np.ndarray:
        return self.plan.by_source(layout)

    def needed(self, layout: Layout) -> np.ndarray:
        return self.plan.needed(layout)


def statistics_of(plan: Drawn) -> Statistics:
    """What the engine would sum up of a plan."""
    first = first_blocks(plan.documents, plan.num_blocks, plan.block_size)[0]
    total = Statistics.zeros(plan.num_blocks)
    for blocks in np.array_split(np.arange(plan.num_blocks), -(-plan.num_blocks // 512)):
        shares = plan.counts[blocks] / np.float64(HEADS)
        total += measure(shares, plan.columns[blocks], blocks, first[blocks])
    return total


def call_of(machine, block_size: int, nodes: int, exchanges: tuple[str, ...] = EXCHANGES) -> Call:
    """bf16 keys and values, fp32 gradients."""
    tokens = block_size * KEY_HEADS * DIM * 2
    return Call(HEADS, KEY_HEADS, 2 * tokens, 4 * tokens, exchanges, machine, nodes)


class Judge:
    """Simulated times of layouts and exchanges on one plan."""

    def __init__(self, plan: Drawn, call: Call, world: int):
        self.plan, self.call, self.world = plan, call, world
        self.topology, self.counted, self.times = call.topology(world), {}, {}

    def counts(self, layout: Layout) -> tuple[np.ndarray, np.ndarray]:
        """Work by source and needed keys, [W, W] each."""
        if layout.assignment not in self.counted:
            self.counted[layout.assignment] = self.plan.by_source(layout), self.plan.needed(layout)
        return self.counted[layout.assignment]

    def work(self, layout: Layout, exchange: str) -> np.ndarray:
        steps = step_of_source(exchange, self.world, self.call.nodes)
        return work_by_step(self.counts(layout)[0], work_by_rank(layout, self.plan.columns), steps)

    def imbalance(self, layout: Layout) -> float:
        return worker_imbalance(self.work(layout, "gather"))

    def seconds(self, layout: Layout, exchange: str) -> float:
        """Forward and backward."""
        key = layout.assignment, exchange
        if key not in self.times:
            sizes, call = np.array(layout.blocks_per_rank, dtype=np.float64), self.call
            blocks = self.counts(layout)[1] if exchange == "pull" else np.tile(sizes, (self.world, 1))
            blocks, total = blocks * (1 - np.eye(self.world)), 0.0
            kernels = call.machine.forward, call.machine.backward
            sent = 0.0, call.gradient_bytes
            for program, kernel, gradient_bytes in zip(
                programs_of(exchange, self.world, call.nodes), kernels, sent, strict=True
            ):
                work = self.work(layout, exchange)
                compute = step_seconds(kernel, call, work, sizes, layout.block_size)
                keys, gradients = blocks * call.key_bytes, blocks * gradient_bytes
                total += float(simulate(program, self.topology, compute, keys, gradients).seconds)
            self.times[key] = total
        return self.times[key]

    def best(self, layout: Layout) -> tuple[float, str]:
        return min((self.seconds(layout, exchange), exchange) for exchange in self.call.exchanges)

    def ideal(self) -> float:
        """Seconds of all work, equally shared, in one launch."""
        work = self.plan.sums().sum() / self.world, self.plan.columns.sum() / self.world
        sizes = np.full(1, self.plan.num_blocks / self.world)
        kernels = self.call.machine.forward, self.call.machine.backward
        each = (step_seconds(k, self.call, np.array([work]), sizes, self.plan.block_size) for k in kernels)
        return float(sum(x.sum() for x in each))

    def bound(self, weighed: list[Layout]) -> float:
        """Seconds that no schedule of these layouts beats: ideal compute, or the keys that must arrive."""
        size, nodes = 2 * self.call.key_bytes + self.call.gradient_bytes, self.call.nodes
        inside, between = self.topology.inside, self.topology.between
        arrive = []
        for layout in weighed:
            needed = self.counts(layout)[1]
            each = (needed.sum() - np.trace(needed)) / self.world * size
            seconds = each / (inside.bandwidth + (between.bandwidth if nodes > 1 else 0))
            if nodes > 1:
                across = self.plan.needed_by_nodes(layout, nodes).mean() * size / self.topology.inner
                seconds = max(seconds, across / between.bandwidth)
            arrive.append(seconds)
        return max(self.ideal(), min(arrive)) + inside.latency


def pulled(needed: np.ndarray) -> float:
    """Keys that ranks need of others, as a share of what a ring brings them."""
    return float((needed.sum() - np.trace(needed)) / (needed.shape[0] - 1))


def evaluate(plan: Drawn, known: Known, earlier: Statistics, call: Call, world: int) -> dict:
    """One row of results."""
    judge, size, blocks = Judge(plan, call, world), plan.block_size, plan.num_blocks
    decision = choose(known, plan.columns, world, size, call=call)
    started = time.perf_counter()
    lagged = resolve("auto", plan.documents, blocks, world, size, earlier, call=call)
    planning = time.perf_counter() - started
    union = (plan.counts > 0).sum(1).astype(float)
    baselines = [fixed(name, blocks, world, size) for name in ("contiguous", "zigzag", "striped")]
    baselines.append(replace(work_sorted(union, world, size), name="PTRR"))
    others = {layout.name: judge.best(layout) for layout in baselines}
    best = min(others, key=lambda name: others[name][0])
    ours, late = (judge.seconds(each.layout, each.exchange) for each in (decision, lagged))
    weighed = [c.layout for c in decision.table]
    bound = judge.bound([*baselines, *weighed])  # contiguous runs need the fewest keys
    ring = choose(known, plan.columns, world, size)
    by_block = plan.sums() + plan.columns
    equal = [x for x in local_layouts(by_block, [known], size, judge.topology) if judge.imbalance(x) <= 1.03]
    local = min(equal or weighed, key=lambda layout: pulled(judge.counts(layout)[1]))
    row = dict(
        layout=decision.layout.name,
        exchange=decision.exchange,
        worker=worker_imbalance(judge.work(decision.layout, decision.exchange)),
        ring_step=step_imbalance(judge.work(ring.layout, "ring")[:, :-1]),
        ring_layout=ring.layout.name,
        local_layout=local.name,
        local_worker=worker_imbalance(judge.work(local, "pull")),
        local_share=pulled(judge.counts(local)[1]) / blocks,
        ms=1e3 * ours,
        bound_ms=1e3 * bound,
        schedule_efficiency=bound / ours,
        compute_efficiency=judge.ideal() / ours,
        lagged_layout=f"{lagged.layout.name}, {lagged.exchange}",
        lagged_worker=worker_imbalance(judge.work(lagged.layout, lagged.exchange)),
        lagged_efficiency=bound / late,
        best_baseline=f"{best}, {others[best][1]}",
        over_baseline=ours / others[best][0],
        predicted=decision.chosen.best.seconds / ours,
        planning_ms=1e3 * planning,
    )
    return row | {f"{name}_ms": 1e3 * seconds for name, (seconds, _) in others.items()}


def window_share(world: int, blocks: int = 4096) -> float:
    """Keys that a pull moves for a sliding window of 4096 tokens under the planner's layout, of a ring's."""
    distance = np.arange(blocks)[:, None] - np.arange(blocks)
    chosen = ((distance >= 0) & (distance <= 32)).astype(np.float32)
    documents = (((0, blocks * 128),),)
    first = np.zeros(blocks, dtype=np.int64)
    seen = measure(chosen, np.zeros(blocks), np.arange(blocks), first)
    call = call_of(H200, 128, world // PER_NODE, ("pull",))
    layout = resolve("auto", documents, blocks, world, 128, seen, call=call).layout
    needed = sum(
        (chosen[list(held)].any(0) & (layout.source_of_block != r)).sum()
        for r, held in enumerate(layout.assignment)
    )
    return float(needed / (blocks * (world - 1)))


def planning_ms(world: int, blocks: int = 8192, repeats: int = 5) -> dict[str, float]:
    """Best of some, of one document of a million tokens and of packed ones, all groups of layers equal."""
    result, groups = {}, layer_groups(world)
    for name in ("vertical-slash", LOCAL, "packed documents"):
        plan = draw(name, blocks, 0.05, 128, seed=1)
        seen, call = statistics_of(plan), call_of(H200, 128, world // PER_NODE)
        seen, times = Statistics.from_vector(np.tile(seen.to_vector(), (groups, 1))), []
        for _ in range(repeats):
            started = time.perf_counter()
            resolve("auto", plan.documents, blocks, world, 128, seen, call=call)
            times.append(time.perf_counter() - started)
        result[name] = round(1e3 * min(times), 1)
    return result


def frontier(known: Known, plan: Drawn, world: int) -> dict[str, tuple[float, float]]:
    """For every layout weighed (keys pulled of a ring's, worker imbalance)."""
    points = {}
    topology = H200.topology(world, world // PER_NODE)
    by_block = plan.sums() + plan.columns
    weighed = layouts(by_block, world, plan.block_size)
    for layout in weighed + local_layouts(by_block, [known], plan.block_size, topology):
        work = work_by_rank(layout, by_block)[:, None]
        points[layout.name] = (pulled(plan.needed(layout)) / plan.num_blocks, worker_imbalance(work))
    return points


def summary(rows: list[dict], machine) -> dict:
    """What is asked for, by name, over all rows."""

    def over(name: str, some: list[dict], worst=max) -> dict[str, float]:
        values = [row[name] for row in some]
        return {"worst": round(worst(values), 4), "mean": round(float(np.mean(values)), 4)} if values else {}

    static = [row for row in rows if row["pattern"] in STATIC]
    joint = [row for row in rows if (row["pattern"], row["world"]) == (LOCAL, 32)]
    loss = np.mean([row["schedule_efficiency"] - row["lagged_efficiency"] for row in rows])
    return dict(
        setting=dict(
            heads=HEADS,
            key_heads=KEY_HEADS,
            dim=DIM,
            ranks_a_node=PER_NODE,
            layers=1,
            passes="forward + backward",
            blocks={name: f"{count} of {size} tokens" for name, (count, size) in SIZES.items()},
            machine=machine.source,
        ),
        cases=len(rows),
        worst_worker_imbalance=over("worker", rows)["worst"],
        worker_imbalance=over("worker", rows),
        lagged_worker_imbalance=over("lagged_worker", rows),
        ring_step_imbalance_static=over("ring_step", static),
        schedule_efficiency=over("schedule_efficiency", rows, min),
        compute_efficiency_4M=over("compute_efficiency", [r for r in rows if r["size"] == "4M"], min),
        over_best_baseline=over("over_baseline", rows),
        worse_than_a_baseline=sum(row["over_baseline"] > 1.0005 for row in rows),
        lagged_loss_points=round(100 * float(loss), 2),
        joint_window_heavy=[
            {
                k: row[k] if isinstance(row[k], str) else round(row[k], 4)
                for k in ("size", "density", "local_layout", "local_worker", "local_share")
            }
            for row in joint
        ],
        window_4096_pull_share={str(world): round(window_share(world), 4) for world in (32, 64)},
        planning_ms={f"{world} ranks": planning_ms(world) for world in (32, 64)},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="512k tokens, density .05, W = 8 and 32")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")
    parser.add_argument(
        "--constants", type=Path, help="a file of cost constants, by default those of an H200"
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    machine = read_constants(options.constants) if options.constants else H200
    sizes, densities, worlds = list(SIZES), (0.05, 0.25), (8, 16, 32, 64)
    if options.quick:
        sizes, densities, worlds = ["512k"], (0.05,), (8, 32)
    rows, frontiers = [], {}
    for name, size, density in ((n, s, d) for s in sizes for d in densities for n in KINDS):
        blocks, tokens = SIZES[size]
        earlier, plan = (draw(name, blocks, density, tokens, seed) for seed in (0, 2))
        statistics = statistics_of(earlier)
        del earlier
        expected = expected_tiles(
            plan.documents, blocks, tokens, statistics_of(plan), np.sqrt(HEADS / KEY_HEADS)
        )
        known = Known(plan, expected)
        for world in worlds:
            call = call_of(machine, tokens, world // PER_NODE)
            row = evaluate(plan, known, statistics, call, world)
            rows.append(dict(size=size, density=density, pattern=name, world=world) | row)
            if not options.json:
                print(
                    *(f"{v:.3f}" if isinstance(v, float) else v for v in rows[-1].values()),
                    sep=", ",
                    flush=True,
                )
            if world == 32 and size == sizes[0]:
                frontiers[name, density] = frontier(known, plan, world)
    found = summary(rows, machine)
    options.out.mkdir(parents=True, exist_ok=True)
    with (options.out / "balance.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(
            {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()} for row in rows
        )
    (options.out / "balance.json").write_text(json.dumps(found, indent=1) + "\n")
    draw_frontier(frontiers, options.out / "balance.png")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
