"""What a profiler sees of a step, and a trace of one step.

Spans are those of `torch.profiler.record_function`: torch.profiler shows them, Nsight Systems does inside
`torch.autograd.profiler.emit_nvtx()`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile


@contextmanager
def profiled(path: Path | None) -> Iterator[None]:
    """Inside, torch.profiler records this process; then `path` is a trace for Perfetto. None: nothing."""
    if path is None:
        yield
        return
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as recorded:
        yield
    path.parent.mkdir(parents=True, exist_ok=True)
    recorded.export_chrome_trace(str(path))
