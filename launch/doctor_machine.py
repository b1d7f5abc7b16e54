"""Devices, the links between them, memory and limits of this machine."""

from __future__ import annotations

import importlib.util
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from .doctor_finding import GIB, Finding, check, size_text

SHARED_MEMORY = Path("/dev/shm")
LEAST_SHARED = GIB  # NCCL without peer access, and worker processes of data, keep their buffers there
LEAST_FILES = 4096  # open at once: sockets of every channel and rank, shards of a checkpoint
MOST_IN_USE = 0.1  # of the memory of a GPU, before anything of ours runs


def check_machine() -> list[Finding]:
    """Processors, memory, shared memory, open files, the folder of compiled kernels."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = [Finding("machine.cpu", "ok", f"{cores} cores that this process may use")]
    if (memory := available_memory()) is not None:
        found.append(Finding("machine.memory", "ok", f"{size_text(memory)} available"))
    if SHARED_MEMORY.exists():
        free = shutil.disk_usage(SHARED_MEMORY).free
        remedy = f"give it {size_text(LEAST_SHARED)} or more: docker run --shm-size=8g, or --ipc=host"
        detail = f"{size_text(free)} free in {SHARED_MEMORY}"
        found.append(check("machine.shm", free >= LEAST_SHARED, detail, remedy, "warn"))
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = files == resource.RLIM_INFINITY or files >= LEAST_FILES
    found.append(
        check("machine.files", enough, f"{files} open files", f"ulimit -n {LEAST_FILES} or more", "warn")
    )
    if importlib.util.find_spec("triton") is not None:
        import triton

        folder = Path(triton.knobs.cache.dir)
        detail = f"{folder} {'can' if writable(folder) else 'cannot'} be written"
        remedy = "set TRITON_CACHE_DIR to a folder that can, or kernels are compiled anew in every process"
        found.append(check("machine.cache", writable(folder), detail, remedy))
    return found


def available_memory() -> int | None:
    """Bytes that new processes may use; None where the system does not say."""
    table = Path("/proc/meminfo")
    if not table.exists():
        return None
    lines = dict(line.split(":", 1) for line in table.read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 2**10


def writable(folder: Path) -> bool:
    """Whether files may be written there, after it was made."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    return existing.is_dir() and os.access(existing, os.W_OK)


def check_gpus() -> list[Finding]:
    """Name, capability and memory of each GPU, its clocks, and how they reach each other."""
    count = torch.cuda.device_count()
    found = [_check_gpu(index) for index in range(count)]
    if importlib.util.find_spec("pynvml") is not None:
        found += [check_clocks(index) for index in range(count)]
    return found + ([check_links(count, torch.cuda.can_device_access_peer, _nvlinks())] if count > 1 else [])


def _check_gpu(index: int) -> Finding:
    properties = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    return check(
        f"gpu.{index}",
        total - free <= MOST_IN_USE * total,
        f"{properties.name}, capability {properties.major}.{properties.minor}, "
        f"{size_text(free)} of {size_text(total)} free",
        "another process holds its memory; end it (nvidia-smi lists it), or leave this GPU out by "
        "CUDA_VISIBLE_DEVICES",
        "warn",
    )


def check_clocks(index: int) -> Finding:
    """Whether heat or power slows the GPU down, as NVIDIA's management library says."""
    import pynvml

    try:
        pynvml.nvmlInit()
        # By name: the first GPU that a process sees need not be the first of the machine.
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(index).uuid}")
        reasons = pynvml.nvmlDeviceGetCurrentClocksEventReasons(handle)
    except (AttributeError, pynvml.NVMLError) as error:  # the first: of releases that know no reasons
        return Finding(f"gpu.{index}.clocks", "ok", f"not known: {error}")
    heat = pynvml.nvmlClocksEventReasonHwThermalSlowdown | pynvml.nvmlClocksEventReasonSwThermalSlowdown
    power = pynvml.nvmlClocksEventReasonSwPowerCap | pynvml.nvmlClocksEventReasonHwPowerBrakeSlowdown
    slowed = [what for what, bits in (("heat", heat), ("power", power)) if reasons & bits]
    detail = f"lowered by {' and '.join(slowed)}" if slowed else "not lowered"
    return check(f"gpu.{index}.clocks", not slowed, detail, "see to cooling and power limits", "warn")


def _nvlinks() -> list[list[int]] | None:
    """NVLinks between every two GPUs; None where the driver does not say."""
    try:
        from torch._C._autograd import DeviceType
        from torch._C._distributed_c10d import _detect_dma_connectivity  # not in every build

        return _detect_dma_connectivity(DeviceType.CUDA, "nvlink").matrix
    except (ImportError, RuntimeError):
        return None


def check_links(count: int, peers: Callable[[int, int], bool], nvlinks: list[list[int]] | None) -> Finding:
    """The pairs of GPUs by how they reach each other."""
    kinds: dict[str, list[str]] = {}
    for i in range(count):
        for j in range(i + 1, count):
            access = "peer access" if peers(i, j) and peers(j, i) else "no peer access"
            link = "link not known" if nvlinks is None else "NVLink" if nvlinks[i][j] else "PCIe"
            kinds.setdefault(f"{link}, {access}", []).append(f"{i}-{j}")
    total = count * (count - 1) // 2
    parts = [f"{kind}: {'all' if len(pairs) == total else ' '.join(pairs)}" for kind, pairs in kinds.items()]
    return check(
        "gpu.links",
        not any("no peer access" in kind for kind in kinds),
        "; ".join(parts),
        "keys go through memory of the host, slowly; turn off ACS and the IOMMU, or use GPUs that have it",
        "warn",
    )
