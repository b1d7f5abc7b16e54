"""The wheel, what an import pulls in, and rules that hold for every file of the library."""

import ast
import importlib.util
import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import machine
import pytest
from transformers.utils import import_utils

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("cp", "kernels", "kernels/patterns", "balance", "launch")
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).glob("*.py"))
FLOORS = {"kernels": 1, "balance": 2, "cp": 3, "launch": 4}


def name_of(path):
    return str(path.relative_to(ROOT))


def python(code, cwd, executable=sys.executable, **environment):
    """What `code` prints in a fresh interpreter, run outside of the checkout."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")} | environment
    command = [executable, "-c", code]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout.strip()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("wheel")
    source = tmp_path / "source"
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        source.mkdir(exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    for path in [*SOURCES, *(ROOT / folder / "py.typed" for folder in FOLDERS)]:
        copy = source / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    build = "import sys, setuptools.build_meta as b; print(b.build_wheel(sys.argv[1]))"
    command = [sys.executable, "-c", build, str(tmp_path)]
    subprocess.run(command, cwd=source, check=True, capture_output=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    return wheel


def test_the_wheel_holds_exactly_the_modules_of_the_five_packages(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        (top,) = (n for n in archive.namelist() if n.endswith("top_level.txt"))
        assert archive.read(top).decode().split() == ["sparring"]
    expected = {f"sparring/{name_of(path)}" for path in SOURCES}
    assert names == expected | {f"sparring/{folder}/py.typed" for folder in FOLDERS}


def test_every_folder_with_modules_is_a_package_of_the_wheel():
    holding = {path.parent for top in FLOORS for path in (ROOT / top).rglob("*.py")}
    examples = ROOT / "launch" / "examples"  # for people to copy
    assert holding == {ROOT / folder for folder in FOLDERS} | {examples}


def test_imports_are_light_and_nothing_is_importable_by_its_bare_name(tmp_path):
    code = (
        "import sys, sparring.cp, sparring.kernels.patterns, sparring.balance;"
        "print([n for n in ('ray', 'transformers', 'triton', 'matplotlib') if n in sys.modules]);"
        "import sparring.launch; from importlib.util import find_spec;"
        "print([find_spec(n) for n in ('kernels', 'cp', 'balance', 'launch')])"
    )
    assert python(code, tmp_path).splitlines() == ["[]", "[None, None, None, None]"]


@pytest.fixture(scope="module")
def clean(wheel, tmp_path_factory):
    """Interpreter and site-packages of a new environment with the wheel and what it depends on."""
    folder = tmp_path_factory.mktemp("clean")
    venv.create(folder, with_pip=False, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)  # what an installer does with a wheel of pure Python
    # Those of this interpreter, but not its editable sparring, whose finder only a .pth of a site starts.
    others = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (site / "dependencies.pth").write_text("\n".join(others))
    return folder / "bin" / "python", site


# What transformers imports from the package `kernels` of its makers, whatever it is.
STUB = """
__version__ = "0.18.2"

class Anything:
    def __init__(self, *args, **kwargs): pass
    def __call__(self, x=None, *args, **kwargs): return x

def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return Anything
"""


def test_the_installed_wheel_leaves_the_kernels_package_of_transformers_alone(clean, tmp_path):
    """It imports without the checkout, and beside a `kernels` of the version that transformers wants."""
    wanted = import_utils.KERNELS_MIN_VERSION
    info = tmp_path / f"kernels-{wanted}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {wanted}\n")
    (tmp_path / "kernels.py").write_text(STUB)
    code = (
        "import sys; sys.path.insert(0, '.'); from importlib.util import find_spec;"
        "import sparring.cp, sparring.kernels.patterns, sparring.balance, sparring.launch;"
        "print([n for n in ('ray', 'transformers', 'triton', 'matplotlib', 'kernels') if n in sys.modules]);"
        "from transformers import LlamaForCausalLM; from transformers.utils import is_kernels_available;"
        "print(sparring.cp.__file__, is_kernels_available(), find_spec('kernels').origin)"
    )
    executable, site = clean
    light, found = python(code, tmp_path, executable).splitlines()
    assert light == "[]"
    assert found == f"{site / 'sparring' / 'cp' / '__init__.py'} True {tmp_path / 'kernels.py'}"


ON_CPU = """
import sys
{before}
import pytest, torch
from sparring.kernels import Geometry, Plan, attend

assert not torch.cuda.is_available()
plan = Plan.build(Geometry.causal(1, 20, 16), torch.ones(1, 1, 2, 2, dtype=torch.bool))
x = torch.ones(1, 2, 20, 8)
for impl in ("auto", "reference"):
    assert torch.equal(attend(x, x, x, plan, impl=impl)[0], x)
with pytest.raises({error}, match={message!r}):
    attend(x, x, x, plan, impl="triton")
print("ran", int(pytest.main({tests})))
"""
QUICK = ["test_balance_schedule.py", "test_attend.py::test_head_groupings"]
WHOLE = [f"test_{name}.py" for name in ("attend", "patterns", "ring", "bad_input", "bad_plans", "finite")]


@pytest.mark.parametrize(
    "tests", [QUICK, pytest.param(WHOLE, marks=pytest.mark.full)], ids=["quick", "whole"]
)
def test_neither_gpu_nor_triton_is_needed(tests):
    code = ON_CPU.format(
        before="sys.modules['triton'] = None  # import raises, find_spec finds nothing",
        error="ImportError",
        message="impl 'triton' needs the package triton.*; pip install .*, or use impl='auto'",
        tests=[*tests, "-q", "-m", "not full", "-p", "no:cacheprovider"],
    )
    assert python(code, ROOT / "tests", CUDA_VISIBLE_DEVICES="").splitlines()[-1] == "ran 0"


@pytest.mark.full
@machine.needs("triton")
def test_triton_without_a_gpu_is_refused_with_the_remedy():
    message = "impl='triton' needs CUDA tensors, got cpu; use impl='reference'"
    tests = ["-q", "--collect-only", "test_balance_schedule.py", "-p", "no:cacheprovider"]
    code = ON_CPU.format(before="", error="ValueError", message=message, tests=tests)
    assert python(code, ROOT / "tests", CUDA_VISIBLE_DEVICES="").splitlines()[-1] == "ran 0"


def test_commands_leave_the_checkout_before_transformers_can_see_it():
    """`python -m` puts the working directory on the path, and there stands a folder `kernels`."""
    code = (
        "import sys; sys.path.insert(0, '');"
        "from sparring.launch.cli import leave_checkout; leave_checkout();"
        "from importlib.util import find_spec; print(find_spec('kernels'))"
    )
    assert python(code, ROOT) == "None"


def test_tests_are_no_package():
    assert not (ROOT / "tests" / "__init__.py").exists()


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_imports_only_go_down(path):
    package = ["sparring", *path.relative_to(ROOT).parent.parts]
    floor = FLOORS[package[1]]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            modules = [".".join([*base, *(node.module or "").split(".")]).rstrip(".")]
            if modules == ["sparring"]:  # from .. import kernels
                modules = [f"sparring.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        else:
            continue
        for module in modules:
            first, *rest = module.split(".")
            line = f"{name_of(path)}:{node.lineno}: {module}"
            assert first not in FLOORS, f"{line}: a bare name"
            assert not (first == "sparring" and isinstance(node, ast.Import)), f"{line}: not relative"
            if first == "sparring":
                assert FLOORS[rest[0]] <= floor, f"{line}: goes up"


# What runs code or commands that it was given, or talks to a network on its own.
BANNED_CALLS = {"eval", "exec", "compile", "__import__", "torch.load", "torch.save", "yaml.load", "np.load"}
BANNED_MODULES = {"pickle", "dill", "cloudpickle", "marshal", "shelve", "yaml", "subprocess", "ctypes"}
BANNED_MODULES |= {"socket", "urllib", "http", "requests", "tempfile"}
BANNED_NAMES = {"system", "popen", "execv", "execve", "spawnv", "putenv", "trust_remote_code"}
BANNED_NAMES |= {"all_gather_object", "gather_object", "broadcast_object_list", "scatter_object_list"}
BANNED_NAMES |= {"send_object_list", "recv_object_list"}  # they pickle what they send


def dotted(node):
    """`a.b.c` of an attribute or a name, "" of anything else."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_nothing_that_runs_what_it_reads(path):
    for node in ast.walk(ast.parse(path.read_text())):
        where = f"{name_of(path)}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Call):
            assert dotted(node.func) not in BANNED_CALLS, where
            assert dotted(node.func).rpartition(".")[2] not in BANNED_NAMES, where
            assert BANNED_NAMES.isdisjoint(k.arg for k in node.keywords), where
            shell = [k.value for k in node.keywords if k.arg == "shell"]
            assert not any(getattr(value, "value", True) for value in shell), where
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            assert BANNED_MODULES.isdisjoint(name.split(".")[0] for name in names), where
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            assert "0.0.0.0" not in node.value, where


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_files_are_short_and_ascii(path):
    text = path.read_text()
    assert text.isascii()
    assert len(text.splitlines()) <= 500


def test_the_guards_of_this_file_see_what_they_forbid(tmp_path, monkeypatch):
    """Each ban fails on a file that breaks it."""
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (tmp_path / "kernels").mkdir()
    bad = tmp_path / "kernels" / "bad.py"
    for text in (
        "import pickle",
        "from pickle import loads",
        "import yaml",
        "from subprocess import run",
        "eval('1')",
        "exec('1')",
        "torch.load('x')",
        "os.system('x')",
        "dist.all_gather_object(a, b)",
        "from_pretrained('x', trust_remote_code=True)",
        "run('x', shell=True)",
        "host = '0.0.0.0'",
    ):
        bad.write_text(text)
        with pytest.raises(AssertionError):
            test_nothing_that_runs_what_it_reads(bad)
    for text in ("from ..cp import x", "from .. import launch", "import kernels", "import sparring.cp"):
        bad.write_text(text)
        with pytest.raises(AssertionError):
            test_imports_only_go_down(bad)
    bad.write_text("from .plan import Plan\nfrom ..kernels.plan import Plan\nimport torch")
    test_imports_only_go_down(bad)
    test_nothing_that_runs_what_it_reads(bad)


def test_console_script_refuses_unknown_commands(capsys):
    from sparring.launch.cli import COMMANDS, main

    with pytest.raises(SystemExit, match="unknown command 'fly'"):
        main(["fly"])
    main(["--help"])
    shown = capsys.readouterr().out
    for command in COMMANDS:
        assert command in shown
        assert importlib.util.find_spec(f"sparring.launch.{command}") is not None
