"""Symmetric memory: buffers on the GPUs of one host that all processes of a group read over NVLink or PCIe.

torch's, without multicast: where torch would set that up (a process has TORCH_SYMM_MEM_DISABLE_MULTICAST=1 if
it would not), nothing is shared. Its barriers run on the device and no watchdog sees them, but they have a
limit: if a rank does not come, the kernel ends with an error, which the waiting process raises as torch's
"unspecified launch failure" where it next looks at the device.
"""

from __future__ import annotations

import math
import platform
import warnings
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._autograd import DeviceType
from torch._C._distributed_c10d import _SymmetricMemory
from torch.distributed import _symmetric_memory

if TYPE_CHECKING:
    from .transport import Distributed

BOOT = Path("/proc/sys/kernel/random/boot_id")  # tells hosts of one name apart


class Symmetric:
    """A buffer of `size` bytes of every rank, as `Shared`. All ranks make it at once; waits for the device.

    group: its ranks map it. ranks: their global ranks by place. timeout: of a barrier, in seconds.
    Raises RuntimeError where the devices cannot reach each other.
    """

    def __init__(self, size: int, group: dist.ProcessGroup, ranks: tuple[int, ...], timeout: float):
        device = torch.device("cuda", torch.cuda.current_device())
        # As torch makes its own: an allocation by itself, in no pool, begins at the same place on all.
        self._own = _SymmetricMemory.empty_strided_p2p((size,), (1,), torch.uint8, device)
        torch.cuda.synchronize(device)  # its signals are zeros
        self._handle = _symmetric_memory.rendezvous(self._own, group)
        places = [dist.get_group_rank(group, rank) for rank in ranks]
        self._buffers = [self._handle.get_buffer(place, (size,), torch.uint8) for place in places]
        self._limit = math.ceil(timeout * 1000)

    def of(self, rank: int) -> Tensor:
        return self._buffers[rank]

    def barrier(self) -> None:
        self._handle.barrier(channel=0, timeout_ms=self._limit)


def can_share(transport: Distributed) -> bool:
    """Whether the current devices of all ranks can read each other's memory: on one host, without multicast.

    All ranks ask at once; waits for the device. Warns on a host where it ought to work and does not.
    """
    device = torch.device("cuda", torch.cuda.current_device())
    plain = _symmetric_memory.get_backend(device) == "CUDA"
    plain = plain and not _SymmetricMemory.has_multicast_support(DeviceType.CUDA, device.index)
    boot = BOOT.read_text() if BOOT.exists() else ""
    host = zlib.crc32(f"{platform.node()} {boot}".encode())
    table = transport.all_gather(torch.tensor([host, plain], device=device)).tolist()
    if any(each != [host, True] for each in table):
        return False
    failed = torch.zeros((), dtype=torch.int64, device=device)
    try:
        Symmetric(1, transport.groups["keys"], transport.ranks, transport.timeout)
    except RuntimeError as error:
        warnings.warn(f"GPUs of one host do not share memory, so messages are sent: {error}", stacklevel=2)
        failed += 1
    transport.all_reduce(failed).wait()
    return not failed.item()
