"""Training traces: W ranks follow one rank, step by step, with the same plans."""

from __future__ import annotations

import tiny_models
import torch

from sparring.cp import ContextParallel, run_threads
from sparring.cp.transport import Alone
from sparring.kernels.patterns import VerticalSlash

STEPS, LENGTH = 12, 512
PATTERN = VerticalSlash(0.7, columns=(4, 24), slashes=(1, 6), probe=16, sink=2, window=16)


def batch(step: int) -> dict:
    """Text with structure that can be learned: one phrase again and again, in two documents."""
    g = torch.Generator().manual_seed(step)
    phrase = torch.arange(37) * 11 % tiny_models.VOCAB  # each token tells the next
    tokens = phrase.repeat(LENGTH // 37 + 1)[None, :LENGTH]
    cut = int(torch.randint(150, 350, (), generator=g))
    return {"input_ids": tokens, "labels": tokens, "document_ids": (torch.arange(LENGTH) >= cut)[None].long()}


def train(transport, model, recorded=None):
    """Losses of all steps, and the plans of all steps (of the whole sequence)."""
    cp = ContextParallel(transport, pattern=PATTERN, block_size=16, grad_reduce="sum", recall_every=0)
    model = cp.attach(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses, plans = [], []
    for step in range(STEPS):
        with cp.replay(recorded[step] if recorded else None):
            shard = cp.shard(batch(step))
        loss = cp.loss(model(**shard.inputs), shard)
        loss.backward()
        cp.sum_gradients(model)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        plans.append(cp.plans(shard))
    return losses, plans


def train_on_two():
    models = [tiny_models.llama() for _ in range(2)]  # here: threads share one random state
    return run_threads(2, lambda transport: train(transport, models[transport.rank]))


def test_two_ranks_follow_one():
    """The sparse loss trace at W = 2 equals that of W = 1 with replayed plans to 1e-4 at every step."""
    results = train_on_two()
    losses, plans = results[0]
    assert results[1][0] == losses  # the loss is global: equal on both ranks
    alone, _ = train(Alone(), tiny_models.llama(), plans)
    assert losses[-1] < 0.65 * losses[0]
    assert max(abs(a - b) for a, b in zip(losses, alone, strict=True)) <= 1e-4


def test_plans_barely_move_without_replay():
    """Estimated anew by one rank, at most one tile in a thousand differs over the first steps."""
    plans = train_on_two()[0][1]
    _, alone = train(Alone(), tiny_models.llama())
    different = total = 0
    for step in range(4):
        for layer, plan in plans[step].items():
            blocks = alone[step][layer].geometry.num_blocks
            mine, other = plan.tiles_bool()[..., :blocks, :blocks], alone[step][layer].tiles_bool()
            different += int((mine != other).sum())
            total += int(other.sum())
    print(f"tiles that differ: {different} of {total}, {different / total:.2e}")
    assert different / total < 1e-3


class Arange(torch.nn.Module):
    """A mistake that verify must find: positions counted from the start of the shard."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, position_ids):
        return self.model(input_ids, torch.arange(input_ids.shape[1]).expand_as(input_ids))


def test_verify_tells_right_from_wrong():
    """The sharded model agrees with one process; one that ignores its position ids does not."""

    def errors(models):
        def body(transport):
            cp = ContextParallel(transport, pattern=PATTERN, block_size=16, recall_every=0)
            model = cp.attach(models[transport.rank])
            result = cp.verify(model, batch(0))
            assert "2 ranks against one on 64 tokens" in str(result)
            return result.error / result.scale

        return run_threads(2, body)

    assert max(errors([tiny_models.llama() for _ in range(2)])) < 1e-5
    assert min(errors([Arange(tiny_models.TinyGPT()) for _ in range(2)])) > 1e-2
