"""The main job: a transformer learns from long text, its sequence sharded over the ranks.

torchrun --standalone --nproc-per-node 2 -m sparring.launch.train --help
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record

from ..kernels.patterns import Dense, Pattern, SinkWindow
from . import flight
from .checkpoint import load_checkpoint, read_values
from .cli import leave_checkout
from .config import TrainConfig, describe, parse_config
from .data import prepare_rows
from .environment import describe_environment
from .gather import gather
from .measure import job_statistics, own_counts
from .metrics import MetricsWriter
from .packing import Rows
from .profiling import profiled
from .progress import ProgressReport, print_table
from .saver import Saver
from .settings import write_settings
from .signals import Stop, leave, orderly_signals
from .summary import layer_statistics, step_statistics, summarize, work_by_layout
from .trackers import check_tracker, open_tracker
from .trainee import assemble, build_pattern, train_step
from .world import World, cpu_group, join_world, uses_gpus

JOB = "job"  # holds the name of the job that wrote here last
RUN_FILES = (
    *("metrics.jsonl", "summary.json", "report.png", "report.html", "checkpoints", "config.json", JOB),
    *("environment.json", "tensorboard", "profile", flight.FOLDER),
)


def run(config: TrainConfig, job: str = "", stop: Stop | None = None) -> dict[str, Any] | None:
    """Train as `config` says; returns the summary on rank 0, None on the others.

    Works under torchrun, under Ray, inside an existing process group, and in a process alone.
    Writes into `config.out`: config.json, environment.json, metrics.jsonl, checkpoints/, summary.json,
    report.png, report.html; on an NCCL timeout flight-recorder/.

    job: a name for this job and no other, if its launcher starts it again when it fails: the job that wrote
    into `config.out` last resumes. stop: tells of signals; once a rank got one, all finish their step, save,
    and leave.
    """
    stop = stop or Stop()
    out = Path(config.out)
    check_tracker(config.tracker)
    if uses_gpus(config):
        flight.record_flight(out)
    with join_world(config) as world:
        if job and (out / JOB).exists() and (out / JOB).read_text(encoding="utf-8") == job:
            config = replace(config, resume=True)
        start = find_checkpoint(config)
        rows = prepare_rows(config, chief=world.chief)
        context = rows.mean_visible_context
        dist.barrier()  # all have looked at `out` before rank 0 changes it
        if world.chief:
            print(f"sparring on {world}\n{describe(config)}")
            print(f"mean visible context: {context:,.0f} of {config.seq_len:,} tokens")
            print(f"padding: {rows.padding:.2%} of {len(rows):,} rows", flush=True)
            if not start:
                set_aside(out)
            out.mkdir(parents=True, exist_ok=True)
            write_settings(out / "config.json", config)
            write_json(out / "environment.json", describe_environment(world.size))
            if uses_gpus(config):
                (out / flight.FOLDER).mkdir(exist_ok=True)
            (out / JOB).write_text(job, encoding="utf-8")
        tracker = open_tracker(config.tracker, out, asdict(config), start) if world.chief else None
        rows_file = MetricsWriter(out / "metrics.jsonl", active=world.chief, start=start, tracker=tracker)
        with closing(rows_file) as writer:
            pattern = build_pattern(config)
            parameters = train(config, world, "train", pattern, rows, writer, stop, start)
            if config.compare:
                local = SinkWindow(sink=0, window=config.block_size)
                train(config, world, "dense", Dense(), rows, writer, stop)
                train(config, world, "local", local, rows, writer, stop)
        if not world.chief:
            return None
        summary = summarize(
            config,
            out / "metrics.jsonl",
            world_size=world.size,
            parameters=parameters,
            context=context,
            padding=rows.padding,
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
    stop: Stop,
    start: int = 0,
) -> int:
    """One run of all steps with `pattern`, from step `start`, of the checkpoint; returns the parameters.

    The same seed gives the same weights and the same data whatever the pattern. Only the run of kind
    "train" is checkpointed and looked at layer by layer.
    """
    from .flops import flops_per_pair, flops_per_token  # transformers: only once `leave_checkout` has run

    trainee = assemble(config, world, pattern, rows)
    saver = Saver(checkpoints(config), config.keep, cpu_group(config))
    if start:
        trainee.load_state_dict(load_checkpoint(saver.root, trainee.state_dict(), saver.group)[1])
    parameters = sum(p.numel() for p in trainee.model.parameters())
    flops = flops_per_token(trainee.model) * config.dp * config.batch * config.seq_len
    pair_flops = flops_per_pair(trainee.model)
    if world.chief:
        print(f"\n{kind}: {parameters:,} parameters, {pattern}", flush=True)
    progress = ProgressReport(kind, config.steps, active=world.chief, every=config.log_every)
    profile = ("train", config.profile_step)
    try:
        with saver, stop.postpone():
            for step in range(start, config.steps):
                with profiled(trace_of(config, world) if (kind, step) == profile else None):
                    shard, row = train_step(config, world, trainee, step)
                report = trainee.cp.report(shard)
                told = gather(world.control, [stop.number, *own_counts(report, shard, world.device)])
                stopped, counts = max(number for number, *_ in told), [rest for _, *rest in told]
                row |= step_statistics(report) | job_statistics(counts, row["seconds"], flops, pair_flops)
                writer.write(kind, step, **row)
                progress.update(step, row)
                if kind == "train":
                    writer.write("layers", step, **layer_statistics(report))
                    if step + 1 == config.steps:
                        writer.write("decision", step, text=shard.decision.explain())
                        for work in work_by_layout(trainee.cp, shard):
                            writer.write("work", step, **work)
                    if config.saves_after(step) or (stopped and config.save_every):
                        saver.save(step + 1, trainee.state_dict() | {"config": asdict(config)})
                if stopped:
                    saver.wait()
                    leave(stopped)
    finally:
        progress.close()
        trainee.data.close()
        trainee.cp.detach(trainee.model)
    trainee.cp.close()
    return parameters


def checkpoints(config: TrainConfig) -> Path:
    """The folder of the checkpoints of a run."""
    return Path(config.out) / "checkpoints"


def trace_of(config: TrainConfig, world: World) -> Path:
    """Where this rank writes the trace of the profiled step."""
    return Path(config.out) / "profile" / f"rank-{world.rank}.json"


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Plain values, as JSON that people read too."""
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def find_checkpoint(config: TrainConfig) -> int:
    """The steps of the checkpoint to go on from; 0 unless `config` asks for one and there is one."""
    root = checkpoints(config)
    if not config.resume or not (root / "latest").exists():
        return 0
    steps, values = read_values(root)
    if changed := config.differences(values["config"]):
        raise ValueError(f"{root} was saved with other settings:\n  " + "\n  ".join(changed))
    return steps


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
    """Write summary.json, report.png and report.html, and print the table."""
    from .page import write_page  # jinja2 and matplotlib, needed on rank 0 alone
    from .report import write_report

    write_json(out / "summary.json", summary)
    print_table("summary", summary)
    print(f"{out / 'summary.json'}\n{write_report(out)}\n{write_page(out)}", flush=True)


@record
def main(arguments: Sequence[str] | None = None) -> None:
    """`python -m sparring.launch.train [OPTIONS]`: a rank that torchrun started, or a process alone."""
    leave_checkout()
    job = os.environ.get("TORCHELASTIC_RUN_ID", "none")  # torchrun's word for a job without a name
    with orderly_signals() as stop:
        run(parse_config(arguments), "" if job == "none" else job, stop)


if __name__ == "__main__":
    main()
