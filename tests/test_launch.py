"""launch/start.py: `sparring train` under torchrun; ranks that are killed; two machines."""

from __future__ import annotations

import json
import os
import random
import subprocess
import uuid
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import SimpleNamespace

import machine
import pytest
import replayed
import sampling
import torch
import torch.distributed.run as torchrun
import training
from training import begin, command, config_of, finish, losses, marked, trace

from sparring.launch import start
from sparring.launch.config import TrainConfig
from sparring.launch.settings import write_settings
from sparring.launch.start import Launcher
from sparring.launch.world import World, join_world, nodes_of_group

SAVED = {"save_every": 2, "steps": 12, "keep": 1}


def run(config: TrainConfig, kills: int = 0, replay: bool = False, **launcher) -> str:
    """Runs a job and returns what it printed; `kills` times some rank is killed after some step."""
    folder, mark = config.absolute(), uuid.uuid4().hex
    file = Path(f"{folder.out}.json")
    write_settings(file, config)
    chance = random.Random(f"{sampling.seed} {config.steps} {kills}")
    steps = sorted(chance.sample(range(1, config.steps - 3), kills))
    ranks = [chance.randrange(4) for _ in range(kills)]
    killer = training.Killer(config.out, steps, lambda: marked(mark, _is_rank), ranks)
    (said,) = finish([begin(command(config, file, replay, **launcher), file.parent, mark)], mark, killer)
    assert killer.killed == kills, said
    return said


def _is_rank(environment: bytes, line: bytes) -> bool:
    return b"\0RANK=" in environment and b"sparring.launch.train" in line


# -- what is passed on, and what is refused ------------------------------------------------------------


def test_one_machine_meets_where_no_other_reaches_it():
    assert Launcher().torchrun(gpus=0) == "--nproc-per-node 2 --max-restarts 0 --standalone".split()
    assert Launcher(max_restarts=3).torchrun(8) == "--nproc-per-node 8 --max-restarts 3 --standalone".split()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({}, "--rdzv-backend c10d"),
        ({"node_rank": 0}, "--rdzv-backend static --node-rank 0"),
        ({"local_addr": "a"}, "--local-addr a --rdzv-backend c10d --rdzv-conf is_host=1"),
        ({"local_addr": "b"}, "--local-addr b --rdzv-backend c10d --rdzv-conf is_host=0"),
    ],
)
def test_several_machines_pass_their_rendezvous_on(more, words):
    launcher = Launcher(nproc_per_node=4, nnodes=2, rdzv_endpoint="a:29400", rdzv_id="job", **more)
    common = "--nproc-per-node 4 --max-restarts 0 --nnodes 2 --rdzv-endpoint a:29400 --rdzv-id job "
    assert launcher.torchrun(gpus=0) == (common + words).split()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"engine": "slurm"}, "engine='slurm' .*torchrun.*ray"),
        ({"nproc_per_node": 0}, "nproc_per_node=0 .*0"),
        ({"max_restarts": -1}, "max_restarts=-1 .*0"),
        ({"nnodes": 2}, "nnodes=2 and rdzv_endpoint=None"),
        ({"nnodes": 2, "rdzv_endpoint": "a:1"}, "nnodes=2 and rdzv_id=None"),
        ({"node_rank": 1}, "node_rank=1 and nnodes=1"),
        ({"rdzv_id": "x"}, "rdzv_id='x' and nnodes=1"),
        (
            {"nnodes": 2, "rdzv_endpoint": "a:1", "rdzv_id": "x", "node_rank": 0, "max_restarts": 2},
            "node_rank=0 and max_restarts=2",
        ),
        ({"num_workers": 2}, "num_workers=2 .*engine='torchrun'"),
        ({"ray_address": "auto"}, "ray_address='auto' .*engine='torchrun'"),
        ({"engine": "ray", "nproc_per_node": 2}, "nproc_per_node=2 .*engine='ray'"),
        ({"engine": "ray", "nnodes": 2}, "nnodes=2 .*engine='ray'"),
    ],
)
def test_contradictory_launchers_are_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        Launcher(**changes)


def test_torchrun_gets_its_own_settings_and_the_job_the_others(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "")  # put back at the end
    given = []
    monkeypatch.setattr(torchrun, "main", given.append)
    start.main("--steps 3 --nproc-per-node 4 --warmup 1 --max-restarts 1 --device cpu --no-compare".split())
    rest = "-m sparring.launch.train --steps 3 --warmup 1 --device cpu --no-compare".split()
    assert given == [[*Launcher(nproc_per_node=4, max_restarts=1).torchrun(0), *rest]]


def test_a_rank_that_runs_already_starts_no_others(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    given = []
    monkeypatch.setattr("sparring.launch.train.main", given.append)
    start.main(["--steps", "7"])
    assert given == [["--steps", "7"]]
    with pytest.raises(ValueError, match="rank 1 already.*nproc_per_node=3"):
        start.main(["--nproc-per-node", "3"])


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["--stepz", "1"], "--steps"),
        (["--max-restart", "1"], "--max-restarts"),
        (["--node-rank", "1"], "nnodes=1"),
        (["--heads", "5", "--kv-heads", "2"], "heads=5"),
    ],
)
def test_mistakes_are_told_before_anything_starts(words, shown, monkeypatch, capsys):
    monkeypatch.setattr(torchrun, "main", lambda *_: pytest.fail("started"))
    with pytest.raises(SystemExit) as end:
        start.main(words)
    said = capsys.readouterr()
    assert end.value.code == 2 and shown in said.out + said.err


def test_help_names_every_setting_of_the_launcher_and_of_the_job(capsys):
    with pytest.raises(SystemExit) as end:
        start.main(["--help"])
    shown = capsys.readouterr().out
    assert end.value.code == 0
    for field in (*fields(Launcher), *fields(TrainConfig)):
        assert f"--{field.name.replace('_', '-')}" in shown, field.name
    assert "--config" in shown


# -- nodes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ranks", "processes", "nodes"), [(1, [1], 1), (4, [4] * 4, 1), (2, [4] * 4, 1), (8, [4] * 8, 2)]
)
def test_groups_fill_nodes_or_lie_inside_one(ranks, processes, nodes):
    assert nodes_of_group(ranks, processes) == nodes


@pytest.mark.parametrize(
    ("ranks", "processes", "message"),
    [
        (4, [3, 3, 3, 1], "some nodes have 1 processes and some 3; start the same"),
        (4, [6] * 12, "groups of 4 ranks do not fit nodes of 6 processes"),
        (6, [4] * 12, "groups of 6 ranks do not fit nodes of 4 processes"),
    ],
)
def test_groups_whose_inner_rings_leave_their_node_are_refused(ranks, processes, message):
    with pytest.raises(ValueError, match=message):
        nodes_of_group(ranks, processes)


def test_a_restart_over_the_store_of_dead_ranks_is_refused(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    with pytest.raises(ValueError, match="restart 1 .*--max-restarts.*TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        with join_world(TrainConfig(device="cpu")):
            pass


def test_the_mesh_is_told_in_words():
    said = str(World(0, 16, torch.device("cuda"), SimpleNamespace(shape=(2, 2, 4)), None))
    assert said.startswith("16 x cuda: 2 data-parallel x 8 context-parallel (2 nodes x 4 processes)")
    assert said.endswith("dp=2, cp_outer=2, cp_inner=4")


# -- jobs ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted job of two ranks, by `sparring train`: its settings, and what it printed."""
    config = config_of(tmp_path_factory.mktemp("whole"), "whole", **SAVED)
    return config, run(config, nproc_per_node=2)


def test_sparring_train_starts_its_ranks_and_writes_its_settings(whole):
    config, said = whole
    assert "2 x cpu: 1 data-parallel x 2 context-parallel (inside a node)" in said
    written = json.loads((Path(config.out) / "config.json").read_text())
    assert written == asdict(config)
    assert len(trace(config.out)) == config.steps


@pytest.mark.parametrize("kills", [1, pytest.param(5, marks=pytest.mark.full)])
def test_killed_ranks_do_not_change_the_trace(kills, whole, tmp_path):
    """All ranks start again from the last complete checkpoint, though nobody said --resume."""
    config = config_of(tmp_path, "killed", **SAVED)
    said = run(config, kills, nproc_per_node=2, max_restarts=kills)
    assert said.count("2 x cpu") == kills + 1
    assert trace(config.out) == trace(whole[0].out)


@pytest.fixture(scope="module", params=["dense", "vertical-slash"])
def one(request, tmp_path_factory):
    """A job of one rank in this process, which keeps its plans."""
    config = config_of(tmp_path_factory.mktemp("one"), "one", pattern=request.param)
    replayed.train(config)
    return config


def assert_same(config: TrainConfig, one: TrainConfig) -> None:
    """Losses to the rounding of fp32, which steps of AdamW carry on."""
    assert len(losses(config.out)) == one.steps
    assert losses(config.out) == pytest.approx(losses(one.out), rel=1e-5)


@pytest.mark.full
@pytest.mark.parametrize("world", [1, 2, 4])
def test_torchrun_has_the_losses_of_one_rank(world, one):
    config = replace(one, out=f"{one.out}-{world}")
    run(config, replay=True, nproc_per_node=world)
    assert_same(config, one)


# -- two machines -------------------------------------------------------------------------------------


@pytest.fixture
def hosts():
    """Two network namespaces with a link: their names, and the addresses and devices of its ends."""
    names = [f"sparring-{os.getpid()}-{i}" for i in (1, 2)]
    ends = [f"sp{os.getpid()}{i}" for i in "ab"]
    words = [f"netns add {name}" for name in names]
    words += [f"link add {ends[0]} type veth peer name {ends[1]}"]
    for i, (name, end) in enumerate(zip(names, ends, strict=True), 1):
        words += [f"link set {end} netns {name}", f"-n {name} addr add 10.78.0.{i}/24 dev {end}"]
        words += [f"-n {name} link set {end} up", f"-n {name} link set lo up"]
    try:
        for each in words:
            subprocess.run(["ip", *each.split()], check=True)
        yield [(name, f"10.78.0.{i}", end) for i, (name, end) in enumerate(zip(names, ends, strict=True), 1)]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], stderr=subprocess.DEVNULL)


@pytest.mark.full
@machine.needs("root")
@pytest.mark.parametrize("backend", ["c10d", "static"])
def test_two_machines_have_the_losses_of_one_rank(backend, one, hosts):
    config, mark = replace(one, out=f"{one.out}-{backend}"), uuid.uuid4().hex
    file, jobs = Path(f"{config.out}.json"), []
    write_settings(file, config)
    for number, (name, address, device) in enumerate(hosts):
        launcher = {"nproc_per_node": 2, "nnodes": 2, "rdzv_endpoint": f"{hosts[0][1]}:29400"}
        launcher |= {"rdzv_id": mark, "local_addr": address}
        launcher |= {"node_rank": number} if backend == "static" else {}
        words = ["ip", "netns", "exec", name, *command(config, file, one.pattern != "dense", **launcher)]
        jobs.append(begin(words, file.parent, mark, GLOO_SOCKET_IFNAME=device))
    said = "".join(finish(jobs, mark))
    assert "1 data-parallel x 4 context-parallel (2 nodes x 2 processes)" in said
    assert_same(config, one)
