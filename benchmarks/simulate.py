"""Predicted speed of attention on 8 to 1024 GPUs: the schedules of the engine on an event model.

    python benchmarks/simulate.py                  # every case, sensitivity, CSV and picture: half an hour
    python benchmarks/simulate.py --worlds 8 64 --tokens 524288
    torchrun --nproc-per-node 2 benchmarks/simulate.py --check --constants constants.json

32 query and 8 key heads of width 128, bf16, 8 GPUs a node. Efficiency: the time of an equal share of the work
in one launch without any message, over the simulated time, forward and backward. --check measures on this
machine what it predicts for the same plans, layouts and exchanges (`calibrate.py` makes the constants), and
keeps the errors, which are printed beside every other result. Nothing here is measured on a large machine.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path

from sparring.balance import H200, Constants, read_constants

sys.path.append(str(Path(__file__).parent))  # in its absence: python -P, PYTHONSAFEPATH
import simulate_methods as methods  # noqa: E402
from simulate_methods import METHODS, Setting  # noqa: E402

RESULTS = Path(__file__).parent / "results"
PATTERNS = {"scattered": methods.scattered, "banded": methods.banded}
MILLION = 2**20
TOKENS = (MILLION // 2, MILLION, 4 * MILLION, 8 * MILLION)
WORLDS = (8, 16, 32, 64, 128, 256, 512, 1024)
DENSITIES = (0.05, 0.25)
INNER = 8
ASKED = (512, 4 * MILLION, 0.05)  # the case of the question: GPUs, tokens, density
GOAL = 0.85


def assumptions(constants: Constants, errors: dict[str, str]) -> list[str]:
    """What every figure rests on, in lines."""
    forward, backward = constants.forward, constants.backward
    inside, between = constants.inside, constants.between
    flops = 4 * constants.dim * constants.block_size**2
    return [
        f"constants: {constants.source}",
        f"kernels {flops / forward.tile / 1e12:.0f} / {2.5 * flops / backward.tile / 1e12:.0f} TFLOP/s, c = "
        f"{forward.row / forward.tile:.2f} / {backward.row / backward.tile:.2f} tiles a row, "
        f"{forward.launch * 1e6:.0f} / {backward.launch * 1e6:.0f} us a launch",
        f"links {inside.bandwidth / 1e9:.0f} GB/s inside a node, {between.bandwidth / 1e9:.0f} GB/s a GPU "
        f"between nodes (assumed), {inside.latency * 1e6:.0f} / {between.latency * 1e6:.0f} us a message",
        "patterns are drawn: slashes log-uniform over distance, each head its own (scattered), or in bands of"
        f" 4096 tokens, shared by the query heads of a key head (banded); {methods.COLUMNS} columns a head",
        "every method has our kernels; messages and kernels do not slow each other; plans are known;"
        " the engine has no heads x pull",
        *(f"error of prediction, {where}: {text}" for where, text in errors.items()),
    ]


def calibration_errors() -> dict[str, str]:
    """For each machine that was checked, how far predictions were off."""
    found = {}
    for path in sorted(RESULTS.glob("simulate_check_*.csv")):
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        off = [abs(float(row["error"])) for row in rows]
        found[rows[0]["machine"]] = (
            f"mean {sum(off) / len(off):.0%}, largest {max(off):.0%} of {len(off)} cases"
        )
    return found or {"any machine": "not measured"}


def simulated(setting: Setting, tokens: int, **more) -> list[dict]:
    """One row for every method that can be."""
    ideal, rows = setting.ideal(), []
    for name, method in METHODS.items():
        outcome = method(setting)
        if outcome is None:
            continue
        common = dict(method=name, gpus=setting.world, tokens=tokens, pattern=setting.pattern.name,
                      density=round(setting.pattern.density, 4))  # fmt: skip
        rows.append(common | more | dict(efficiency=ideal / outcome.seconds) | asdict(outcome))
    return rows


def table(rows: list[dict]) -> None:
    columns = ("efficiency", "ms", "waits", "GB inside", "between", "need")
    print(f"  {'method':34}{'layout':>14}" + "".join(f"{name:>11}" for name in columns))
    for row in sorted(rows, key=lambda row: -row["efficiency"]):
        values = (row["efficiency"], row["seconds"] * 1e3, row["waiting"], row["inside"] / 1e9,
                  row["between"] / 1e9, row["need"])  # fmt: skip
        print(f"  {row['method']:34}{row['layout']:>14}" + "".join(f"{value:>11.3f}" for value in values))


def sensitivity(constants: Constants) -> list[dict]:
    """The case of the question with other links, needs and skew."""
    world, tokens, density = ASKED
    rows = []
    for name, draw in PATTERNS.items():
        base = Setting(draw(tokens // methods.BLOCK, density), world, INNER, constants)
        for what, setting in {
            "as assumed": base,
            "links x 0.5": replace(base, constants=methods.faster_links(constants, 0.5)),
            "links x 2": replace(base, constants=methods.faster_links(constants, 2.0)),
            "twice the need": replace(base, need=2.0),
            "skew 0.25": replace(base, skew=0.25),
        }.items():
            rows += simulated(setting, tokens, change=what)
        print(f"\nefficiency with {world} GPUs at {tokens // MILLION}M tokens, density {density}, {name}")
        changes = list(dict.fromkeys(row["change"] for row in rows))
        print(f"  {'method':34}" + "".join(f"{change:>16}" for change in changes))
        for method in METHODS:
            some = [r for r in rows if (r["method"], r["pattern"]) == (method, name)]
            if some:
                print(f"  {method:34}" + "".join(f"{row['efficiency']:>16.3f}" for row in some))
    return rows


def answer(rows: list[dict]) -> None:
    """What the page is for."""
    world, tokens, density = ASKED
    for name in PATTERNS:
        some = [r for r in rows if (r["gpus"], r["tokens"], r["asked"], r["pattern"]) == (*ASKED, name)]
        best = max(some, key=lambda row: row["efficiency"], default=None)
        if best:
            print(
                f"{world} GPUs, {tokens // MILLION}M tokens, density {density}, {name}: goal {GOAL} "
                f"{'reached' if best['efficiency'] >= GOAL else 'missed'}; best is {best['method']} with "
                f"{best['efficiency']:.3f}"
            )


def write(path: Path, rows: list[dict]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(
            {key: f"{value:.5g}" if isinstance(value, float) else value for key, value in row.items()}
            for row in rows
        )


def draw(path: Path, notes: list[str]) -> None:
    """Efficiency by GPUs at the length of the question."""
    import matplotlib.pyplot as plt

    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if int(row["tokens"]) == ASKED[1]]
    figure, axes = plt.subplots(2, 2, figsize=(11, 8.6), sharex=True, sharey=True)
    for line, pattern in zip(axes, PATTERNS, strict=True):
        for axis, density in zip(line, DENSITIES, strict=True):
            for number, method in enumerate(METHODS):
                case = (method, pattern, str(density))
                some = [row for row in rows if (row["method"], row["pattern"], row["asked"]) == case]
                points = [(int(row["gpus"]), float(row["efficiency"])) for row in some]
                ours = "best" in method
                if points:
                    axis.plot(*zip(*points, strict=True), marker="o" if ours else ".", color=f"C{number}",
                              linestyle="-" if ours else "--", label=method)  # fmt: skip
            axis.axhline(GOAL, color="gray", linewidth=0.8)
            axis.set(xscale="log", ylim=(0, 1.02), title=f"{pattern} slashes, density {density}")
            axis.set_xticks(WORLDS, [str(world) for world in WORLDS])
            axis.minorticks_off()
            axis.grid(alpha=0.3)
    for axis in axes[1]:
        axis.set_xlabel("GPUs, 8 a node")
    for axis in axes[:, 0]:
        axis.set_ylabel("efficiency (ideal / simulated)")
    handles = axes[0, 0].get_legend_handles_labels()
    figure.legend(*handles, loc="lower center", ncol=3, fontsize=8, bbox_to_anchor=(0.5, 0.1))
    figure.suptitle(
        f"SIMULATED: {ASKED[1] // MILLION}M tokens, 32/8 heads of 128, forward and backward", fontsize=11
    )
    figure.text(0.5, 0.005, "\n".join(notes), ha="center", va="bottom", fontsize=6.5)
    figure.tight_layout(rect=(0, 0.175, 1, 1))
    figure.savefig(path.with_suffix(".png"), dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--constants", type=Path, help="of calibrate.py; those of an H200 by default")
    parser.add_argument("--worlds", type=int, nargs="+", default=WORLDS, help="numbers of GPUs")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--draw", action="store_true", help="only draw the picture of --out")
    parser.add_argument("--check", action="store_true", help="predicted against measured; under torchrun")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="of --check")
    parser.add_argument("--out", type=Path, default=RESULTS / "simulate.csv")
    options = parser.parse_args()
    constants = read_constants(options.constants) if options.constants else H200
    if options.check:
        import simulate_check

        simulate_check.run(constants, options.device, RESULTS)
        return
    notes = assumptions(constants, calibration_errors())
    if not options.draw:
        print("\n".join(notes))
        rows, began = [], time.perf_counter()
        for world, tokens, density, kind in product(
            options.worlds, options.tokens, DENSITIES, PATTERNS.values()
        ):
            pattern = kind(tokens // methods.BLOCK, density)
            found = simulated(Setting(pattern, world, INNER, constants), tokens, asked=density)
            rows += found
            write(options.out, rows)
            print(
                f"\n{world} GPUs, {tokens / MILLION:g}M tokens, {pattern.name}, density {pattern.density:.3f}"
                f" ({time.perf_counter() - began:.0f} s)"
            )
            table(found)
        if ASKED[0] in options.worlds and ASKED[1] in options.tokens:
            write(options.out.with_name(f"{options.out.stem}_sensitivity.csv"), sensitivity(constants))
            answer(rows)
        print("\n".join(notes))
    draw(options.out, notes)


if __name__ == "__main__":
    main()
