"""`sparring export`: the newest checkpoint of a run as a folder that transformers or peft loads."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from .checkpoint import read_values, verify
from .config import TrainConfig
from .manifest import CheckpointError, newest
from .shards import fill, saved_tensors
from .tokens import BYTES

_PART = "model."  # of a trainee's state


def export(run: Path, out: Path, merge: bool = False) -> Path:
    """Write the model of the newest checkpoint of `run` into a new folder `out`, which is returned.

    safetensors in the dtype of the run's computation, config.json, and the tokenizer if the run had one. Of
    a run with adapters: a peft folder, or with `merge` the whole model. Raises CheckpointError for what
    `load_checkpoint` refuses, ValueError for an `out` that holds files, and for a `merge` without adapters.
    """
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} holds files; give a new folder")
    root = run / "checkpoints"
    folder = newest(root)
    verify(folder)
    config = TrainConfig(**read_values(root)[1]["config"])
    if merge and not config.lora_rank:
        raise ValueError(f"{run} trained all weights (lora_rank=0); leave out --merge")
    model = _load(folder, config)
    if merge:
        model = model.merge_and_unload()
    model.to(getattr(torch, config.dtype)).save_pretrained(out)
    if (name := config.tokenizer or config.model or BYTES) != BYTES:
        _copy_tokenizer(name, out)
    return out


def _load(folder: Path, config: TrainConfig) -> nn.Module:
    """The model of a checkpoint on the CPU, a PeftModel where the run had adapters."""
    from .model import build_model, lora_config

    saved = {n.removeprefix(_PART): t for n, t in saved_tensors(folder).items() if n.startswith(_PART)}
    if config.model is None:
        model = build_model(config, saved["model.embed_tokens.weight"].shape[0])
    else:
        model = build_model(config)
    prefix = ""
    if config.lora_rank:
        from peft import get_peft_model

        if config.model is None:
            raise ValueError(f"{folder}: adapters of a model that was drawn by seed cannot be exported")
        model, prefix = get_peft_model(model, lora_config(config)), "base_model.model."
    own = dict(model.named_parameters())
    trained = {name.removeprefix(prefix) for name, p in own.items() if p.requires_grad}
    if trained != saved.keys():
        differing = sorted(trained ^ saved.keys())
        raise CheckpointError(f"{folder}: {differing[0]} is not in both checkpoint and model {config.model}")
    tensors = {_PART + name: torch.empty(own[prefix + name].shape, dtype=saved[name].dtype) for name in saved}
    fill(folder, tensors)
    with torch.no_grad():
        for name in saved:
            own[prefix + name].copy_(tensors[_PART + name])
    return model


def _copy_tokenizer(folder: str, out: Path) -> None:
    """What transformers loads from `folder`, which runs no code of it."""
    from transformers import AutoTokenizer

    from .model import LOCAL

    AutoTokenizer.from_pretrained(folder, **LOCAL).save_pretrained(out)


def main(arguments: Sequence[str] | None = None) -> None:
    """`sparring export RUN_DIR OUT_DIR [--merge]`."""
    parser = argparse.ArgumentParser(prog="sparring export", description=export.__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--merge", action="store_true", help="add the adapters to the weights of the model")
    given = parser.parse_args(arguments)
    try:
        print(export(given.run_dir, given.out_dir, given.merge))
    except (ValueError, CheckpointError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
