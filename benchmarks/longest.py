"""The longest sequence that trains, its peak memory and its speed, beside what `sparring plan` predicts.

    python benchmarks/longest.py --model qwen2.5-3b --pattern dense --gpus 1
    python benchmarks/longest.py --model llama-8b --pattern vertical-slash --gpus 2 --trained norms
    python benchmarks/longest.py --device cpu --tiny --gpus 2 --most 2048 --out OUT       # a try without GPUs

Shapes of Qwen2.5-3B and Llama-8B with random weights: full checkpointing, tiled feed-forward parts, bf16.
--trained: all weights; norms, all others frozen, where training all does not fit (Llama-8B keeps 120 GiB of
weights, gradients and AdamW, over all GPUs together); lora, which needs peft.

Lengths are doubled from --start until one does not fit, then bisected --steps times. Ranks take two steps at
each length; the second is timed. A job ends with the first length that does not fit, whichever rank finds
out, and a new one is started for the next: no rank ever waits for one that is out of memory. A length counts
only if both losses are finite. Writes a row for every length that ran.
"""

from __future__ import annotations

import argparse
import copy
import csv
import gc
import json
import math
import os
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen2Config

from sparring.balance import H200
from sparring.cp import ContextParallel
from sparring.launch.config import TrainConfig
from sparring.launch.measure import GIB, peak_bytes
from sparring.launch.memory import save_memory
from sparring.launch.model import add_adapters
from sparring.launch.optimizer import build_optimizer, update
from sparring.launch.parallel import shard_weights, weight_mesh
from sparring.launch.plan_memory import worst_moment
from sparring.launch.plan_model import ModelSizes, sizes_of
from sparring.launch.plan_time import step_seconds
from sparring.launch.trainee import build_pattern
from sparring.launch.world import World, join_world

RESULTS = Path(__file__).parent / "results"
OUT_OF_MEMORY = "out of memory"
LIMIT = 900.0  # seconds of a job

MODELS: dict[str, PreTrainedConfig] = {
    "qwen2.5-3b": Qwen2Config(
        vocab_size=151936, hidden_size=2048, intermediate_size=11008, num_hidden_layers=36,
        num_attention_heads=16, num_key_value_heads=2, tie_word_embeddings=True,
        max_position_embeddings=2**24, use_sliding_window=False,
    ),
    "llama-8b": LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=False,
        max_position_embeddings=2**24,
    ),
}  # fmt: skip
TINY = LlamaConfig(
    vocab_size=256, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, max_position_embeddings=2**20,
)  # fmt: skip


def config_of(options: argparse.Namespace, length: int) -> TrainConfig:
    """The settings of the training at a length. Those that sizes_of tells are not looked at."""
    return TrainConfig(
        seq_len=length,
        device=options.device,
        dtype="float32" if options.tiny else "bfloat16",
        pattern=options.pattern,
        max_density=options.max_density,
        checkpointing="full",
        mlp_tiles=options.mlp_tiles,
        offload=options.offload,
        lora_rank=16 if options.trained == "lora" else 0,
        block_size=32 if options.tiny else 128,
        lr=1e-5,
        timeout=120.0,
    )


def build(options: argparse.Namespace, device: str, cp: ContextParallel | None) -> torch.nn.Module:
    """The model with weights drawn on the device, attached if there is a cp, and what is trained of it."""
    torch.manual_seed(0)
    with torch.device(device):
        shape = copy.deepcopy(TINY if options.tiny else MODELS[options.model])
        model = AutoModelForCausalLM.from_config(shape).train()
        if cp is not None:
            model = cp.attach(model)
        if options.trained == "lora":
            add_adapters(model, config_of(options, options.start))
    if options.trained == "norms":
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.ndim == 1)
    return model


def predicted(sizes: ModelSizes, config: TrainConfig, gpus: int) -> dict[str, float]:
    """What `sparring plan` says; torch's own peak, without what is beside tensors."""
    items = worst_moment(sizes, config, gpus)[1]
    seconds, _ = step_seconds(sizes, config, gpus, 1, H200)
    return {"predicted_GiB": sum(items.values()) / GIB, "predicted_seconds": sum(seconds.values())}


# -- a rank -------------------------------------------------------------------------------------------


def run_rank(options: argparse.Namespace) -> None:
    """Two steps at each length, ascending; a line of JSON in `options.said` for each, and for running out."""
    with join_world(config_of(options, options.start)) as world:
        try:
            for length in options.lengths:
                say(options, world, length, measure(options, world, length))
        except torch.OutOfMemoryError:
            with options.said.open("a") as file:
                file.write(json.dumps({"rank": world.rank, "failed": OUT_OF_MEMORY}) + "\n")
            raise  # the launcher ends all others


def measure(options: argparse.Namespace, world: World, length: int) -> dict[str, float]:
    """Of two steps at this length: peak of this rank, seconds of the second, the last loss."""
    config, device = config_of(options, length), world.device
    cuda = device.type == "cuda"
    cp = ContextParallel(
        world.mesh, axes=("cp_outer", "cp_inner"), data_axes=("dp",), pattern=build_pattern(config),
        block_size=config.block_size, grad_reduce="mean", timeout=config.timeout,
    )  # fmt: skip
    model = build(options, str(device), cp)
    save_memory(model, config)
    shard_weights(model, weight_mesh(config, device.type, world.size), getattr(torch, config.dtype))
    optimizer = build_optimizer(model, config)
    ids = torch.randint(256, (1, length), generator=torch.Generator().manual_seed(1)).to(device)
    gc.collect()  # what is left of the length before
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    for step in range(2):
        began = time.perf_counter()
        shard = cp.shard({"input_ids": ids, "labels": ids})
        loss = cp.loss(model(**shard.inputs), shard)
        loss.backward()
        value = loss.item()
        if not math.isfinite(value):
            raise SystemExit(f"the loss of {length} tokens is {value}; nothing is counted")
        update(optimizer, config, step)
        if cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
    report = cp.report(shard)
    cp.detach(model)
    cp.close()
    return {"peak": peak_bytes(device), "seconds": seconds, "loss": value, "density": report.density}


def say(options: argparse.Namespace, world: World, length: int, found: dict[str, float]) -> None:
    """The most of all ranks, by rank 0."""
    most = torch.tensor([found["peak"], found["seconds"]], dtype=torch.float64)
    torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX, group=world.control)
    if world.chief:
        row = found | {"length": length, "peak": most[0].item(), "seconds": most[1].item()}
        with options.said.open("a") as file:
            file.write(json.dumps(row) + "\n")


# -- the search ---------------------------------------------------------------------------------------


def search(run, start: int, most: int, unit: int, steps: int) -> int:
    """The longest length that ran, 0 if none: doubled from `start`, then bisected so many times.

    run(lengths): takes ascending lengths, returns how many of them ran before one did not fit. unit: what
    lengths are multiples of.
    """
    lengths = [start]
    while 2 * lengths[-1] <= most:
        lengths.append(2 * lengths[-1])
    ran = run(lengths)
    low = lengths[ran - 1] if ran else 0
    high = lengths[ran] if ran < len(lengths) else low
    for _ in range(steps):
        middle = (low + high) // 2 // unit * unit
        if middle <= low:
            break
        low, high = (middle, high) if run([middle]) else (low, middle)
    return low


def start_job(options: argparse.Namespace, arguments: list[str], lengths: list[int]) -> list[dict]:
    """Rows of the lengths that ran, in a job of their own."""
    options.said.unlink(missing_ok=True)
    options.said.touch()
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    command = [*launcher, str(options.gpus), str(Path(__file__).resolve()), *arguments]
    command += ["--said", str(options.said), "--lengths", *map(str, lengths)]
    environment = os.environ | {"PYTHONSAFEPATH": "1"}
    job = subprocess.run(command, cwd="/", env=environment, timeout=LIMIT, capture_output=True, text=True)
    said = [json.loads(line) for line in options.said.read_text().splitlines()]
    if job.returncode and not any(row.get("failed") == OUT_OF_MEMORY for row in said):
        raise SystemExit(f"lengths {lengths}: {job.stderr[-4000:]}")
    return [row for row in said if "length" in row]


def drive(options: argparse.Namespace, arguments: list[str]) -> int:
    """The search, its table, and the longest length."""
    options.out.mkdir(parents=True, exist_ok=True)
    options.said = (options.out / "longest.said").resolve()
    sizes = sizes_of(build(options, "meta", None))
    machine = {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__, "transformers": version("transformers"), "commit": options.commit,
    }  # fmt: skip
    setup = {name: getattr(options, name) for name in ("model", "trained", "pattern", "gpus", "mlp_tiles")}
    setup |= {"model": "tiny" if options.tiny else options.model, "offload": options.offload}
    path = options.out / "longest.csv"

    def run(lengths: list[int]) -> int:
        rows = start_job(options, arguments, lengths)
        for row in rows:
            config = config_of(options, row["length"])
            told = predicted(sizes, config, options.gpus)
            peak = row.pop("peak") / GIB
            measured = {"length": row.pop("length"), "peak_GiB": peak, **row}
            measured["tokens_per_second"] = config.seq_len / row["seconds"]
            line = setup | measured | told | {"memory_ratio": told["predicted_GiB"] / peak} | machine
            new = not path.exists()
            with path.open("a", newline="") as file:
                writer = csv.DictWriter(file, line)
                if new:
                    writer.writeheader()
                writer.writerow(line)
            print({name: line[name] for name in ("length", *told, "peak_GiB", "seconds")}, flush=True)
        return len(rows)

    unit = options.gpus * config_of(options, options.start).block_size
    found = search(run, options.start, options.most, unit, options.steps)
    options.said.unlink()
    print(f"longest: {found:,} tokens")
    return found


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", choices=sorted(MODELS), default="qwen2.5-3b")
    parser.add_argument("--pattern", choices=("dense", "vertical-slash"), default="dense")
    parser.add_argument("--max-density", type=float, default=0.1)
    parser.add_argument("--trained", choices=("all", "norms", "lora"), default="all")
    parser.add_argument("--mlp-tiles", type=int, default=8)
    parser.add_argument("--offload", action="store_true")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a model of a few thousand weights, fp32")
    parser.add_argument("--start", type=int, default=None, help="first length")
    parser.add_argument("--most", type=int, default=2**23, help="longest length that is tried")
    parser.add_argument("--steps", type=int, default=3, help="of bisection")
    parser.add_argument("--commit", default="", help="what was measured")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--said", type=Path, default=None, help=argparse.SUPPRESS)  # of a rank
    parser.add_argument("--lengths", type=int, nargs="+", default=None, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.start = options.start or (256 if options.tiny else 65536)
    return options


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    if options.lengths:
        run_rank(options)
    else:
        drive(options, arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
