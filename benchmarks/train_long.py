"""Sparse against dense training of one model on very long text, over all GPUs of this machine.

Runs `sparring train` twice with the same seed and data, then writes a table and a picture:

    python benchmarks/train_long.py --out benchmarks/results/train_131072
    python benchmarks/train_long.py --out benchmarks/results/train_131072 --draw     # from what is there

16 layers, 16 query and 4 key heads of width 128, bf16, activation checkpointing, 131072 tokens a step.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import triton

RUNS = {"sparse": "vertical-slash", "dense": "dense"}
MODEL = "--seq-len 131072 --layers 16 --steps 50 --lr 3e-4 --save-every 0 --no-compare".split()
COLUMNS = (
    "pattern", "steps", "seq_len", "world_size", "parameters", "mean_visible_context", "loss_first",
    "loss_last", "tokens_per_second", "density", "recall", "worker_imbalance", "step_imbalance",
)  # fmt: skip


def train(out: Path) -> None:
    """Both runs, one after the other; the reference for correctness is `make test` on this machine."""
    here = Path(__file__).resolve().parent.parent
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "gpu"]
    here = Path(__file__).resolve().parent.parent
    versions = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True
        ).stdout.strip(),
        "command": " ".join(["sparring train", *MODEL, "--pattern", "{pattern}"]),
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "versions.json").write_text(json.dumps(versions, indent=1) + "\n")
    for name, pattern in RUNS.items():
        arguments = [*MODEL, "--pattern", pattern, "--out", str(out.resolve() / name)]
        environment = os.environ | {"PYTHONSAFEPATH": "1"}
        subprocess.run(
            [*launch, "-m", "sparring.launch.train", *arguments], check=True, cwd="/", env=environment
        )


def draw(out: Path) -> None:
    """table.csv and loss.png from the metrics of both runs."""
    versions = json.loads((out / "versions.json").read_text())
    rows = []
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for name in RUNS:
        summary = json.loads((out / name / "summary.json").read_text())
        rows.append({k: summary[k] for k in COLUMNS} | versions)
        metrics = [json.loads(line) for line in (out / name / "metrics.jsonl").read_text().splitlines()]
        steps = [row for row in metrics if row["kind"] == "train"]
        label = f"{name}, density {summary['density']:.3f}"
        left.plot([row["step"] for row in steps], [row["loss"] for row in steps], label=label)
        right.plot(
            [row["step"] for row in steps], [row["tokens_per_second"] / 1e3 for row in steps], label=label
        )
    left.set(xlabel="step", ylabel="loss", title="same seed, same text")
    right.set(xlabel="step", ylabel="thousand tokens / s", ylim=0, title="all GPUs together")
    left.legend()
    right.legend()
    figure.suptitle(
        f"131072 tokens on {rows[0]['world_size']} x {versions['gpu']}, torch {versions['torch']}"
    )
    figure.savefig(out / "loss.png", dpi=110)
    with (out / "table.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    for key in COLUMNS:
        print(
            f"{key:<22}"
            + "".join(
                f"{row[key]:>18.6g}" if isinstance(row[key], float) else f"{row[key]!s:>18}" for row in rows
            )
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--draw", action="store_true", help="only draw")
    options = parser.parse_args()
    if not options.draw:
        train(options.out)
    draw(options.out)
