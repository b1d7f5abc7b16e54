"""launch/checkpoint.py: exact, tamper-evident, crash-safe."""

import builtins
import json
import pickle
import random
import threading

import pytest
import torch

from sparring.launch import checkpoint, manifest, shards
from sparring.launch.checkpoint import load_checkpoint, save_checkpoint
from sparring.launch.manifest import CheckpointError
from sparring.launch.saver import Saver

SHARD = "shard-00000.safetensors"


def state_of(step):
    generator = torch.Generator().manual_seed(step)
    return {
        "model": {"a.weight": torch.randn(3, 4, generator=generator), "b": torch.tensor(1.5)},
        "planner": {"layout": "zigzag", "history": [1.1, None, True], "counts": torch.arange(3)},
        "half": {"x": torch.randn(5, generator=generator).bfloat16()},
        "empty": {},
    }


def blank(state):
    """A template: the same tensors, other values."""
    if isinstance(state, dict):
        return {key: blank(value) for key, value in state.items()}
    return torch.full_like(state, 77) if isinstance(state, torch.Tensor) else "other"


def load(root):
    return load_checkpoint(root, blank(state_of(0)))


def seal(folder, name):
    """Let the manifest say that a changed file is as it should be."""
    content = json.loads((folder / "manifest.json").read_text())
    content["files"][name] = manifest.fingerprint(folder / name)
    (folder / "manifest.json").write_text(json.dumps(content))


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
    template = blank(state_of(7))
    step, state = load_checkpoint(tmp_path, template)
    assert step == 7
    assert_equal(state, state_of(7))
    assert state["model"]["a.weight"] is template["model"]["a.weight"]  # filled in place
    assert {path.suffix for path in folder.iterdir()} == {".safetensors", ".json"}


def test_views_and_shared_storage_are_saved_as_what_they_show(tmp_path):
    whole = torch.arange(12.0).view(3, 4)
    state = {"views": {"t": whole.T, "row": whole[1], "flat": whole.view(-1), "whole": whole}}
    save_checkpoint(tmp_path, 1, state)
    views = load_checkpoint(tmp_path, blank(state))[1]["views"]
    assert torch.equal(views["t"], whole.T) and torch.equal(views["row"], whole[1])


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ({"layer": {0: torch.ones(1)}}, TypeError, "layer.0: this key is not a string"),
        ({"of": {"thing": object()}}, TypeError, "of.thing: object is neither"),
        ({"a.b": torch.ones(1), "a": {"b": torch.ones(1)}}, ValueError, r"'planner\.a\.b'"),
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
    assert_equal(load(tmp_path)[1], state_of(60))


def test_without_a_complete_checkpoint_loading_says_so(tmp_path):
    with pytest.raises(CheckpointError, match="latest.*no complete checkpoint"):
        load(tmp_path)


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
                step, state = load(tmp_path)
            except CheckpointError as error:
                assert str(folder) in str(error)
            else:  # only in what the manifest says of no file: its white space, its step
                assert path.name == "manifest.json" and step == 3
                assert_equal(state, state_of(3))
        path.write_bytes(content)
    assert_equal(load(tmp_path)[1], state_of(3))


def test_a_missing_file_is_named(tmp_path):
    folder = save_checkpoint(tmp_path, 3, state_of(3))
    (folder / SHARD).unlink()
    with pytest.raises(CheckpointError, match=r"shard-00000\.safetensors: missing"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("b", None, r"state\.json: has model\.b, which the model has not; 1 in all"),
        ("c", torch.zeros(2), r"state\.json: model\.c is missing"),
        ("a.weight", torch.zeros(4, 3), r"model\.a\.weight has shape \(3, 4\) here, \(4, 3\) in the model"),
        ("a.weight", torch.zeros(3, 4).bfloat16(), r"has dtype torch\.float32 here, torch\.bfloat16 in"),
    ],
)
def test_tensors_that_are_not_those_of_the_model_are_refused(tmp_path, name, tensor, message):
    save_checkpoint(tmp_path, 3, state_of(3))
    template = blank(state_of(3))
    del template["model"][name if tensor is None else "b"]
    template["model"] |= {"b": torch.tensor(0.0)} if tensor is not None else {}
    template["model"] |= {} if tensor is None else {name: tensor}
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(tmp_path, template)
    assert "step-000003" in str(caught.value)


def test_files_of_another_run_are_refused(tmp_path):
    """Its manifest, its shard, its whole folder under a name of this run."""
    ours, theirs = (save_checkpoint(tmp_path / name, 3, state_of(n)) for n, name in enumerate("ab"))
    for name in ("manifest.json", SHARD):
        content = (ours / name).read_bytes()
        (ours / name).write_bytes((theirs / name).read_bytes())
        with pytest.raises(CheckpointError, match=f"{SHARD}: damaged"):
            load(tmp_path / "a")
        (ours / name).write_bytes(content)
    theirs.rename(ours.parent / "step-000005")
    (ours.parent / "latest").write_text("../b/step-000003")
    with pytest.raises(CheckpointError, match="latest: '../b/step-000003' is not the name of a checkpoint"):
        load(tmp_path / "a")


def crash(*_, **__):
    raise KeyboardInterrupt


MOMENTS = {
    "before any data": (shards, "save_file"),
    "after the data": (checkpoint, "write_json"),
    "before the manifest": (checkpoint, "commit"),
    "between manifest and latest": (manifest.os, "replace"),
    "while cleaning up": (manifest.shutil, "rmtree"),
}


@pytest.mark.parametrize("again", [False, True], ids=["a new step", "the same step"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_crash_while_saving_leaves_a_complete_checkpoint(tmp_path, monkeypatch, moment, again):
    """The previous one, or the new one where only the cleaning is left to do."""
    save_checkpoint(tmp_path, 2, state_of(2))
    step = 2 if again else 4
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(*MOMENTS[moment], crash)
        save_checkpoint(tmp_path, step, state_of(40), keep=1)
    done = moment == "while cleaning up"
    found, state = load(tmp_path)
    assert found == (step if done else 2)
    assert_equal(state, state_of(40 if done else 2))
    save_checkpoint(tmp_path, 4, state_of(4), keep=1)  # the next save works, and cleans up
    assert load(tmp_path)[0] == 4
    assert len(list(tmp_path.glob("step-*"))) == 1


def test_a_planted_pickle_never_runs(tmp_path):
    canary = tmp_path / "canary"

    class Payload:
        def __reduce__(self):
            return (builtins.open, (str(canary), "w"))

    folder = save_checkpoint(tmp_path, 1, state_of(1))
    planted = pickle.dumps(Payload())
    for name, message in ((".metadata", "a pickle"), ("extra.pt", "not in the manifest")):
        (folder / name).write_bytes(planted)
        with pytest.raises(CheckpointError, match=f"{name}: {message}"):
            load(tmp_path)
        (folder / name).unlink()
    (folder / SHARD).write_bytes(planted)
    with pytest.raises(CheckpointError, match=f"{SHARD}: damaged"):
        load(tmp_path)
    seal(folder, SHARD)
    with pytest.raises(CheckpointError, match="step-000001"):
        load(tmp_path)
    assert not canary.exists()
    pickle.loads(planted)
    assert canary.exists()  # the payload would have worked


def test_the_error_is_an_exception_that_can_be_pickled():
    error = pickle.loads(pickle.dumps(CheckpointError("a: damaged")))
    assert isinstance(error, Exception) and str(error) == "a: damaged"


def test_saving_goes_on_beside_training(tmp_path, monkeypatch):
    """What is saved is the state at the call; one save at a time; the last is complete at the end."""
    write, running, most, gate = shards.save_file, [], [], threading.Event()

    def slow(*args, **options):
        running.append(1)
        most.append(len(running))
        assert gate.wait(30)
        write(*args, **options)
        running.pop()

    monkeypatch.setattr(shards, "save_file", slow)
    state = state_of(1)
    with Saver(tmp_path, keep=2) as saver:
        saver.save(1, state)
        state["model"]["a.weight"].zero_()  # training goes on
        assert not (tmp_path / "latest").exists()
        gate.set()
        saver.save(2, state)
    assert most == [1, 1]
    assert load(tmp_path)[0] == 2
    (tmp_path / "latest").write_text("step-000001")
    assert_equal(load(tmp_path)[1], state_of(1))


@pytest.mark.parametrize("when", ["at the next save", "at the end"])
def test_a_save_that_failed_is_told(tmp_path, monkeypatch, when):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards, "save_file", full)
    with pytest.raises(CheckpointError, match="step-000001: .*No space left"), Saver(tmp_path, 2) as saver:
        saver.save(1, state_of(1))
        if when == "at the next save":
            saver.save(2, state_of(2))
    assert not (tmp_path / "latest").exists()
    assert not list(tmp_path.glob("step-000002*"))
