"""`sparring doctor`: what this machine has, whether it works, and what to do if not.

With --json it prints one object and nothing else:

    {"verdict": "ok" | "warn" | "fail",
     "findings": [{"name": ..., "status": "ok" | "warn" | "fail", "detail": ..., "remedy": ...}, ...],
     "bandwidth": [{"what": "ring hop" | "all-to-all", "bytes": ..., "gigabytes_per_second": ...}, ...]}

Names are stable: version.*, extra.*, machine.*, gpu.*, kernel.<device>.<impl>.<dtype>, auto.impl.<dtype> and
group.*. A check that cannot be made fails. Exit code 1 if anything fails.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict

import torch

from .doctor_devices import check_devices
from .doctor_finding import Finding, Rate, made, worst
from .doctor_group import check_group
from .doctor_machine import check_machine
from .doctor_show import show
from .doctor_versions import check_versions


def main(arguments: Sequence[str] | None = None) -> None:
    """`sparring doctor [OPTIONS]`."""
    parser = argparse.ArgumentParser(
        "sparring doctor", description="What works on this machine, what does not."
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument(
        "--nproc-per-node", type=_positive(int), help="processes to start; default: its GPUs, 2 without"
    )
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: GPUs where there are any"
    )
    parser.add_argument(
        "--timeout", type=_positive(float), default=60.0, help="seconds for each check of the processes"
    )
    options = parser.parse_args(arguments)
    gpus = 0 if options.device == "cpu" else torch.cuda.device_count()
    device = "cuda" if gpus or options.device == "cuda" else "cpu"
    findings, rates = examine(device, options.nproc_per_node or gpus or 2, options.timeout)
    if options.json:
        bandwidth = [asdict(rate) for rate in rates]
        found = {"findings": [asdict(finding) for finding in findings], "bandwidth": bandwidth}
        print(json.dumps({"verdict": worst(findings)} | found))
    else:
        show(findings, rates)
    if worst(findings) == "fail":
        raise SystemExit(1)


def _positive(kind: type[int] | type[float]) -> Callable[[str], float]:
    def read(text: str) -> float:
        if not 0 < (value := kind(text)) < float("inf"):
            raise ValueError(text)
        return value

    read.__name__ = f"{kind.__name__} above 0"  # what argparse says was expected
    return read


def examine(device: str, processes: int, limit: float) -> tuple[list[Finding], list[Rate]]:
    """All checks on "cpu" or "cuda"; see `check_group` for the other arguments."""
    found = made("version", check_versions) + made("machine", check_machine)
    gpus = torch.cuda.device_count() if device == "cuda" else 0
    if device == "cuda" and processes > gpus:
        remedy = "install a driver and a CUDA build of torch, ask for fewer processes, or use --device cpu"
        detail = f"{processes} processes need a GPU each, {gpus} here"
        return [*found, Finding("gpu.count", "fail", detail, remedy)], []
    _say("devices and kernels, for which compilers may take minutes")
    found += made("device", check_devices, [f"cuda:{index}" for index in range(gpus)] or ["cpu"])
    _say(f"{processes} processes that exchange messages")
    rates: list[Rate] = []

    def group() -> list[Finding]:
        findings, measured = check_group(processes, device, limit)
        rates.extend(measured)
        return findings

    return found + made("group", group), rates


def _say(what: str) -> None:
    """To a person who waits."""
    if sys.stderr.isatty():
        print(f"checking {what}", file=sys.stderr)


if __name__ == "__main__":
    main()
