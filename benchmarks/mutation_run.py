"""Runs fast tests against changed copies of the library, each in a forked process with a time limit.

This process has imported torch, transformers, pytest and triton, but not sparring. A fork puts a copy of
the library first on the path, where it shadows the installed one, and runs pytest.
"""

from __future__ import annotations

import compileall
import json
import os
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = ("kernels", "balance", "cp", "launch")
PATIENCE = 300.0  # seconds of a trial whose usual time is not known


@dataclass(frozen=True)
class Trial:
    """Tests to run with some files of the library, such as "cp/loss.py", replaced by other text."""

    name: str
    changes: dict[str, str]
    tests: str
    limit: float = PATIENCE


@dataclass(frozen=True)
class Verdict:
    """outcome: "survived" (all tests passed), "failure", "crash", "timeout", or "no tests" were selected.

    test: the first test that failed. imported: whether every changed file was the one that ran.
    """

    outcome: str
    test: str
    seconds: float
    imported: bool
    output: str

    @property
    def killed(self) -> bool:
        return self.outcome in ("failure", "crash", "timeout")


@dataclass
class _Running:
    trial: Trial
    folder: Path
    started: float
    late: bool = False


def snapshot(target: Path) -> Path:
    """A copy of the library as target/sparring, which is returned, and of its tests: edits do not disturb."""
    compiled = shutil.ignore_patterns("__pycache__")
    for floor in FLOORS:
        shutil.copytree(ROOT / floor, target / "sparring" / floor, ignore=compiled)
    shutil.copytree(ROOT / "tests", target / "tests", ignore=compiled)
    shutil.copy(ROOT / "pyproject.toml", target)
    compileall.compile_dir(target / "sparring", quiet=1)
    return target / "sparring"


def run(trials: Iterable[Trial], library: Path, jobs: int) -> Iterator[tuple[Trial, Verdict]]:
    """Runs trials on copies of `library`, `jobs` at a time; yields each when it ends.

    library: from `snapshot`; its tests lie beside it.
    """
    waiting, running = list(trials)[::-1], {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                trial = waiting.pop()
                folder = Path(tempfile.mkdtemp(prefix="mutant-"))
                _build(trial, library, folder)
                running[_fork(trial, folder, library.parent)] = _Running(trial, folder, time.monotonic())
            time.sleep(0.02)
            for pid in list(running):
                job = running[pid]
                if time.monotonic() - job.started > job.trial.limit and not job.late:
                    job.late = True
                    _kill(pid)
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    del running[pid]
                    _kill(pid)  # whatever it started
                    yield job.trial, _verdict(job, status)
                    shutil.rmtree(job.folder, ignore_errors=True)
    finally:
        for pid, job in running.items():
            _kill(pid)
            os.waitpid(pid, 0)
            shutil.rmtree(job.folder, ignore_errors=True)


def _build(trial: Trial, library: Path, folder: Path) -> None:
    shutil.copytree(library, folder / "sparring")
    for name, text in trial.changes.items():
        (folder / "sparring" / name).write_text(text, encoding="utf-8")


def _kill(group: int) -> None:
    """Ends a trial's process group; workers in sessions of their own end when their pipes close."""
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        pass


def _fork(trial: Trial, folder: Path, root: Path) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        os.setpgid(pid, pid)  # here too, so that it can be killed at once
        return pid
    status = 1
    try:
        status = _child(trial, folder, root)
    finally:
        os._exit(status)


class _Recorder:
    """A pytest plugin: what failed, and how many tests ran."""

    def __init__(self):
        self.failed: list[str] = []
        self.ran = 0

    def pytest_collectreport(self, report):
        if report.failed:
            self.failed.append(report.nodeid or "collection")

    def pytest_runtest_logreport(self, report):
        self.ran += report.when == "call" and not report.skipped
        if report.failed:
            self.failed.append(report.nodeid)


def _child(trial: Trial, folder: Path, root: Path) -> int:
    os.setpgid(0, 0)
    output = os.open(folder / "output", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.path.insert(0, str(folder))
    os.environ["PYTHONPATH"] = str(folder)  # for processes that tests start,
    sys.modules["__main__"] = ModuleType("__main__")  # which must not import this program
    os.chdir(folder)
    words = shlex.split(trial.tests)
    words = [str(root / "tests" / word) if word.split("::")[0].endswith(".py") else word for word in words]
    options = (
        f"-p no:cacheprovider -x -q --draw=0 --hypothesis-seed=0 -c {root}/pyproject.toml --rootdir {root}"
    )
    if "-m" not in words:
        words += ["-m", "not full"]
    recorder = _Recorder()
    code = int(pytest.main([*options.split(), *words], plugins=[recorder]))
    loaded = {str(getattr(module, "__file__", "")) for module in list(sys.modules.values())}
    result = {
        "code": code,
        "ran": recorder.ran,
        "failed": recorder.failed[:1],
        "imported": all(str(folder / "sparring" / name) in loaded for name in trial.changes),
        "foreign": any(path.startswith(str(ROOT / floor) + "/") for path in loaded for floor in FLOORS),
    }
    (folder / "result").write_text(json.dumps(result), encoding="utf-8")
    return 0


def _verdict(job: _Running, status: int) -> Verdict:
    seconds = time.monotonic() - job.started
    output, path = (job.folder / "output").read_text(errors="replace"), job.folder / "result"
    if job.late:
        return Verdict("timeout", f"limit of {job.trial.limit:.0f} s", seconds, True, output)
    if not path.exists():
        code = os.waitstatus_to_exitcode(status)
        return Verdict("crash", f"exit code {code}", seconds, True, output)
    result = json.loads(path.read_text(encoding="utf-8"))
    imported = result["imported"] and not result["foreign"]
    if result["failed"] or result["code"] not in (0, 5):
        test = (result["failed"] or ["collection"])[0].removeprefix("tests/")
        return Verdict("failure", test, seconds, not result["foreign"], output)
    return Verdict("survived" if result["ran"] else "no tests", "", seconds, imported, output)
