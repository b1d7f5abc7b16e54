"""Where the numbers of a run go besides metrics.jsonl, if asked: TensorBoard, wandb."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

NO_TRACKER = "none"


class Tracker(Protocol):
    """What is told numbers by name, as kind/name, of steps from 0."""

    def log(self, step: int, numbers: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in the folder "tensorboard" of the run; a run resumed at `start` hides its later steps."""

    def __init__(self, out: Path, settings: dict[str, Any], start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(out / "tensorboard"), purge_step=start or None)

    def log(self, step: int, numbers: dict[str, float]) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """A run of the project "sparring" of wandb, which sends it to its server unless WANDB_MODE says offline.

    A resumed job begins another run in the same group, the name of the folder.
    """

    def __init__(self, out: Path, settings: dict[str, Any], start: int) -> None:
        import wandb

        self._run = wandb.init(project="sparring", group=out.absolute().name, dir=str(out), config=settings)
        self._run.define_metric("*", step_metric="step")  # kinds of runs count their steps anew

    def log(self, step: int, numbers: dict[str, float]) -> None:
        self._run.log({"step": step, **numbers})

    def close(self) -> None:
        self._run.finish()


TRACKERS = {"tensorboard": TensorBoard, "wandb": Wandb}


def check_tracker(name: str) -> None:
    """ImportError if the package of the tracker is not installed."""
    if name != NO_TRACKER and find_spec(name) is None:
        raise ImportError(f"--tracker {name} needs the package {name}; pip install {name}")


def open_tracker(name: str, out: Path, settings: dict[str, Any], start: int) -> Tracker | None:
    """The tracker of this name, for the run in `out` with these settings; None for "none"."""
    return None if name == NO_TRACKER else TRACKERS[name](out, settings, start)
