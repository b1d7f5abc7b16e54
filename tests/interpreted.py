"""Test files that run again in a process of their own, in which Triton interprets its kernels on the CPU.

The interpreter has to be chosen before triton is imported.
"""

from __future__ import annotations

import os
import subprocess
import sys

import machine
import pytest

INTERPRETED = bool(os.environ.get("TRITON_INTERPRET"))  # this is that process
kernels_run = machine.needs(*(("triton interpreter",) if INTERPRETED else ("gpu", "triton compiled")))
MARKS = [
    pytest.mark.filterwarnings("error::RuntimeWarning"),  # of numpy: NaN, overflow, log of 0
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),
    pytest.mark.usefixtures("poisoned"),
]


def check(path: str, marks: str = "not full") -> None:
    """The tests of a file with these marks pass, interpreted."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", marks, path]
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=290)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
