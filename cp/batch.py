"""Reading a batch: documents, positions and shifted labels from what a user has."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.geometry import Documents, Geometry, check_length

IGNORE = -100  # label of a token without a loss
KNOWN = (
    "input_ids", "inputs_embeds", "labels", "shift_labels", "position_ids", "document_ids",
    "attention_mask",
)  # fmt: skip
INTEGER = set(KNOWN) - {"inputs_embeds", "attention_mask"}


def check_batch(batch: dict[str, Tensor], block_size: int) -> tuple[int, int]:
    """(batch size, length); ValueError or NotImplementedError for what cannot be sharded."""
    unknown = [name for name in batch if name not in KNOWN]
    if unknown:
        raise NotImplementedError(f"batch has {unknown}; supported are {list(KNOWN)}")
    for name, x in batch.items():
        if not isinstance(x, Tensor):
            raise ValueError(f"{name} is a {type(x).__name__}; it must be a tensor")
    tokens = batch.get("input_ids", batch.get("inputs_embeds"))
    if tokens is None:
        raise ValueError(f"batch has {list(batch)}; it needs input_ids or inputs_embeds")
    for name, form in (("input_ids", "[batch, length, ...]"), ("inputs_embeds", "[batch, length, width]")):
        if name in batch and batch[name].dim() < len(form.replace(", ...", "").split(",")):
            raise ValueError(f"{name} is {tuple(batch[name].shape)}; it must be {form}")
    if "position_ids" in batch and batch["position_ids"].dim() > 2:
        raise NotImplementedError(
            f"position_ids with {batch['position_ids'].dim()} dims (M-RoPE); only [batch, length]"
        )
    if "attention_mask" in batch and batch["attention_mask"].dim() > 2:
        raise NotImplementedError(
            f"attention_mask with {batch['attention_mask'].dim()} dims; only padding masks [batch, length]"
        )
    if "document_ids" in batch and batch["document_ids"].dim() > 2:
        raise ValueError(f"document_ids is {tuple(batch['document_ids'].shape)}; it must be [batch, length]")
    size, length = tokens.shape[:2]
    if size < 1:
        raise ValueError("batch size is 0; it needs at least 1 row")
    check_length(length, block_size)
    devices = {name: str(x.device) for name, x in batch.items()}
    if len(set(devices.values())) > 1 or "meta" in devices.values():
        raise ValueError(f"the batch is on {devices}; use one device, that holds values")
    for name, tensor in batch.items():
        if name in INTEGER and tensor.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"{name} is of {tensor.dtype}; use torch.int64")
        shared = name == "position_ids" and tensor.shape == (1, length)
        if tensor.shape[:2] != (size, length) and not shared:
            raise ValueError(f"{name} is {tuple(tensor.shape)}; it must start with [{size}, {length}]")
    return size, length


def find_documents(batch: dict[str, Tensor], size: int, length: int) -> Documents:
    """Documents of each row from document_ids, or else from position_ids that restart; less padding.

    attention_mask [B, S] marks tokens; padding stands at the ends of rows and documents. Synchronises.
    """
    starts = torch.zeros(size, length, dtype=torch.bool)
    starts[:, 0] = True
    if "document_ids" in batch:
        ids = batch["document_ids"].cpu()
        starts[:, 1:] |= ids[:, 1:] != ids[:, :-1]
    elif "position_ids" in batch:
        positions = batch["position_ids"].cpu()
        starts[:, 1:] |= (positions[:, 1:] != positions[:, :-1] + 1).expand(size, -1)
    valid = torch.ones(size, length, dtype=torch.bool)
    if "attention_mask" in batch:
        mask = batch["attention_mask"].cpu()
        valid = mask.bool()
        if not torch.equal(mask, valid.to(mask.dtype)):
            raise ValueError(
                f"attention_mask holds {float(mask.min())} to {float(mask.max())}; use 1 for tokens and 0 "
                "for padding"
            )
        starts[:, 1:] |= valid[:, 1:] != valid[:, :-1]
        _check_holes(valid, batch.get("document_ids"))
    documents = []
    for row in range(size):
        begins = starts[row].nonzero()[:, 0].tolist()
        ranges = zip(begins, [*begins[1:], length], strict=True)
        documents.append(tuple((a, b) for a, b in ranges if valid[row, a]))
    return tuple(documents)


def _check_holes(valid: Tensor, document_ids: Tensor | None) -> None:
    """Padding stands at the ends of rows and of documents."""
    ids = torch.zeros(valid.shape, dtype=torch.int64) if document_ids is None else document_ids.cpu()
    for row, name in zip(valid, ids, strict=True):
        at = row.nonzero()[:, 0]
        hole = at[1:] > at[:-1] + 1
        if (hole & (name[at[1:]] == name[at[:-1]])).any():
            raise NotImplementedError(
                "attention_mask with holes inside a document; only padding at the ends of a row, or between "
                "documents of different document_ids"
            )


def shift_labels(batch: dict[str, Tensor], documents: Documents, length: int) -> Tensor | None:
    """int64 [B, S]: the label of each token is the next token of its document, else IGNORE.

    From "labels" (aligned with the tokens, as transformers has them) or "shift_labels" (already shifted).
    """
    if "shift_labels" in batch:
        return batch["shift_labels"]
    if "labels" not in batch:
        return None
    labels = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORE)
    inside = torch.zeros(labels.shape, dtype=torch.bool)
    for row, ranges in enumerate(documents):
        for start, end in ranges:
            inside[row, start : end - 1] = True
    return labels.masked_fill(~inside.to(labels.device), IGNORE)


def position_ids(batch: dict[str, Tensor], documents: Documents, size: int, length: int) -> Tensor:
    """int64 [B, S]: as given, or counted from the start of each document; padding has 0."""
    if "position_ids" in batch:
        return batch["position_ids"].expand(size, -1)
    positions = torch.zeros(size, length, dtype=torch.int64)
    for row, ranges in enumerate(documents):
        for start, end in ranges:
            positions[row, start:end] = torch.arange(end - start)
    return positions.to(next(iter(batch.values())).device)


def take(x: Tensor, geometry: Geometry, fill: int) -> Tensor:
    """[B, S, ...] -> this rank's tokens [B, S', ...] in physical order, padding filled."""
    tail = geometry.num_tokens - x.shape[1]
    pad = (0, 0) * (x.dim() - 2) + (0, tail)
    return torch.nn.functional.pad(x, pad, value=fill)[:, geometry.positions].contiguous()


def fingerprint(x: Tensor) -> int:
    """An integer that depends on every element and on its place. Synchronises."""
    bits = x.detach().double().view(torch.int64) if x.is_floating_point() else x.long() + 1
    weights = torch.arange(1, bits.numel() + 1, device=x.device) * 0x5851F42D4C957F2D  # odd; wraps around
    return int((bits.flatten() * weights).sum())
