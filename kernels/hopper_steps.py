"""The four step functions on Hopper; imported only where they are used."""

from .hopper_backward import backward_keys as backward_step
from .hopper_columns import forward_columns
from .hopper_columns_backward import backward_columns
from .hopper_forward import forward_step

__all__ = ["backward_columns", "backward_step", "forward_columns", "forward_step"]
