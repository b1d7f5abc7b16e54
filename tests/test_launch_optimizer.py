"""launch/optimizer.py, and the state of a model in training: exact, complete, refused if it does not fit."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from sparring.cp import ContextParallel
from sparring.launch.config import TrainConfig
from sparring.launch.corpus import Corpus
from sparring.launch.data import PackedText
from sparring.launch.optimizer import build_optimizer, learning_rate, update
from sparring.launch.packing import pack
from sparring.launch.tokens import encode
from sparring.launch.trainee import Trainee

CONFIG = TrainConfig(steps=12, warmup=3)


def model_of(*sizes):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, *sizes or (1,)))


def learn(trainee, steps):
    """Losses of `steps`; the data depends on the step alone."""
    losses = []
    for step in steps:
        x = torch.randn(16, 6, generator=torch.Generator().manual_seed(step))
        loss = (trainee.model(x) - x.sum(1, keepdim=True)).square().mean()
        loss.backward()
        update(trainee.optimizer, CONFIG, step)
        losses.append(loss.item())
    return losses


def trained(steps, model=None):
    """All that changes while a model trains, after `steps` steps of it."""
    model, cp = model or model_of(), ContextParallel(None, block_size=16)
    data = PackedText(pack(Corpus.of([encode(bytes(range(1, 200)))]), 40))
    trainee = Trainee(model, cp, build_optimizer(model, CONFIG), data)
    learn(trainee, range(steps))
    for _ in range(steps):
        cp.shard(next(data))
    torch.manual_seed(steps)
    return trainee


def copied(state):
    if isinstance(state, dict):
        return {key: copied(value) for key, value in state.items()}
    return state.clone() if isinstance(state, torch.Tensor) else state


def assert_equal(left, right):
    if isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype and torch.equal(left, right)
    elif isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            assert_equal(left[key], right[key])
    else:
        assert left == right


def test_everything_that_changes_while_a_model_trains_is_restored():
    """Weights, optimizer, planner, position in the data, random numbers; and the rest is the same."""
    before, after = trained(3), trained(1)
    state = copied(before.state_dict())
    drawn, rest = torch.rand(3), learn(before, range(3, 12))
    after.load_state_dict(state)
    assert_equal(after.state_dict(), state)
    assert torch.equal(torch.rand(3), drawn)
    assert learn(after, range(3, 12)) == rest


def test_a_fresh_trainee_takes_a_state():
    """Its optimizer has no state yet: what is loaded must not depend on that."""
    before, after = trained(3), trained(0)
    state = copied(before.state_dict())
    after.load_state_dict(state)
    assert_equal(after.state_dict(), state)


def test_frozen_weights_are_not_in_the_state_and_stay():
    models = [model_of(), model_of()]
    for model in models:
        model[0].requires_grad_(False)
    with torch.no_grad():
        models[1][0].weight.fill_(2.0)
    before, after = (trained(2, model) for model in models)
    state = before.state_dict()
    rest = ["1.bias", "1.weight", "2.bias", "2.weight"]
    assert sorted(state["model"]) == sorted(state["optimizer"]) == rest
    after.load_state_dict(copied(state))
    assert_equal(after.state_dict()["model"], state["model"])
    assert torch.equal(after.model[0].weight, torch.full((8, 6), 2.0))


def test_a_state_of_another_model_is_refused():
    state = trained(1).state_dict()
    state["model"]["3.weight"] = state["model"].pop("2.weight")
    with pytest.raises(ValueError, match="do not fit the model, in 2 names, first 2.weight"):
        trained(1).load_state_dict(state)


def test_the_norm_is_that_of_all_gradients_before_clipping():
    model = model_of()
    optimizer = build_optimizer(model, CONFIG)
    model(torch.ones(4, 6)).sum().mul(100).backward()
    gradients = torch.cat([p.grad.flatten() for p in model.parameters()]).clone()
    norm, rate = update(optimizer, CONFIG, 5)
    assert norm.item() == pytest.approx(gradients.norm().item(), rel=1e-6) and norm > CONFIG.clip
    assert rate == learning_rate(CONFIG, 5)
    assert all(p.grad is None for p in model.parameters())


def test_only_matrices_decay():
    model = model_of()
    optimizer = build_optimizer(model, CONFIG)
    for group in optimizer.param_groups:
        assert {p.ndim >= 2 for p in group["params"]} == {group["weight_decay"] > 0}
    model.requires_grad_(False)
    model[0].weight.requires_grad_(True)
    [group] = build_optimizer(model, replace(CONFIG, weight_decay=0.2)).param_groups
    assert group["params"] == [model[0].weight] and group["weight_decay"] == 0.2


def test_learning_rate_warms_up_and_ends_at_a_tenth():
    rates = [learning_rate(CONFIG, step) for step in range(CONFIG.steps)]
    assert rates[:3] == pytest.approx([CONFIG.lr / 3, CONFIG.lr * 2 / 3, CONFIG.lr])
    assert rates[3] == pytest.approx(CONFIG.lr)
    assert rates[-1] == pytest.approx(CONFIG.lr / 10)
    assert rates[3:] == sorted(rates[3:], reverse=True)
