"""The console script: `sparring COMMAND ...` calls main of the module of that name, or of STARTED_BY."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

COMMANDS = {
    "train": "train a model on long text: starts its processes by torchrun or Ray",
    "plan": "predict memory and step time of a training, and the switches that it needs",
    "report": "draw the report of a run again, or compare several",
    "export": "write a checkpoint as a folder that transformers or peft loads",
    "doctor": "check this machine: versions, devices, links, kernels, and what to do",
}
STARTED_BY = {"train": "start"}  # which itself starts the module of the command, once for each rank


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the console script."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments and arguments[0] in COMMANDS:
        leave_checkout()
        module = STARTED_BY.get(arguments[0], arguments[0])
        importlib.import_module(f".{module}", __package__).main(arguments[1:])
        return
    lines = [f"  {name:<8} {text}" for name, text in COMMANDS.items()]
    usage = "\n".join(["usage: sparring COMMAND [OPTIONS]", "", *lines])
    if arguments[:1] in (["-h"], ["--help"]):
        print(usage)
        return
    raise SystemExit(f"unknown command {arguments[0]!r}\n\n{usage}" if arguments else usage)


def leave_checkout() -> None:
    """Take this checkout off `sys.path`, where `python -m` puts the working directory.

    transformers would take the checkout's folder `kernels` for the package of that name and import it.
    """
    checkout = Path(__file__).resolve().parents[1]
    sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != checkout]
