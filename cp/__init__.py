"""sparring.cp: sparse context parallelism for PyTorch. Floor 3, executes across ranks.

from sparring.cp import ContextParallel
"""

from .context_parallel import ContextParallel
from .errors import RingDesyncError, RingTimeoutError
from .report import Report
from .shard import Shard
from .threads import run as run_threads

__all__ = ["ContextParallel", "Report", "RingDesyncError", "RingTimeoutError", "Shard", "run_threads"]
