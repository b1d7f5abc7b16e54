"""`sparring plan`: memory and step time of a training before it is run, and the switches that it needs.

Needs no GPU and reads no weights. Settings are those of `sparring train`; the defaults are those of GPUs.
With --json it prints one object and nothing else:

    {"gpus": ..., "cp_size": ..., "tokens_per_rank": ..., "moment": ..., "memory": {item: bytes, ...},
     "overhead": bytes, "needed": bytes, "available": bytes, "fits": ..., "host_memory": bytes,
     "seconds": {item: seconds, ...}, "step_seconds": ..., "exchange": ..., "chosen": switches or null,
     "options": [{"switches": ..., "bytes": ..., "fits": ..., "longest": tokens}, ...], "assumed": [...]}
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..balance import H200, read_constants
from .cli import leave_checkout
from .config import Command, default_config
from .measure import GIB
from .settings import read_settings


@dataclass(frozen=True)
class Plan(Command):
    """Predict memory and step time of a training, and say which switches it needs."""

    gpus: int = 1  # GPUs of the whole job.
    gpus_per_node: int | None = None  # GPUs of each machine; default: all, or 8 if there are more.
    memory: float = 139.0  # GiB of each GPU; an H200 has 139.
    constants: Path | None = None  # Costs of another machine, as benchmarks/calibrate.py writes them.
    json: bool = False  # Print one JSON object and nothing else.

    def __post_init__(self) -> None:
        for name in ("gpus", "gpus_per_node", "memory"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise ValueError(f"{name}={value} must be greater than 0")
        if self.gpus % self.per_node:
            raise ValueError(
                f"{self.gpus} GPUs do not fill nodes of gpus_per_node={self.per_node}; plan whole nodes"
            )

    @property
    def per_node(self) -> int:
        return self.gpus_per_node or min(self.gpus, 8)


def parse_plan(arguments: Sequence[str]) -> Plan:
    """The plan that is asked for, its file of settings read. Usage errors end the program with code 2."""
    import tyro

    default = default_config(cuda=True)
    given, _ = tyro.cli(_File, args=arguments, return_unknown_args=True, add_help=False)
    flat = (tyro.conf.OmitArgPrefixes,)
    try:
        if given.config:
            default = read_settings(given.config, default)
        return tyro.cli(Plan, prog="sparring plan", args=arguments, default=Plan(default), config=flat)
    except ValueError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from error


@dataclass(frozen=True)
class _File:
    config: Path | None = None


def main(arguments: Sequence[str] | None = None) -> None:
    """`sparring plan [OPTIONS]`."""
    leave_checkout()
    plan = parse_plan(sys.argv[1:] if arguments is None else arguments)
    try:
        found = predict_training(plan)
    except (ValueError, NotImplementedError) as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from error
    if plan.json:
        print(json.dumps(found))
        return
    from .plan_show import show

    show(found)


def predict_training(plan: Plan) -> dict[str, Any]:
    """What --json prints. ValueError for settings that no such job can have."""
    from .plan_memory import OVERHEAD, element, share_of, worst_moment  # transformers, with leave_checkout
    from .plan_model import build_meta, sizes_of
    from .plan_switches import options
    from .plan_time import PEAK, REACHED, step_seconds
    from .world import nodes_of_group

    config, gpus = plan.settings, plan.gpus
    share = share_of(config, gpus)
    nodes = nodes_of_group(share.world, [plan.per_node])
    machine = read_constants(plan.constants) if plan.constants else H200
    model = sizes_of(build_meta(config))
    moment, items = worst_moment(model, config, gpus)
    needed, available = sum(items.values()) + OVERHEAD, plan.memory * GIB
    seconds, exchange = step_seconds(model, config, gpus, nodes, machine)
    sets = options(model, config, gpus, available)
    offloaded = model.layers * share.tokens * element(config) * model.width
    return {
        "gpus": gpus,
        "cp_size": share.world,
        "seq_len": config.seq_len,
        "tokens_per_rank": share.tokens,
        "parameters": model.whole.count,
        "trained": model.whole.trained,
        "moment": moment,
        "memory": items,
        "overhead": OVERHEAD,
        "needed": needed,
        "available": available,
        "fits": needed <= available,
        "host_memory": offloaded if config.offload else 0,
        "seconds": seconds,
        "step_seconds": sum(seconds.values()),
        "exchange": exchange,
        "chosen": next((each.switches for each in sets if each.fits), None),
        "options": [asdict(each) for each in sets],
        "assumed": [
            f"{OVERHEAD / GIB:g} GiB of a GPU beside tensors",
            f"{REACHED:.0%} of {PEAK[config.dtype] / 1e12:g} TFLOP/s for weights",
            f"attention as on {machine.source}",
            "one document of the whole length, work even over ranks",
        ],
    }


if __name__ == "__main__":
    main()
