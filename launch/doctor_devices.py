"""All checks that use devices, in a process of their own: it may crash or hang, and frees them at its end."""

from __future__ import annotations

from collections.abc import Callable
from multiprocessing.queues import SimpleQueue

import torch

from .doctor_finding import Finding, made
from .doctor_kernels import DTYPES, check_auto, check_kernel, implementations, kernel_name
from .doctor_machine import check_gpus
from .doctor_process import listen

LIMIT = 600.0  # seconds for all of them, of which compilers take the most


def check_devices(devices: list[str]) -> list[Finding]:
    """GPUs and their links; every kernel in every dtype that it has on each device; what "auto" takes."""
    told, code = listen(tell, (devices,), LIMIT)
    found = [each for each in told if isinstance(each, Finding)]
    if code != 0:
        name = told[-1] if told and isinstance(told[-1], str) else "device"
        detail = f"not done in {LIMIT:g} s" if code is None else f"its process ended with exit code {code}"
        remedy = "see what it wrote to stderr; do not train here; report this, with this output"
        found.append(Finding(name, "fail", detail, remedy))
    return found


def tell(queue: SimpleQueue, devices: list[str]) -> None:
    """Puts the name of each check before it is made, and what it found after."""

    def make(name: str, check: Callable[..., list[Finding]], *arguments: object) -> None:
        queue.put(name)
        for finding in made(name, check, *arguments):
            queue.put(finding)

    if devices != ["cpu"]:
        make("gpu", check_gpus)
    for device in map(torch.device, devices):
        for dtype in DTYPES:
            for impl in implementations(dtype, device):
                make(kernel_name(impl, dtype, device), check_kernel, impl, dtype, device)
    make("auto", check_auto, torch.device(devices[0]))
