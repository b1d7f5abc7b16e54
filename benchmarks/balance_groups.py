"""What statistics of layer groups are worth: models whose layers follow two patterns of the zoo.

    python benchmarks/balance_groups.py          # writes results/balance_groups.csv

For every pair of patterns of balance_zoo.py (but packed documents), one of density .05 and one of .25, each
in half of the layers, the planner gets the statistics of both halves summed, or apart as layer groups. Its
two choices are simulated on the drawn plans as in balance.py: 512k tokens, forward and backward, 8 a node.
"""

from __future__ import annotations

import argparse
import csv
from itertools import product
from pathlib import Path

import numpy as np
from balance_zoo import KINDS, draw

from balance import PER_NODE, RESULTS, SIZES, Judge, call_of, statistics_of
from sparring.balance import H200, Statistics, resolve

WORLDS, DENSITIES = (8, 16, 32, 64), (0.05, 0.25)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--worlds", type=int, nargs="+", default=WORLDS, help="numbers of GPUs")
    parser.add_argument("--out", type=Path, default=RESULTS / "balance_groups.csv")
    options = parser.parse_args()
    blocks, size = SIZES["512k"]
    kinds = [kind for kind in KINDS if kind != "packed documents"]
    plans = {key: draw(key[0], blocks, key[1], size, 2) for key in product(kinds, DENSITIES)}
    seen, rows = {key: statistics_of(plan).to_vector() for key, plan in plans.items()}, []
    for world in options.worlds:
        call = call_of(H200, size, world // PER_NODE)
        judges = {key: Judge(plan, call, world) for key, plan in plans.items()}
        for kind, other in product(kinds, kinds):
            halves = (kind, DENSITIES[0]), (other, DENSITIES[1])
            vectors = np.stack([seen[key] for key in halves])
            row = dict(world=world, sparse=kind, dense=other)
            for name, vector in (("summed", vectors.sum(0)), ("groups", vectors)):
                statistics, documents = Statistics.from_vector(vector), plans[halves[0]].documents
                made = resolve("auto", documents, blocks, world, size, statistics, call=call)
                seconds = np.mean([judges[key].seconds(made.layout, made.exchange) for key in halves])
                row |= {
                    name: f"{made.layout.name}, {made.exchange}",
                    f"{name}_ms": round(1e3 * float(seconds), 4),
                    f"{name}_predicted": round(made.chosen.best.seconds / float(seconds), 4),
                }
            rows.append(row | {"speedup": round(row["summed_ms"] / row["groups_ms"], 4)})
        ratios = np.array([row["speedup"] for row in rows if row["world"] == world])
        print(
            f"{world} GPUs, {len(ratios)} models: groups are {ratios.mean() - 1:.2%} faster in the mean, "
            f"{ratios.max() - 1:.1%} at most, {ratios.min() - 1:.1%} at least; by more than .5 % faster in "
            f"{(ratios > 1.005).sum()}, slower in {(ratios < 0.995).sum()}",
            flush=True,
        )
    with options.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
