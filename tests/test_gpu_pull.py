"""One-sided reads between GPUs of one host, with devices that are late and hosts that run ahead."""

from __future__ import annotations

import gpu_pull
import machine
import pool
import pytest
import torch

pytestmark = machine.needs("two gpus", "multicast off")
FP32 = 2e-5


def on_all(body, *args):
    return pool.run(torch.cuda.device_count(), body, *args, timeout=280, backend="nccl")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ranks_read_what_was_shown_in_that_turn(dtype):
    assert all(on_all(gpu_pull.windows, dtype))


@pytest.mark.parametrize("even", [True, False], ids=["even", "uneven"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_that_are_read_are_the_rows_that_are_sent(dtype, even):
    """In layers one after another that the host does not wait for, to the last bit."""
    for result in on_all(gpu_pull.compared, dtype, even):
        assert result["equal"]
        if dtype == torch.float32:  # that half precision is as precise as one device: test_gpu_ring.py
            assert result["error"] <= 2 * FP32, result  # both are so far from exact at most


def test_a_rank_that_does_not_come_ends_the_job():
    """With an error of the device, within the timeout: nothing else sees such a wait."""
    with pytest.raises(pool.PoolError, match="CUDA error|died, exit code"):
        on_all(gpu_pull.nobody_comes)
