"""The four step functions on Hopper: its own forward over tiles, the portable kernels for the rest."""

from .hopper_forward import forward_step
from .triton_backward import backward_step
from .triton_columns import backward_columns, forward_columns

__all__ = ["backward_columns", "backward_step", "forward_columns", "forward_step"]
