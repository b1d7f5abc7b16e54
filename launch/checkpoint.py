"""Checkpoints of safetensors and JSON: nothing that is loaded can run, and damage is noticed.

    <root>/step-000020/shard-00000.safetensors ...   the tensors, one file for each rank that holds some
                      /state.json                    everything else, with references to the tensors
                      /manifest.json                 see manifest.py

Each rank writes its own part; any number of ranks can load it, with tensors sharded in any other way.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from .gather import Group, rank_of, together
from .manifest import (
    CheckpointError,
    check,
    commit,
    fingerprint,
    folder_name,
    make_folder,
    newest,
    prune,
    read_file,
    read_manifest,
    write_json,
)
from .shards import Piece, fill, stage, write
from .tree import join, names, split


@dataclass(frozen=True)
class Staged:
    """A copy of a state: its values, and the pieces of tensors that this rank writes."""

    values: dict[str, Any]
    pieces: dict[str, Piece]


def stage_state(state: dict[str, Any], group: Group = None) -> Staged:
    """Copy what this rank will write of `state` to the CPU; training may go on.

    Args:
        state: nested dicts with string keys (and lists) of tensors, numbers, strings, bools, None. A tensor
            is a DTensor, or equal on all ranks.
    """
    tensors: dict[str, torch.Tensor] = {}
    values = split(state, "", tensors)
    return Staged(values, stage(tensors, rank_of(group)))


def write_checkpoint(root: Path, step: int, staged: Staged, keep: int = 2, group: Group = None) -> Path:
    """Write a new checkpoint, make it the latest, and remove all but the newest `keep`.

    All ranks of `group` call it, with the same `root` of a file system that they share. Raises
    CheckpointError on all of them if one fails, or is not heard within the group's timeout. Returns the new
    folder.
    """
    chief = rank_of(group) == 0

    def write_own() -> Sequence[int]:
        if not staged.pieces:
            return ()
        path = folder / _shard_name(rank_of(group))
        write(path, staged.pieces)
        found = fingerprint(path)
        return found["bytes"], *struct.unpack("<4q", bytes.fromhex(found["sha256"]))

    def complete() -> Sequence[int]:
        write_json(folder / "state.json", {"step": step, "state": staged.values})
        files = {"state.json": fingerprint(folder / "state.json")}
        for rank, (size, *digest) in enumerate(written):
            if size:
                files[_shard_name(rank)] = {"bytes": size, "sha256": struct.pack("<4q", *digest).hex()}
        commit(folder, step, files)
        prune(root, folder, keep)
        return ()

    with _naming(root):
        made = together(group, lambda: (make_folder(root, step),) if chief else ())
    folder = root / folder_name(step, made[0][0])
    with _naming(folder):
        written = together(group, write_own)
        together(group, lambda: complete() if chief else ())
    return folder


def save_checkpoint(root: Path, step: int, state: dict[str, Any], keep: int = 2, group: Group = None) -> Path:
    """`stage_state` and `write_checkpoint`, of a `state` after `step` optimizer steps."""
    return write_checkpoint(root, step, stage_state(state, group), keep, group)


def read_values(root: Path) -> tuple[int, dict[str, Any]]:
    """(steps done, state without its tensors) of the latest checkpoint under `root`."""
    folder = newest(root)
    check(folder / "state.json", read_manifest(folder)["state.json"])
    saved = read_file(folder / "state.json", json.loads)
    return saved["step"], saved["state"]


def load_checkpoint(root: Path, template: dict[str, Any], group: Group = None) -> tuple[int, dict[str, Any]]:
    """The latest checkpoint under `root` as (steps done, state).

    Args:
        template: a state with the same tensors (plain or DTensor, on any device, sharded in any way). They
            are overwritten, and are those of the result; its other values are the saved ones.
        group: ranks that check a part of the files each; None: this process checks all.

    Raises CheckpointError, naming the file and the reason, unless every byte is what was written and every
    tensor of checkpoint and template has its like in the other.
    """
    folder = newest(root)
    verify(folder, group)
    step, values = read_values(root)
    wanted: dict[str, torch.Tensor] = {}
    split(template, "", wanted)
    path, saved = folder / "state.json", set(names(values))
    if missing := sorted(wanted.keys() - saved):
        raise CheckpointError(f"{path}: {missing[0]} is missing, and {len(missing) - 1} more tensors")
    if foreign := sorted(saved - wanted.keys()):
        raise CheckpointError(f"{path}: has {foreign[0]}, which the model has not; {len(foreign)} in all")
    fill(folder, wanted)
    return step, join(values, wanted)


def verify(folder: Path, group: Group = None) -> None:
    """CheckpointError on all ranks unless each file of a checkpoint has the sha256 that its manifest says."""
    files = sorted(read_manifest(folder).items())

    def check_own() -> Sequence[int]:
        for name, expected in files[rank_of(group) :: group.size() if group else 1]:
            check(folder / name, expected)
        return ()

    with _naming(folder):
        together(group, check_own)


@contextmanager
def _naming(folder: Path) -> Iterator[None]:
    """Failures inside become a CheckpointError that names the folder."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        raise CheckpointError(f"{folder}: {error}") from error


def _shard_name(rank: int) -> str:
    return f"shard-{rank:05d}.safetensors"
