"""The whole proof: every test, resumable, and what they show in a table and a digest.

    python benchmarks/proof.py [pytest options, e.g. -n 4]    # runs what has not passed at this commit
    python benchmarks/proof.py --digest                       # only prints the digest of the table

Finished tests are logged in .proof/COMMIT.csv, so that an interrupted run goes on where it stopped; a log
of another machine (pytest tests -m gpu --proof FILE) can be appended to it. A changed tree starts anew.
The table, one row a test function, is benchmarks/results/proof.csv; errors are in units of the largest value
of their tensor (at least 1).
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "tests"))

import proof_log  # noqa: E402
import tolerance  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
TABLE = RESULTS / "proof.csv"
COUNTS = ("cases", "passed", "failed", "skipped")
COLUMNS = ("test", *COUNTS, "reasons", "worlds", "seconds", *tolerance.TIERS, "machines", "commit", "date")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--digest", action="store_true", help="print the digest of the table, run nothing")
    options, arguments = parser.parse_known_args()
    status = 0 if options.digest else run(arguments)
    rows = []
    if TABLE.exists():
        with TABLE.open(newline="") as file:
            rows = list(csv.DictReader(file))
    if not rows:
        print(f"{TABLE} does not exist or has no rows; run `make test-full`")
        return status or 1
    print("\n".join(digest(rows)))
    return status


def run(arguments: list[str]) -> int:
    """Runs what has not passed at this commit; writes the table. pytest's exit status."""
    commit = git("rev-parse", "HEAD")[:12]
    changed = bool(git("status", "--porcelain", "--", ".", ":!benchmarks/results"))
    log = ROOT / ".proof" / f"{commit}{'+changes' * changed}.csv"
    log.parent.mkdir(exist_ok=True)
    if changed:
        log.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", str(ROOT / "tests"), "--proof", str(log), *arguments]
    status = subprocess.run(command, cwd=ROOT).returncode
    status = 0 if status == 5 else status  # 5: nothing was left to run
    if status in (0, 1):
        write(list(proof_log.read(log).values()), log.stem)
    else:
        print(f"interrupted; {TABLE.name} is as before, run this again to go on")
    return status


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def write(lines: list[dict], commit: str) -> None:
    """The table of a log."""
    groups: dict[str, list[dict]] = {}
    for line in lines:
        groups.setdefault(line["test"].partition("[")[0], []).append(line)
    with TABLE.open("w", newline="") as file:
        table = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        table.writeheader()
        for test, group in sorted(groups.items()):
            table.writerow({"test": test, **summary(group), "commit": commit, "date": datetime.date.today()})


def summary(lines: list[dict]) -> dict:
    """What the cases of one test function say together."""
    outcomes = Counter(line["outcome"] for line in lines)
    errors = [json.loads(line["errors"]) for line in lines]
    largest = {tier: max((e[tier] for e in errors if tier in e), default=None) for tier in tolerance.TIERS}
    return {
        "cases": len(lines),
        **{outcome: outcomes[outcome] for outcome in COUNTS[1:]},
        "reasons": "; ".join(sorted({line["reason"] for line in lines} - {""})),
        "worlds": " ".join(map(str, sorted({int(line["world"]) for line in lines if line["world"]}))),
        "seconds": f"{sum(float(line['seconds']) for line in lines):.1f}",
        **{tier: f"{error:.1e}" for tier, error in largest.items() if error is not None},
        "machines": " + ".join(sorted({line["machine"] for line in lines if line["outcome"] != "skipped"})),
    }


def digest(rows: list[dict]) -> list[str]:
    """At most 8 lines for people."""

    def total(what: str, file: str = "") -> int:
        return sum(int(row[what]) for row in rows if row["test"].startswith(f"tests/{file}"))

    worlds = sorted({int(world) for row in rows for world in row["worlds"].split()})
    errors = {t: max((float(row[t]) for row in rows if row[t]), default=None) for t in tolerance.TIERS}
    machines = {machine for row in rows for machine in row["machines"].split(" + ") if machine}
    mutations = RESULTS / "mutations.json"
    killed = json.loads(mutations.read_text()) if mutations.exists() else {}
    return [
        f"proof at {rows[0]['commit']} ({rows[0]['date']}) on {' and '.join(sorted(machines))}",
        f"cases: {total('cases')}, {', '.join(f'{total(x)} {x}' for x in COUNTS[1:])}",
        f"world sizes: {', '.join(map(str, worlds))}",
        f"faults injected: {total('passed', 'test_fault')}; bad inputs: {total('passed', 'test_bad_')}",
        f"mutations killed: {killed.get('kill_rate', 'not run')} of the listed, "
        f"{killed.get('kill_rate_random', 'not run')} of the drawn",
        "largest error: " + ", ".join(f"{tier} {x:.1e}" for tier, x in errors.items() if x is not None),
    ]


if __name__ == "__main__":
    sys.exit(main())
