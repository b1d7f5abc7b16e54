"""Small training jobs as users start them: their command lines, their traces, and ranks that are killed."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from launched import MARK

from sparring.launch.config import TrainConfig
from sparring.launch.metrics import read_metrics
from sparring.launch.start import Launcher

HERE = Path(__file__).parent
LIMIT = 280.0  # seconds; then a job, and nothing else, is killed
SMALL = {
    "device": "cpu", "seq_len": 256, "block_size": 32, "width": 32, "heads": 2, "kv_heads": 1, "head_dim": 16,
    "mlp": 32, "steps": 20, "warmup": 1, "save_every": 0, "compare": False, "timeout": 60.0,
}  # fmt: skip
SPARRING = ("-c", "from sparring.launch.cli import main; main()", "train")


def config_of(folder: Path, name: str, **changes) -> TrainConfig:
    """Settings of a job that writes into folder/name and reads folder/text, made here."""
    text = folder / "text"
    text.write_text("".join(f"line {i} of {i * i}\n" for i in range(1000)))
    return TrainConfig(**{"out": str(folder / name), "data": str(text), **SMALL, **changes})


def words_of(settings: dict) -> list[str]:
    """Settings as words of a command line."""
    words = []
    for name, value in settings.items():
        option = name.replace("_", "-")
        words += [f"--{option}" if value else f"--no-{option}"] if isinstance(value, bool) else []
        words += [f"--{option}", str(value)] if not isinstance(value, bool) else []
    return words


def command(config: TrainConfig, file: Path, replayed: bool = False, **launcher) -> list[str]:
    """A job under torchrun whose settings are in `file`: `sparring train`, or tests/replayed.py."""
    if not replayed:
        return [sys.executable, *SPARRING, "--config", str(file), *words_of(launcher)]
    torchrun = [sys.executable, "-m", "torch.distributed.run", *Launcher(**launcher).torchrun(gpus=0)]
    return [*torchrun, str(HERE / "replayed.py"), "--config", str(file)]


def trace(out: str | Path) -> list[list]:
    """What must be the same, bit for bit, in two runs of the same settings on as many ranks."""
    rows = read_metrics(Path(out) / "metrics.jsonl", "train")
    return [[row[n] for n in ("step", "loss", "grad_norm", "lr", "density", "layout")] for row in rows]


def losses(out: str | Path) -> list[float]:
    return [row["loss"] for row in read_metrics(Path(out) / "metrics.jsonl", "train")]


def marked(mark: str, having: Callable[[bytes, bytes], bool] = lambda *_: True) -> list[int]:
    """Processes with this mark in their environment whose (environment, command line) is as wanted."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and f"{MARK}={mark}".encode() in (
                seen := (entry / "environ").read_bytes()
            ):
                if having(seen, (entry / "cmdline").read_bytes()):
                    found.append(int(entry.name))
    return sorted(found)


@dataclass(frozen=True)
class Started:
    """A job, and the file that has what it prints."""

    process: subprocess.Popen
    said: Path


def begin(words: list[str], folder: Path, mark: str, **environment: str) -> Started:
    """A job in a session of its own."""
    given = {MARK: mark, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment}
    said = folder / f"{uuid.uuid4().hex}.log"
    with open(said, "wb") as out:
        output = {"stdin": subprocess.DEVNULL, "stdout": out, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(
            words, cwd=folder, env=os.environ | given, start_new_session=True, **output
        )
    return Started(process, said)


def finish(jobs: list[Started], mark: str, watch: Callable[[], None] = lambda: None) -> list[str]:
    """What jobs printed, which must succeed and leave no process. watch() is called until they end."""
    limit = time.monotonic() + LIMIT
    try:
        while any(job.process.poll() is None for job in jobs) and time.monotonic() < limit:
            watch()
            time.sleep(0.005)
    finally:
        ended = [job.process.poll() for job in jobs]
        left = marked(mark) if None not in ended else []
        for pid in marked(mark):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        said = [job.said.read_text(errors="replace") for job in jobs if job.process.wait() is not None]
    assert ended == [0] * len(jobs), "\n".join(said)[-5000:]
    assert left == []
    return said


class Killer:
    """Kills one of the ranks as soon as the job has taken so many steps, for each number of `steps`.

    ranks: the processes of all ranks. pick: which of them, as each number comes.
    """

    def __init__(self, out: str | Path, steps: list[int], ranks: Callable[[], list[int]], pick: list[int]):
        self.metrics, self.ranks = Path(out) / "metrics.jsonl", ranks
        self.left, self.dying, self.killed = list(zip(steps, pick, strict=True)), set(), 0

    def __call__(self) -> None:
        if not self.left or not self.metrics.exists():
            return
        if len(list(read_metrics(self.metrics, "train"))) < self.left[0][0]:
            return
        alive = self.ranks()
        if not alive or self.dying & set(alive):
            return
        _, pick = self.left.pop(0)
        with contextlib.suppress(ProcessLookupError):
            os.kill(alive[pick % len(alive)], signal.SIGKILL)
            self.killed += 1
        self.dying = set(alive)
