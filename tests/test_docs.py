"""What the documentation says can be done: its commands and code run, its names and messages exist."""

from __future__ import annotations

import ast
import builtins
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import machine
import pool
import pytest
import tiny_models
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import sparring.cp
import sparring.kernels
from sparring.cp import ContextParallel

ROOT = Path(__file__).resolve().parents[1]
PAGES = ["README.md", "cp/README.md", "benchmarks/README.md", "CONTRIBUTING.md", "SECURITY.md"]
FOLDERS = ("kernels", "kernels/patterns", "balance", "cp", "launch")
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).glob("*.py"))
TEXT = {page: (ROOT / page).read_text() for page in PAGES}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`]+)`")


def fences(text: str, python: bool) -> list[str]:
    return [body for language, body in FENCE.findall(text) if (language == "python") == python]


def snippets() -> list[str]:
    """Inline code and the lines of blocks, with a single space wherever there is white space."""
    found = []
    for text in TEXT.values():
        lines = [line.partition("  #")[0] for block in fences(text, False) for line in block.splitlines()]
        found += [" ".join(x.split()) for x in [*lines, *INLINE.findall(FENCE.sub("", text))]]
    return list(dict.fromkeys(found))


# -- commands -----------------------------------------------------------------------------------------

SMALL = "--device cpu --seq-len 256 --block-size 32 --steps 2 --warmup 0 --layers 1 --width 32 --heads 2 "
SMALL += "--kv-heads 1 --head-dim 16 --mlp 32 --no-compare --out OUT/run"
MINE = "sparring train --model DIR --data PATH --out runs/mine"  # makes what other commands go on from
# Each kind of command and what is added to it here: settings that it documents and that make it short.
# Words are filled in: OUT is an empty folder, DIR a model, PATH a text, runs/mine a run.
COMMANDS = {
    "make train": SMALL,
    "sparring train": SMALL,
    MINE: "--device cpu --seq-len 256 --block-size 32 --steps 2 --warmup 0 --no-compare --tokenizer bytes",
    "sparring train --config": "",
    "sparring export": "",
    "sparring report": "",
    "sparring plan": "",
    "sparring doctor": "--device cpu --nproc-per-node 1",
    "make test": "--collect-only -q",  # as a part of itself it must not run itself
    "make test-full": "",
    "make lint": "",
    "python benchmarks/balance.py": "--quick --out OUT",
    "python benchmarks/balance_groups.py": "--worlds 8 --out OUT/groups.csv",
    "python benchmarks/copy_task.py": "",  # with fewer steps it misses its bars
    "python benchmarks/estimates.py": "--lengths 8192 --heads 4 --kv-heads 2 --out OUT/estimates.csv",
    "python benchmarks/plans.py": "--lengths 8192 --out OUT/plans.csv",
    "python benchmarks/kernels.py": "--cases quick --impls hopper triton --out OUT/kernels.csv",
    "python benchmarks/train_long.py": "--out OUT/train_131072 --draw",
    "python benchmarks/proof.py": "--digest",
    "python benchmarks/simulate.py": "--worlds 8 16 --tokens 524288 --out OUT/simulate.csv",
    "python benchmarks/mutations.py": "--only merge --random 0",
    "torchrun --nproc-per-node 2 benchmarks/scaling.py": "--device cpu --tokens 1024 --heads 4 2 --dim 32 "
    "--patterns window:.3 --layouts zigzag --out OUT/scaling.csv",
}
DRY = {"make test-full"}  # writes the table of results, and runs this file: only looked at
NEEDS = {  # what a machine must have, in the words of machine.py
    "python benchmarks/estimates.py": "gpu",
    "python benchmarks/plans.py": "gpu",
    "python benchmarks/kernels.py": "hopper gpu",
    "python benchmarks/mutations.py": "numpy < 2.4",
    "make lint": "ruff",
}
PROGRAMS = ("make ", "python ", "python3 ", "torchrun ", "sparring ", "pip ", "ARGS=")


def documented() -> list[str]:
    """Every command on the pages; settings alone, ARGS="...", are those of the main job."""
    found = [x for x in snippets() if x.startswith(PROGRAMS)]
    return [f"make train {x}" if x.startswith("ARGS=") else x for x in found]


def kind_of(command: str) -> str | None:
    return max((kind for kind in COMMANDS if f"{command} ".startswith(f"{kind} ")), key=len, default=None)


def marks(command: str) -> list:
    """Every command starts processes that take their time: only `make test-full` runs them."""
    kind = kind_of(command)
    return [pytest.mark.full] + ([machine.needs(NEEDS[kind])] if kind in NEEDS else [])


def test_every_documented_command_is_of_a_kind_that_runs_here():
    """A new one needs an entry in COMMANDS."""
    assert len(documented()) > 5
    assert [command for command in documented() if kind_of(command) is None] == []


@pytest.mark.parametrize("command", [pytest.param(x, id=x, marks=marks(x)) for x in documented()])
def test_documented_commands_run(command, tmp_path):
    (tmp_path / "text.txt").write_text("It was a dark and stormy night. " * 1000)
    shutil.copytree(ROOT / "benchmarks/results/train_131072", tmp_path / "train_131072")
    tiny_models.build(LlamaForCausalLM, LlamaConfig, vocab_size=260).save_pretrained(tmp_path / "model")
    if "runs/mine" in command and command != MINE:
        run(MINE, tmp_path)
    run(command, tmp_path)


def run(command: str, folder: Path) -> None:
    """Runs it on what is in a folder, where it leaves what it makes."""
    kind = kind_of(command)
    places = {"PATH": "text.txt", "runs/mine": "mine", "OUT_DIR": "exported", "DIR": "model"}

    def filled(word: str) -> str:
        for name, place in places.items():
            word = re.sub(rf"(?<!\w){name}(?!\w)", str(folder / place), word)
        return word

    added = COMMANDS[kind].replace("OUT", str(folder)).split()
    words = [filled(word) for word in shlex.split(command)]
    if words[0] == "make":
        settings = [x.removeprefix("ARGS=").split() for x in words[2:]]
        arguments = " ".join([*sum(settings, []), *added])
        words = ["make", words[1], "VENV=", f"PYTHON={sys.executable}", f"ARGS={arguments}"]
        words += ["--dry-run"] if kind in DRY else []
    elif words[0] == "torchrun":
        words = [sys.executable, "-m", "torch.distributed.run", *words[1:], *added]
    elif words[0] == "sparring":
        words = [sys.executable, "-c", "from sparring.launch.cli import main; main()", *words[1:], *added]
    else:
        words = [sys.executable, *words[1:], *added]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


# -- python -------------------------------------------------------------------------------------------


def run_block(code: str) -> float:
    """Runs a block as a user would, on two CPU ranks; what it leaves to the reader is given here."""
    model = tiny_models.llama()
    given = {"dp": 1, "cp_size": 2, "model": model, "loader": [tiny_models.make_batch("packed")[0]] * 2}
    given["optimizer"] = torch.optim.SGD(model.parameters(), 1e-3)
    exec(compile(code.replace('"cuda"', '"cpu"'), "README.md", "exec"), given)
    return float(given["loss"])


BLOCKS = [(page, block) for page in PAGES for block in fences(TEXT[page], True)]


@pytest.mark.parametrize("block", [pytest.param(x, id=page) for page, x in BLOCKS])
def test_python_blocks_run(block):
    losses = pool.run(2, run_block, block)
    assert losses[0] == losses[1] > 0


def test_there_is_a_python_block():
    assert [page for page, _ in BLOCKS] == ["README.md"]


@pytest.mark.parametrize(
    "line", [x for x in snippets() if x.startswith(("from sparring", "import sparring"))]
)
def test_import_lines_run(line):
    exec(line, {})


def test_methods_that_the_pages_name_exist():
    names = {name for x in snippets() for name in re.findall(r"\bcp\.(\w+)\(", x)}
    names |= {name for _, block in BLOCKS for name in re.findall(r"\bcp\.(\w+)\(", block)}
    assert len(names) > 4
    assert [name for name in names if not hasattr(ContextParallel, name)] == []


# -- errors and the environment -----------------------------------------------------------------------

TREES = {path: ast.parse(path.read_text()) for path in SOURCES}
NODES = [(path, node) for path, tree in TREES.items() for node in ast.walk(tree)]
ROWS = re.findall(r"^\| (`\w*Error`.*?) \|", TEXT["cp/README.md"], re.MULTILINE)
NOT_FOR_USERS = {"AssertionError", "SystemExit"}  # our own invariants; how a command ends


def raised() -> set[str]:
    """Names of the exceptions that some `raise` of the library makes, and of those that it defines."""
    calls = [n.exc.func for _, n in NODES if isinstance(n, ast.Raise) and isinstance(n.exc, ast.Call)]
    names = {call.id for call in calls if isinstance(call, ast.Name)}
    own = {n.name for _, n in NODES if isinstance(n, ast.ClassDef) and n.name.endswith("Error")}
    kinds = {n for n in names if isinstance(getattr(builtins, n, None), type)}
    return (own | kinds) - NOT_FOR_USERS


def test_every_exception_is_in_the_table_of_errors():
    named = {name for row in ROWS for name in re.findall(r"`(\w+Error)`", row)}
    assert named == raised()


def test_exported_exceptions_are_in_the_table():
    for package in (sparring.cp, sparring.kernels):
        for name in package.__all__:
            thing = getattr(package, name)
            if isinstance(thing, type) and issubclass(thing, Exception):
                assert any(f"`{name}`" in row for row in ROWS), name


def test_quoted_messages_are_those_of_the_library():
    texts = [n.value for _, n in NODES if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    phrases = [phrase for row in ROWS for phrase in re.findall(r'"(.+?)"', row)]
    assert len(phrases) > 5
    assert [p for p in phrases if not any(p in " ".join(text.split()) for text in texts)] == []


SAYS_WHAT_TO_DO = {"ValueError", "TypeError", "ImportError", "NotImplementedError", "FloatingPointError"}


@pytest.mark.parametrize("path", [p for p in SOURCES if "launch" not in p.parts], ids=lambda p: p.name)
def test_messages_say_what_to_do(path):
    """What was given; what to do."""
    for node in ast.walk(TREES[path]):
        if not isinstance(node, ast.Raise) or not isinstance(node.exc, ast.Call):
            continue
        if getattr(node.exc.func, "id", None) not in SAYS_WHAT_TO_DO:
            continue
        parts = [n.value for n in ast.walk(node.exc) if isinstance(n, ast.Constant)]
        assert any(";" in str(part) for part in parts), (
            f"{path.name}:{node.lineno}: no remedy after a semicolon"
        )


def test_the_environment_is_read_by_the_launcher_alone_and_documented():
    for path, tree in TREES.items():
        if not re.search(r"\b(environ|getenv|putenv)\b", path.read_text()):
            continue
        assert path.parent.name == "launch", path
        looks = [n for n in ast.walk(tree) if isinstance(n, ast.Subscript | ast.Call | ast.Compare)]
        looks = [ast.unparse(n) for n in looks if "environ" in ast.unparse(n)]
        for name in {name for look in looks for name in re.findall(r"'([A-Z][A-Z_]+)'", look)}:
            assert f"`{name}`" in TEXT["cp/README.md"], f"{path.name} reads {name}"
