"""Speed of plan building on one GPU: from the bitmask to the lists that kernels walk, and their order.

    python benchmarks/plans.py           # 128k and 512k tokens, 32 mask heads, a causal mask, random tiles

Device time of CUDA graphs, so that launches cost what they cost in a captured step. `physical` puts bits in
order by key, `rows` and `keys` make the lists, `work` and `columns` the tables of the Hopper kernels, `all`
is all of it. `order` is longest_first alone; `argsort` and `plain` are what it and the lists stand for, by
plain operations. Checked against those before anything is timed.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
from dataclasses import replace
from pathlib import Path

import torch
import triton

from sparring.kernels import Geometry, Plan, bind
from sparring.kernels.bound import plain_lists, prepare
from sparring.kernels.geometry import EMPTY
from sparring.kernels.hopper_schedule import column_table, work_table
from sparring.kernels.plan import pack_bits
from sparring.kernels.triton_lists import csr, lists, physical, tables
from sparring.kernels.triton_order import longest_first

RESULTS = Path(__file__).parent / "results"
HEADS, KV_HEADS = 32, 8


def make(length: int, heads: int, density: float, seed: int = 0) -> Plan:
    """Random tiles of a causal mask, one head at a time: no tensor of all tiles is ever made."""
    geometry = Geometry.causal(1, length, device="cuda")
    g = torch.Generator("cuda").manual_seed(seed)
    visible, shape = (geometry.tile_class != EMPTY)[:, None], (1, 1, geometry.num_blocks, geometry.num_blocks)
    chosen = ((torch.rand(shape, generator=g, device="cuda") < density) & visible for _ in range(heads))
    return Plan(geometry, torch.cat([pack_bits(x) for x in chosen], 1))


def slots(plan: Plan):
    return torch.arange(plan.geometry.num_blocks, device="cuda")[None]


def check() -> None:
    """The lists and the order of a short sequence; raises if they are not those of plain operations."""
    plan = make(50_000, 4, 0.3)
    geometry = plan.geometry
    capacity = plan.mask_heads * geometry.num_visible_tiles
    actual = lists(plan, tables(geometry, slots(plan), in_order=True), capacity)
    lengths, longest = actual[0][0].diff().view(1, 2, -1), geometry.num_blocks
    pairs = [(longest_first(lengths, longest), sort(lengths, longest))]
    for got, wanted in zip(actual, plain_lists(plan, slots(plan), capacity), strict=True):
        ends = None, None, int(wanted[0][-1])
        pairs += [(x[:end], y[:end]) for x, y, end in zip(got, wanted, ends, strict=True)]
    if not all(torch.equal(*pair) for pair in pairs):
        raise SystemExit("the lists or their order are wrong; nothing is timed")


def sort(lengths, longest: int):
    """What longest_first gives, by a sort."""
    group = torch.arange(lengths.shape[1], dtype=torch.int32, device="cuda")[:, None]
    key = torch.where(lengths > 0, group * (longest + 1) - lengths, 2**30)
    return key.flatten(1).argsort(stable=True)


def parts(plan: Plan) -> dict:
    """What is timed, by name."""
    geometry, key_blocks = plan.geometry, (plan.geometry.blocks,)
    prepare(geometry, key_blocks)
    known, capacity = tables(geometry, slots(plan), in_order=True), HEADS * geometry.num_visible_tiles
    bound, blocks = bind(plan, key_blocks), geometry.num_blocks
    by_row, by_key = physical(plan.tiles, known)
    lengths = bound.row_ptr.diff().view(1, KV_HEADS, -1)

    def everything():
        rows, keys = lists(plan, known, capacity)
        fresh = bound.join((*rows, *keys))  # without the tables kept with the plan
        work_table(fresh, 0, HEADS, KV_HEADS)
        column_table(fresh, 0, HEADS, KV_HEADS, True)

    return {
        "physical": lambda: physical(plan.tiles, known),
        "rows": lambda: csr(by_row, known.full[0], blocks, capacity),
        "keys": lambda: csr(by_key, known.full[1], blocks, capacity),
        "work": lambda: work_table(replace(bound), 0, HEADS, KV_HEADS),
        "columns": lambda: column_table(replace(bound), 0, HEADS, KV_HEADS, True),
        "all": everything,
        "order": lambda: longest_first(lengths, blocks),
        "argsort": lambda: sort(lengths, blocks),
        "plain": lambda: plain_lists(plan, slots(plan), capacity),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[131072, 524288])
    parser.add_argument("--densities", type=float, nargs="+", default=[0.25, 0.05])
    parser.add_argument("--commit", help="written to the results where there is no git")
    parser.add_argument("--out", type=Path, default=RESULTS / "plans.csv")
    options = parser.parse_args()
    check()
    git = dict(args=["git", "describe", "--always", "--dirty"], cwd=RESULTS.parent)
    commit = options.commit or subprocess.run(**git, capture_output=True, text=True).stdout
    versions = dict(torch=torch.__version__, triton=triton.__version__, commit=commit.strip() or "unknown")
    common, rows = dict(gpu=torch.cuda.get_device_name(), **versions), []
    for length, density in ((x, y) for x in options.lengths for y in options.densities):
        plan = make(length, HEADS, density)
        shape = dict(length=length, heads=HEADS, kv_heads=KV_HEADS, density=density)
        for name, function in parts(plan).items():
            us = 1e3 * triton.testing.do_bench_cudagraph(function, rep=50, return_mode="median")
            rows.append(common | shape | dict(what=name, us=round(us, 1)))
            print(f"{length:7} tokens, density {density:4}: {name:9}{us:8.1f} us", flush=True)
    with options.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
