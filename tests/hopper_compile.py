"""Run by test_hopper.py in a process of its own: compiles the Hopper kernels for sm_90, no GPU needed.

Prints a JSON list: for every shipped configuration, what ptxas says of registers, spills and wgmma.
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from sparring.kernels import hopper_forward

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def tensor_map(rows: int, width: int) -> str:
    layout = gl.NVMMASharedLayout.get_default_for([rows, width], gl.bfloat16)
    return f"tensordesc<bf16[{rows}, {width}],{layout!r}>"


def report(kernel, types: dict[str, str], constants: dict) -> dict:
    """Spilled bytes, registers and warnings of one configuration."""
    names = kernel.arg_names
    signature = {name: types.get(name, "constexpr") for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name][0] == "*"}
    values = {(names.index(name),): value for name, value in constants.items()}
    source = GluonASTSource(kernel, signature, values, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder, "kernel.ptx")
        ptx.write_text(compiled.asm["ptx"])
        command = [TOOLS / "ptxas", "-arch=sm_90a", "-v", ptx, "-o", ptx.with_suffix(".o")]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return {
        **constants,
        "registers": int(re.search(r"Used (\d+) registers", text)[1]),
        "spilled": int(re.search(r"(\d+) bytes spill stores", text)[1]),
        "warnings": re.findall(r"C75\d\d", text),
        "shared": compiled.metadata.shared,
    }


def forward(width: int, prefix: bool, resume: bool) -> dict:
    half, block = hopper_forward.QUERIES // 2, hopper_forward.QUERIES
    types = dict.fromkeys(
        ("table", "row_tiles", "key_base", "live", "lo", "hi", "prefix_lo", "prefix_hi"), "*i32"
    )
    types |= dict.fromkeys(("items", "rows", "key_tokens", "heads", "group", "programs"), "i32")
    types |= {"out": "*fp32" if resume else "*bf16", "lse": "*fp32", "scale": "fp32"}
    types |= {"dq": tensor_map(half, width), "dout": tensor_map(half, width)}
    types |= dict.fromkeys(("dk", "dv"), tensor_map(block, width))
    constants = {"KEYS": block, "DIM": width, "WIDTH": width, "STAGES": hopper_forward.STAGES[width]}
    return report(hopper_forward._forward, types, constants | {"PREFIX": prefix, "RESUME": resume})


if __name__ == "__main__":
    cases = itertools.product(hopper_forward.STAGES, (False, True), (False, True))
    print(json.dumps([forward(*case) for case in cases]))
