"""Jobs under torchrun that are expected to fail: what they said, when they ended, what they left behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

LIMIT = 150.0  # seconds; then the job, and nothing else, is killed
MARK = "SPARRING_TEST_JOB"  # in the environment of every process of a job


@dataclass(frozen=True)
class Job:
    """said: lines of JSON of all ranks. cause: the message of the launcher's error file.

    orphans: processes of the job that were alive after its end. leaked: files in /dev/shm that it left.
    """

    returncode: int | None
    began: float
    ended: float
    said: list[dict]
    stderr: str
    cause: dict
    orphans: list[int]
    leaked: set[str]
    interrupted: float | None

    @property
    def fault(self) -> dict:
        """What the rank said just before it failed."""
        return next(x for x in self.said if "fault" in x)

    @property
    def seconds_to_start(self) -> float:
        return (self.interrupted or max(x["time"] for x in self.said if "ready" in x)) - self.began

    @property
    def seconds_since_fault(self) -> float:
        return self.ended - (self.interrupted or self.fault["time"])


def launch(folder: Path, world: int, *options, target: str = "", interrupt: int | None = None) -> Job:
    """Runs tests/fault_worker.py, or the module `target`, on `world` ranks until it ends.

    world: 1 runs it without torchrun. interrupt: a signal for the job once it takes steps.
    """
    here, mark = Path(__file__).parent, uuid.uuid4().hex
    command = [sys.executable]
    if world > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    command += ["-m", target] if target else [str(here / "fault_worker.py")]
    paths = [str(here), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {
        MARK: mark, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1",
        "TORCHELASTIC_ERROR_FILE": str(folder / "cause.json"),
    }  # fmt: skip
    before, began = _shared_memory(), time.time()
    with open(folder / "stdout", "wb") as out, open(folder / "stderr", "wb") as err:
        job = subprocess.Popen(
            [*command, *map(str, options)], env=environment, cwd=folder, stdout=out, stderr=err,
            start_new_session=True,
        )  # fmt: skip
    pids, interrupted = set(), None
    try:
        limit = time.monotonic() + LIMIT
        while job.poll() is None and time.monotonic() < limit:
            pids |= _alive(mark)
            if interrupt and not interrupted and (folder / "stdout").read_text().count("loss") > 2:
                interrupted = time.time()
                os.kill(job.pid, interrupt)
            time.sleep(0.05)
        ended, returncode = time.time(), job.returncode
        time.sleep(0.2)
        orphans = sorted(_alive(mark))
    finally:
        for pid in _alive(mark):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        job.wait()
    lines = (folder / "stdout").read_text().splitlines()
    error = folder / "cause.json"
    return Job(
        returncode,
        began,
        ended,
        [json.loads(line) for line in lines if line.startswith("{")],
        (folder / "stderr").read_text(errors="replace"),
        json.loads(error.read_text())["message"] if error.exists() else {},
        orphans,
        {name for name in _shared_memory() - before if any(str(pid) in name for pid in pids)},
        interrupted,
    )


def _alive(mark: str) -> set[int]:
    """Processes with this mark in their environment, which zombies do not have."""
    found, wanted = set(), f"{MARK}={mark}".encode()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if wanted in (entry / "environ").read_bytes():
                    found.add(int(entry.name))
    return found


def _shared_memory() -> set[str]:
    return set(os.listdir("/dev/shm"))
