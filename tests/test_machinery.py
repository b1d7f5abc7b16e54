"""The machinery of these tests: skips come from one table, samples cover and repeat, comparisons notice."""

from __future__ import annotations

import ast
import importlib.util
import itertools
import json
import os
import platform
import re
import subprocess
import sys
import threading
from importlib.metadata import version
from pathlib import Path

import machine
import poison
import proof_log
import pytest
import sampling
import tolerance
import torch

HERE = Path(__file__).parent
SKIPS = {"skip", "skipif", "importorskip", "xfail", "skipUnless", "skipIf", "SkipTest"}


def test_every_skip_comes_from_the_table():
    found = []
    for path in sorted(HERE.glob("**/*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            name = node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", None)
            if name in SKIPS:
                found.append((path.name, name))
    assert found == [("conftest.py", "skip")]


def test_the_table_knows_its_names_and_reasons():
    assert len({need.name for need in machine.TABLE}) == len(machine.TABLE)
    with pytest.raises(ValueError, match=r"\['tpu'\].*'two gpus'"):
        machine.needs("gpu", "tpu")
    for need in machine.TABLE:
        assert machine.lacks(need.name) in (None, need.otherwise)


def test_supported_versions_are_those_of_the_readme_and_of_this_machine():
    supported = machine.supported()
    line = next(x for x in (HERE.parent / "README.md").read_text().splitlines() if x.startswith("| versions"))
    promised = {name.lower(): oldest for name, oldest in re.findall(r"(\w+) >= ([\d.]+)", line)}
    assert set(promised) == {"python", "torch", "triton", "transformers"}
    for name, oldest in promised.items():
        assert supported[name] == oldest, name
        if name in ("python", "torch", "transformers") or machine.lacks(name) is None:
            have = platform.python_version() if name == "python" else version(name)
            assert _numbers(have) >= _numbers(oldest), f"{name} {have} is older than {oldest}"


def _numbers(text: str) -> list[int]:
    return [int(x) for x in re.match(r"[\d.]*\d", text)[0].split(".")]


@pytest.mark.parametrize("sizes", [[21, 3, 7, 4, 4, 3], [2, 2], [3, 1, 4], [5, 4, 4, 4, 3]])
def test_the_fixed_sample_covers_every_pair_and_is_small(sizes):
    sample = sampling.covering(sizes)
    for i, j in itertools.combinations(range(len(sizes)), 2):
        pairs = set(itertools.product(range(sizes[i]), range(sizes[j])))
        assert {(case[i], case[j]) for case in sample} == pairs
    first, second = sorted(sizes)[-2:]
    assert len(sample) <= 2 * first * second


def test_the_drawn_sample_changes_with_the_seed_and_repeats(monkeypatch):
    def sample(seed):
        monkeypatch.setattr(sampling, "seed", seed)
        params = sampling.pairwise(list(range(9)), list("abcd"), [None, True])
        assert len(params) == 72
        return {param.values for param in params if not param.marks}

    first, fixed = sample(1), sample(1) & sample(2) & sample(3)
    assert first == sample(1) != sample(2)
    assert len(first) - len(fixed) == max(1, len(fixed) // 10) == 3


def test_comparisons_notice_what_they_must():
    one, infinite = torch.ones(3), torch.tensor([1.0, -torch.inf, 2.0])
    tolerance.drain()
    tolerance.check("fp64", "same", infinite, infinite, 0.0)
    tolerance.check("fp32", "near", one + 1e-6, one, 2e-6)
    tolerance.check(
        "fp32", "rows", torch.tensor([[1.0], [5.0]]), torch.ones(2, 1), torch.tensor([[0.0], [4.0]])
    )
    assert tolerance.drain() == {"fp64": 0.0, "fp32": 4.0} and tolerance.drain() == {}
    for actual in (one * torch.nan, infinite, -infinite, one + 1):
        with pytest.raises(AssertionError, match="x: "):
            tolerance.check("fp32", "x", actual, one, 0.5)
    with pytest.raises(
        AssertionError, match=r"1 of 3 values are wrong; the worst at \(1,\) is 1.0, not -inf"
    ):
        tolerance.check("fp32", "x", one, torch.tensor([1.0, -torch.inf, 1.0]), 0.5)
    with pytest.raises(AssertionError, match="expected values have NaN"):
        tolerance.check("fp32", "x", one, one * torch.nan, 0.5)
    with pytest.raises(AssertionError, match=r"\(2,\), not \(3,\)"):
        tolerance.check("fp32", "x", one[:2], one, 0.5)
    with pytest.raises(ValueError, match="'fp8' is unknown; use one of fp64"):
        tolerance.check("fp8", "x", one, one, 0.0)
    tolerance.drain()


def test_the_bound_of_low_precision_is_twice_its_error_and_a_rounding_band():
    exact = torch.tensor([[[[1.0, 4.0], [0.0, 0.5]]]], dtype=torch.float64)
    low = exact + torch.tensor([[[[0.0, 0.25], [0.125, 0.0]]]])
    bound = tolerance.rounding(low, exact, torch.bfloat16)
    assert torch.equal(bound, torch.tensor([[[[0.5 + 4 / 128], [0.5 + 0.5 / 128]]]], dtype=torch.float64))


def test_poisoned_memory_is_nan_in_all_threads(poisoned):
    made = []

    def make():
        x = torch.ones(2, dtype=torch.bfloat16)
        made.extend(
            [torch.empty(2), torch.empty_like(x), x.new_empty(3), torch.empty_strided((2, 2), (2, 1))]
        )

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    assert len(made) == len(poison.MAKERS) and all(x.isnan().all() for x in made)
    assert (torch.empty(2, dtype=torch.int8) == 127).all()


CASES = """
import machine, pytest, tolerance, torch

@pytest.mark.parametrize("world", [1, 4])
def test_good(world):
    tolerance.check("fp64", "x", torch.tensor([2.0 + world / 8]), torch.tensor([2.0]), 1.0)

def test_bad():
    assert {right}, "why not"

@machine.needs("never there")
def test_elsewhere():
    pass
"""
NEVER = """
import machine
machine._BY_NAME["never there"] = machine.Need("never there", lambda: False, "not on this machine")
"""


def test_a_proof_is_resumed_and_tells_what_it_saw(tmp_path):
    """What passed is not run again, what failed is; the table and the digest count cases, not runs."""
    log = tmp_path / "log.csv"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "conftest",
        "-p",
        "never",
        "--proof",
        str(log),
        "-q",
        ".",
    ]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE), str(tmp_path)])}
    (tmp_path / "never.py").write_text(NEVER)

    def run(right):
        (tmp_path / "test_cases.py").write_text(CASES.replace("{right}", str(right)))
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=90
        )
        rows = proof_log.read(log)
        return done.stdout, {test.partition("::")[2]: row["outcome"] for test, row in rows.items()}

    passed = {"test_good[1]": "passed", "test_good[4]": "passed", "test_elsewhere": "skipped"}
    text, outcomes = run(False)
    assert "1 failed, 2 passed, 1 skipped" in text
    assert outcomes == passed | {"test_bad": "failed"}
    row = proof_log.read(log)["test_cases.py::test_bad"]
    assert row["reason"] == "AssertionError: why not" and "torch" in row["machine"]
    text, outcomes = run(True)
    assert "1 passed, 1 skipped, 2 deselected" in text
    assert outcomes == passed | {"test_bad": "passed"}

    spec = importlib.util.spec_from_file_location("proof", HERE.parent / "benchmarks" / "proof.py")
    proof = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(proof)
    rows = list(proof_log.read(log).values())
    good = proof.summary([row for row in rows if "test_good" in row["test"]])
    assert (good["cases"], good["passed"], good["worlds"], good["fp64"]) == (2, 2, "1 4", "2.5e-01")
    assert proof.summary(rows)["reasons"] == "not on this machine"
    results = tmp_path / "results"
    results.mkdir()
    proof.TABLE, proof.RESULTS = results / "proof.csv", results
    (results / "mutations.json").write_text(json.dumps({"kill_rate": 0.97, "kill_rate_random": 0.8}))
    proof.write([row | {"test": f"tests/{row['test']}"} for row in rows], "abc")
    lines = proof.digest(list(proof.csv.DictReader(proof.TABLE.open())))
    assert len(lines) <= 8
    assert lines[1:3] == ["cases: 4, 3 passed, 0 failed, 1 skipped", "world sizes: 1, 4"]
    assert lines[4] == "mutations killed: 0.97 of the listed, 0.8 of the drawn"
    assert lines[5] == "largest error: fp64 2.5e-01"
