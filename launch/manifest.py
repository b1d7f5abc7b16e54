"""Which checkpoint is complete: a manifest of every file, written last, and `latest`, which names a folder.

    <root>/step-000020/manifest.json           size and sha256 of every other file of the folder
    <root>/latest                              name of the newest complete checkpoint

Every save goes to a folder that did not exist and `latest` moves by an atomic rename, so a crash at any
moment leaves the previous checkpoint in force.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

FORMAT = 2
MANIFEST, LATEST = "manifest.json", "latest"
_NAME = re.compile(r"step-(\d{6,})(?:-(\d+))?")


class CheckpointError(Exception):
    """A checkpoint that is missing, incomplete, damaged, of another format, or not of this model."""


def folder_name(step: int, attempt: int) -> str:
    """A step that was saved before gets a second name."""
    return f"step-{step:06d}" + (f"-{attempt}" if attempt else "")


def make_folder(root: Path, step: int) -> int:
    """Make a folder that did not exist; returns the attempt of its `folder_name`."""
    root.mkdir(parents=True, exist_ok=True)
    attempt = 0
    while True:
        try:
            (root / folder_name(step, attempt)).mkdir()
            return attempt
        except FileExistsError:
            attempt += 1


def commit(folder: Path, step: int, files: dict[str, dict[str, Any]]) -> None:
    """Write the manifest of `files` (name -> fingerprint) and make this checkpoint the latest.

    Raises CheckpointError unless every file is here and as long as the rank that wrote it says.
    """
    for name, expected in files.items():
        size = (folder / name).stat().st_size if (folder / name).is_file() else None
        if size != expected["bytes"]:
            raise CheckpointError(
                f"{folder / name}: {size} bytes here, {expected['bytes']} where it was written; "
                f"all ranks must share this folder"
            )
    write_json(folder / MANIFEST, {"format": FORMAT, "step": step, "files": files})
    sync(folder)
    fresh = folder.parent / f"{LATEST}.new"
    fresh.write_text(folder.name + "\n", encoding="utf-8")
    sync(fresh)
    os.replace(fresh, folder.parent / LATEST)
    sync(folder.parent)


def newest(root: Path) -> Path:
    """The folder that `latest` names."""
    name = read_file(root / LATEST, str.strip)
    if not _NAME.fullmatch(name):
        raise CheckpointError(f"{root / LATEST}: {name[:80]!r} is not the name of a checkpoint")
    return root / name


def read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """name -> fingerprint of every file of a checkpoint; refused if the folder holds any other."""
    if (folder / ".metadata").exists():
        raise CheckpointError(
            f"{folder / '.metadata'}: a pickle, as plain torch.distributed.checkpoint folders have, can run "
            f"code when it is read; checkpoints of sparring have none, and none is read"
        )
    files = read_file(folder / MANIFEST, _parse)
    for path in sorted(folder.iterdir()):
        if path.name not in files and path.name != MANIFEST:
            raise CheckpointError(f"{path}: not in the manifest, so not of this checkpoint")
    return files


def check(path: Path, expected: dict[str, Any]) -> None:
    """CheckpointError unless the file has the fingerprint that the manifest says."""
    if not path.is_file():
        raise CheckpointError(f"{path}: missing, but in the manifest")
    if (found := fingerprint(path)) != expected:
        raise CheckpointError(f"{path}: damaged: it has {found}, the manifest says {expected}")


def prune(root: Path, latest: Path, keep: int) -> None:
    """Remove what crashes left incomplete, and complete checkpoints but the newest `keep`."""
    found = [(match, root / match.string) for p in root.iterdir() if (match := _NAME.fullmatch(p.name))]
    ordered = sorted(found, key=lambda each: (int(each[0][1]), int(each[0][2] or 0)))
    others = [folder for _, folder in ordered if folder != latest]
    complete = [folder for folder in others if (folder / MANIFEST).exists()]
    kept = complete[len(complete) - (keep - 1) :] if keep > 1 else []
    for folder in others:
        if folder not in kept:
            shutil.rmtree(folder)


def fingerprint(path: Path) -> dict[str, Any]:
    """Size and sha256 of a file."""
    with open(path, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": sha256}


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write, and wait until it is on the disk."""
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")
    sync(path)


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk: what comes after it must not get there first."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_file(path: Path, parse: Callable[[str], Any]) -> Any:
    """The parsed text of a file; CheckpointError with its name if it cannot be read."""
    try:
        return parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: no complete checkpoint here") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _parse(text: str) -> dict[str, dict[str, Any]]:
    """The files of a manifest; ValueError if it is none of ours."""
    manifest = json.loads(text)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(f"not a manifest of format {FORMAT}")
    files = manifest.get("files")
    if not isinstance(files, dict) or "state.json" not in files:
        raise ValueError("the manifest does not list state.json")
    return files
