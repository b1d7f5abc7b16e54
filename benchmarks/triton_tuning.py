"""Which configurations of the portable kernels are fastest, and what the compiler makes of the shipped ones.

python benchmarks/triton_tuning.py                  # all candidates, checked first
python benchmarks/triton_tuning.py --columns 1024   # those of the column kernels as well
python benchmarks/triton_tuning.py --compile        # registers and spills for sm_90; needs no GPU
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
import triton

from sparring.kernels import Geometry, Plan, attend, bind
from sparring.kernels import triton_backward as backward
from sparring.kernels import triton_columns as columns
from sparring.kernels import triton_forward as forward
from sparring.kernels.attention import carried
from sparring.kernels.columns import gather_columns
from sparring.kernels.triton_forward import CONFIGS, Config

RESULTS = Path(__file__).parent / "results"
CANDIDATES = {
    ("forward", 64): [(128, 64, 4, 3), (128, 64, 8, 3), (128, 128, 8, 3), (128, 128, 8, 2), (64, 64, 4, 3)],
    ("forward", 128): [(128, 128, 8, 3), (128, 128, 8, 2), (128, 64, 8, 3), (128, 64, 8, 4), (64, 64, 4, 3)],
    ("dq", 64): [(128, 64, 8, 3), (128, 128, 8, 3), (128, 128, 8, 2), (64, 64, 4, 3), (64, 128, 4, 3)],
    ("dq", 128): [(128, 64, 8, 3), (128, 64, 8, 2), (128, 128, 8, 2), (64, 64, 4, 3)],
    ("dkv", 64): [(64, 128, 8, 3), (64, 128, 8, 2), (64, 64, 4, 3), (128, 64, 8, 3), (32, 128, 4, 3)],
    ("dkv", 128): [(64, 128, 8, 2), (64, 128, 8, 3), (32, 128, 8, 3), (64, 64, 8, 3), (64, 64, 4, 2)],
    ("forward_columns", 64): [(128, 64, 8, 3), (128, 64, 4, 3), (128, 32, 4, 3), (64, 64, 4, 3)],
    ("forward_columns", 128): [(128, 64, 8, 3), (128, 64, 8, 2), (128, 32, 8, 3), (64, 64, 4, 3)],
    ("dq_columns", 64): [(128, 64, 8, 3), (128, 64, 4, 3), (64, 64, 4, 3)],
    ("dq_columns", 128): [(128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 4, 3)],
    ("dkv_columns", 64): [(64, 64, 4, 3), (64, 64, 8, 3), (64, 128, 8, 3), (128, 64, 8, 2)],
    ("dkv_columns", 128): [(64, 64, 8, 2), (64, 64, 8, 3), (32, 64, 4, 3), (64, 128, 8, 2)],
}


def make(options, dim: int, density: float, length: int, device="cuda", seed: int = 0):
    """q, k, v, dout, plan: random tiles of a causal mask, and columns if asked for."""
    g = torch.Generator(device).manual_seed(seed)
    shape = (1, options.heads, length, dim)

    def normal(heads):
        size = (1, heads, *shape[2:])
        return torch.randn(size, generator=g, device=device).to(torch.bfloat16)

    geometry = Geometry.causal(1, length, options.block_size, device=device)
    blocks = geometry.num_blocks
    tiles = torch.rand((1, options.mask_heads, blocks, blocks), generator=g, device=device) < density
    chosen = None
    if options.columns:
        count = (1, options.mask_heads, 1, options.columns)
        chosen = torch.randint(0, length, count, generator=g, device=device)
    plan = Plan.build(geometry, tiles, chosen)
    return (
        normal(options.heads),
        normal(options.kv_heads),
        normal(options.kv_heads),
        normal(options.heads),
        plan,
    )


class Steps:
    """The kernels on a bound plan, with everything around them taken away."""

    def __init__(self, q, k, v, dout, plan):
        self.q, self.k, self.v, self.dout, self.scale = q, k, v, dout, q.shape[3] ** -0.5
        self.bound = bind(plan, (plan.geometry.blocks,))
        self.columns = None
        if plan.columns is not None:
            self.columns = [gather_columns(x, plan) for x in (k, v)]
        self.out, self.lse = carried(q)
        self.delta = torch.zeros_like(self.lse)
        self.dq, self.dk, self.dv = (torch.zeros_like(x, dtype=torch.float32) for x in (q, k, v))
        self.dcolumns = [torch.zeros_like(x, dtype=torch.float32) for x in self.columns or ()]

    def forward(self, tiles=True):
        state = (self.bound, self.out, self.lse, self.scale)
        if tiles:
            bound, *rest = state
            forward.forward_step(self.q, self.k, self.v, bound, 0, *rest, fresh=True)
        if self.columns:
            columns.forward_columns(self.q, *self.columns, *state)

    def backward(self, tiles=True):
        given = (self.dout, self.lse, self.delta, self.bound)
        if tiles:
            sums = (self.dq, self.dk, self.dv)
            backward.backward_step(self.q, self.k, self.v, *given, 0, *sums, self.scale)
        if self.columns:
            columns.backward_columns(self.q, *self.columns, *given, self.dq, *self.dcolumns, self.scale)


def milliseconds(function) -> float:
    return triton.testing.do_bench(function, warmup=50, rep=200, return_mode="median")


def check(options, dim: int) -> None:
    """The compiled kernels against the reference on a short sequence; raises if they disagree."""
    q, k, v, dout, plan = make(options, dim, 0.3, 8 * options.block_size)
    results = []
    for impl, dtype in (("triton", torch.bfloat16), ("reference", torch.float32)):
        leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        out, lse = attend(*leaves, plan, impl=impl)
        grads = torch.autograd.grad(out, leaves, dout.to(dtype))
        results.append([x.detach().float() for x in (out, lse, *grads)])
    for name, actual, expected in zip(("out", "lse", "dq", "dk", "dv"), *results, strict=True):
        error = float((actual - expected).abs().max() / expected.abs().max())
        print(f"D={dim} {name:3}: relative error {error:.1e}")
        if not error < 2e-2:
            raise SystemExit(f"{name} is wrong; nothing is timed")


def sweep_rows(options, dim: int) -> list[dict]:
    """Times every candidate of every kernel; a kernel's own time stands out against its fixed partner."""
    rows = []
    for kernel, candidates in ((name, c) for (name, width), c in CANDIDATES.items() if width == dim):
        of_columns = kernel.endswith("columns")
        if of_columns and not options.columns:
            continue
        for density in options.densities if not of_columns else options.densities[-1:]:
            steps = Steps(*make(options, dim, density, options.length))
            steps.columns = steps.columns if of_columns else None
            steps.forward()  # the backward needs a true lse
            run = partial(steps.forward if kernel.startswith("forward") else steps.backward, not of_columns)
            for candidate in candidates:
                ms = timed(kernel, dim, candidate, run)
                rows.append(dict(what=kernel, config=candidate, dim=dim, density=density, ms=ms))
                shape = "{}x{} warps {} stages {}".format(*candidate)
                print(f"D={dim} density {density:5.3f} {kernel:15} {shape:26} {ms:8.3f} ms", flush=True)
            del steps
    return rows


def timed(kernel: str, dim: int, candidate: tuple, run) -> float:
    shipped = CONFIGS[kernel, dim, 2]
    try:
        CONFIGS[kernel, dim, 2] = Config(*candidate)
        forward.config.cache_clear()
        run()
        return milliseconds(run)
    except triton.runtime.errors.OutOfResources:
        return float("nan")
    finally:
        CONFIGS[kernel, dim, 2] = shipped
        forward.config.cache_clear()


def warm(job) -> None:
    """Compiles the kernels of one candidate into Triton's cache, in a process of its own."""
    options, kernel, dim, candidate = job
    CONFIGS[kernel, dim, 2] = Config(*candidate)
    steps = Steps(*make(options, dim, 0.5, 8 * options.block_size))
    try:
        steps.forward() if kernel.startswith("forward") else steps.backward()
    except triton.runtime.errors.OutOfResources:
        pass


def warm_all(options) -> None:
    jobs = [(options, kernel, dim, c) for (kernel, dim), many in CANDIDATES.items() for c in many]
    jobs = [job for job in jobs if job[2] in options.dims]
    jobs = [job for job in jobs if options.columns or not job[1].endswith("columns")]
    workers = max(1, min(12, (os.cpu_count() or 2) - 2))
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        list(pool.map(warm, jobs))


def compile_report(options, dim: int) -> None:
    """Compiles every kernel for sm_90 as shipped; prints what ptxas says. Needs no GPU."""
    launches = []
    for module in (forward, backward, columns):
        module.check = lambda *_: None
        module.launch = lambda kernel, _, __, arguments, **meta: launches.append((kernel, arguments, meta))
    options.columns = options.columns or 64
    steps = Steps(*make(options, dim, 1.0, 4 * options.block_size, "cpu"))
    steps.forward()
    steps.backward()
    for kernel, arguments, meta in launches:
        print(f"D={dim} {kernel.__name__:17} {compiled(kernel, arguments, dict(meta))}", flush=True)


def compiled(kernel, arguments, meta) -> str:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int32: "*i32"}
    launch = {name: meta.pop(name) for name in ("num_warps", "num_stages")}
    signature, attributes = {}, {}
    for i, (name, x) in enumerate(zip(kernel.arg_names, arguments, strict=False)):
        tensor = isinstance(x, torch.Tensor)
        signature[name] = types[x.dtype] if tensor else "fp32" if isinstance(x, float) else "i32"
        if tensor or (isinstance(x, int) and x % 16 == 0 and name not in kernel.do_not_specialize):
            attributes[(i,)] = [["tt.divisibility", 16]]
    signature |= {name: "constexpr" for name in meta}
    constants = {(kernel.arg_names.index(name),): x for name, x in meta.items()}
    source = ASTSource(kernel, signature, constants, attributes)
    binary = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=launch)
    ptxas = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(binary.asm["ptx"])
        file.flush()
        command = [str(ptxas), "-v", "--gpu-name", "sm_90a", file.name, "-o", os.devnull]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = re.search(r"Used (\d+) registers", said)[1]
    spilled = re.search(r"(\d+) bytes spill stores", said)[1]
    warnings = " ".join(sorted(set(re.findall(r"C75\d\d", said))))
    shape = f"{meta['QUERIES']}x{meta['KEYS']} warps {launch['num_warps']} stages {launch['num_stages']}"
    shared = f"{binary.metadata.shared / 1024:.0f} KiB shared"
    return f"{shape}: {registers} registers, {spilled} B spilled, {shared} {warnings}"


def write(options, rows: list[dict]) -> None:
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=RESULTS.parent, capture_output=True, text=True
    ).stdout.strip()
    common = dict(
        gpu=torch.cuda.get_device_name(),
        torch=torch.__version__,
        triton=triton.__version__,
        commit=options.commit or commit or "unknown",
        dtype="bfloat16",
        length=options.length,
        heads=options.heads,
        kv_heads=options.kv_heads,
        mask_heads=options.mask_heads,
        block_size=options.block_size,
        columns=options.columns,
    )
    path = Path(options.out or RESULTS / "triton_tuning.csv")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*common, *rows[0]])
        writer.writeheader()
        writer.writerows(common | row for row in rows)
    print(f"wrote {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--length", type=int, default=32768)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--mask-heads", type=int, default=8)
    parser.add_argument("--block-size", type=int, default=128)
    parser.add_argument("--dims", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--densities", type=float, nargs="+", default=[1.0, 0.25, 0.1, 0.05])
    parser.add_argument("--columns", type=int, default=0, help="columns of each mask head")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--commit", help="written to the results where there is no git")
    parser.add_argument("--out")
    options = parser.parse_args()
    if options.compile:
        for dim in options.dims:
            compile_report(options, dim)
        return
    for dim in options.dims:
        check(options, dim)
    warm_all(options)
    write(options, [row for dim in options.dims for row in sweep_rows(options, dim)])


if __name__ == "__main__":
    main()
