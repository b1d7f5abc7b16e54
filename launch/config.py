"""Every setting of the training job, in one frozen dataclass; the command line is made from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields

#: Settings that must be the same for a checkpoint to be resumed.
RESUME_FIELDS = (
    "data seed seq_len batch dp layers width heads kv_heads head_dim mlp pattern top_p max_density "
    "block_size steps lr warmup weight_decay clip dtype"
).split()


@dataclass(frozen=True)
class TrainConfig:
    """Train a Llama-architecture model on long text with sparse context parallelism.

    Run under torchrun (one process per rank); without it the job runs on one rank. The defaults are
    those of a CPU machine, or of a GPU machine where this is one.
    """

    data: str | None = None  # Text file or folder; default: the sources of Python's standard library.
    out: str = "runs/quickstart"  # Folder of metrics, checkpoints, summary.json and report.png.
    seed: int = 0  # Of the initial weights and the order of the data.
    resume: bool = False  # Continue from the newest checkpoint in `out`, if there is one.
    device: str = "auto"  # auto | cpu | cuda

    seq_len: int = 8192  # Tokens in one packed sequence, over all ranks.
    batch: int = 1  # Sequences per data-parallel group and step.
    dp: int = 1  # Data-parallel groups; the ranks of each share one sequence.

    layers: int = 2  # Transformer layers.
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
    dtype: str = "float32"  # float32 | bfloat16 (weights; the optimizer keeps fp32 copies)
    checkpointing: bool = False  # Recompute activations in the backward pass: less memory, more time.

    save_every: int = 20  # Steps between checkpoints; 0 saves none.
    keep: int = 2  # Checkpoints kept.
    log_every: int = 1  # Steps between progress lines where there is no terminal.
    compare: bool = True  # Also run dense and one-block-window attention, same seed and steps.

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be greater than 0")
        for name in ("warmup", "weight_decay", "save_every", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be less than 0")
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {allowed}")
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
        for name in ("top_p", "max_density"):
            if getattr(self, name) > 1.0:
                raise ValueError(f"{name}={getattr(self, name)} is a share: it must be at most 1.0")

    def saves_after(self, step: int) -> bool:
        """Whether a checkpoint is due after `step` (from 0): every `save_every`, and at the end."""
        done = step + 1
        return self.save_every > 0 and (done % self.save_every == 0 or done == self.steps)

    def differences(self, saved: dict) -> list[str]:
        """What forbids resuming from a checkpoint of settings `saved`, one line each."""
        return [
            f"{name}: checkpoint {saved.get(name)!r}, now {getattr(self, name)!r}"
            for name in RESUME_FIELDS
            if saved.get(name) != getattr(self, name)
        ]


_POSITIVE = (
    "seq_len batch dp layers width heads kv_heads head_dim mlp block_size steps lr clip top_p "
    "max_density keep log_every timeout"
).split()
_CHOICES = {"device": ("auto", "cpu", "cuda"), "dtype": ("float32", "bfloat16")}


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
        checkpointing=True,
        max_density=0.15,
        save_every=50,
    )


def parse_config(arguments: Sequence[str] | None = None) -> TrainConfig:
    """The configuration that command-line `arguments` (default: `sys.argv[1:]`) describe.

    A refused value ends the program with the reason and exit code 2, as any usage error does.
    """
    import torch
    import tyro

    default = default_config(torch.cuda.is_available())
    return tyro.cli(TrainConfig, prog="sparring train", args=arguments, default=default)


def describe(config: TrainConfig) -> str:
    """All settings, one line each, as printed at the start of a job."""
    width = max(len(field.name) for field in fields(config))
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in asdict(config).items())
