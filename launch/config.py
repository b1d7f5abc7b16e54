"""Every setting of the training job, in one frozen dataclass; the command line is made from it."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TypeVar

from ..balance.layout import named
from ..cp.exchange import check_exchange
from ..kernels.patterns import PATTERNS
from .settings import read_settings
from .tokens import BYTES
from .trackers import NO_TRACKER, TRACKERS

#: Settings that must be the same for a checkpoint to be resumed; so must batch x dp, and what the data holds.
RESUME_FIELDS = (
    "seed seq_len model lora_rank lora_alpha layers width heads kv_heads head_dim mlp pattern top_p "
    "max_density block_size steps lr warmup weight_decay clip dtype"
).split()


@dataclass(frozen=True)
class TrainConfig:
    """Train a Llama-architecture model on long text with sparse context parallelism.

    The defaults are those of a CPU machine, or of a GPU machine where this is one. Add a setting as a line
    below with its comment, which --help shows, and a check.
    """

    data: str | None = None  # Text, .jsonl, .parquet, .arrow, saved dataset, folder; default: Python's own.
    text_field: str = "text"  # Where records of JSON lines or tables have their text.
    tokenizer: str | None = None  # Folder of a tokenizer, or bytes; default: that of model, else bytes.
    out: str = "runs/quickstart"  # Folder of metrics, checkpoints, summary.json and report.png.
    seed: int = 0  # Of the initial weights and the order of the data.
    resume: bool = False  # Continue from the newest checkpoint in `out`, if there is one.
    device: str = "auto"  # auto | cpu | cuda

    seq_len: int = 8192  # Tokens in one packed sequence, over all ranks.
    packing: str = "concat"  # Documents in rows: concat (cut where a row ends) | best-fit (whole; padding)
    batch: int = 1  # Sequences per data-parallel group and step.
    dp: int = 1  # Data-parallel groups; the ranks of each share one sequence.

    model: str | None = None  # Folder of a transformers causal LM to train on; default: drawn by seed.
    lora_rank: int = 0  # Of adapters that alone are trained (LoRA); 0 trains all weights.
    lora_alpha: float | None = None  # Adapters count lora_alpha / lora_rank times; default: twice.

    layers: int = 2  # Transformer layers. This and the next five are not for --model.
    width: int = 256  # Of the residual stream.
    heads: int = 4  # Query heads.
    kv_heads: int = 2  # Key/value heads, each shared by heads / kv_heads query heads.
    head_dim: int = 64  # Of queries, keys and values.
    mlp: int = 512  # Inner width of the feed-forward part.

    pattern: str = "vertical-slash"  # Which keys each query sees: vertical-slash | sink-window | dense
    top_p: float = 0.95  # Share of the estimated attention that vertical-slash keeps, if it may.
    max_density: float = 0.5  # Most of the visible pairs that vertical-slash keeps, in long documents.
    layout: str = "auto"  # Which rank holds which blocks: auto | contiguous | zigzag | striped
    exchange: str = "auto"  # How keys and values travel: auto | ring | hierarchical | gather | pull | heads
    block_size: int = 128  # Tokens of a block, the unit that is chosen, held and moved.
    timeout: float = 300.0  # Seconds to wait for another rank before the job fails.

    steps: int = 40  # Optimizer steps.
    lr: float = 4e-3  # Peak learning rate; cosine decay to a tenth of it.
    warmup: int = 4  # Steps of linear warmup.
    weight_decay: float = 0.1  # AdamW, on matrices only.
    clip: float = 1.0  # Largest gradient norm.
    dtype: str = "float32"  # Of the computation: float32 | bfloat16; trained weights are fp32.

    shard: str = "full"  # Weights: full (over all ranks) | hybrid (within data-parallel groups) | none
    checkpointing: str = "none"  # Recompute in the backward: none | selective (not attention) | full (layers)
    offload: bool = False  # Keep the inputs of layers in CPU memory; with full checkpointing.
    mlp_tiles: int = 1  # Parts of the tokens on which feed-forward parts work, one after another.

    save_every: int = 20  # Steps between checkpoints; 0 saves none.
    keep: int = 2  # Checkpoints kept.
    log_every: int = 1  # Steps between progress lines where there is no terminal.
    tracker: str = "none"  # Besides metrics.jsonl: none | tensorboard | wandb (sends to its server)
    profile_step: int | None = None  # Step (from 0) that torch.profiler records, into profile/ of `out`.
    compare: bool = True  # Also run dense and one-block-window attention, same seed and steps.

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be greater than 0")
        for name in ("warmup", "weight_decay", "save_every", "seed", "lora_rank"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be less than 0")
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {allowed}")
        if self.pattern not in PATTERNS:
            raise ValueError(f"pattern={self.pattern!r} must be one of {sorted(PATTERNS)}")
        if self.layout != "auto":
            named(self.layout, 1, 1, self.block_size)  # raises if there is no such layout
        check_exchange(self.exchange)
        if self.seq_len < self.block_size:
            raise ValueError(
                f"seq_len={self.seq_len} is shorter than one block of block_size={self.block_size}; "
                f"raise seq_len or lower block_size"
            )
        if self.heads % self.kv_heads:
            raise ValueError(
                f"heads={self.heads} is not divisible by kv_heads={self.kv_heads}; "
                f"each key head serves the same number of query heads"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} is not divisible by 2, as rotary needs")
        if self.warmup >= self.steps and self.warmup > 0:
            raise ValueError(
                f"warmup={self.warmup} must be less than steps={self.steps}, "
                f"or the learning rate never decays"
            )
        if self.profile_step is not None and not 0 <= self.profile_step < self.steps:
            raise ValueError(
                f"profile_step={self.profile_step} and steps={self.steps}; give a step from 0 to steps - 1"
            )
        if self.lora_alpha is not None and not self.lora_rank:
            raise ValueError(f"lora_alpha={self.lora_alpha} and lora_rank=0; give both, or leave it out")
        if self.offload and self.checkpointing != "full":
            raise ValueError(
                f"offload=True and checkpointing={self.checkpointing!r}: the inputs of layers are offloaded, "
                f"which full checkpointing alone keeps; set checkpointing to full"
            )
        for name in _SIZES if self.model is not None else ():
            if getattr(self, name) not in [getattr(default_config(cuda), name) for cuda in (False, True)]:
                raise ValueError(
                    f"{name}={getattr(self, name)} and model={self.model!r}: sizes are those of the model; "
                    f"leave {name} out"
                )
        for name in ("top_p", "max_density"):
            if getattr(self, name) > 1.0:
                raise ValueError(f"{name}={getattr(self, name)} is a share: it must be at most 1.0")

    def absolute(self) -> TrainConfig:
        """The same where paths hold in any working directory."""
        paths = {name: getattr(self, name) for name in _PATHS}
        if self.tokenizer != BYTES:
            paths["tokenizer"] = self.tokenizer
        return replace(self, **{name: path and str(Path(path).absolute()) for name, path in paths.items()})

    def saves_after(self, step: int) -> bool:
        """Whether a checkpoint is due after `step` (from 0): every `save_every`, and at the end."""
        done = step + 1
        return self.save_every > 0 and (done % self.save_every == 0 or done == self.steps)

    def differences(self, saved: dict) -> list[str]:
        """What forbids resuming from a checkpoint of settings `saved`, one line each."""
        now = asdict(self)
        found = [
            f"{name}: checkpoint {saved.get(name)!r}, now {now[name]!r}"
            for name in RESUME_FIELDS
            if saved.get(name) != now[name]
        ]
        steps = [[settings.get(name, 0) for name in ("batch", "dp")] for settings in (saved, now)]
        if math.prod(steps[0]) != math.prod(steps[1]):
            then, here = (f"{batch} x {dp}" for batch, dp in steps)
            found.append(f"batch x dp: checkpoint {then}, now {here}")
        return found


_SIZES = ("layers", "width", "heads", "kv_heads", "head_dim", "mlp")
_PATHS = ("data", "out", "model")
_POSITIVE = (
    "seq_len batch dp layers width heads kv_heads head_dim mlp block_size steps lr clip top_p "
    "max_density keep log_every timeout mlp_tiles"
).split()
_CHOICES = {
    "packing": ("concat", "best-fit"),
    "device": ("auto", "cpu", "cuda"),
    "dtype": ("float32", "bfloat16"),
    "shard": ("full", "hybrid", "none"),
    "checkpointing": ("none", "selective", "full"),
    "tracker": (NO_TRACKER, *TRACKERS),
}


def default_config(cuda: bool) -> TrainConfig:
    """The defaults of a GPU machine (`cuda`), or of a CPU machine: about a million parameters."""
    if not cuda:
        return TrainConfig()
    return TrainConfig(
        seq_len=65536,
        layers=8,
        width=2048,
        heads=16,
        kv_heads=4,
        head_dim=128,
        mlp=5632,
        steps=100,
        lr=6e-4,
        warmup=10,
        dtype="bfloat16",
        checkpointing="full",
        max_density=0.15,
        save_every=50,
    )


@dataclass(frozen=True)
class Command:
    """Train a transformer on long text with sparse context parallelism."""

    settings: TrainConfig
    config: Path | None = None  # TOML or JSON file of settings; those given here win. A run writes one.


C = TypeVar("C", bound=Command)


def parse_command(kind: type[C], arguments: Sequence[str]) -> C:
    """The command of this kind that `arguments` describe, their file of settings read.

    Usage errors, files among them, end the program with the reason and exit code 2.
    """
    import torch
    import tyro

    default = default_config(torch.cuda.is_available())
    given, _ = tyro.cli(_File, args=arguments, return_unknown_args=True, add_help=False)
    if given.config:
        try:
            default = read_settings(given.config, default)
        except ValueError as error:
            print(error, file=sys.stderr)
            raise SystemExit(2) from error
    flat = (tyro.conf.OmitArgPrefixes,)
    return tyro.cli(kind, prog="sparring train", args=arguments, default=kind(default), config=flat)


@dataclass(frozen=True)
class _File:
    config: Path | None = None


def parse_config(arguments: Sequence[str] | None = None) -> TrainConfig:
    """The settings that command-line `arguments` (default: `sys.argv[1:]`) describe; see `parse_command`."""
    return parse_command(Command, sys.argv[1:] if arguments is None else arguments).settings


def describe(config: TrainConfig) -> str:
    """All settings, one line each, as printed at the start of a job."""
    width = max(len(field.name) for field in fields(config))
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in asdict(config).items())
