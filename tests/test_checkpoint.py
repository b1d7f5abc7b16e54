"""launch/checkpoint.py and the state of launch/optimizer.py: exact, tamper-evident, crash-safe."""

import builtins
import json
import pickle
import random
from dataclasses import replace

import pytest
import torch
from torch import nn

from sparring.cp import ContextParallel
from sparring.launch import checkpoint
from sparring.launch.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from sparring.launch.config import TrainConfig
from sparring.launch.data import PackedText, encode, pack
from sparring.launch.optimizer import Optimizer, learning_rate
from sparring.launch.trainee import Trainee

CONFIG = TrainConfig(steps=12, warmup=3)


def state_of(step):
    generator = torch.Generator().manual_seed(step)
    return {
        "model": {"a.weight": torch.randn(3, 4, generator=generator), "b": torch.tensor(1.5)},
        "planner": {"layout": "zigzag", "history": [1.1, None, True], "counts": torch.arange(3)},
        "half": {"x": torch.randn(5, generator=generator).bfloat16()},
        "empty": {},
    }


def assert_equal(left, right):
    assert type(left) is type(right)
    if isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype and torch.equal(left, right)
    elif isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            assert_equal(left[key], right[key])
    else:
        assert left == right


def test_round_trip_is_exact(tmp_path):
    folder = save_checkpoint(tmp_path, 7, state_of(7))
    step, state = load_checkpoint(tmp_path)
    assert step == 7
    assert_equal(state, state_of(7))
    assert {path.suffix for path in folder.iterdir()} == {".safetensors", ".json"}


def test_views_and_shared_storage_are_saved_as_what_they_show(tmp_path):
    whole = torch.arange(12.0).view(3, 4)
    save_checkpoint(tmp_path, 1, {"views": {"t": whole.T, "row": whole[1], "whole": whole}})
    views = load_checkpoint(tmp_path)[1]["views"]
    assert torch.equal(views["t"], whole.T) and torch.equal(views["row"], whole[1])


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ({"layer": {0: torch.ones(1)}}, TypeError, "layer.0: this key is not a string"),
        ({"of": {"thing": object()}}, TypeError, "of.thing: object is neither"),
        ({"a.b": torch.ones(1), "a": {"b": torch.ones(1)}}, ValueError, "'a.b'"),
    ],
)
def test_what_cannot_be_restored_exactly_is_refused(tmp_path, value, error, message):
    with pytest.raises(error, match=message):
        save_checkpoint(tmp_path, 1, {"planner": value})
    assert not (tmp_path / "latest").exists()


def test_only_the_newest_are_kept_and_a_saved_step_is_never_overwritten(tmp_path):
    for step in (2, 4, 6):
        save_checkpoint(tmp_path, step, state_of(step), keep=2)
    assert [p.name for p in sorted(tmp_path.glob("step-*"))] == ["step-000004", "step-000006"]
    again = save_checkpoint(tmp_path, 6, state_of(60), keep=2)
    assert again.name == "step-000006-1"
    assert_equal(load_checkpoint(tmp_path)[1], state_of(60))


def test_without_a_complete_checkpoint_loading_says_so(tmp_path):
    with pytest.raises(CheckpointError, match="latest.*no complete checkpoint"):
        load_checkpoint(tmp_path)


def test_every_flipped_bit_and_every_truncation_is_noticed(tmp_path):
    folder = save_checkpoint(tmp_path, 3, state_of(3))
    draw = random.Random(0)
    for path in folder.iterdir():
        content = path.read_bytes()
        positions = draw.sample(range(len(content)), min(len(content), 40))
        damaged = [content[:-1], b""]
        for at in positions:
            flipped = bytearray(content)
            flipped[at] ^= 1 << draw.randrange(8)
            damaged.append(bytes(flipped))
        for version in damaged:
            path.write_bytes(version)
            try:
                step, state = load_checkpoint(tmp_path)
            except CheckpointError as error:
                assert str(folder) in str(error)
            else:  # only in what the manifest says of no file: its white space, its step
                assert path.name == "manifest.json" and step == 3
                assert_equal(state, state_of(3))
        path.write_bytes(content)
    assert_equal(load_checkpoint(tmp_path)[1], state_of(3))


def test_a_missing_file_is_named(tmp_path):
    folder = save_checkpoint(tmp_path, 3, state_of(3))
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: missing"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("crash_at", ["save_file", "_write_json", "_fingerprint", "os.replace"])
def test_a_crash_while_saving_leaves_the_previous_checkpoint(tmp_path, monkeypatch, crash_at):
    save_checkpoint(tmp_path, 2, state_of(2))

    def crash(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if crash_at == "os.replace":
            patch.setattr(checkpoint.os, "replace", crash)
        else:
            patch.setattr(checkpoint, crash_at, crash)
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(tmp_path, 4, state_of(4))
    step, state = load_checkpoint(tmp_path)
    assert step == 2
    assert_equal(state, state_of(2))
    save_checkpoint(tmp_path, 4, state_of(4), keep=1)  # the next save works, and cleans up
    assert load_checkpoint(tmp_path)[0] == 4
    assert len(list(tmp_path.glob("step-*"))) == 1


def test_a_planted_pickle_never_runs(tmp_path):
    canary = tmp_path / "canary"

    class Payload:
        def __reduce__(self):
            return (builtins.open, (str(canary), "w"))

    folder = save_checkpoint(tmp_path, 1, state_of(1))
    planted = pickle.dumps(Payload())
    (folder / ".metadata").write_bytes(planted)
    load_checkpoint(tmp_path)
    (folder / "model.safetensors").write_bytes(planted)
    with pytest.raises(CheckpointError):
        load_checkpoint(tmp_path)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["model.safetensors"] = checkpoint._fingerprint(folder / "model.safetensors")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="model.safetensors"):
        load_checkpoint(tmp_path)
    assert not canary.exists()
    pickle.loads(planted)
    assert canary.exists()  # the payload would have worked


def test_the_error_is_an_exception_that_can_be_pickled():
    error = pickle.loads(pickle.dumps(CheckpointError("a: damaged")))
    assert isinstance(error, Exception) and str(error) == "a: damaged"


def model_of(dtype=torch.float32):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 1))
    return model.to(dtype)


def learn(model, optimizer, steps):
    """Losses of `steps`; the data depends on the step alone."""
    losses = []
    for step in steps:
        x = torch.randn(16, 6, generator=torch.Generator().manual_seed(step))
        dtype = next(model.parameters()).dtype
        loss = (model(x.to(dtype)) - x.sum(1, keepdim=True).to(dtype)).square().mean()
        loss.backward()
        optimizer.step(step)
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_goes_on_exactly_after_save_and_load(tmp_path, dtype):
    model = model_of(dtype)
    optimizer = Optimizer(model, CONFIG)
    learn(model, optimizer, range(6))
    save_checkpoint(tmp_path, 6, {"optimizer": optimizer.state_dict()})
    rest = learn(model, optimizer, range(6, 12))

    resumed = model_of(dtype)
    with torch.no_grad():
        for parameter in resumed.parameters():
            parameter.fill_(9.0)
    again = Optimizer(resumed, CONFIG)
    step, state = load_checkpoint(tmp_path)
    again.load_state_dict(state["optimizer"])
    assert learn(resumed, again, range(step, 12)) == rest
    for left, right in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(left, right)
    for left, right in zip(optimizer.weights.values(), again.weights.values(), strict=True):
        assert left.dtype == torch.float32 and torch.equal(left, right)
        assert optimizer.adamw.state[left]["step"] == again.adamw.state[right]["step"] == 12


def trainee(seed):
    """All that changes while a model trains, after `seed` steps of it."""
    model, cp = model_of(), ContextParallel(None, block_size=16)
    optimizer = Optimizer(model, CONFIG)
    learn(model, optimizer, range(seed))
    rows = pack([encode(bytes(range(1, 200)))], 40)
    data = PackedText(rows)
    for _ in range(seed):
        cp.shard(next(data))
    torch.manual_seed(seed)
    return Trainee(model, cp, optimizer, data)


def test_everything_that_changes_while_a_model_trains_is_restored(tmp_path):
    """Weights, optimizer, planner, position in the data, random numbers."""
    before, after = trainee(3), trainee(1)
    state = before.state_dict()
    save_checkpoint(tmp_path, 3, state)
    drawn = torch.rand(3)
    after.load_state_dict(load_checkpoint(tmp_path)[1])
    assert_equal(after.state_dict(), state)
    assert torch.equal(torch.rand(3), drawn)


def test_small_updates_are_not_lost_in_bfloat16():
    """Rounded to bfloat16, 1 + 1e-3 is 1: only the fp32 copy can add up such updates."""
    model = nn.Linear(1, 1, bias=False).bfloat16()
    nn.init.ones_(model.weight)
    config = replace(CONFIG, lr=1e-3, warmup=0, weight_decay=0.0)
    optimizer = Optimizer(model, config)
    for _ in range(12):
        model(torch.ones(1, 1).bfloat16()).sum().backward()
        optimizer.step(0)
    assert model.weight.item() == pytest.approx(1 - 12e-3, abs=4e-3)


def test_weights_of_another_shape_are_refused():
    saved = Optimizer(nn.Linear(3, 2), CONFIG).state_dict()
    with pytest.raises(ValueError, match=r"weight has shape \(2, 4\), the saved one \(2, 3\)"):
        Optimizer(nn.Linear(4, 2), CONFIG).load_state_dict(saved)


def test_only_matrices_decay():
    optimizer = Optimizer(model_of(), CONFIG)
    for group in optimizer.adamw.param_groups:
        assert {p.ndim >= 2 for p in group["params"]} == {group["weight_decay"] > 0}


def test_learning_rate_warms_up_and_ends_at_a_tenth():
    rates = [learning_rate(CONFIG, step) for step in range(CONFIG.steps)]
    assert rates[:3] == pytest.approx([CONFIG.lr / 3, CONFIG.lr * 2 / 3, CONFIG.lr])
    assert rates[3] == pytest.approx(CONFIG.lr)
    assert rates[-1] == pytest.approx(CONFIG.lr / 10)
    assert rates[3:] == sorted(rates[3:], reverse=True)
