"""The four step functions on Hopper: kernels of its own over tiles, the portable ones over columns."""

from .hopper_backward import backward_keys as backward_step
from .hopper_forward import forward_step
from .triton_columns import backward_columns, forward_columns

__all__ = ["backward_columns", "backward_step", "forward_columns", "forward_step"]
