"""A task that cannot be solved without distance: every token repeats one at least 1024 tokens before it.

Each sequence copies itself after a distance drawn anew for that sequence, so the model must find by
content where to read, and the pattern must find that distance on the fly. The sequence is sharded over
ranks (threads of this process); accuracy is counted on tokens whose source lies on another rank. Dense
attention, vertical-slash within a quarter of the pairs, and a window of one block train alike.

    python benchmarks/copy_task.py
"""

from __future__ import annotations

import argparse
import csv
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from sparring.cp import ContextParallel, run_threads
from sparring.cp.batch import IGNORE
from sparring.kernels.patterns import Dense, Pattern, SinkWindow, VerticalSlash

BLOCK = 128
PATTERNS = {
    "dense": Dense(),
    "vertical-slash": VerticalSlash(top_p=0.95, columns=(8, 32), slashes=(2, 5), sink=4, window=0),
    "window": SinkWindow(sink=0, window=0),
}


@dataclass(frozen=True)
class Task:
    """Sizes of the task; distances are drawn from [nearest, farthest]."""

    length: int = 3072
    nearest: int = 1024
    farthest: int = 1792
    vocab: int = 512
    steps: int = 50
    evaluate: int = 8
    world: int = 2


class CopyModel(nn.Module):
    """One attention layer that can match a pair of tokens with an earlier equal pair.

    Tokens [B, S, 3] are (this, previous, the one before). A query is made of (this, previous), a key of
    (previous, the one before) by the same matrix (shared-QK as in Reformer, arXiv 2001.04451), so that
    equal contexts attract each other from the start; the value says which token came next.
    """

    def __init__(self, vocab: int, heads: int = 2, dim: int = 64):
        super().__init__()
        self.heads, self.dim = heads, dim
        width = heads * dim
        self.embed = nn.Embedding(vocab, width)
        self.match = nn.Linear(2 * width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, vocab, bias=False)
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, tokens, attention):
        this, previous, before = self.embed(tokens).unbind(2)
        q = self.match(torch.cat((this, previous), -1)) * self.gain
        k = self.match(torch.cat((previous, before), -1))
        q, k, v = (x.unflatten(2, (self.heads, self.dim)).transpose(1, 2) for x in (q, k, self.value(this)))
        return self.out(attention(q, k, v).transpose(1, 2).flatten(2))


def make_batch(task: Task, seed: int) -> tuple[dict, int]:
    """One sequence that repeats itself after a random distance; labels only where it does."""
    g = torch.Generator().manual_seed(seed)
    distance = int(torch.randint(task.nearest, task.farthest + 1, (), generator=g))
    base = torch.randint(task.vocab, (distance,), generator=g)
    text = base.repeat(task.length // distance + 2)[: task.length + 3]
    tokens = torch.stack((text[2:-1], text[1:-2], text[:-3]), -1)[None]
    labels = text[3:].clone()
    labels[: distance + 2] = IGNORE  # nothing to copy yet
    return {"input_ids": tokens, "shift_labels": labels[None]}, distance


def train(task: Task, pattern: Pattern) -> list[dict]:
    """Trains on `world` ranks and evaluates on unseen sequences and distances; one result a rank."""

    models = []
    for _ in range(task.world):  # here, because threads share one random state
        torch.manual_seed(0)
        models.append(CopyModel(task.vocab))

    def body(transport):
        model = models[transport.rank]
        cp = ContextParallel(transport, pattern=pattern, layout="striped", grad_reduce="sum", recall_every=0)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        densities = []
        for step in range(task.steps):
            shard = cp.shard(make_batch(task, step)[0])
            logits = model(shard.inputs["input_ids"], lambda q, k, v, s=shard: cp.attention(q, k, v, s))
            loss = cp.loss(logits, shard)
            optimizer.zero_grad()
            loss.backward()
            cp.sum_gradients(model)
            optimizer.step()
            densities.append(cp.report(shard).density)
        right, remote_right, counted, remote_counted = 0, 0, 0, 0
        for number in range(task.evaluate):
            batch, distance = make_batch(task, 10**6 + number)
            with torch.no_grad():
                shard = cp.shard(batch)
                logits = model(shard.inputs["input_ids"], lambda q, k, v, s=shard: cp.attention(q, k, v, s))
            densities.append(cp.report(shard).density)
            hit = logits.argmax(-1)[0] == shard.labels[0]
            valid = shard.labels[0] != IGNORE
            source = (shard.geometry.positions + 1 - distance).clamp(min=0) // BLOCK
            owner = torch.from_numpy(shard.layout.source_of_block)[source]
            remote = valid & (owner != transport.rank)
            right, counted = right + int((hit & valid).sum()), counted + int(valid.sum())
            remote_right += int((hit & remote).sum())
            remote_counted += int(remote.sum())
        totals = torch.tensor([right, counted, remote_right, remote_counted])
        transport.all_reduce(totals).wait()
        right, counted, remote_right, remote_counted = totals.tolist()
        return {
            "loss": loss.item(),
            "density": sum(densities) / len(densities),
            "accuracy": right / counted,
            "remote_accuracy": remote_right / remote_counted,
            "remote_share": remote_counted / counted,
        }

    return run_threads(task.world, body)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=Task.steps)
    parser.add_argument("--out", type=Path, default=None, help="CSV file to write")
    options = parser.parse_args()
    task = Task(steps=options.steps)
    print(f"{task}\nchance {1 / task.vocab:.4f}")
    rows = []
    for name, pattern in PATTERNS.items():
        began = time.perf_counter()
        row = {"pattern": name, **train(task, pattern)[0], "seconds": time.perf_counter() - began}
        rows.append(row)
        print("  ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{v:<15}" for k, v in row.items()))
    if options.out:
        with options.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    dense, sparse, window = (row["remote_accuracy"] for row in rows)
    print(f"distance {task.nearest} to {task.farthest} tokens, all counted sources on another rank")
    print(f"sparse / dense accuracy {sparse / dense:.4f} at density {rows[1]['density']:.4f}")
    if not (sparse >= 0.95 * dense and rows[1]["density"] <= 0.25 and window < 0.05 and dense > 0.5):
        raise SystemExit("the copy task missed its bars")


if __name__ == "__main__":
    main()
