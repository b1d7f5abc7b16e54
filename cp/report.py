"""Report: what one step did over the whole group, and what the planner expected of it."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np
import torch

from ..balance import Decision, step_imbalance, worker_imbalance
from ..balance.schedule import HEADS, HEADS_RING
from .record import Record
from .transport import Transport

CHANNELS = ("keys", "grads", "columns", "outer keys", "outer grads", "needs", "heads", "queries")


@dataclass(frozen=True, eq=False)
class Report:
    """One step over the whole group.

    why: this exchange.
    density, density_tiles: computed pairs / visible pairs, with and without columns. recall: share of
    the attention mass that the plans hold, of sampled queries, or None where not sampled this step.
    work_by_layer: float64 [W, steps + 1] for each layer, tiles of each rank in each step, mean over heads;
    column work is last. predicted: the same of one layer as the planner expected it when it chose the layout;
    None where it had no choice, or where ranks share heads, whose work a layout does not change.
    moved: for each layer whose query blocks moved, how many, and the worker imbalance that they had before.
    bytes_moved: by traffic class, over all ranks and layers, forward and backward; classes without any are
    left out. What a hierarchical ring moves between nodes has classes of its own, and so have the headers
    in which ranks say what they need of each other. bytes_least: of keys and of their gradients, what the
    tiles of the plans make necessary if queries stay where they are; see `Record`.
    waited: seconds that each rank of the group waited for messages of others in attention; on CUDA, that
    its stream did: the communication that computation did not hide. elapsed: seconds from the making of the
    shard to the last wait, of the slowest rank. straggler: global rank that the others waited for, if there
    is one. headers, header_wait: how often the host of each rank waited for a header (law 5), and the seconds
    that it did in all, of the slowest rank.
    keys_by_layer: (pairs that queries saw, pairs that plans promised) summed over the times that the layer
    ran, recomputation included; in the first steps only.
    """

    layout: str
    exchange: str
    why: str
    density: float
    density_tiles: float
    density_by_layer: dict
    recall: float | None
    recall_by_layer: dict
    work_by_layer: dict[Hashable, np.ndarray]
    predicted: np.ndarray | None
    moved: dict[Hashable, tuple[int, float]]
    bytes_moved: dict[str, int]
    bytes_least: dict[str, int]
    waited: tuple[float, ...]
    elapsed: float
    straggler: int | None
    headers: int
    header_wait: float
    keys_by_layer: dict[Hashable, tuple[int, int]]

    @property
    def work(self) -> np.ndarray:
        """float64 [W, steps + 1]: summed over layers."""
        return np.sum(list(self.work_by_layer.values()), axis=0)

    @property
    def worker_imbalance(self) -> float:
        return worker_imbalance(self.work)

    @property
    def step_imbalance(self) -> float:
        return step_imbalance(self.work)

    @property
    def worker_imbalance_by_layer(self) -> dict[Hashable, float]:
        return {layer: worker_imbalance(work) for layer, work in self.work_by_layer.items()}

    @property
    def step_imbalance_by_layer(self) -> dict[Hashable, float]:
        return {layer: step_imbalance(work) for layer, work in self.work_by_layer.items()}

    @property
    def exposed(self) -> float:
        """Waiting as a share of the elapsed time, mean over ranks; 0 where nothing was waited for."""
        return sum(self.waited) / len(self.waited) / self.elapsed if self.elapsed else 0.0

    def __str__(self) -> str:
        recall = "not sampled" if self.recall is None else f"{self.recall:.4f}"
        lines = [
            f"layout {self.layout}, exchange {self.exchange} ({self.why})",
            f"density {self.density:.4f} (tiles {self.density_tiles:.4f}), recall {recall}",
            f"imbalance: worker {self.worker_imbalance:.3f}, step {self.step_imbalance:.3f} (max / mean)",
        ]
        if len(self.work_by_layer) > 1:
            workers, steps = self.worker_imbalance_by_layer, self.step_imbalance_by_layer
            lines.append(f"  worst layers: worker {_worst(workers)}, step {_worst(steps)}")
        if self.predicted is not None:
            layers, total = len(self.work_by_layer), self.work.sum()
            lines.append(
                f"  predicted: worker {worker_imbalance(self.predicted):.3f}, "
                f"step {step_imbalance(self.predicted):.3f}; "
                f"{self.predicted.sum():.1f} tiles in a layer, measured {total / layers:.1f}"
            )
        if self.moved:
            blocks, before = zip(*self.moved.values(), strict=True)
            after = max(self.worker_imbalance_by_layer[layer] for layer in self.moved)
            lines.append(
                f"  query blocks moved: {sum(blocks)} in layers {', '.join(map(str, self.moved))}, "
                f"worker imbalance there {max(before):.3f} -> {after:.3f}"
            )
        mean = sum(self.waited) / len(self.waited)
        late = "" if self.straggler is None else f": the others waited for rank {self.straggler}"
        lines += [
            f"MiB moved: {_mebibytes(self.bytes_moved)}; tiles need at least {_mebibytes(self.bytes_least)}",
            f"waited for other ranks: {mean:.2f} s on average, {self.exposed:.1%} of {self.elapsed:.2f} s; "
            f"{min(self.waited):.2f} s at least{late}",
        ]
        if self.headers:
            lines.append(f"waited for headers: {self.headers} times, {self.header_wait:.3f} s")
        if self.keys_by_layer:
            seen, promised = (sum(x) for x in zip(*self.keys_by_layer.values(), strict=True))
            lines.append(f"keys seen by queries: {seen} of {promised} promised, in all layers and ranks")
        return "\n".join(lines)


def combine(record: Record, transport: Transport, decision: Decision) -> Report:
    """The report of a step from the records of all ranks, which all call it."""
    layers = list(record.elements)
    if not layers:
        raise ValueError("no attention ran with this shard; call the model with **shard.inputs first")

    def of_layers(counts: dict) -> torch.Tensor:
        return torch.stack([counts[layer] for layer in layers])

    counts = torch.cat((of_layers(record.elements), of_layers(record.least)), 1)
    device = counts.device
    transport.all_reduce(counts).wait()
    counts = counts.cpu()
    tiles, columns, visible = counts[:, :3].double().T
    work = transport.all_gather(of_layers(record.work)).cpu().numpy()  # [W, layers, steps + 1]
    recall = {layer: float(value) for layer, value in record.recall.items()}
    moved = torch.tensor([record.bytes[channel] for channel in CHANNELS], dtype=torch.int64)
    moved = transport.all_gather(moved.to(device)).sum(0).tolist()
    keys = {layer: torch.stack(runs).sum(0)[:2] for layer, runs in record.keys.items()}
    for total in keys.values():
        transport.all_reduce(total).wait()
    headers = record.waits.headers
    waits = torch.tensor([*record.waits.seconds(), sum(headers)], dtype=torch.float64)
    waited, elapsed, header_wait = transport.all_gather(waits.to(device)).cpu().T
    known = decision.table and decision.exchange not in (HEADS, HEADS_RING)
    return Report(
        layout=decision.layout.name,
        exchange=decision.exchange,
        why=decision.why,
        density=float((tiles + columns).sum() / visible.sum()),
        density_tiles=float(tiles.sum() / visible.sum()),
        density_by_layer=dict(zip(layers, ((tiles + columns) / visible).tolist(), strict=True)),
        recall=sum(recall.values()) / len(recall) if recall else None,
        recall_by_layer=recall,
        work_by_layer=dict(zip(layers, work.swapaxes(0, 1), strict=True)),
        predicted=decision.chosen.work if known else None,
        moved=dict(record.moved),
        bytes_moved={name: count for name, count in zip(CHANNELS, moved, strict=True) if count},
        bytes_least=dict(zip(("keys", "grads"), counts[:, 3:].sum(0).tolist(), strict=True)),
        waited=tuple(waited.tolist()),
        elapsed=float(elapsed.max()),
        straggler=find_straggler(waited.tolist(), float(elapsed.max()), transport.ranks),
        headers=len(headers),
        header_wait=float(header_wait.max()),
        keys_by_layer={layer: tuple(total.tolist()) for layer, total in keys.items()},
    )


def find_straggler(waited: list[float], elapsed: float, ranks: tuple[int, ...]) -> int | None:
    """The rank that all others waited for: it waited least, by more than a tenth of the time of the step."""
    least = min(range(len(waited)), key=waited.__getitem__)
    others = (sum(waited) - waited[least]) / max(1, len(waited) - 1)
    return ranks[least] if others - waited[least] > 0.1 * elapsed else None


def _worst(by_layer: dict[Hashable, float]) -> str:
    layer = max(by_layer, key=by_layer.__getitem__)
    return f"{by_layer[layer]:.3f} in {layer}"


def _mebibytes(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count / 2**20:.1f}" for name, count in counts.items()) or "none"
