"""The main job: a transformer learns from long text, its sequence sharded over the ranks.

torchrun --standalone --nproc-per-node 2 -m sparring.launch.train --help
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record

from ..kernels.patterns import Dense, Pattern, SinkWindow
from .checkpoint import load_checkpoint, save_checkpoint
from .cli import leave_checkout
from .config import TrainConfig, describe, parse_config
from .data import Rows, pack, read_documents
from .metrics import MetricsWriter, ProgressReport, print_table
from .signals import orderly_signals
from .summary import layer_statistics, step_statistics, summarize, work_by_layout
from .trainee import Trainee, assemble, build_pattern, train_step
from .world import World, join_world

RUN_FILES = ("metrics.jsonl", "summary.json", "report.png", "checkpoints")

Saved = tuple[int, dict[str, Any]]  # steps done, and the state then


def run(config: TrainConfig) -> dict[str, Any] | None:
    """Train as `config` says; returns the summary on rank 0, None on the others.

    Works under torchrun, under Ray, inside an existing process group, and in a process alone.
    Writes into `config.out`: metrics.jsonl, checkpoints/, summary.json, report.png.
    """
    out = Path(config.out)
    with join_world(config) as world:
        saved = find_checkpoint(config)
        rows = pack(read_documents(config.data), config.seq_len)
        context = rows.mean_visible_context
        dist.barrier()  # all have looked at `out` before rank 0 changes it
        if world.chief:
            print(f"sparring on {world.size} x {world.device.type}\n{describe(config)}")
            print(f"mean visible context: {context:,.0f} of {config.seq_len:,} tokens", flush=True)
            if saved is None:
                set_aside(out)
        start = saved[0] if saved else 0
        with closing(MetricsWriter(out / "metrics.jsonl", active=world.chief, start=start)) as writer:
            pattern = build_pattern(config)
            parameters = train(config, world, "train", pattern, rows, writer, saved)
            if config.compare:
                local = SinkWindow(sink=0, window=config.block_size)
                train(config, world, "dense", Dense(), rows, writer)
                train(config, world, "local", local, rows, writer)
        if not world.chief:
            return None
        summary = summarize(
            config,
            out / "metrics.jsonl",
            world_size=world.size,
            parameters=parameters,
            context=context,
        )
        finish(out, summary)
        return summary


def train(
    config: TrainConfig,
    world: World,
    kind: str,
    pattern: Pattern,
    rows: Rows,
    writer: MetricsWriter,
    saved: Saved | None = None,
) -> int:
    """One run of all steps with `pattern`, from the start or from `saved`; returns the parameters.

    The same seed gives the same weights and the same data whatever the pattern. Only the run of kind
    "train" is checkpointed and looked at layer by layer.
    """
    trainee = assemble(config, world, pattern, rows)
    if saved:
        trainee.load_state_dict(saved[1])
    parameters = sum(p.numel() for p in trainee.model.parameters())
    if world.chief:
        print(f"\n{kind}: {parameters:,} parameters, {pattern}", flush=True)
    progress = ProgressReport(kind, config.steps, active=world.chief, every=config.log_every)
    try:
        for step in range(saved[0] if saved else 0, config.steps):
            shard, row = train_step(config, world, trainee, step)
            report = trainee.cp.report(shard)
            row |= step_statistics(report)
            writer.write(kind, step, **row)
            progress.update(step, row)
            if kind != "train":
                continue
            writer.write("layers", step, **layer_statistics(report))
            if step + 1 == config.steps:
                for work in work_by_layout(trainee.cp, shard):
                    writer.write("work", step, **work)
            if config.saves_after(step):
                save(config, world, trainee, step + 1)
    finally:
        progress.close()
        trainee.cp.detach(trainee.model)
    trainee.cp.close()
    return parameters


def save(config: TrainConfig, world: World, trainee: Trainee, steps: int) -> None:
    """Checkpoint after `steps` steps: rank 0 writes, all wait."""
    state = trainee.state_dict() | {"config": asdict(config)}
    if world.chief:
        save_checkpoint(Path(config.out) / "checkpoints", steps, state, config.keep)
    dist.barrier()


def find_checkpoint(config: TrainConfig) -> Saved | None:
    """The checkpoint to go on from, if `config` asks for one and there is one."""
    root = Path(config.out) / "checkpoints"
    if not config.resume or not (root / "latest").exists():
        return None
    step, state = load_checkpoint(root)
    if changed := config.differences(state["config"]):
        raise ValueError(f"{root} was saved with other settings:\n  " + "\n  ".join(changed))
    return step, state


def set_aside(out: Path) -> None:
    """Move what an earlier run left in `out` to `out/previous-N`."""
    found = [out / name for name in RUN_FILES if (out / name).exists()]
    if found:
        folder = next(p for n in range(1, 10**6) if not (p := out / f"previous-{n}").exists())
        folder.mkdir()
        for path in found:
            path.rename(folder / path.name)
        print(f"moved the earlier run in {out} to {folder}", flush=True)


def finish(out: Path, summary: dict[str, Any]) -> None:
    """Write summary.json and report.png, and print the table."""
    from .report import write_report  # matplotlib, needed on rank 0 alone

    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    print_table("summary", summary)
    print(f"{out / 'summary.json'}\n{write_report(out)}", flush=True)


@record
def main(arguments: Sequence[str] | None = None) -> None:
    """`sparring train [OPTIONS]`."""
    leave_checkout()
    with orderly_signals():
        run(parse_config(arguments))


if __name__ == "__main__":
    main()
