"""The flight recorder of torch: the last transfers of every rank, written down when NCCL times out."""

from __future__ import annotations

import os
from pathlib import Path

FOLDER = "flight-recorder"


def record_flight(out: Path) -> None:
    """Before process groups are made: a timeout writes a file for each rank into the folder FOLDER of `out`.

    That must exist by then. Settings that the environment has already win. torch's own tool reads the files,
    which are pickles: torchfrtrace (torch.distributed.flight_recorder.fr_trace).
    """
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")  # transfers
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", str(out.absolute() / FOLDER / "rank-"))
