"""Versions on this machine against what the package requires."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import platform
import re
import sys
from pathlib import Path

import torch
from torch.torch_version import TorchVersion

from .doctor_finding import Finding, check

EXTRAS = {
    "transformers": "models of transformers",
    "launch": "sparring train",
    "data": "training on Parquet files and saved datasets",
    "ray": "sparring train --engine ray",
}
DRIVER = Path("/proc/driver/nvidia/version")
# A requirement: its name, the oldest version, and where it holds (";" and a marker).
_REQUIREMENT = re.compile(r"([\w.-]+)(?:\[[^]]*\])?\s*(?:>=\s*([\d.]+))?[^;]*(?:;\s*(.*))?")


def check_versions() -> list[Finding]:
    """Python, the package, what it requires, its optional extras, and what torch was built with."""
    metadata = importlib.metadata.metadata("sparring")
    oldest = metadata["Requires-Python"].strip(">= ")
    found = [
        _compare("version.python", platform.python_version(), oldest, f"install Python {oldest} or newer"),
        Finding("version.sparring", "ok", metadata["Version"]),
    ]
    for name, oldest, extra in requirements():
        if extra is None:
            remedy = f"pip install '{name}>={oldest}'"
            version = installed(name)
            if version is None:
                found.append(Finding(f"version.{name}", "fail", f"missing, needs >= {oldest}", remedy))
            else:
                found.append(_compare(f"version.{name}", version, oldest, remedy))
    extras = [extra for extra in EXTRAS if any(extra == group for *_, group in requirements())]
    return [*found, *map(_check_extra, extras), *_check_cuda()]


def requirements() -> list[tuple[str, str, str | None]]:
    """(package, oldest version, extra that needs it) of all that the installed package requires here."""
    found = []
    for line in importlib.metadata.requires("sparring") or ():
        name, oldest, marker = _REQUIREMENT.fullmatch(line).groups(default="")
        extra = re.search(r"extra == ['\"](\w+)['\"]", marker)
        system = re.search(r"sys_platform == ['\"](\w+)['\"]", marker)
        if name != "sparring" and (system is None or system[1] == sys.platform):
            found.append((name, oldest or "0", extra[1] if extra else None))
    return found


def installed(package: str) -> str | None:
    """Its version, or None. Some builds of torch bring triton under the name of another distribution."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        found = importlib.util.find_spec(package) is not None
        return getattr(importlib.import_module(package), "__version__", None) if found else None


def _compare(name: str, version: str, oldest: str, remedy: str) -> Finding:
    return check(name, TorchVersion(version) >= oldest, f"{version}, needs >= {oldest}", remedy)


def _check_extra(extra: str) -> Finding:
    needed = {name: oldest for name, oldest, group in requirements() if group == extra}
    versions = {name: installed(name) for name in needed}
    missing = [name for name, version in versions.items() if version is None]
    old = [name for name in needed if name not in missing and TorchVersion(versions[name]) < needed[name]]
    parts = [f"{name} {versions[name]}, needs >= {needed[name]}" for name in old]
    parts += [f"without {', '.join(missing)}"] if missing else []
    detail = "; ".join(parts) or ", ".join(f"{name} {version}" for name, version in versions.items())
    remedy = f"pip install 'sparring[{extra}]', for {EXTRAS[extra]}"
    return check(f"extra.{extra}", not parts, detail, remedy, "fail" if old else "warn")


def _check_cuda() -> list[Finding]:
    """What torch was built with, and the driver."""
    driver = DRIVER.read_text().splitlines()[0] if DRIVER.exists() else None
    if driver is None and torch.version.cuda is None:
        return []
    found = [
        check(
            "version.cuda",
            torch.version.cuda is not None,
            f"torch was built {'with ' + torch.version.cuda if torch.version.cuda else 'without CUDA'}",
            "install a CUDA build of torch, see https://pytorch.org/get-started/locally",
            "warn",
        )
    ]
    if torch.version.cuda is not None and torch.distributed.is_nccl_available():
        found.append(Finding("version.nccl", "ok", ".".join(map(str, torch.cuda.nccl.version()))))
    number = re.search(r"\d+\.\d+(\.\d+)?", driver or "")
    sees = torch.cuda.is_available()
    detail = f"{number[0] if number else 'version not known'}, torch sees {'GPUs' if sees else 'no GPUs'}"
    remedy = "install an NVIDIA driver for this build of torch, and give the container its GPUs"
    found.append(check("version.driver", torch.version.cuda is None or sees, detail, remedy, "warn"))
    return found
