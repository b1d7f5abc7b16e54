"""A rank of launch/train.py that keeps the plans of its steps, or uses those that an earlier job kept.

torchrun --standalone --nproc-per-node 2 tests/replayed.py --out FOLDER/two        # plans: FOLDER/plans
"""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import torch

from sparring.launch import train as job
from sparring.launch.config import TrainConfig, parse_config


def train(config: TrainConfig, name: str = ""):
    """`run` of launch/train.py; the first job of a folder chooses and keeps, later ones repeat."""
    folder, step = Path(config.out).parent / "plans", job.train_step
    keeps = not folder.exists()
    folder.mkdir(exist_ok=True)

    def keep(config, world, trainee, number):
        shard, row = step(config, world, trainee, number)
        torch.save(trainee.cp.plans(shard), folder / f"{number}.pt")
        return shard, row

    def repeat(config, world, trainee, number):
        plans = torch.load(folder / f"{number}.pt", weights_only=False)  # of this test
        with trainee.cp.replay(plans):
            return step(config, world, trainee, number)

    with mock.patch.object(job, "train_step", keep if keeps else repeat):
        return job.run(config, name)


if __name__ == "__main__":
    train(parse_config())
