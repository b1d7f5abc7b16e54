"""The four step functions of the portable Triton implementation; imported only where it is used."""

from .triton_backward import backward_step
from .triton_columns import backward_columns, forward_columns
from .triton_forward import forward_step

__all__ = ["backward_columns", "backward_step", "forward_columns", "forward_step"]
