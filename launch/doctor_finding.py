"""What `sparring doctor` finds: one fact of a machine each, whether it is good, and what to do if not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

LONGEST = 400  # characters of an error
STATUSES = ("ok", "warn", "fail")  # from good to bad
MIB = 2**20
GIB = 2**30


@dataclass(frozen=True)
class Finding:
    """name: stable, with dots. status: of STATUSES. detail: what is here. remedy: what to do if not ok."""

    name: str
    status: str
    detail: str
    remedy: str = ""


@dataclass(frozen=True)
class Rate:
    """What one rank sends in a second while it receives as much. what: "ring hop" or "all-to-all"."""

    what: str
    bytes: int
    gigabytes_per_second: float


def check(name: str, good: bool, detail: str, remedy: str, otherwise: str = "fail") -> Finding:
    """A finding that is `otherwise` where it is not good, and then alone has the remedy."""
    return Finding(name, "ok", detail) if good else Finding(name, otherwise, detail, remedy)


def made(name: str, check: Callable[..., list[Finding]], *arguments: object) -> list[Finding]:
    """What a check found; that it could not be made is a finding too."""
    try:
        return check(*arguments)
    except Exception as error:  # of any library: what does not work here is what is looked for
        remedy = "see the error and the findings above; if they explain nothing, report it with this output"
        return [Finding(name, "fail", f"{type(error).__name__}: {str(error)[:LONGEST]}", remedy)]


def worst(findings: list[Finding]) -> str:
    """The worst status of all."""
    return max((finding.status for finding in findings), key=STATUSES.index, default="ok")


def size_text(size: float) -> str:
    """Bytes in the largest unit of which there is at least one."""
    for name, unit in (("GiB", GIB), ("MiB", MIB)):
        if size >= unit:
            return f"{size / unit:.4g} {name}"
    return f"{size / 2**10:.4g} KiB"
