"""What a run was made with: versions, devices, the commit."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("sparring", "torch", "triton", "numpy", "transformers", "peft", "safetensors", "ray")


def describe_environment(processes: int) -> dict[str, Any]:
    """Plain values, of this machine: its system and GPUs, versions, the commit of the library's checkout."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    found = {"processes": processes, "GPUs": ", ".join(gpus) or "none", "system": platform.platform()}
    found["Python"] = platform.python_version()
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    if torch.version.cuda:
        found["CUDA"] = torch.version.cuda
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found | {"commit": read_commit(Path(__file__).resolve().parents[1])}


def read_commit(checkout: Path) -> str | None:
    """The commit that is checked out, as git keeps it in files; None outside a plain checkout."""
    try:
        head = (checkout / ".git" / "HEAD").read_text().strip()
        if not head.startswith("ref: "):
            return head
        name = head.removeprefix("ref: ")
        if (loose := checkout / ".git" / name).exists():
            return loose.read_text().strip()
        packed = (checkout / ".git" / "packed-refs").read_text().splitlines()
        return next((line.split()[0] for line in packed if line.endswith(f" {name}")), None)
    except OSError:
        return None
