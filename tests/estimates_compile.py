"""Run by test_estimates.py in a process of its own: compiles kernels of estimates for sm_90, no GPU needed.

Prints a JSON list: for every kernel and configuration, what ptxas says of registers and spills.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sparring.kernels import Geometry, triton_estimates, triton_select
from sparring.kernels.estimates import FIXED
from sparring.kernels.patterns import VerticalSlash, vertical_slash

PTXAS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
OPTIONS = ("num_warps", "num_stages", "maxnreg")
TYPES = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int64: "*i64", torch.int32: "*i32"}
TYPES |= {torch.uint8: "*u8", torch.int8: "*i8"}


def launches(dtype: torch.dtype, dim: int) -> dict:
    """(kernel, arguments, options) of every kernel of one estimate, by name; none of them runs."""
    found = {}

    def note(kernel, _, __, arguments, **meta):
        found.setdefault(kernel.__name__, (kernel, arguments, meta))

    triton_estimates.launch = triton_select.launch = note
    geometry, ops, pattern = Geometry.causal(1, 1024), triton_estimates, VerticalSlash()
    tables = pattern.prepare(geometry)
    q, k = torch.zeros(1, 8, 1024, dim, dtype=dtype), torch.zeros(1, 2, 1024, dim, dtype=dtype)
    rows = vertical_slash.probe.gather_rows(q, tables.probes)
    peak = ops.peaks(rows, k, tables.probes)
    total = ops.totals(rows, k, peak, tables.probes)
    slash, far, codes = ops.masses(rows, k, peak, peak, tables.tail, tables.probes)
    ops.top_k(codes, tables.contest)
    ops.threshold(slash, far * FIXED + total[..., 0], 2, 64)
    ops.tiles_of_diagonals(slash > 0, geometry, 2, tables.window_of_row)
    return found


def report(kernel, arguments: tuple, meta: dict) -> dict:
    """Registers and spilled bytes of one launch."""
    signature, aligned = {}, {}
    for i, (name, x) in enumerate(zip(kernel.arg_names, arguments, strict=False)):
        tensor = isinstance(x, torch.Tensor)
        signature[name] = TYPES[x.dtype] if tensor else "fp32" if isinstance(x, float) else "i32"
        if tensor:
            aligned[(i,)] = [["tt.divisibility", 16]]
    constants = {name: x for name, x in meta.items() if name not in OPTIONS}
    signature |= dict.fromkeys(constants, "constexpr")
    values = {(kernel.arg_names.index(name),): x for name, x in constants.items()}
    options = {name: meta[name] for name in OPTIONS if name in meta}
    source = ASTSource(kernel, signature, values, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(compiled.asm["ptx"])
        file.flush()
        command = [PTXAS, "-arch=sm_90a", "-v", file.name, "-o", os.devnull]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return {
        "kernel": kernel.__name__,
        "registers": int(re.search(r"Used (\d+) registers", text)[1]),
        "spilled": int(re.search(r"(\d+) bytes spill stores", text)[1]),
        "shared": compiled.metadata.shared,
    }


if __name__ == "__main__":
    cases = ((torch.bfloat16, 128), (torch.bfloat16, 256), (torch.float32, 128), (torch.float32, 256))
    found = [
        dict(dim=dim, type=str(dtype)) | report(*x)
        for dtype, dim in cases
        for x in launches(dtype, dim).values()
    ]
    print(json.dumps(found))
