"""launch/flight.py: after an NCCL timeout the last transfers of the ranks are in the folder of the run."""

import os
import subprocess
import sys

import machine
import pytest

from sparring.launch.flight import FOLDER, record_flight

NAMES = ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_DUMP_ON_TIMEOUT", "TORCH_FR_DUMP_TEMP_FILE")
HANG = """
import datetime, pathlib, sys, time, torch, torch.distributed as dist
from sparring.launch.flight import record_flight
record_flight(pathlib.Path(sys.argv[1]))
dist.init_process_group("nccl", timeout=datetime.timedelta(seconds=5))
torch.cuda.set_device(dist.get_rank())
x = torch.ones(1, device="cuda")
dist.all_reduce(x)
torch.cuda.synchronize()
if dist.get_rank() == 1:
    time.sleep(90)
dist.all_reduce(x)
torch.cuda.synchronize()
"""


def test_the_flight_recorder_writes_into_the_run_unless_the_environment_says_where(tmp_path, monkeypatch):
    for name in NAMES:
        monkeypatch.setenv(name, "")  # so that it is taken away again
        monkeypatch.delenv(name)
    monkeypatch.setenv(NAMES[0], "7")
    record_flight(tmp_path)
    assert [os.environ[name] for name in NAMES] == ["7", "1", str(tmp_path / FOLDER / "rank-")]


@pytest.mark.timeout(240)
@machine.needs("two gpus")
def test_a_rank_that_hangs_leaves_the_transfers_of_the_others(tmp_path):
    script = tmp_path / "hang.py"
    script.write_text(HANG)
    (tmp_path / FOLDER).mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {name: value for name, value in os.environ.items() if name not in NAMES}
    done = subprocess.run(
        [*command, str(script), str(tmp_path)], env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode != 0
    assert (tmp_path / FOLDER / "rank-0").stat().st_size > 0, done.stderr[-3000:]
