"""What a machine may lack, and what is supported: every skip of the tests comes from this one table.

    @machine.needs("two gpus")      # a decorator, an entry of pytestmark, or a mark of pytest.param

conftest.py looks at the machine just before such a test runs, so that collecting tests touches no device.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy
import pytest
import torch

PYPROJECT = Path(__file__).parent.parent / "pyproject.toml"


@dataclass(frozen=True)
class Need:
    """Something that a machine may lack: how to see it, and what to do about it."""

    name: str
    present: Callable[[], bool]
    otherwise: str


def _importable(name: str) -> Callable[[], bool]:
    return lambda: importlib.util.find_spec(name) is not None


def _gpus(count: int) -> Callable[[], bool]:
    return lambda: torch.cuda.device_count() >= count  # asks the driver's library: makes no context


def _multicast_off() -> bool:
    return os.environ.get("TORCH_SYMM_MEM_DISABLE_MULTICAST") == "1"


def _gpu_memory() -> bool:
    return _gpus(1)() and torch.cuda.get_device_properties(0).total_memory >= 100 * 2**30


def _hopper() -> bool:
    return _gpus(1)() and torch.cuda.get_device_capability(0)[0] == 9


def _numpy_of_the_interpreter() -> bool:
    return numpy.lib.NumpyVersion(numpy.__version__) < "2.4.0"


def _interpreted() -> bool:
    """Whether this process has the kernels for Triton's interpreter: decided when triton is imported."""
    module = sys.modules.get("sparring.kernels.triton_forward")
    return module is not None and module.INTERPRET


def _compiled() -> bool:
    return _importable("triton")() and not _interpreted()


def _namespaces() -> bool:
    return os.geteuid() == 0 and _shell(["ip", "netns", "exec", _NAMESPACE, "true"])


def _rate_limit() -> bool:
    limit = "tc qdisc add dev lo root tbf rate 100mbit burst 32k latency 50ms"
    return os.geteuid() == 0 and _shell(["ip", "netns", "exec", _NAMESPACE, *limit.split()])


_NAMESPACE = f"sparring-{os.getpid()}"


def _shell(command: list[str]) -> bool:
    """Whether a command succeeds inside a network namespace that is made for it."""
    if shutil.which("ip") is None:
        return False
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    try:
        made = subprocess.run(["ip", "netns", "add", _NAMESPACE], **quiet).returncode == 0
        return made and subprocess.run(command, **quiet).returncode == 0
    finally:
        subprocess.run(["ip", "netns", "del", _NAMESPACE], **quiet)


TABLE = (
    Need("gpu", _gpus(1), "needs a CUDA device"),
    Need("two gpus", _gpus(2), "needs two CUDA devices"),
    Need("multicast off", _multicast_off, "needs TORCH_SYMM_MEM_DISABLE_MULTICAST=1, to read one-sidedly"),
    Need("100 GiB of gpu memory", _gpu_memory, "needs a GPU with 100 GiB of memory"),
    Need("hopper gpu", _hopper, "needs a GPU of compute capability 9"),
    Need("triton", _importable("triton"), "needs triton: pip install triton (Linux)"),
    Need("numpy < 2.4", _numpy_of_the_interpreter, "triton's interpreter needs numpy < 2.4"),
    Need("triton interpreter", _interpreted, "runs in test_in_a_process_of_its_own, interpreted"),
    Need("triton compiled", _compiled, "needs triton, not imported for its interpreter"),
    Need("ruff", _importable("ruff"), "needs ruff: pip install ruff"),
    Need("peft", _importable("peft"), "needs peft: pip install peft"),
    Need("accelerate", _importable("accelerate"), "needs accelerate: pip install accelerate"),
    Need("pyarrow", _importable("pyarrow"), "needs pyarrow: pip install 'sparring[data]'"),
    Need("datasets", _importable("datasets"), "needs datasets: pip install 'sparring[data]'"),
    Need("ray", _importable("ray"), "needs Ray: pip install 'sparring[ray]'"),
    Need("c++ compiler", lambda: shutil.which("g++") is not None, "torch.compile needs a C++ compiler"),
    Need("root", _namespaces, "needs root and iproute2, to make network namespaces"),
    Need("slow link tools", _rate_limit, "needs root, iproute2 and the kernel's tbf queue, to slow a link"),
)
_BY_NAME = {need.name: need for need in TABLE}


def needs(*names: str) -> pytest.MarkDecorator:
    """The mark of a test that is skipped, with the table's reason, where the machine lacks one of `names`."""
    unknown = [name for name in names if name not in _BY_NAME]
    if unknown:
        raise ValueError(f"the table of machine.py does not know {unknown}; it has {list(_BY_NAME)}")
    return pytest.mark.needs(*names)


@functools.cache
def lacks(name: str) -> str | None:
    """Why a test that needs this cannot run here, or None."""
    need = _BY_NAME[name]
    return None if need.present() else need.otherwise


def supported() -> dict[str, str]:
    """The oldest supported version of python and of every dependency, as pyproject.toml says."""
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    lines = [f"python{project['requires-python']}", *project["dependencies"]]
    lines += [line for extra in project["optional-dependencies"].values() for line in extra]
    found = [re.match(r"([\w-]+)(?:\[\w+\])?\s*>=\s*([\d.]+)", line) for line in lines]
    return {match[1]: match[2] for match in found if match}
