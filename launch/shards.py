"""Tensors of a checkpoint: one safetensors file per rank, as torch.distributed.checkpoint lays them out.

The header of a file says where each piece lies in its whole tensor, which is all that torch's
HuggingFaceStorageReader needs to fill tensors of any sharding. Its writer is not used: it sends pickles
between the ranks, and holds a second copy of the file in memory.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from .manifest import CheckpointError, sync

OFFSETS = "DCP_SHARDING_INFO"  # torch's name, in the header


@dataclass(frozen=True)
class Piece:
    """data: a copy on the CPU, contiguous. offsets: its first element's index in the whole tensor."""

    data: Tensor
    offsets: tuple[int, ...]


def stage(tensors: Mapping[str, Tensor], rank: int) -> dict[str, Piece]:
    """Copies of the pieces that this rank writes: of replicas the first does, of plain tensors rank 0."""
    pieces = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor):
            if _is_writer(tensor):
                (chunk,) = tensor.__create_chunk_list__()
                pieces[name] = Piece(_copy(tensor.to_local()), tuple(chunk.offsets))
        elif rank == 0:
            pieces[name] = Piece(_copy(tensor), (0,) * tensor.dim())
    return pieces


def write(path: Path, pieces: Mapping[str, Piece]) -> None:
    """Write this rank's file, and wait until it is on the disk."""
    offsets = {name: {"saved_offsets": piece.offsets} for name, piece in pieces.items()}
    header = {"format": "pt", "DCP_VERSION": "1.0", OFFSETS: json.dumps(offsets)}
    save_file({name: piece.data for name, piece in pieces.items()}, path, metadata=header)
    sync(path)


def fill(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Read `tensors` from the files of a checkpoint, in place; each rank what it holds.

    Raises CheckpointError unless all are there, whole, with this shape and dtype.
    """
    reader = dcp.HuggingFaceStorageReader(str(folder))
    try:
        saved = reader.read_metadata().state_dict_metadata
        for name, tensor in tensors.items():
            _compare(folder, name, tensor, saved.get(name))
        with warnings.catch_warnings():  # each rank reads alone: nothing is sent
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load(dict(tensors), storage_reader=reader, no_dist=True)
    except (SafetensorError, dcp.CheckpointException, KeyError, ValueError, OSError) as error:
        raise CheckpointError(f"{folder}: {error}") from error


def saved_tensors(folder: Path) -> dict[str, Tensor]:
    """Tensors without storage (meta) of the names, shapes and dtypes that a checkpoint has."""
    try:
        saved = dcp.HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    except SafetensorError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    return {n: torch.empty(t.size, dtype=t.properties.dtype, device="meta") for n, t in saved.items()}


def _compare(folder: Path, name: str, tensor: Tensor, saved) -> None:
    if saved is None:
        raise CheckpointError(f"{folder}: none of its files has {name}")
    for what, found, wanted in (
        ("shape", tuple(saved.size), tuple(tensor.shape)),
        ("dtype", saved.properties.dtype, tensor.dtype),
    ):
        if found != wanted:
            raise CheckpointError(f"{folder}: {name} has {what} {found} here, {wanted} in the model")
    held = sum(chunk.sizes.numel() for chunk in saved.chunks)
    if held != tensor.numel():
        raise CheckpointError(f"{folder}: {name} has {held} elements in its files, not {tensor.numel()}")


def _is_writer(tensor: DTensor) -> bool:
    """Whether this rank writes its piece: the first of its replicas, and not empty (but for one rank)."""
    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None:
        return False
    first = all(c == 0 for c, p in zip(coordinate, tensor.placements, strict=True) if p.is_replicate())
    return first and (tensor.to_local().numel() > 0 or not any(coordinate))


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()
