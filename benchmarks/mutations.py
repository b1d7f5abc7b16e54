"""Do the tests notice wrong code? Applies small, wrong edits to the library and runs the fast tests on each.

    python benchmarks/mutations.py [--json] [--only NAME] [--random N] [--seed S] [--jobs J]

Listed mutations (mutation_list*.py) are the mistakes that implementations of this kind make; kill_rate is
the share of them that some test notices. Others are drawn over the syntax trees, with a printed seed: such
an edit may change nothing that matters, so kill_rate_random is only reported. Every run first shows that
its verdicts mean something: the mapped tests pass on an unchanged copy, and a copy that cannot be imported
is noticed. A run without --only writes results/mutations.json.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

HERE = Path(__file__).resolve().parent
os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
os.environ["OMP_NUM_THREADS"] = "1"  # one core a trial; and a process with threads must not fork
os.environ["PYTHONSAFEPATH"] = "1"  # in processes that tests start

sys.path.insert(0, str(HERE))
from mutation_list import LISTED  # noqa: E402
from mutation_random import draw  # noqa: E402
from mutation_run import FLOORS, ROOT, Trial, Verdict, run, snapshot  # noqa: E402
from mutation_tests import files_of, tests_of  # noqa: E402

# transformers would take this repository's folder kernels/, or our kernels.py, for a package of its own.
sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() not in (HERE, ROOT)]

TARGET = 0.95
RESULT = HERE / "results" / "mutations.json"
SENTINEL = 'raise RuntimeError("this mutant cannot be imported")\n'
WORKERS = "Distributed.exchange = None\n"  # called in processes that tests start only


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object; progress goes to stderr")
    parser.add_argument("--only", default="", metavar="NAME", help="listed ones whose name or file has it")
    parser.add_argument("--random", type=int, default=10, metavar="N", help="mutations to draw (10)")
    parser.add_argument("--seed", type=int, default=None, help="of the draw; another each run")
    parser.add_argument("--jobs", type=int, default=2, help="trials at a time (2)")
    options = parser.parse_args()
    seed = random.SystemRandom().randrange(2**31) if options.seed is None else options.seed
    began = time.monotonic()
    preload()
    with tempfile.TemporaryDirectory(prefix="sparring-") as folder:
        library, versions = snapshot(Path(folder)), find_versions()
        listed = [m for m in LISTED if options.only in m.name or options.only in m.file]
        trials = [
            Trial(m.name, {m.file: m.apply((library / m.file).read_text(encoding="utf-8"))}, m.tests)
            for m in listed
        ]
        drawn = draw(library, files_of(library), 0 if options.only else options.random, seed)
        trials += [Trial(m.name, {m.file: m.text}, tests_of(m.file)) for m in drawn]
        say(f"{len(listed)} listed mutations, {len(drawn)} drawn with --seed {seed}")
        usual = check_machinery(trials, library, options.jobs)
        limited = [Trial(t.name, t.changes, t.tests, 20 + 5 * usual[t.tests]) for t in trials]
        verdicts = {}
        for trial, verdict in run(limited, library, options.jobs):
            verdicts[trial.name] = verdict
            if not verdict.imported and trial.name in {m.name for m in listed}:
                raise SystemExit(f"{trial.name}: the tests did not import it\n{verdict.output}")
            say(line(len(verdicts), len(trials), trial, verdict))
    result = summary(listed, drawn, verdicts) | versions
    result |= {"seed": seed, "jobs": options.jobs, "seconds": round(time.monotonic() - began)}
    if not options.only:
        RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result) if options.json else describe(result))
    sys.exit(result["kill_rate"] < TARGET)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def preload() -> None:
    """Imports what all tests need and no test changes, once for all forks."""
    for name in (
        "hypothesis", "matplotlib", "rich.progress", "safetensors.torch", "torch.distributed.fsdp",
        "torch.distributed.tensor", "transformers.models.llama.modeling_llama",
        "transformers.models.qwen2.modeling_qwen2", "triton.experimental.gluon", "tyro",
    ):  # fmt: skip
        __import__(name)
    if any(name.split(".")[0] == "sparring" for name in sys.modules):
        raise SystemExit("sparring was imported before the first fork; trials would not see their mutants")


def check_machinery(trials: list[Trial], library: Path, jobs: int) -> dict[str, float]:
    """Seconds that each selection of tests takes on the unchanged library, where all of them must pass.

    Also, one module of each floor that cannot be imported must be noticed, and one that fails in processes
    that tests start.
    """
    selections = list(dict.fromkeys(trial.tests for trial in trials))
    green = [Trial("unchanged", {}, tests) for tests in selections]
    broken = []
    for floor in FLOORS:
        file = next((f for t in trials for f in t.changes if f.startswith(floor + "/")), None)
        if file is not None:
            tests = next(t.tests for t in trials if file in t.changes)
            broken.append(Trial("sentinel", {file: SENTINEL}, tests))
    worse = (library / "cp/transport.py").read_text(encoding="utf-8") + WORKERS
    broken.append(Trial("sentinel", {"cp/transport.py": worse}, tests_of("cp/mesh.py")))
    seconds, wrong = {}, []
    for trial, verdict in run([*green, *broken], library, jobs):
        good = verdict.outcome == ("failure" if trial.changes else "survived") and verdict.imported
        if not good:
            what = f"{trial.name} {' '.join(trial.changes)}: {verdict.outcome} {verdict.test}"
            wrong.append(f"{verdict.output}\n{what}, of pytest {trial.tests}")
        if not trial.changes:
            seconds[trial.tests] = verdict.seconds
    if wrong:
        raise SystemExit("\n".join(wrong))
    total = sum(seconds.values())
    say(f"machinery: {len(green)} selections of tests pass unchanged ({total:.0f} s), sentinels are noticed")
    return seconds


def line(number: int, total: int, trial: Trial, verdict: Verdict) -> str:
    outcome = f"killed ({verdict.outcome})" if verdict.killed else "SURVIVED"
    return f"{number:>3}/{total} {verdict.seconds:5.1f} s  {outcome:<18} {trial.name}  {verdict.test}"


def summary(listed, drawn, verdicts: dict[str, Verdict]) -> dict:
    """Rates, counts by way of the kill, survivors, and every mutation with its verdict."""
    kinds = {m.name: "listed" for m in listed} | {m.name: "random" for m in drawn}
    explained = {m.name: m.why for m in listed}
    differences = {m.name: m.diff for m in drawn}

    def rate(kind: str) -> float | None:
        killed = [verdicts[name].killed for name in kinds if kinds[name] == kind]
        return round(sum(killed) / len(killed), 4) if killed else None

    rows, survivors = [], []
    for name, kind in kinds.items():
        verdict = verdicts[name]
        row = {k: v for k, v in asdict(verdict).items() if k in ("outcome", "test")}
        rows.append({"name": name, "kind": kind, **row, "seconds": round(verdict.seconds, 1)})
        if not verdict.killed:
            why = explained.get(name) or differences.get(name, "")
            unseen = "" if verdict.imported else "\nits tests do not import the file"
            survivors.append({"name": name, "kind": kind, "explanation": why + unseen})
    outcomes = [verdict.outcome for verdict in verdicts.values()]
    return {
        "kill_rate": rate("listed") or 0.0,
        "kill_rate_random": rate("random"),
        "listed": len(listed),
        "random": len(drawn),
        "outcomes": {name: outcomes.count(name) for name in sorted(set(outcomes))},
        "survivors": survivors,
        "mutations": rows,
    }


def find_versions() -> dict[str, str]:
    import torch

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "--", *FLOORS, "tests")
    commit = git("rev-parse", "--short", "HEAD") + ("+changes" if changed else "")
    return {"commit": commit, "torch": torch.__version__}


def describe(result: dict) -> str:
    lines = []
    for survivor in result["survivors"]:
        lines += [f"survived ({survivor['kind']}): {survivor['name']}", survivor["explanation"]]
    by = ", ".join(f"{count} {outcome}" for outcome, count in result["outcomes"].items())
    lines += [
        f"{result['listed']} listed, {result['random']} random: {by}; {result['seconds']} s with "
        f"{result['jobs']} jobs, seed {result['seed']}, commit {result['commit']}",
        f"kill_rate {result['kill_rate']}",
        f"kill_rate_random {result['kill_rate_random']}",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
