"""Checkpoints of sharded tensors: each rank writes its part, any other sharding can read it."""

import os
import time
from pathlib import Path

import machine
import pool
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from sparring.launch import shards
from sparring.launch.checkpoint import load_checkpoint, save_checkpoint
from sparring.launch.manifest import CheckpointError

SHAPES = {"even": (8, 3), "odd": (7, 5), "short": (1, 4), "row": (9,), "scalar": (), "none": (0, 3)}


def whole():
    """The same on every rank."""
    draw = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=draw) for name, shape in SHAPES.items()}
    return {"model": tensors, "half": {"x": torch.randn(6, 2, generator=draw).bfloat16()}, "step": 5}


def spread(state, mesh, placements):
    """Tensors as DTensors; those without dimensions are plain."""
    if isinstance(state, dict):
        return {key: spread(value, mesh, placements) for key, value in state.items()}
    if isinstance(state, torch.Tensor) and state.dim():
        return distribute_tensor(state, mesh, placements)
    return state


def gathered(state):
    if isinstance(state, dict):
        return {key: gathered(value) for key, value in state.items()}
    return state.full_tensor() if isinstance(state, DTensor) else state


def state_on(world, kind):
    if kind == "plain":
        return whole()
    if kind == "sharded":
        return spread(whole(), init_device_mesh("cpu", (world,)), [Shard(0)])
    return spread(whole(), init_device_mesh("cpu", (2, world // 2)), [Replicate(), Shard(0)])


def save(root, world, kind):
    save_checkpoint(Path(root), 3, state_on(world, kind), group=dist.group.WORLD)


def load(root, world, kind):
    """Whether all that is loaded equals what was saved."""
    template = state_on(world, kind)
    for tensor in [*template["model"].values(), *template["half"].values()]:
        tensor.zero_()
    step, state = load_checkpoint(Path(root), template, dist.group.WORLD)
    same = [torch.equal(gathered(state)[k][n], t) for k in ("model", "half") for n, t in whole()[k].items()]
    return step, state["step"], all(same), isinstance(state["model"]["odd"], DTensor)


@pytest.mark.parametrize(
    ("saved", "files"),
    [((2, "sharded"), 2), ((4, "replicated"), 2), ((2, "plain"), 1), ((1, "sharded"), 1)],
    ids=lambda x: " ".join(map(str, x)) if isinstance(x, tuple) else "",
)
def test_any_sharding_reads_what_any_other_wrote(tmp_path, saved, files):
    """Replicas are written once; bit for bit, uneven and empty parts too."""
    pool.run(saved[0], save, str(tmp_path), *saved)
    assert len(list(tmp_path.glob("step-000003/*.safetensors"))) == files
    for world, kind in ((1, "plain"), (2, "sharded"), (4, "sharded"), (4, "replicated")):
        for found in pool.run(world, load, str(tmp_path), world, kind):
            assert found == (3, 5, True, kind != "plain")


def load_refused(root, world):
    with pytest.raises(CheckpointError) as caught:
        load(root, world, "sharded")
    return str(caught.value)


def test_every_rank_refuses_what_one_finds_damaged(tmp_path):
    pool.run(2, save, str(tmp_path), 2, "sharded")
    shard = tmp_path / "step-000003" / "shard-00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    errors = pool.run(2, load_refused, str(tmp_path), 2)
    assert any(f"{shard}: damaged" in text for text in errors)
    assert all(f"{shard.parent}" in text for text in errors)
    shard.unlink()
    errors = pool.run(2, load_refused, str(tmp_path), 2)
    assert any(f"{shard}: missing" in text for text in errors)


def save_with_a_fault(root, fault):
    """Rank 1 fails to write, or does not come; what each rank raised, and after how many seconds."""
    began = time.monotonic()
    if dist.get_rank() == 1 and fault == "raises":
        shards.save_file = full
    if dist.get_rank() == 1 and fault == "is gone":
        os._exit(3)
    try:
        with pytest.raises(CheckpointError) as caught:
            save_checkpoint(Path(root), 4, state_on(2, "sharded"), group=dist.group.WORLD)
    finally:
        shards.save_file = SAVE_FILE
    return str(caught.value), time.monotonic() - began


SAVE_FILE = shards.save_file


def full(*_, **__):
    raise OSError(28, "No space left on device")


def test_a_save_that_fails_on_one_rank_fails_on_all_and_leaves_the_previous(tmp_path):
    pool.run(2, save, str(tmp_path), 2, "sharded")
    (first, _), (second, _) = pool.run(2, save_with_a_fault, str(tmp_path), "raises")
    assert "rank 1 failed" in first and "No space left" in second
    assert (tmp_path / "latest").read_text().strip() == "step-000003"
    for found in pool.run(2, load, str(tmp_path), 2, "sharded"):
        assert found == (3, 5, True, True)


def test_a_save_without_a_rank_that_died_ends(tmp_path):
    with pytest.raises(pool.PoolError, match="rank 1 of 2: died, exit code 3"):
        pool.run(2, save_with_a_fault, str(tmp_path), "is gone")
    assert not (tmp_path / "latest").exists()


def through_gpus(root):
    """Saved from two GPUs and loaded there, then on the CPU; the ranks agree over gloo beside NCCL."""
    mesh, group = init_device_mesh("cuda", (2,)), dist.new_group(backend="gloo")
    save_checkpoint(Path(root), 3, spread(whole(), mesh, [Shard(0)]), group=group)
    template = spread(whole(), mesh, [Shard(0)])
    for tensor in template["model"].values():
        tensor.zero_()
    loaded = gathered(load_checkpoint(Path(root), template, group)[1]["model"])
    alone = load_checkpoint(Path(root), whole() | {"model": {n: t * 0 for n, t in whole()["model"].items()}})
    return all(
        torch.equal(found[name].cpu(), tensor)
        for found in (loaded, alone[1]["model"])
        for name, tensor in whole()["model"].items()
    )


@machine.needs("two gpus")
def test_what_two_gpus_saved_is_read_there_and_on_the_cpu(tmp_path):
    assert all(pool.run(2, through_gpus, str(tmp_path), backend="nccl"))


def read_with_torch(root):
    """With nothing but torch.distributed.checkpoint."""
    import torch.distributed.checkpoint as dcp

    tensors = {f"model.{name}": torch.zeros(shape) for name, shape in SHAPES.items()}
    dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(root))
    return all(torch.equal(tensors[f"model.{name}"], tensor) for name, tensor in whole()["model"].items())


def test_torch_reads_the_tensors_by_itself(tmp_path):
    pool.run(2, save, str(tmp_path), 2, "sharded")
    assert all(pool.run(2, read_with_torch, str(tmp_path / "step-000003")))
