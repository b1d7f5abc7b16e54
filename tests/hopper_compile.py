"""Run by test_hopper.py in a process of its own: compiles the Hopper kernels for sm_90, no GPU needed.

Prints a JSON list: for the shipped configurations (with the argument "all" those with a prefix too),
what ptxas says of registers, spills and wgmma, and the spills inside each innermost loop with matrix
products, the shortest, mask-free loops first.
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from sparring.kernels import (
    hopper_backward,
    hopper_columns,
    hopper_columns_backward,
    hopper_columns_dq,
    hopper_dq,
    hopper_forward,
)

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def tensor_map(rows: int, width: int) -> str:
    layout = gl.NVMMASharedLayout.get_default_for([rows, width], gl.bfloat16)
    return f"tensordesc<bf16[{rows}, {width}],{layout!r}>"


def segment_map(rows: int, width: int) -> str:
    layout = gl.NVMMASharedLayout.get_default_for([1, rows, width], gl.bfloat16)
    return f"tensordesc<bf16[1, {rows}, {width}],{layout!r}>"


def spills_in_loops(cubin: Path) -> list[int]:
    """Stores to and loads from local memory in every innermost loop with matrix products, shortest first."""
    text = subprocess.run([TOOLS / "cuobjdump", "-sass", cubin], capture_output=True, text=True).stdout
    code = [(int(a, 16), line) for a, line in re.findall(r"/\*([0-9a-f]{4,6})\*/\s+(.*?);", text)]
    place = {address: i for i, (address, _) in enumerate(code)}
    jumps = [(i, re.search(r"BRA\S* .*?(0x[0-9a-f]+)", line)) for i, (_, line) in enumerate(code)]
    loops = [(place[int(to[1], 16)], i) for i, to in jumps if to and int(to[1], 16) in place]
    loops = [(first, last) for first, last in loops if first < last]
    found = []
    for first, last in loops:
        inside = [line for _, line in code[first : last + 1]]
        inner = not any(first <= a and b <= last and (a, b) != (first, last) for a, b in loops)
        if inner and any("HGMMA" in line for line in inside):
            found.append((len(inside), sum(bool(re.search("STL|LDL", line)) for line in inside)))
    return [spills for _, spills in sorted(found)]


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
        loops = spills_in_loops(ptx.with_suffix(".o"))
    return {
        "kernel": kernel.__name__,
        **constants,
        "registers": int(re.search(r"Used (\d+) registers", text)[1]),
        "spilled": int(re.search(r"(\d+) bytes spill stores", text)[1]),
        "spilled_in_loops": loops,
        "warnings": re.findall(r"C75\d\d", text),
        "shared": compiled.metadata.shared,
    }


def signature(integers: str, counts: str, floats: str, descriptors: dict[str, str]) -> dict[str, str]:
    types = dict.fromkeys(f"lo hi prefix_lo prefix_hi {integers}".split(), "*i32")
    types |= dict.fromkeys(counts.split(), "i32") | dict.fromkeys(floats.split(), "*fp32")
    return types | descriptors


def forward(width: int, prefix: bool, resume: bool) -> dict:
    half, block = hopper_forward.QUERIES // 2, hopper_forward.QUERIES
    maps = dict.fromkeys(("dq", "dout"), tensor_map(half, width))
    maps |= dict.fromkeys(("dk", "dv"), tensor_map(block, width)) | {"scale": "fp32"}
    counts = "items rows key_tokens heads group programs"
    types = signature("table row_tiles key_base live", counts, "out lse", maps)
    constants = {"KEYS": block, "DIM": width, "WIDTH": width, "STAGES": hopper_forward.STAGES[width]}
    return report(hopper_forward._forward, types, constants | {"PREFIX": prefix, "RESUME": resume})


def rows(width: int, prefix: bool) -> dict:
    half, block = hopper_forward.QUERIES // 2, hopper_forward.QUERIES
    maps = dict.fromkeys(("dq_in", "ddout"), tensor_map(half, width)) | {"scale_log2": "fp32"}
    maps |= dict.fromkeys(("dk", "dv"), tensor_map(block, width)) | {"scale": "fp32"}
    types = signature("table live row_tiles key_base", "rows key_tokens heads group", "lse delta dq", maps)
    constants = {"KEYS": block, "DIM": width, "WIDTH": width, "STAGES": hopper_dq.STAGES[width]}
    return report(hopper_dq._rows, types, constants | {"PREFIX": prefix})


def backward(width: int, prefix: bool, with_dq: bool) -> dict:
    queries = hopper_backward.QUERIES[width]
    maps = dict.fromkeys(("dq_in", "ddout"), tensor_map(queries, width)) | {"scale_log2": "fp32"}
    maps |= dict.fromkeys(("dk_in", "dv_in"), tensor_map(64, width)) | {"scale": "fp32"}
    counts = "source num_sources rows slots key_tokens heads kv_heads mask_heads"
    lists = "table live key_ptr key_full key_tiles key_base"
    types = signature(lists, counts, "lse delta dq dk dv", maps)
    constants = {"LISTS": 1, "SHARE": 4, "DIM": width, "WIDTH": width, "QUERIES": queries}
    return report(hopper_backward._backward, types, constants | {"PREFIX": prefix, "WITH_DQ": with_dq})


COLUMNS, EXTENTS = "table live columns tiles", "count words rows heads programs"


def forward_columns(width: int, prefix: bool) -> dict:
    maps = {"dq": tensor_map(hopper_forward.QUERIES // 2, width), "scale": "fp32"}
    maps |= dict.fromkeys(("dk", "dv"), segment_map(128, width))
    constants = {"DIM": width, "WIDTH": width, "STAGES": hopper_forward.STAGES[width], "PREFIX": prefix}
    return report(hopper_columns._forward, signature(COLUMNS, EXTENTS, "out lse", maps), constants)


def rows_of_columns(width: int, prefix: bool) -> dict:
    half = hopper_forward.QUERIES // 2
    maps = dict.fromkeys(("dq_in", "ddout"), tensor_map(half, width)) | {"scale_log2": "fp32"}
    maps |= dict.fromkeys(("dk", "dv"), segment_map(128, width)) | {"scale": "fp32"}
    constants = {"DIM": width, "WIDTH": width, "STAGES": hopper_dq.STAGES[width], "PREFIX": prefix}
    types = signature(COLUMNS, EXTENTS, "lse delta dq", maps)
    return report(hopper_columns_dq._rows, types, constants)


def keys_of_columns(width: int, prefix: bool) -> dict:
    queries = hopper_backward.QUERIES[width]
    maps = dict.fromkeys(("dq_in", "ddout"), tensor_map(queries, width)) | {"scale_log2": "fp32"}
    maps |= dict.fromkeys(("dk_in", "dv_in"), segment_map(64, width)) | {"scale": "fp32"}
    counts = "parts count groups tokens words rows heads kv_heads mask_heads column_heads"
    types = signature("entries sizes columns tiles", counts, "lse delta dk dv", maps)
    constants = {"SHARE": 4, "DIM": width, "WIDTH": width, "QUERIES": queries, "PREFIX": prefix}
    return report(hopper_columns_backward._keys, types, constants)


if __name__ == "__main__":
    both, widths = (False, True), hopper_forward.STAGES
    prefixes = both if sys.argv[1:] == ["all"] else (False,)
    reports = [forward(*case) for case in itertools.product(widths, prefixes, both)]
    reports += [rows(*case) for case in itertools.product(widths, prefixes)]
    reports += [backward(*case) for case in itertools.product(widths, prefixes, both)]
    for columns in (forward_columns, rows_of_columns, keys_of_columns):
        reports += [columns(*case) for case in itertools.product(widths, prefixes)]
    print(json.dumps(reports))
