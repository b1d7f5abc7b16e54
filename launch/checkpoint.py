"""Checkpoints of safetensors and JSON: nothing that is loaded can run, and damage is noticed.

    <root>/step-000020/model.safetensors ...   one file per top-level key that holds tensors
                      /state.json              everything else, with references to the tensors
                      /manifest.json           size and sha256 of each file, written last
    <root>/latest                              name of the newest complete checkpoint

Every save goes to a new folder and `latest` moves by an atomic rename, so a crash at any moment leaves
the previous checkpoint in force.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

FORMAT = 1
_TENSOR = "__tensor__"


class CheckpointError(Exception):
    """A checkpoint that is missing, incomplete, damaged or of another format."""


def save_checkpoint(root: Path, step: int, state: dict[str, Any], keep: int = 2) -> Path:
    """Write `state` as a new checkpoint, make it the latest, and remove all but the newest `keep`.

    Args:
        root: folder of all checkpoints of one run; only one process may write to it.
        step: optimizer steps done.
        state: nested dicts with string keys (and lists) of tensors, numbers, strings, bools, None.

    Returns the new checkpoint's folder.
    """
    root.mkdir(parents=True, exist_ok=True)
    folder = _new_folder(root, step)
    rest = {}
    for key, value in state.items():
        tensors: dict[str, torch.Tensor] = {}
        rest[key] = _split(value, "", tensors)
        if tensors:
            save_file(tensors, folder / f"{key}.safetensors")
    _write_json(folder / "state.json", {"step": step, "state": rest})
    for path in folder.iterdir():
        _sync(path)
    files = {path.name: _fingerprint(path) for path in sorted(folder.iterdir())}
    _write_json(folder / "manifest.json", {"format": FORMAT, "step": step, "files": files})
    _sync(folder / "manifest.json")
    (root / "latest.new").write_text(folder.name + "\n", encoding="utf-8")
    os.replace(root / "latest.new", root / "latest")
    _prune(root, folder, keep)
    return folder


def load_checkpoint(root: Path) -> tuple[int, dict[str, Any]]:
    """The latest checkpoint under `root` as (steps done, state), tensors on the CPU.

    Raises CheckpointError, naming the file and the reason, unless every byte is what was written.
    """
    folder = root / _read(root / "latest", str.strip)
    files = _read(folder / "manifest.json", _parse_manifest)
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path}: missing, but in the manifest")
        if (found := _fingerprint(path)) != expected:
            raise CheckpointError(f"{path}: damaged: it has {found}, the manifest says {expected}")
    saved = _read(folder / "state.json", json.loads)
    state = {}
    for key, value in saved["state"].items():
        name = f"{key}.safetensors"
        try:
            state[key] = _join(value, load_file(folder / name) if name in files else {})
        except (SafetensorError, KeyError) as error:
            raise CheckpointError(f"{folder / name}: {error}") from error
    return saved["step"], state


def _split(value: Any, path: str, tensors: dict[str, torch.Tensor]) -> Any:
    """`value` as JSON, its tensors moved to `tensors` under their paths, such as "layer.0.weight"."""
    if isinstance(value, torch.Tensor):
        name = path or "tensor"
        if name in tensors:
            raise ValueError(f"two tensors are called {name!r}; keys with dots must not collide")
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        return {_TENSOR: name}
    prefix = f"{path}." if path else ""
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"{prefix}{key!r}: this key is not a string")
        return {key: _split(item, prefix + key, tensors) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_split(item, f"{prefix}{i}", tensors) for i, item in enumerate(value)]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{path}: {type(value).__name__} is neither a tensor nor JSON")


def _join(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """The inverse of `_split` (tuples come back as lists)."""
    if isinstance(value, dict):
        if value.keys() == {_TENSOR}:
            return tensors[value[_TENSOR]]
        return {key: _join(item, tensors) for key, item in value.items()}
    return [_join(item, tensors) for item in value] if isinstance(value, list) else value


def _new_folder(root: Path, step: int) -> Path:
    """A folder that did not exist: a step that was saved before gets a second name."""
    names = [f"step-{step:06d}"] + [f"step-{step:06d}-{n}" for n in range(1, 1000)]
    folder = next(root / name for name in names if not (root / name).exists())
    folder.mkdir()
    return folder


def _prune(root: Path, latest: Path, keep: int) -> None:
    """Remove what crashes left incomplete, and complete checkpoints but the newest `keep`."""
    others = sorted(folder for folder in root.glob("step-*") if folder != latest)
    complete = [folder for folder in others if (folder / "manifest.json").exists()]
    kept = complete[len(complete) - (keep - 1) :] if keep > 1 else []
    for folder in others:
        if folder not in kept:
            shutil.rmtree(folder)


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")


def _sync(path: Path) -> None:
    """Wait until the file is on the disk: what comes after it must not get there first."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def _fingerprint(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": sha256}


def _read(path: Path, parse: Callable[[str], Any]) -> Any:
    try:
        return parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: no complete checkpoint here") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _parse_manifest(text: str) -> dict[str, dict]:
    """The files of a manifest; ValueError if it is none of ours."""
    manifest = json.loads(text)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(f"not a manifest of format {FORMAT}")
    files = manifest.get("files")
    if not isinstance(files, dict) or "state.json" not in files:
        raise ValueError("the manifest does not list state.json")
    return files
