"""launch/doctor.py: what it says of this machine, of one that is broken, and that it always ends."""

from __future__ import annotations

import importlib.metadata
import json
import os
import queue
import subprocess
import sys
import time
import uuid
from types import SimpleNamespace

import doctor_ranks
import machine
import pytest
import torch
from launched import MARK
from training import marked

from sparring.cp import run_threads
from sparring.cp.transport import Pending
from sparring.kernels import reference
from sparring.launch import (
    doctor,
    doctor_devices,
    doctor_group,
    doctor_machine,
    doctor_process,
    doctor_rank,
    doctor_versions,
)
from sparring.launch.doctor_finding import Finding, Rate, made, worst
from sparring.launch.doctor_group import Told, judge
from sparring.launch.doctor_kernels import check_kernel

CPU = torch.device("cpu")
RATES = [Rate("ring hop", 2**16, 0.5), Rate("ring hop", 2**28, 2.0), Rate("all-to-all", 2**25, 1.0)]


def on_cpu(devices=("cpu",)):
    """What the process that checks devices finds, without that process."""
    told = queue.SimpleQueue()
    doctor_devices.tell(told, list(devices))
    return [each for each in (told.get() for _ in range(told.qsize())) if isinstance(each, Finding)]


def kernel(dtype=torch.float32):
    (found,) = made("kernel", check_kernel, "reference", dtype, CPU)
    return found


def by_name(findings):
    assert len({finding.name for finding in findings}) == len(findings)
    for finding in findings:
        assert finding.status in ("ok", "warn", "fail") and finding.detail
        assert bool(finding.remedy) == (finding.status != "ok"), finding
    return {finding.name: finding for finding in findings}


# -- what is printed -----------------------------------------------------------------------------------


def printed(monkeypatch, capsys, group, *arguments):
    """What the command prints, and its exit code; `group` stands for what processes found."""
    monkeypatch.setattr(doctor, "check_group", lambda *given: group)
    monkeypatch.setattr(doctor, "check_devices", on_cpu)  # without a process, which has a test of its own
    code = 0
    try:
        doctor.main(["--device", "cpu", *arguments])
    except SystemExit as end:
        code = end.code
    return capsys.readouterr().out, code


def test_json_is_one_object_of_stable_names(monkeypatch, capsys):
    out, code = printed(monkeypatch, capsys, ([Finding("group.formed", "ok", "2 ranks")], RATES), "--json")
    found = json.loads(out)
    assert sorted(found) == ["bandwidth", "findings", "verdict"] and code == 0
    assert found["verdict"] == worst([Finding(**each) for each in found["findings"]])
    names = by_name([Finding(**each) for each in found["findings"]])
    kinds = ("float32", "bfloat16", "float16")
    assert {"version.python", "version.torch", "version.numpy", "machine.cpu", "group.formed"} <= set(names)
    assert {f"kernel.cpu.reference.{kind}" for kind in kinds} <= set(names)
    assert {names[f"auto.impl.{kind}"].detail for kind in kinds} == {"reference for head dim 64, 128, 256"}
    assert found["bandwidth"][1] == {"what": "ring hop", "bytes": 2**28, "gigabytes_per_second": 2.0}


def test_lines_end_with_the_verdict_and_name_remedies(monkeypatch, capsys):
    bad = Finding("group.formed", "fail", "rank 1: never began", "look at the firewall")
    out, code = printed(monkeypatch, capsys, ([bad], RATES))
    lines = out.splitlines()
    assert code == 1 and lines[-1].startswith("fail: ") and lines[-1].endswith(" 1 fail")
    assert any(line.startswith("fail  group.formed") and "never began" in line for line in lines)
    assert any(line.split() == ["->", "look", "at", "the", "firewall"] for line in lines)
    assert any(line.split() == ["ring", "hop", "256", "MiB", "2.000", "GB/s"] for line in lines)


def test_a_terminal_gets_the_same_in_tables(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "200")
    warned = Finding("group.bandwidth", "warn", "[slow] link", "measure [it]")
    out, code = printed(monkeypatch, capsys, ([warned], RATES))
    assert code == 0  # warnings are no failures
    assert "[slow] link" in out and "measure [it]" in out and "256 MiB" in out and "warn: " in out


def test_a_check_that_raises_is_a_finding(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "check_machine", lambda: 1 / 0)
    out, code = printed(monkeypatch, capsys, ([], []), "--json")
    found = by_name([Finding(**each) for each in json.loads(out)["findings"]])
    assert code == 1 and found["machine"].detail.startswith("ZeroDivisionError")


@pytest.mark.parametrize("arguments", [["--timeout", "0"], ["--timeout", "inf"], ["--nproc-per-node", "0"]])
def test_limits_must_be_above_zero(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        doctor.main(arguments)
    assert "above 0" in capsys.readouterr().err


def test_more_processes_than_gpus_are_told_with_both_numbers(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    findings, rates = doctor.examine("cuda", 3, 1.0)
    assert findings[-1].status == "fail" and "3 processes need a GPU each, 2 here" in findings[-1].detail
    assert rates == []


# -- versions and devices ------------------------------------------------------------------------------


def test_too_old_a_version_fails_with_both(monkeypatch):
    real = importlib.metadata.version
    old = {"torch": "2.9.1+cpu", "transformers": "4.57.0"}
    monkeypatch.setattr(importlib.metadata, "version", lambda name: old.get(name) or real(name))
    found = by_name(doctor_versions.check_versions())
    assert found["version.torch"].status == found["extra.transformers"].status == "fail"
    assert "2.9.1+cpu, needs >= 2.10" in found["version.torch"].detail
    assert "transformers 4.57.0, needs >= 5.3" in found["extra.transformers"].detail
    assert found["version.numpy"].status == "ok"


def test_missing_packages_fail_and_missing_extras_warn(monkeypatch):
    monkeypatch.setattr(
        doctor_versions, "installed", lambda name: None if name in ("numpy", "tyro") else "999"
    )
    found = by_name(doctor_versions.check_versions())
    assert (found["version.numpy"].status, found["version.torch"].status) == ("fail", "ok")
    assert found["extra.launch"].status == "warn" and "without tyro" in found["extra.launch"].detail
    assert "pip install 'sparring[launch]'" in found["extra.launch"].remedy


def test_a_build_of_triton_by_another_name_counts(monkeypatch):
    def unknown(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", unknown)
    assert doctor_versions.installed("torch") == torch.__version__
    assert doctor_versions.installed("no_such_package") is None


def test_links_name_the_pairs_of_each_kind():
    nvlinks = [[0, 18, 0], [18, 0, 0], [0, 0, 0]]
    mixed = doctor_machine.check_links(3, lambda i, j: {i, j} != {1, 2}, nvlinks)
    assert mixed.status == "warn"
    assert mixed.detail == "NVLink, peer access: 0-1; PCIe, peer access: 0-2; PCIe, no peer access: 1-2"
    whole = doctor_machine.check_links(2, lambda i, j: True, [[0, 18], [18, 0]])
    assert (whole.status, whole.detail) == ("ok", "NVLink, peer access: all")


def test_little_shared_memory_and_few_files_warn(monkeypatch):
    monkeypatch.setattr(doctor_machine, "LEAST_SHARED", 2**60)
    monkeypatch.setattr(doctor_machine, "LEAST_FILES", 2**60)
    found = by_name(doctor_machine.check_machine())
    assert found["machine.shm"].status == "warn" and "--shm-size" in found["machine.shm"].remedy
    if found["machine.files"].status != "ok":
        assert "ulimit -n" in found["machine.files"].remedy


def test_heat_and_power_that_lower_clocks_warn(monkeypatch):
    reasons = {name: 1 << n for n, name in enumerate(("HwThermal", "SwThermal", "HwPowerBrake"))}
    library = SimpleNamespace(
        NVMLError=OSError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID={"GPU-ab-cd": "gpu"}.get,
        nvmlDeviceGetCurrentClocksEventReasons={"gpu": 0b10010}.get,
        nvmlClocksEventReasonSwPowerCap=8,
        **{f"nvmlClocksEventReason{name}Slowdown": bit for name, bit in reasons.items()},
    )
    monkeypatch.setitem(sys.modules, "pynvml", library)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid="ab-cd"))
    found = doctor_machine.check_clocks(0)
    assert (found.name, found.status, found.detail) == ("gpu.0.clocks", "warn", "lowered by heat")
    library.nvmlDeviceGetCurrentClocksEventReasons = {"gpu": 0b10000}.get  # only the user's own limit
    assert doctor_machine.check_clocks(0).status == "ok"


# -- kernels -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("broken", ["forward_step", "backward_step", "backward_columns"])
def test_a_wrong_kernel_fails(monkeypatch, broken):
    """One that takes values for 1 % larger, in one of its functions."""
    right = getattr(reference, broken)

    def wrong(q, k, v, *rest, **options):
        right(q, k, 1.01 * v, *rest, **options)

    assert kernel().status == "ok"
    monkeypatch.setattr(reference, broken, wrong)
    found = kernel()
    assert found.status == "fail"
    assert "allowed" in found.detail and "do not train" in found.remedy


def test_a_kernel_that_raises_or_gives_nan_fails(monkeypatch):
    def nan(q, k, v, bound, source, out, lse, *rest, **options):
        out.fill_(torch.nan)
        lse.zero_()

    monkeypatch.setattr(reference, "forward_step", nan)
    assert "inf of" in kernel().detail
    monkeypatch.setattr(reference, "forward_step", lambda *given, **options: 1 / 0)
    for dtype in (torch.bfloat16, torch.float32):
        assert kernel(dtype).status == "fail" and "ZeroDivisionError" in kernel(dtype).detail


@pytest.mark.parametrize(
    ("target", "detail"),
    [
        (doctor_ranks.crash, "its process ended with exit code -11"),
        (doctor_ranks.hang, "not done in 4 s"),
    ],
)
def test_a_kernel_that_crashes_or_hangs_is_named(monkeypatch, capfd, target, detail):
    monkeypatch.setattr(doctor_devices, "tell", target)
    monkeypatch.setattr(doctor_devices, "LIMIT", 4.0)
    monkeypatch.setattr(doctor_process, "GRACE", 0.2)
    (found,) = doctor_devices.check_devices(["cuda:0"])
    assert (found.name, found.status, found.detail) == ("kernel.cuda:0.triton.float32", "fail", detail)
    assert capfd.readouterr().out == ""


# -- groups --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_that_exchange_rightly_pass(monkeypatch, world):
    monkeypatch.setattr(doctor_rank, "RING_SIZES", (2**10, 2**12))
    monkeypatch.setattr(doctor_rank, "ALL_TO_ALL_SIZE", 2**12)

    def body(transport):
        return {phase: doctor_rank.CHECKS[phase](transport, CPU) for phase in doctor_rank.phases(world)}

    ranks = run_threads(world, body)
    told = [
        Told(rank, phase, "done", value)
        for rank, values in enumerate(ranks)
        for phase, value in values.items()
    ]
    told += [Told(rank, phase, "done", "here") for rank in range(world) for phase in ("formed", "left")]
    findings, rates = judge(told, world, "cpu", 1.0)
    assert {finding.status for finding in by_name(findings).values()} == {"ok"}
    assert [finding.name for finding in findings] == [
        "group.formed",
        *(f"group.{x}" for x in doctor_rank.CHECKS),
    ]
    assert [(rate.what, rate.bytes) for rate in rates[:2]] == [("ring hop", 2**10), ("ring hop", 2**12)]
    slowest = min(values["bandwidth"][0].gigabytes_per_second for values in ranks)
    assert rates[0].gigabytes_per_second == slowest


class Zeros:
    """A group of two as rank 0 sees it, in which all that arrives is zero."""

    rank, size = 0, 2

    def all_reduce(self, x, op="sum"):
        return self.exchange([], 1, [x], 1, "control")

    def exchange(self, send, to, receive, source, channel):
        for x in receive:
            x.zero_()
        return Pending(lambda: None)

    def all_to_all(self, send, sends, receive, receives, channel):
        return self.exchange([send], 1, [receive], 1, channel)


@pytest.mark.parametrize("phase", ["all-reduce", "exchange", "all-to-all"])
def test_messages_with_wrong_values_are_seen(phase):
    with pytest.raises(ValueError, match="of .* values are wrong"):
        doctor_rank.CHECKS[phase](Zeros(), CPU)


def test_a_phase_that_not_all_ranks_finish_is_named_with_what_each_was_at():
    told = [Told(rank, "formed", "done", "2 ranks") for rank in range(4)]
    told += [Told(rank, "all-reduce", "begun", None) for rank in range(3)]
    told += [
        Told(0, "all-reduce", "failed", "ValueError: wrong"),
        Told(1, "exit", "failed", "ended with exit code -9"),
    ]
    findings, rates = judge(told, 4, "cuda", 2.5)
    assert [finding.status for finding in findings] == ["ok", "fail"] and rates == []
    assert findings[1].name == "group.all-reduce" and "NCCL_P2P_DISABLE" in findings[1].remedy
    assert findings[1].detail.split("; ") == [
        "rank 0: ValueError: wrong",
        "rank 1: ended with exit code -9",
        "rank 2: not done within 2.5 s",
        "rank 3: never began",
    ]


def test_a_slow_link_and_gpus_that_cannot_read_warn():
    values = dict.fromkeys(doctor_rank.phases(2), "right") | {"one-sided": "sent", "bandwidth": RATES}
    values |= {"formed": "2 ranks", "left": None}
    told = [Told(rank, phase, "done", value) for rank in range(2) for phase, value in values.items()]
    found = by_name(judge(told, 2, "cuda", 1.0)[0])
    assert found["group.bandwidth"].status == found["group.one-sided"].status == "warn"
    assert "calibrate.py" in found["group.bandwidth"].remedy
    assert "TORCH_SYMM_MEM_DISABLE_MULTICAST" in found["group.one-sided"].remedy


def test_a_process_alone_has_nothing_to_exchange():
    told = [Told(0, phase, "done", "here") for phase in ("formed", "auto", "left")]
    findings, rates = judge(told, 1, "cuda", 1.0)
    assert [finding.name for finding in findings] == ["group.formed", "group.auto"] and rates == []


# -- processes -----------------------------------------------------------------------------------------


def failing(monkeypatch, work, limit=8.0):
    """The last finding of two processes that run `work`, of which nothing may be left."""
    mark = uuid.uuid4().hex
    monkeypatch.setenv(MARK, mark)
    monkeypatch.setattr(doctor_group, "work", work)
    began = time.monotonic()
    findings, _ = doctor_group.check_group(2, "cpu", limit)
    assert time.monotonic() - began < doctor_group.START
    assert [finding.status for finding in findings[:-1]] == ["ok"] * (len(findings) - 1)
    assert (
        marked(mark, lambda _, line: b"resource_tracker" not in line) == []
    )  # that one is Python's, for all
    return findings[-1]


@pytest.mark.full
def test_a_rank_that_never_joins_fails_within_its_limit(monkeypatch):
    found = failing(monkeypatch, doctor_ranks.absent, limit=1.0)
    assert (found.name, found.status) == ("group.formed", "fail")
    assert "rank 0: Dist" in found.detail and "rank 1: never began" in found.detail
    assert "NCCL_SOCKET_IFNAME" in found.remedy


@pytest.mark.full
def test_ranks_that_are_all_stuck_end_themselves(monkeypatch):
    found = failing(monkeypatch, doctor_ranks.all_stuck)
    assert found.name == "group.exchange"
    assert "rank 0: not done within 8 s" in found.detail and "rank 1: not done within 8 s" in found.detail


@pytest.mark.full
def test_a_rank_that_is_stuck_is_named(monkeypatch):
    found = failing(monkeypatch, doctor_ranks.stuck)
    assert found.name == "group.exchange" and "rank 0: RingTimeoutError" in found.detail
    assert "rank 1: not done within 8 s" in found.detail


@pytest.mark.full
def test_a_rank_that_is_killed_is_named(monkeypatch):
    found = failing(monkeypatch, doctor_ranks.killed)
    assert found.name == "group.all-to-all"
    assert "rank 1: ended with exit code -9" in found.detail


@pytest.mark.full
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=machine.needs("gpu"))])
def test_the_whole_command_on_this_machine(device, tmp_path):
    """It needs none of the extras. Nothing but the object is on its stdout, whatever NCCL says."""
    code = "import sys; sys.modules.update(dict.fromkeys(['tyro', 'rich', 'ray', 'transformers']));"
    code += "from sparring.launch.cli import main; main()"
    command = [sys.executable, "-c", code, "doctor", "--json", "--device", device]
    environment = os.environ | {"NCCL_DEBUG": "INFO"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280)
    found = json.loads(done.stdout)
    names = by_name([Finding(**each) for each in found["findings"]])
    assert found["verdict"] != "fail" and done.returncode == 0, done.stdout
    if device == "cuda":
        assert {"gpu.0", "kernel.cuda:0.triton.float32", "kernel.cuda:0.triton.bfloat16"} <= set(names)
    if device == "cpu" or torch.cuda.device_count() > 1:
        assert {f"group.{phase}" for phase in ("formed", *doctor_rank.CHECKS)} <= set(names)
        assert {rate["bytes"] for rate in found["bandwidth"]} >= {2**16, 2**28}
        assert all(rate["gigabytes_per_second"] > 0 for rate in found["bandwidth"])
